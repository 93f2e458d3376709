"""Online batch selection by the rank of the loss (Loshchilov & Hutter 2015)."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from fastis import check
from fastis.batch import Scored
from fastis.kernels.layout import MEAN, Table
from fastis.kernels.table import Observation
from fastis.methods.base import ScoreFn
from fastis.methods.scoring import score_all
from fastis.methods.weighted import (
    Distinct,
    WithoutCoefficients,
    assign,
    clamped,
    epoch_ended,
    usable,
)
from fastis.saved import Range


@dataclass(frozen=True)
class OnlineBatch(WithoutCoefficients):
    """Samples with a large last loss come more often, by rank.

    With rank 1 for the largest last loss, in epoch e after the e0 warm-up epochs::

        p_i ~ exp(-log(s) rank_i / N),   s = pressure^(1 - (e - e0) / (total_epochs - e0))

    Losses are stored as they come and ranked at the end of every epoch; all are computed anew every
    ``recompute_every`` epochs where there is a ``score_fn``. Minibatches have no coefficients
    (weights are 1): a biased estimate, by design. Ranking is a host decision at the end of an
    epoch: not for CUDA graphs.

    Parameters
    ----------
    pressure : float of at least 1
        s at the start: how much more often the largest loss comes than the smallest (100).
    total_epochs : int, optional
        length of the run: the pressure falls to 1 by then. None: it stays.
    score_fn : callable, optional
        indices int64 [n] -> the ScoredLoss of these samples from a forward pass of the user's
        (called under ``torch.no_grad()``), or float [n], their losses.
    recompute_every : int
        epochs between calls of ``score_fn`` for all samples (2).
    warmup_epochs : int
        epochs without replacement at the start (1): a loss for every sample.
    estimator, smoothing
        see :class:`fastis.methods.Method`.

    Raises
    ------
    TypeError, ValueError
        naming the option, what was expected and what came.
    """

    name: ClassVar[str] = "online_batch"
    memory_ranges: ClassVar[dict[str, Range]] = {"losses": Range(-float("inf"), float("inf"))}

    warmup_epochs: int = 1
    pressure: float = 100.0
    total_epochs: int | None = None
    recompute_every: int = 2
    score_fn: ScoreFn | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        check.number("pressure", self.pressure, 1.0, float("inf"), "[)")
        if self.total_epochs is not None:
            check.integer("total_epochs", self.total_epochs, self.warmup_epochs + 1)
        check.integer("recompute_every", self.recompute_every, 1)
        check.function("score_fn", self.score_fn, optional=True)

    def memory(self, table: Table) -> dict[str, Tensor]:
        # Not seen yet counts as the largest loss.
        n = table.constants.num_samples
        return {"losses": torch.full((n,), torch.inf, dtype=torch.float32, device=table.device)}

    def observed(self, out: Scored) -> Tensor:
        return out.losses

    def learn(self, table: Table, observation: Observation, kept: Distinct) -> None:
        epoch = epoch_ended(table, updates=1)
        ranks = epoch >= max(1, self.warmup_epochs)
        fresh = None
        recomputes = ranks and (epoch - self.warmup_epochs) % self.recompute_every == 0
        if recomputes and self.score_fn is not None:
            # Before anything changes: the user's function may fail.
            fresh = score_all(self.score_fn, table, self.observed)
        losses = table.memory["losses"]
        kept.write(losses, kept.observed)
        # The weights in force stay until the next ranking; what is not usable is skipped.
        in_force = table.column(MEAN)[clamped(table, observation.indices)]
        same = torch.where(usable(observation.observed), in_force, observation.observed)
        self.update_table(table, observation._replace(observed=same))
        if fresh is not None:
            losses.copy_(torch.where(fresh.isnan(), losses, fresh))
        if ranks:
            assign(table, self.by_rank(losses, epoch))

    def by_rank(self, losses: Tensor, epoch: int) -> Tensor:
        """float32 [N]: the weights of epoch ``epoch`` (from 0) for last losses ``losses`` [N]."""
        n = len(losses)
        rank = torch.empty(n, dtype=torch.float64, device=losses.device)
        order = losses.argsort(descending=True, stable=True)
        rank[order] = torch.arange(1, n + 1, dtype=torch.float64, device=losses.device)
        return (-math.log(self.pressure_in(epoch)) * rank / n).exp().float()

    def pressure_in(self, epoch: int) -> float:
        """s in epoch ``epoch``, counted from 0."""
        if self.total_epochs is None:
            return self.pressure
        share = (epoch - self.warmup_epochs) / (self.total_epochs - self.warmup_epochs)
        return math.pow(self.pressure, 1 - min(1.0, max(0.0, share)))
