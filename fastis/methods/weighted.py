"""What the methods share that compute their weights themselves instead of averaging a score.

Their table keeps the last weight it was given: ``update`` hands over those of a minibatch, and
:func:`assign` those of all samples.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from fastis import check
from fastis.kernels import kernels_for
from fastis.kernels.layout import (
    LAST,
    LAST_UNSEEN,
    LATEST,
    MEAN,
    UPDATES,
    VAR,
    Table,
    may_read,
)
from fastis.kernels.state import LARGEST_SCORE, first_positions
from fastis.kernels.table import Batch, Observation
from fastis.methods.base import Method


@dataclass(frozen=True)
class Learning(Method):
    """A method that computes something of its own from every minibatch, in :meth:`learn`."""

    def update(self, table: Table, observation: Observation) -> None:
        if may_read(table.device):
            table.check_indices(observation.indices)
        if len(observation.indices) > 0:
            self.learn(table, observation, distinct(table, observation))

    def learn(self, table: Table, observation: Observation, kept: Distinct) -> None:
        """One iteration, indices checked; hands :meth:`update_table` what the table is to learn."""
        raise NotImplementedError

    def update_table(self, table: Table, observation: Observation) -> None:
        """The update of the table."""
        super().update(table, observation)


@dataclass(frozen=True)
class Weighted(Learning):
    """A method that computes the weights of the samples itself, after some uniform epochs.

    As in every table, no weight is below 0.001 of their mean (ours).

    Parameters
    ----------
    warmup_epochs : int
        epochs without replacement before the weights are used.

    Raises
    ------
    TypeError, ValueError
        naming the option, what was expected and what came.
    """

    has_states: ClassVar[bool] = True

    warmup_epochs: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        check.integer("warmup_epochs", self.warmup_epochs, 0)

    def warmup_draws(self, batches_per_epoch: int) -> int:
        return self.warmup_epochs * batches_per_epoch

    def constants(self) -> dict[str, Any]:
        return {**super().constants(), "tau": -1.0}


@dataclass(frozen=True)
class WithoutCoefficients(Weighted):
    """A :class:`Weighted` method whose minibatches have weights of 1: biased, by design."""

    has_coefficients: ClassVar[bool] = False

    def draw(self, table: Table, batch: Batch) -> None:
        super().draw(table, batch)
        batch.weights.fill_(1.0)


def usable(observed: Tensor) -> Tensor:
    """bool [n]: which observations the table takes; it skips and counts the others."""
    return observed.abs() < LARGEST_SCORE


class Distinct(NamedTuple):
    """What counts of a minibatch: the first usable observation of every distinct active sample.

    On the CPU m is their number. A device would have to be waited for to know it; there m is n, and
    what is left over repeats the last of them, so that writing it again changes nothing.
    """

    indices: Tensor  # int64 [m], in range
    observed: Tensor  # float32 [m]
    weights: Tensor  # float32 [m]
    counts: Tensor  # bool [m]: false for the repeats

    def write(self, memory: Tensor, values: Tensor) -> None:
        """``memory[indices] = values``; nothing where no observation counts."""
        if not may_read(memory.device):
            condition = self.counts[0]  # false: there is none to be repeated
            values = torch.where(condition, values, memory[self.indices])
        memory[self.indices] = values


def in_range(table: Table, indices: Tensor) -> Tensor:
    """bool [n]: which indices are those of samples."""
    return (indices >= 0) & (indices < table.constants.num_samples)


def clamped(table: Table, indices: Tensor) -> Tensor:
    """``indices`` to gather with: on a device, where nobody has looked, kept in range."""
    if may_read(indices.device):
        return indices
    return indices.clamp(0, table.constants.num_samples - 1)


def distinct(table: Table, observation: Observation) -> Distinct:
    """What counts of a minibatch.

    A device leaves rows out of range out, as its kernels do: nothing here waits for it.
    """
    indices = observation.indices
    good = usable(observation.observed) & table.is_active(clamped(table, indices))
    if may_read(indices.device):
        at = first_positions(indices, good)
        counts = torch.ones_like(at, dtype=torch.bool)
    else:
        first = is_first(torch.where(in_range(table, indices) & good, indices, -1))
        number, place = first.sum(), torch.arange(len(first), device=first.device)
        in_order = first.logical_not().to(torch.uint8).argsort(stable=True)
        at, counts = in_order[place.minimum((number - 1).clamp(min=0))], place < number
    i = clamped(table, indices[at])
    return Distinct(i, observation.observed[at], observation.weights[at], counts)


def is_first(indices: Tensor) -> Tensor:
    """bool [n]: which of the indices that are not negative occur for the first time."""
    ordered, order = indices.sort(stable=True)
    is_new = torch.ones_like(ordered, dtype=torch.bool)
    is_new[1:] = ordered[1:] != ordered[:-1]
    return torch.empty_like(is_new).scatter_(0, order, is_new & (ordered >= 0))


def epoch_ended(table: Table, updates: int = 0) -> int:
    """How many epochs of updates have just been completed, or will be after so many more; 0 inside
    of one."""
    done = table.count_on_host(UPDATES) + updates
    epoch, rest = divmod(done, table.constants.batches_per_epoch)
    return epoch if rest == 0 else 0


def assign(table: Table, weights: Tensor, which: Tensor | None = None) -> None:
    """Gives all active samples (or those where ``which`` bool [N] is true) the ``weights``.

    float32 [N], O(N). Weights of 0 become the least that the table can hold. Samples keep the
    iteration of their last observation; those without one get the present, since without they
    would have no weight.
    """
    weights = weights.clamp(-LARGEST_SCORE, LARGEST_SCORE)  # as those of a minibatch are
    now = ((table.scalars[UPDATES] - 1).clamp(min=0) & LATEST).int()
    last = torch.where(table.column(LAST) == LAST_UNSEEN, now, table.column(LAST))
    which = table.is_active() if which is None else which & table.is_active()
    for at, values in ((MEAN, weights), (VAR, torch.zeros_like(weights)), (LAST, last)):
        column = table.column(at)
        column[:] = torch.where(which, values, column)
    kernels_for("table", table.device.type).rescale(table)
