"""The contract of the table column: what every backend's table takes and fills.

``fastis/kernels/{reference,cpu,cuda}/table.py`` have ``update(table, observation)``,
``fold(table, observation, iteration)``, ``clear(table, indices, last)``, ``draw(table, batch)``,
``update_and_draw(table, observation, next_batch)`` and ``rescale(table)``, with the
:class:`fastis.kernels.layout.Table` of a sampler; ``shard_total(table, theta)`` and
``draw_share(table, share, batch)``, with that of a shard (:mod:`fastis.kernels.shards`); and
``IS_ATOMIC``: whether an update, a fold or a draw is one call that holds the GIL. Other threads'
steps have to wait for the others.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Batch(NamedTuple):
    """A minibatch: which samples to train on, and how much each counts.

    Attributes
    ----------
    indices : Tensor
        int64 ``[B]``: positions in the training set, in [0, N).
    weights : Tensor
        float32 ``[B]``: the coefficients ``r = 1/(N p)`` of the draws; the weighted mean of the
        losses is an unbiased estimate of the mean over the training set.

    Both on the sampler's device, or where :meth:`to` took them.
    """

    indices: Tensor
    weights: Tensor

    def to(self, device: torch.device | str | int, non_blocking: bool = False) -> Batch:
        """The minibatch on ``device``; equal to ``Batch(*(t.to(device, ...) for t in batch))``.

        With ``non_blocking=True`` a copy from pinned memory to a GPU does not wait for it. A copy
        to the host must not be read before the GPU is done, as everywhere in PyTorch.
        """
        return Batch(
            self.indices.to(device, non_blocking=non_blocking),
            self.weights.to(device, non_blocking=non_blocking),
        )

    def mix(self, permutation: Tensor) -> Batch:
        """The minibatch with the coefficients of pairs: position b is mixed with position
        ``permutation[b]``, as mixup and CutMix do.

        Both parents were drawn, so that the coefficient of a pair is the product of theirs; a
        sample that is its own partner keeps its own. The estimate then has the expectation that it
        has under uniform draws, if draws are independent (``scheme="multinomial"``). Hand the
        result to the loss and to :meth:`fastis.Sampler.update`: a pair's score goes to the sample
        at b. Equal::

            partner = weights[permutation]
            Batch(indices, torch.where(permutation == torch.arange(B), weights, weights * partner))

        Parameters
        ----------
        permutation : Tensor
            int64 ``[B]`` on the minibatch's device, e.g. ``torch.randperm(B)``.

        Raises
        ------
        TypeError, ValueError, IndexError
            for another type, dtype or shape; positions outside of the minibatch.
        """
        if not isinstance(permutation, Tensor) or permutation.dtype != torch.int64:
            kind = permutation.dtype if isinstance(permutation, Tensor) else type(permutation)
            raise TypeError(f"permutation must be an int64 tensor, got {kind}")
        if permutation.shape != self.weights.shape:
            raise ValueError(
                f"permutation must have shape {list(self.weights.shape)}, got "
                f"{list(permutation.shape)}"
            )
        alone = permutation == torch.arange(len(permutation), device=permutation.device)
        pairs = self.weights * self.weights[permutation]
        return Batch(self.indices, torch.where(alone, self.weights, pairs))


class Observation(NamedTuple):
    """What one minibatch of n draws has shown, on the table's device, contiguous and detached."""

    indices: Tensor  # int64 [n]; duplicates are legal, the first usable position wins
    weights: Tensor  # float32 [n], the coefficients of the draw
    observed: Tensor  # float32 [n], what the table keeps averages of (the score, or the loss)
    score: Tensor  # float32 [n], for the variance traces
    mean_grad: Tensor | None  # float32 [C], minibatch mean of r g


class ShardTotal(NamedTuple):
    """What a shard of a larger table weighs, in its own integers: ``uncapped + capped * theta``."""

    uncapped: int  # sum of the weights up to theta
    capped: int  # how many weigh more, and are drawn with theta; all of them if none has been seen


class Share(NamedTuple):
    """A rank's part of a minibatch of all shards, in integers of any size.

    The ranks' totals lie side by side in [0, total). A weight there is 2^shift times the integer
    that it is in the shard, but for capped items, which weigh ``theta``.
    """

    seed: int  # of the draws, the same on all ranks
    first: int  # of the draws to look at: no others can be the rank's
    end: int
    batch_size: int  # of all ranks
    num_samples: int  # of all ranks
    total: int
    before: int  # of the ranks before this one
    own: int  # of this rank
    theta: int
    own_theta: int  # in the shard's own integers: what tells capped items from others
    shift: int


def empty_batch(like: Tensor, count: int) -> tuple[Batch, tuple[int, int]]:
    """A minibatch to be drawn, on the device of the int64 tensor ``like``, and its addresses."""
    indices, weights = like.new_empty(count), like.new_empty(count, dtype=torch.float32)
    return Batch(indices, weights), (indices.data_ptr(), weights.data_ptr())
