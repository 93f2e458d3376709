"""Misuse of a sampler that would go on in silence: heard once, at little cost.

What is certain is an error. What may be meant is a warning, once a sampler: draws that nothing is
learnt from, and losses that leave the coefficients out.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed
from torch import Tensor

from fastis import check
from fastis.kernels.layout import NEVER, Table
from fastis.kernels.table import Batch

LEAST_PATIENCE = 100  # draws: a loader may be so many ahead
_LOOK_EVERY = 32  # losses without coefficients until the next look, which waits for a device


class Watch:
    """What one sampler has heard so far.

    Attributes
    ----------
    draws, updates : int
        how many, in this process.
    patience : int
        so many more of the one than of the other before a word is said.
    """

    def __init__(self, table: Table, group: Any) -> None:
        self.draws = self.updates = 0
        self._group = group
        self._learns = table.states is not None or bool(table.memory)
        self.patience = max(table.constants.batches_per_epoch, LEAST_PATIENCE)
        self._unweighted = 0
        self._may_lack_weights = True

    def learnt(self) -> None:
        """Something was, other than by an update: draws without one are not odd."""
        self.updates = max(self.updates, 1)

    def drawn(self) -> None:
        """A draw, and no update so far."""
        if self.draws == 1:
            check_group(self._group)  # which may have come after the sampler
        if self.draws == self.patience and self._learns:
            warnings.warn(
                f"{self.draws} minibatches drawn and no update so far: the sampler learns nothing "
                "until every minibatch's scored loss goes to sampler.update(batch, out)",
                stacklevel=3,
            )

    def updated(self) -> None:
        """An update."""
        self.updates += 1
        if self.updates > self.draws + self.patience:
            self.updated_too_often()

    def updated_too_often(self) -> None:
        """An update, of which there were too many more than draws. Without any draw they are
        meant."""
        if self.draws == 0:
            return
        more, self.patience = self.updates - self.draws, NEVER
        warnings.warn(
            f"{more} more updates than minibatches drawn: each of them counts as an iteration. "
            "Update once for a minibatch, with all of its parts in one list; scores from outside "
            "of the draws (an evaluation pass) go to sampler.refresh(indices, out)",
            stacklevel=3,
        )

    def not_surely_weighted(self, batch: Batch, out: Any) -> None:
        """An update whose loss may have been computed without the coefficients.

        Warns if it was, and they are not all 1: that is looked up now and then.
        """
        if isinstance(out, Tensor):  # the scores
            return
        parts = out if isinstance(out, Sequence) and not hasattr(out, "weighted") else (out,)
        if not self._may_lack_weights or all(getattr(p, "weighted", True) for p in parts):
            return
        self._unweighted += 1
        if self._unweighted % _LOOK_EVERY != 1 or _is_capturing(batch.weights):
            return
        if bool((batch.weights != 1).any()):
            self._may_lack_weights = False
            warnings.warn(
                "out was computed without the coefficients of the minibatch, and trains on another "
                "objective: pass batch.weights to the loss, fastis.cross_entropy(logits, target, "
                "batch.weights)",
                stacklevel=3,
            )


def _is_capturing(weights: Tensor) -> bool:
    return weights.is_cuda and torch.cuda.is_current_stream_capturing()


def check_group(group: Any) -> None:
    """Refuses what would make several processes draw the same samples.

    Raises
    ------
    TypeError
        for anything but a process group, None and False.
    ValueError
        for None where a process group of several ranks is initialised.
    """
    if group is False or is_group(group):
        return
    if group is not None:
        raise TypeError(
            "group must be a torch.distributed process group that this process is in, None or "
            f"False, got {check.describe(group)}"
        )
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        ranks = torch.distributed.get_world_size()
        if ranks > 1:
            raise ValueError(
                f"group must be given where torch.distributed has {ranks} processes, or each of "
                "them draws on its own: group=<process group> for one global minibatch of all "
                "(torch.distributed.group.WORLD, say), or group=False for a process on its own, "
                "with seed=rank"
            )


def is_group(group: Any) -> bool:
    """Whether it is a torch.distributed process group."""
    available = torch.distributed.is_available()
    return available and isinstance(group, torch.distributed.ProcessGroup)


def check_returned(batch: Batch, indices: Any) -> None:
    """Refuses ``indices`` of a data set that are not those drawn. Waits for a device.

    Raises
    ------
    TypeError, ValueError
        naming what was expected, and the first that differs.
    """
    found = torch.as_tensor(indices)
    if found.dtype.is_floating_point or found.dtype.is_complex or found.dtype == torch.bool:
        raise TypeError(f"indices must hold integers, got {found.dtype}")
    drawn, found = batch.indices.cpu(), found.detach().cpu().long()
    if found.shape != drawn.shape:
        raise ValueError(
            f"indices must have shape {list(drawn.shape)}, as batch.indices, got "
            f"{list(found.shape)}"
        )
    if not torch.equal(found, drawn):
        at = int((found != drawn).nonzero()[0])
        raise ValueError(
            f"indices[{at}] must be {int(drawn[at])}, as drawn, got {int(found[at])}: batch and "
            "data are not those of one draw"
        )
