"""What can be done to a sampler between its steps: scores from outside of the draws, samples that
come and go, and settings.

A training step knows nothing of it. Whatever is done here holds from the next draw on, and is saved
with the state.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastis import check
from fastis.batch import Scored, folded, observe
from fastis.kernels.layout import LAST_EXCLUDED, LAST_UNSEEN, may_read
from fastis.kernels.table import Batch, Observation
from fastis.resume import Resumable


class Steerable(Resumable):
    """What of a :class:`fastis.Sampler` a user may change during a run."""

    _observed_of: Callable[[Scored], Tensor] | None
    _correction: float

    # Scores from outside of the draws ------------------------------------------------------------

    def refresh(self, indices: Tensor, out: Scored | Sequence[Scored] | Tensor) -> None:
        """Takes over scores from outside of the draws: of an evaluation pass over the training set.

        No iteration of ``.step`` and no part of the variance: N_ems, S and the learning rate's
        factor stay those of the minibatches drawn, which as many calls of
        :meth:`fastis.Sampler.update` with weights of 1 would replace by those of uniform ones. In
        any number of calls::

            for i in torch.arange(num_samples).split(1000):
                with torch.no_grad():
                    out = fastis.cross_entropy(model(x[i]), y[i])  # the loss to be reported, too
                sampler.refresh(i, out)

        Parameters
        ----------
        indices : Tensor
            int64 ``[n]``, of which samples; any n.
        out : ScoredLoss, a sequence of them, or a float tensor [n]
            as in :meth:`fastis.Sampler.update`; computed without coefficients.

        Scores enter the moving averages at the present iteration. A sample that has been observed
        in it already, by an earlier ``refresh``, stays as it is; so does, in the next ``update``,
        one that has just been refreshed: the network is still the same.

        Raises
        ------
        TypeError, ValueError, IndexError
            as :meth:`fastis.Sampler.update`; TypeError also for methods that do not average the
            scores of the samples (all but emais, loss and distributed).
        """
        method, table = self._method, self._table
        if not method.folds:
            raise TypeError(
                f"method {method.name!r} learns from its own minibatches alone: refresh() is for "
                "those that average each sample's score, emais, loss and distributed"
            )
        indices = self._samples(indices)
        none = torch.ones_like(indices, dtype=torch.float32)
        observation = observe(table.device, self._observed_of, Batch(indices, none), out)
        self._fold(observation, None)
        self._watch.learnt()

    def _samples(self, indices: Any) -> Tensor:
        """int64 [n], wherever it is: checked as far as that waits for no device."""
        where = check.tensor("indices", indices).device
        found = check.vector("indices", indices, None, (torch.int64,), where)
        if may_read(self._table.device):
            self._table.check_indices(found, "indices")
        return found

    def fold(self, indices: Tensor, scores: Tensor, iteration: int) -> None:
        """Scores that another process computed with the parameters of ``iteration``.

        They come into the state as :meth:`fastis.Sampler.update` would have brought them in then;
        variance traces and ``.step`` stay. A sample that was observed at that iteration or since
        stays as it is: late scores undo nothing, and folding the same ones again changes nothing.
        O(n).

        Parameters
        ----------
        indices : int64 tensor [n]
        scores : float tensor [n]
            what the method observes: gradient norms, or losses for ``method="loss"``. Not finite
            ones are counted in ``.skipped``.
        iteration : int
            ``.step`` when these parameters were those of the training: at most the present one, and
            less than 2^20 before it.

        Raises
        ------
        TypeError, ValueError, IndexError
            before anything has changed; also for a method that does not average scores. A sampler
            on a GPU leaves out what is out of range, and does not wait to know.
        """
        observation = folded(self._table, self._method, indices, scores, iteration)
        self._fold(observation, int(iteration))

    def _fold(self, observation: Observation, iteration: int | None) -> None:
        """Scores as of an ``iteration``; None: the present one."""
        with self._table.lock:
            self._method.fold(self._table, observation, iteration)

    # Samples that come and go -------------------------------------------------------------------

    def reset(self, indices: Tensor | Sequence[int]) -> None:
        """These slots hold a new sample: unseen again, also where they were excluded.

        For pools that are regenerated, ring buffers, and the slots of a data set that grows. A new
        sample has the mean weight of the seen ones until its first score (in prioritized replay the
        largest so far). O(n); from the next draw on; saved with the state::

            transitions[slots] = new
            sampler.reset(slots)

        Parameters
        ----------
        indices : Tensor or sequence of int
            int64 ``[n]``, on any device; duplicates count once.

        What is learnt of a slot from now on counts for its new sample. So call ``reset`` after the
        :meth:`fastis.Sampler.update` of the minibatches drawn before: else the score of the old
        sample would be the first of the new one.

        A GPU is not waited for, a CUDA graph can hold the call, and indices out of range are left
        out there. In a group all processes call it alike.

        Raises
        ------
        TypeError, ValueError, IndexError
            before anything has changed; TypeError also for methods that remember more of a sample
            than can be taken back, or nothing (all but emais, loss, distributed and prioritized).
        """
        self._clear("reset", indices, LAST_UNSEEN)

    def exclude(self, indices: Tensor | Sequence[int]) -> None:
        """These samples are not drawn any more, until :meth:`reset`.

        N is then the number of the others, the active ones: in the coefficients 1/(N p), in
        ``probabilities()``, in the share of unseen samples and in the epochs of uniform draws. What
        was learnt of an excluded sample is forgotten. O(n); from the next draw on; saved with the
        state::

            doubtful = (sampler.importance > 20 * sampler.importance.mean()).nonzero().flatten()
            sampler.exclude(doubtful)

        Parameters
        ----------
        indices : Tensor or sequence of int
            int64 ``[n]``, on any device; duplicates count once.

        Minibatches drawn before may hold such samples yet: what :meth:`fastis.Sampler.update` is
        told of these is left out, but for the variance traces.

        ``num_samples``, the length of a :class:`fastis.DataLoader` and the number of minibatches in
        the warm-up stay as they are. What is left of a uniform epoch goes on in another order, in
        which some samples come again or not at all.

        When fewer than B samples are active a uniform minibatch holds some of them twice. When B/D
        or fewer are (with ``flatten="mix"``: a few more), no other probabilities than uniform ones
        meet the cap. When none is, :meth:`fastis.Sampler.sample` raises a ValueError; on a GPU,
        where nobody looks, it draws any samples, with weights of 0.

        As :meth:`reset` in all else.

        Raises
        ------
        TypeError, ValueError, IndexError
            as :meth:`reset`.
        """
        self._clear("exclude", indices, LAST_EXCLUDED)

    def _clear(self, name: str, indices: Tensor | Sequence[int], last: int) -> None:
        method, table = self._method, self._table
        if not method.renews:
            raise TypeError(
                f"method {method.name!r} remembers more of a sample than can be taken back, or "
                f"nothing: {name}() is for emais, loss, distributed and prioritized"
            )
        if isinstance(indices, Sequence) and not isinstance(indices, str):
            listed = [check.integer("indices", index, -(2**63), 2**63 - 1) for index in indices]
            indices = torch.tensor(listed, dtype=torch.int64, device="cpu")
        found = self._samples(indices)
        found = found.to(table.device, non_blocking=not may_read(table.device))
        with table.lock:
            method.clear(table, found, last)

    # Settings -------------------------------------------------------------------------------------

    @property
    def correction(self) -> float:
        """In [0, 1], settable at any time: ``batch.weights`` are ``(1/(N p))^correction``.

        1 is unbiased. Below, the objective leans towards the samples that are drawn often, and the
        less the nearer to 1; prioritized replay (Schaul et al. 2015) anneals it towards 1. At 0
        all weights are 1.

        Probabilities stay as they are. :meth:`fastis.Sampler.update` takes 1/(N p) back from the
        weights, by the correction then in force, so that the variance traces, N_ems and S are those
        of the unbiased estimate (but for ``|G|^2``; at 0 nothing is left to take back, and they are
        those of uniform draws). ``lr_factor()`` is 1 below 1, and EMAIS does not pause where little
        gain is predicted, since variance is not all that is wanted then. Saved with the state. A
        CUDA graph keeps the correction that it was captured with.

        Raises
        ------
        TypeError, ValueError
            for no number in [0, 1], and for other than 1 with a method that has no such
            coefficients.
        """
        return self._correction

    @correction.setter
    def correction(self, wanted: float) -> None:
        self._correct(wanted)

    def _correct(self, wanted: float) -> None:
        found = check.number("correction", wanted, 0.0, 1.0)
        if found != 1.0 and not self._method.has_coefficients:
            raise ValueError(
                f"correction must be 1 for method {self._method.name!r}, whose weights are not "
                f"1/(N p), got {wanted!r}"
            )
        is_made = hasattr(self, "_like")
        may_pause = is_made and self._correction == 1.0
        self._arguments["correction"] = self._correction = found
        if is_made and (found == 1.0) != may_pause:
            self._pause_or_not()

    def _pause_or_not(self) -> None:
        """Lets the method pause importance sampling with a correction of 1, and where minibatches
        can be drawn without replacement."""
        least_gain = self._method.constants().get("least_gain", 0.0)
        pauses = self._correction == 1.0 and self.global_batch_size <= self.num_samples
        self._table.pause_below(least_gain if pauses else 0.0)

    @property
    def uniform(self) -> bool:
        """Whether draws are uniform because you asked for it; settable at any time.

        True: from the next draw on (or the end of the warm-up) samples are drawn uniformly, without
        replacement, by whole epochs; coefficients and learning rate factor are 1, and
        :meth:`fastis.Sampler.update` goes on learning. False: as the method says. Saved with the
        state. Setting it waits for nothing, and reaches CUDA graphs captured before.

        Raises
        ------
        TypeError
            for anything but a bool.
        ValueError
            when ``batch_size`` exceeds ``num_samples``.
        """
        return self._table.uniform

    @uniform.setter
    def uniform(self, wanted: bool) -> None:
        if not isinstance(wanted, bool):
            raise TypeError(f"uniform must be a bool, got {check.describe(wanted)}")
        size = self.global_batch_size
        if wanted and size > self.num_samples:
            raise ValueError(
                "uniform must be False: there is no drawing without replacement of "
                f"batch_size={size} from num_samples={self.num_samples}"
            )
        self._table.draw_uniformly(wanted)
