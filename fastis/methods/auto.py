"""EMAIS while it is predicted to pay, uniform draws while it is not (ours)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fastis import check
from fastis.kernels import kernels_for
from fastis.kernels.layout import CODE, DRAWS, EXPONENT, FLATTEN, SEEN, TOTAL, Table, may_read
from fastis.kernels.table import Batch, Observation
from fastis.methods.base import FOREVER
from fastis.methods.emais import EMAIS
from fastis.methods.weighted import clamped, in_range
from fastis.saved import FINITE, Range


@dataclass(frozen=True)
class Auto(EMAIS):
    """:class:`EMAIS` that draws uniformly while the table predicts no gain.

    With r the coefficient of the draw and q = mean(w) / w_i what the table's would have been, the
    minibatch gives unbiased estimates of the second moments under uniform draws and under the
    table's probabilities, whichever drew it::

        uniform = E[r |g|^2],   table = E[r q |g|^2]

    Both are averaged over iterations; draws are uniform (with replacement, coefficients 1) while
    gain = uniform / table is below ``least_gain``. That keeps a base rate that is too high for
    EMAIS from diverging. q takes the cap of ``flatten="cap"`` into account, as the table's last
    draw had it; for "mix" it is that of the plain weights. The choice is made on the device, the
    places of the uniform draws follow from the host's count of them: not for CUDA graphs.

    Parameters
    ----------
    least_gain : float
        1: importance sampling whenever it is not predicted to be worse.
    tau, importance, warmup_epochs, floor, refresh_every, score_fn, estimator, smoothing
        see :class:`EMAIS`.

    Raises
    ------
    TypeError, ValueError
        naming the option, what was expected and what came.
    """

    name: ClassVar[str] = "auto"
    memory_ranges: ClassVar[dict[str, Range]] = {
        "moments": FINITE,
        "level": Range(0.0, float("inf"), nan=True),  # NaN: drawn before anything was seen
    }

    least_gain: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check.number("least_gain", self.least_gain, 0.0)

    def memory(self, table: Table) -> dict[str, Tensor]:
        return {
            "moments": torch.zeros(2, dtype=torch.float64, device=table.device),
            # Mean of the capped weights, and the least q; infinite and 0 while nothing is capped.
            "level": torch.tensor(torch.inf, dtype=torch.float64, device=table.device),
        }

    def draws_uniformly(self, table: Table) -> Tensor:
        """While the table predicts no gain."""
        uniform, by_table = table.memory["moments"].unbind()
        return uniform < self.least_gain * by_table

    def draw(self, table: Table, batch: Batch) -> None:
        constants, (indices, weights) = table.constants, batch
        first = table.count_on_host(DRAWS)
        super().draw(table, batch)
        if first < constants.warmup_draws:
            return
        if constants.flatten == FLATTEN["cap"]:
            # r w is the mean of the capped weights for an item below the cap, and more above it.
            level = (weights.double() * self._weights_of(table, indices)).min()
            table.memory["level"].copy_(level)
        uniform = self.draws_uniformly(table)
        if may_read(table.device) and not bool(uniform):
            return
        kernels = kernels_for("categorical", table.device.type)
        n, b = constants.num_samples, constants.batch_size
        start = first * b % FOREVER  # the counters are 64 bits wide
        uniform_indices = kernels.random_below(n, constants.seed, start, b, table.device)
        indices.copy_(torch.where(uniform, uniform_indices, indices))
        weights.masked_fill_(uniform, 1.0)

    def update(self, table: Table, observation: Observation) -> None:
        indices = observation.indices
        if may_read(table.device):
            table.check_indices(indices)
        inside = in_range(table, indices)
        r, g2 = observation.weights.double(), observation.score.double().square()
        # Not a number while no sample has been seen: nothing is learnt then.
        q = self._coefficients(table, clamped(table, indices))
        both = torch.stack([r * g2, r * q * g2])
        now = torch.where(inside, both, 0.0).sum(1) / inside.sum()
        super().update(table, observation)  # which may raise, then with nothing changed
        moments = table.memory["moments"]
        learnt = moments.lerp(now, 1 - self.smoothing)
        moments.copy_(torch.where(now.isfinite().all(), learnt, moments))

    def _mean_weight(self, table: Table) -> Tensor:
        total, num_seen, e0 = (table.scalars[at] for at in (TOTAL, SEEN, EXPONENT))
        return total / num_seen * 2.0 ** (e0 - 15)

    def _weights_of(self, table: Table, indices: Tensor) -> Tensor:
        """float64 [n]: importance as the table has it; unseen samples have the mean."""
        code = table.column(CODE)[indices] & 0x7FFFFFFF
        weights = code.view(torch.float32).double()
        return torch.where(code == 0, self._mean_weight(table), weights)

    def _coefficients(self, table: Table, indices: Tensor) -> Tensor:
        """float64 [n]: q, what 1/(N p) would be if the table drew."""
        weights, mean = self._weights_of(table, indices), self._mean_weight(table)
        constants, level = table.constants, table.memory["level"]
        if constants.flatten != FLATTEN["cap"]:
            return mean / weights
        least = constants.batch_size / (constants.num_samples * constants.max_duplicates)
        return (torch.minimum(mean, level) / weights).clamp(min=least)
