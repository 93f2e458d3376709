"""Self-paced learning: easy samples first (Kumar, Packer & Koller 2010; Kutsuna 2025, sec. 9.2)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fastis import check
from fastis.batch import Scored
from fastis.kernels.layout import Table
from fastis.kernels.state import LARGEST_SCORE
from fastis.kernels.table import Batch, Observation
from fastis.methods.base import FOREVER
from fastis.methods.weighted import Distinct, Learning, epoch_ended
from fastis.saved import Range


@dataclass(frozen=True)
class SelfPaced(Learning):
    """Uniform minibatches, of which only samples with a loss below a growing threshold count.

    ``loss = sum(v l) / max(1, sum v)`` with v = 1 where l < lambda, else 0, which ``batch.weights``
    = v B / max(1, sum v) make of the plain mean. Minibatches are drawn without replacement. The
    first epoch counts whole; lambda is then set to a quantile of its losses, and multiplied every
    epoch until it exceeds the largest loss, from where on all samples count. Where that does not
    raise lambda (it is about 0 or negative), the next larger loss comes to count (ours).

    Since the weights travel with the draw, v goes by each sample's last known loss (ours; the paper
    by the present one). lambda is a host decision at the end of an epoch: not for CUDA graphs.

    Parameters
    ----------
    quantile : float in (0, 1]
        part of the data that counts after the first epoch (Kutsuna 2025: 0.6).
    growth : float above 1
        what lambda is multiplied with every epoch (1.3; Kumar et al. 2010, a value from memory).
    estimator, smoothing
        see :class:`fastis.methods.Method`.

    Raises
    ------
    TypeError, ValueError
        naming the option, what was expected and what came.
    """

    name: ClassVar[str] = "self_paced"
    has_coefficients: ClassVar[bool] = False
    memory_ranges: ClassVar[dict[str, Range]] = {
        "losses": Range(-LARGEST_SCORE, LARGEST_SCORE, nan=True),
        "threshold": Range(-2 * LARGEST_SCORE, float("inf")),
    }

    quantile: float = 0.6
    growth: float = 1.3

    def __post_init__(self) -> None:
        super().__post_init__()
        check.number("quantile", self.quantile, 0.0, 1.0, "(]")
        check.number("growth", self.growth, 1.0, interval="(]")

    def warmup_draws(self, batches_per_epoch: int) -> int:
        return FOREVER

    def memory(self, table: Table) -> dict[str, Tensor]:
        n = table.constants.num_samples
        return {
            # NaN: not known yet
            "losses": torch.full((n,), torch.nan, dtype=torch.float32, device=table.device),
            "threshold": torch.full((), torch.inf, dtype=torch.float32, device=table.device),
        }

    def draw(self, table: Table, batch: Batch) -> None:
        super().draw(table, batch)
        indices, weights = batch
        harder = table.memory["losses"][indices] >= table.memory["threshold"]
        counts = (~harder).to(weights.dtype)
        weights.copy_(counts * (len(counts) / counts.sum().clamp(min=1)))

    def observed(self, out: Scored) -> Tensor:
        return out.losses

    def learn(self, table: Table, observation: Observation, kept: Distinct) -> None:
        kept.write(table.memory["losses"], kept.observed)
        epoch = epoch_ended(table, updates=1)
        self.update_table(table, observation)
        if epoch:
            self._raise_threshold(table.memory["losses"], table.memory["threshold"], epoch)

    def _raise_threshold(self, losses: Tensor, threshold: Tensor, epoch: int) -> None:
        known = losses[~losses.isnan()]
        if len(known) == 0:
            return
        if epoch == 1:  # by sorting: torch.quantile takes 2^24 values at most
            last = max(0, round(self.quantile * len(known)) - 1)
            quantile = known.sort().values[last]
            threshold.copy_(torch.nextafter(quantile, quantile.new_tensor(torch.inf)))
        elif bool(threshold < torch.inf):
            grown = threshold * self.growth
            if not bool(grown > threshold):  # lambda of 0 or below: by one sample more
                harder = known[known >= threshold].min()
                grown = torch.nextafter(harder, harder.new_tensor(torch.inf))
            threshold.copy_(grown)
        if bool(threshold > known.max()):
            threshold.fill_(torch.inf)
