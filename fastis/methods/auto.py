"""EMAIS while it is predicted to pay, uniform draws while it is not (ours)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fastis import check
from fastis.kernels import kernels_for
from fastis.methods.base import Observation
from fastis.methods.emais import EMAIS
from fastis.methods.weighted import usable_positions
from fastis.table import CODE, DRAWS, EXPONENT, SEEN, TOTAL, Table


@dataclass(frozen=True)
class Auto(EMAIS):
    """:class:`EMAIS` that draws uniformly while the table predicts no gain.

    With r the coefficient of the draw and q = mean(w) / w_i what the table's would have been, the
    minibatch gives unbiased estimates of the second moments under uniform draws and under the
    table's probabilities, whichever drew it::

        uniform = E[r |g|^2],   table = E[r q |g|^2]

    Both are averaged over iterations; draws are uniform (with replacement, coefficients 1) while
    gain = uniform / table is below ``least_gain``. That keeps a base rate that is too high for
    EMAIS from diverging. The choice is made on the host: not for CUDA graphs.

    Parameters
    ----------
    least_gain : float
        1: importance sampling whenever it is not predicted to be worse.
    tau, importance, warmup_epochs, floor, refresh_every, score_fn, estimator, smoothing
        see :class:`EMAIS`.
    """

    name: ClassVar[str] = "auto"

    least_gain: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check.number("least_gain", self.least_gain, 0.0)

    def memory(self, table: Table) -> dict[str, Tensor]:
        return {"moments": torch.zeros(2, dtype=torch.float64, device=table.device)}

    def _prefers_uniform(self, table: Table) -> bool:
        uniform, by_table = table.memory["moments"].tolist()
        return bool(uniform < self.least_gain * by_table)

    def draw(self, table: Table, indices: Tensor, weights: Tensor) -> None:
        constants = table.constants
        first = int(table.scalars[DRAWS])
        super().draw(table, indices, weights)
        if first >= constants.warmup_draws and self._prefers_uniform(table):
            kernels = kernels_for("sample", table.device.type)
            n, b = constants.num_samples, constants.batch_size
            indices.copy_(kernels.draw_points(n, constants.seed, first * b, b, table.device))
            weights.fill_(1.0)

    def update(self, table: Table, seen: Observation) -> bool:
        if usable_positions(table, seen) is None:
            return False
        total, num_seen, e0 = (table.scalars[at] for at in (TOTAL, SEEN, EXPONENT))
        if int(num_seen) > 0 and len(seen.indices) > 0:
            mean = total / num_seen * 2.0 ** (e0 - 15)
            code = table.column(CODE)[seen.indices] & 0x7FFFFFFF
            q = torch.where(code == 0, 1.0, mean / code.view(torch.float32).double())
            r, g2 = seen.weights.double(), seen.score.double().square()
            now = torch.stack([(r * g2).mean(), (r * q * g2).mean()])
            if bool(now.isfinite().all()):
                table.memory["moments"].lerp_(now, 1 - self.smoothing)
        return super().update(table, seen)

    def probabilities(self, table: Table) -> Tensor:
        by_table = super().probabilities(table)
        uniform = torch.full_like(by_table, 1 / table.constants.num_samples)
        return uniform if self._prefers_uniform(table) else by_table
