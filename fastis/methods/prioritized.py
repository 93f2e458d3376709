"""Prioritized replay for supervised training (Schaul, Quan, Antonoglou & Silver 2015)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fastis import check
from fastis.batch import Scored
from fastis.kernels.layout import (
    DRAWS,
    LAST,
    LAST_UNSEEN,
    LATEST,
    MEAN,
    UPDATES,
    Table,
    may_read,
)
from fastis.kernels.state import LARGEST_SCORE
from fastis.kernels.table import Batch, Observation
from fastis.methods.base import Method
from fastis.methods.weighted import Weighted, assign, clamped
from fastis.saved import Range

_EPSILON = 1e-8


@dataclass(frozen=True)
class Prioritized(Weighted):
    """Samples in proportion to a power of their last loss, with partly corrected coefficients.

    ::

        p_i ~ (l_i + 1e-8)^alpha;   weights = (1/(N p))^beta / (their maximum in the minibatch)

    Samples without a loss so far, new ones in a ring buffer (:meth:`fastis.Sampler.reset`) among
    them, have the largest priority so far; on a GPU every update sets it anew, which costs O(N) and
    waits for nothing. The estimate is biased until beta reaches 1, and
    then unbiased up to the minibatch's scale.

    Parameters
    ----------
    alpha : float in [0, 1]
        0.6; 0 is uniform.
    beta : float in [0, 1]
        beta at the start, 0.4 (Schaul et al., proportional variant).
    total_steps : int, optional
        minibatches in the run: beta grows linearly to 1 by then. None: it stays.
    warmup_epochs : int
        epochs without replacement at the start (0).
    estimator, smoothing
        see :class:`fastis.methods.Method`.

    Raises
    ------
    TypeError, ValueError
        naming the option, what was expected and what came.
    """

    name: ClassVar[str] = "prioritized"
    has_coefficients: ClassVar[bool] = False  # in part
    renews: ClassVar[bool] = True
    memory_ranges: ClassVar[dict[str, Range]] = {
        "known": Range(0, 1),
        "largest": Range(0.0, LARGEST_SCORE),
    }

    warmup_epochs: int = 0
    alpha: float = 0.6
    beta: float = 0.4
    total_steps: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check.number("alpha", self.alpha, 0.0, 1.0)
        check.number("beta", self.beta, 0.0, 1.0)
        if self.total_steps is not None:
            check.integer("total_steps", self.total_steps, 1)

    def memory(self, table: Table) -> dict[str, Tensor]:
        n = table.constants.num_samples
        return {
            "known": torch.zeros(n, dtype=torch.bool, device=table.device),
            "largest": torch.zeros((), dtype=torch.float32, device=table.device),
        }

    def grow(self, table: Table) -> None:
        known, largest = table.memory["known"], table.memory["largest"]
        if bool(known.any()):
            assign(table, largest.expand(len(known)), which=~known)

    def draw(self, table: Table, batch: Batch) -> None:
        share = table.scalars[DRAWS] / (self.total_steps or float("inf"))
        beta = self.beta + (1 - self.beta) * share.clamp(max=1)
        super().draw(table, batch)
        batch.weights.pow_(beta).div_(batch.weights.max())

    def observed(self, out: Scored) -> Tensor:
        losses = out.losses
        # 0 times the loss: what is not finite stays so, also for alpha = 0.
        return (losses.abs() + _EPSILON) ** self.alpha + 0 * losses

    def clear(self, table: Table, indices: Tensor, last: int) -> None:
        super().clear(table, indices, last)
        known = table.memory["known"]
        if may_read(table.device):
            known[indices] = False
        else:  # nobody has looked whether they are in range
            known &= table.column(LAST) >= 0
        # As of the iteration before, since the present one is to observe these samples.
        iteration = table.count_on_host(UPDATES) - 1
        if last == LAST_UNSEEN and iteration >= 0:
            priority = table.memory["largest"].expand(len(indices)).contiguous()
            observation = Observation(indices, priority, priority, priority, None)
            super().fold(table, observation, iteration)

    def update(self, table: Table, observation: Observation) -> None:
        indices = observation.indices
        Method.update(self, table, observation)
        if len(indices) == 0:
            return
        known, largest = table.memory["known"], table.memory["largest"]
        i = clamped(table, indices)
        # The table has kept what counts: of a sample drawn twice the first usable loss.
        now = (table.scalars[UPDATES] - 1) & LATEST
        known[i] |= table.column(LAST)[i] == now
        found = table.column(MEAN)[i].max()
        # Whether that changes anything only the device knows: there it is done every time.
        rises = not may_read(table.device) or bool(found > largest)
        torch.maximum(largest, found, out=largest)
        if rises and not (may_read(table.device) and bool(known.all())):
            assign(table, largest.expand(len(known)), which=~known)
