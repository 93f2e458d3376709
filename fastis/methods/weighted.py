"""What the methods share that compute their weights themselves instead of averaging a score.

Their table keeps the last weight it was given: ``update`` hands over those of a minibatch, and
:func:`assign` those of all samples.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from fastis import check
from fastis.kernels import kernels_for
from fastis.kernels.reference_update import LARGEST_SCORE, first_positions
from fastis.methods.base import Method, Observation
from fastis.table import LAST, LATEST, MEAN, UPDATES, VAR, Table


@dataclass(frozen=True)
class Weighted(Method):
    """A method with weights of its own, after some epochs without replacement.

    As in every table, no weight is below 0.001 of their mean (ours).

    Parameters
    ----------
    warmup_epochs : int
        epochs without replacement before the weights are used.
    """

    has_records: ClassVar[bool] = True

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
    """... whose loss is the plain mean over the minibatch: a biased estimate, by design."""

    def draw(self, table: Table, indices: Tensor, weights: Tensor) -> None:
        super().draw(table, indices, weights)
        weights.fill_(1.0)


def usable(observed: Tensor) -> Tensor:
    """bool [n]: which observations the table takes; it skips and counts the others."""
    return observed.abs() < LARGEST_SCORE


def usable_positions(table: Table, seen: Observation) -> Tensor | None:
    """First positions of the distinct indices with finite observations; None: one out of range."""
    indices, observed = seen.indices, seen.observed
    if bool(((indices < 0) | (indices >= table.constants.num_samples)).any()):
        return None
    return first_positions(indices, usable(observed))


def epoch_ended(table: Table, updates: int = 0) -> int:
    """How many epochs of updates have just been completed, or will be after so many more; 0 inside
    of one."""
    done = int(table.scalars[UPDATES]) + updates
    epoch, rest = divmod(done, table.constants.batches_per_epoch)
    return epoch if rest == 0 else 0


def assign(table: Table, weights: Tensor, which: Tensor | None = None) -> None:
    """Gives all samples (or those where ``which`` bool [N] is true) the ``weights`` float32 [N].

    O(N). Weights of 0 become the least that the table can hold. Samples keep the iteration of their
    last observation; those without one get the present, since without they would have no weight.
    """
    weights = weights.clamp(-LARGEST_SCORE, LARGEST_SCORE)  # as those of a minibatch are
    now = ((table.scalars[UPDATES] - 1).clamp(min=0) & LATEST).int()
    last = torch.where(table.column(LAST) < 0, now, table.column(LAST))
    for at, values in ((MEAN, weights), (VAR, torch.zeros_like(weights)), (LAST, last)):
        column = table.column(at)
        column[:] = values if which is None else torch.where(which, values, column)
    kernels_for("update", table.device.type).rescale(table)
