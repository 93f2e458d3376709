"""Importance sampling within a large uniform minibatch (Katharopoulos & Fleuret 2018, Alg. 1)."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from fastis import check
from fastis.batch import Scored
from fastis.kernels import kernels_for
from fastis.kernels.layout import DRAWS, SKIPPED, UPDATES, Table
from fastis.kernels.table import Batch, Observation
from fastis.kernels.variance import minibatch_moments, of_two_stages, smooth
from fastis.methods import scoring
from fastis.methods.base import FOREVER, PHASES, Method, ScoreFn
from fastis.methods.weighted import usable
from fastis.saved import Range

SCORES = ("upper_bound", "loss", "gradient_norm")
_FLOOR = 1e-3


@dataclass(frozen=True)
class Presampling(Method):
    """Scores M uniform candidates by an extra forward pass, and draws the minibatch from them.

    When the smoothed tau exceeds (M + 3 b) / (3 b), M candidates are drawn uniformly and scored,
    and b of them with replacement in proportion to the score, with coefficients 1/(M q). Otherwise
    the minibatch is uniform, and its own scores renew tau for free::

        q_i = score_i / sum of scores;   tau <- 0.9 tau + 0.1 sqrt(n sum q^2)

    q is floored at 1e-3/M (ours). Scores that are not finite count as 0. The sampler's
    ``max_duplicates`` and ``scheme`` do not apply (the method as published): b q copies of a
    candidate are expected. Whether there is a forward pass is decided on the host: not for CUDA
    graphs.

    The draws of a minibatch share their candidates; the variance traces take the candidates' own
    scatter into account, so that with M = 3 b no N_ems above 3 b is reached (ours). A minibatch
    counts as uniform when all its coefficients are 1, which those of equal scores are as well.

    Parameters
    ----------
    score_fn : callable
        indices int64 [n] -> the ScoredLoss of these samples from a forward pass of the user's
        (called under ``torch.no_grad()``), or float [n], their scores.
    score : "upper_bound", "loss" or "gradient_norm"
        which column of a ScoredLoss counts: the norm of the gradient at the logits (eq. 19), or the
        loss. For "gradient_norm" ``score_fn`` must return the exact norms, e.g. those of
        :func:`fastis.estimators.gradient_norms`.
    presample : int, optional
        M, the number of candidates; None: 3 b (Kutsuna 2025 and the authors' experiments).
    tau_threshold : float, optional
        None: (M + 3 b) / (3 b), from where on a variance reduction pays for the extra forward pass.
    tau_smoothing : float in [0, 1)
        how much of tau a step keeps (0.9).
    estimator, smoothing
        see :class:`fastis.methods.Method`.

    Raises
    ------
    TypeError, ValueError
        naming the option, what was expected and what came.
    """

    name: ClassVar[str] = "presampling"
    memory_ranges: ClassVar[dict[str, Range]] = {"tau": Range(0.0, 2.0**32)}  # sqrt(scores)

    score_fn: ScoreFn = field(compare=False)
    score: str = "upper_bound"
    presample: int | None = None
    tau_threshold: float | None = None
    tau_smoothing: float = 0.9

    def __post_init__(self) -> None:
        super().__post_init__()
        check.function("score_fn", self.score_fn)
        check.choice("score", self.score, SCORES)
        if self.presample is not None:
            check.integer("presample", self.presample, 1)
        if self.tau_threshold is not None:
            check.number("tau_threshold", self.tau_threshold, 0.0)
        check.number("tau_smoothing", self.tau_smoothing, 0.0, 1.0, "[)")

    def warmup_draws(self, batches_per_epoch: int) -> int:
        return 0

    def memory(self, table: Table) -> dict[str, Tensor]:
        _, threshold = self._sizes(table)
        highest = table.constants.batch_size**0.5  # of b scores, one of them holding everything
        if threshold >= highest:
            warnings.warn(
                "presampling will never switch on: tau is at most sqrt(batch_size) = "
                f"{highest:.3g} in uniform steps, and its threshold is {threshold:.3g}",
                stacklevel=4,
            )
        return {"tau": torch.zeros((), dtype=torch.float64, device=table.device)}

    def _sizes(self, table: Table) -> tuple[int, float]:
        """M and the threshold of tau."""
        b = table.constants.batch_size
        m = 3 * b if self.presample is None else self.presample
        threshold = (m + 3 * b) / (3 * b) if self.tau_threshold is None else self.tau_threshold
        return m, threshold

    def draw(self, table: Table, batch: Batch) -> None:
        constants, (indices, weights) = table.constants, batch
        n, b, seed = constants.num_samples, constants.batch_size, constants.seed
        m, _ = self._sizes(table)
        kernels = kernels_for("categorical", table.device.type)
        # A stretch of the counters for every iteration: m candidates, then b choices.
        first = int(table.scalars[DRAWS]) * (max(m, b) + b) % FOREVER  # they are 64 bits wide
        if bool(self.draws_uniformly(table)):
            indices.copy_(kernels.random_below(n, seed, first, b, table.device))
            weights.fill_(1.0)
        else:
            candidates = kernels.random_below(n, seed, first, m, table.device)
            q = _shares(scoring.score(self.score_fn, candidates, self.observed))
            self._smooth(table, q)
            quantized = kernels.quantize(q.clamp(min=_FLOOR / m))
            chosen, coefficients = kernels.draw(quantized, seed, first + max(m, b), b)
            indices.copy_(candidates[chosen])
            weights.copy_(coefficients)
        table.scalars[DRAWS] += 1

    def observed(self, out: Scored) -> Tensor:
        return out.losses if self.score == "loss" else out.score

    def update(self, table: Table, observation: Observation) -> None:
        table.check_indices(observation.indices)
        if len(observation.indices) == 0:
            return
        # A minibatch drawn ahead may be older than tau: its own weights say how it was drawn.
        if not bool((observation.weights == 1).all()):
            self._update_after_scoring(table, observation)
            return
        scores = observation.observed
        if self.score == "gradient_norm":  # before anything changes: the function may fail
            scores = scoring.score(self.score_fn, observation.indices, self.observed)
        super().update(table, observation)
        self._smooth(table, _shares(scores))

    def _update_after_scoring(self, table: Table, observation: Observation) -> None:
        """The reference's update, but for the moments: those of draws in two stages."""
        n = len(observation.indices)
        table.scalars[SKIPPED] += (~usable(observation.observed)).sum()
        r, x = observation.weights.double(), observation.score.double()
        m, _ = self._sizes(table)
        smooth(table, of_two_stages(minibatch_moments(r, x, observation.mean_grad), n, m), n)
        table.scalars[UPDATES] += 1

    def _smooth(self, table: Table, q: Tensor) -> None:
        tau = (len(q) * q.square().sum()).sqrt()
        table.memory["tau"].lerp_(tau, 1 - self.tau_smoothing)

    def draws_uniformly(self, table: Table) -> Tensor:
        """While an extra forward pass does not pay."""
        _, threshold = self._sizes(table)
        return table.memory["tau"] <= threshold

    def probabilities(self, table: Table) -> Tensor:
        if PHASES[int(self.phase(table))] == "importance":
            raise ValueError(
                "probabilities of the next draw are not known before its candidates are scored "
                "(method 'presampling')"
            )
        return super().probabilities(table)


def _shares(scores: Tensor) -> Tensor:
    """float64 [n]: q, the scores over their sum; all equal when all are 0."""
    usable = torch.where(scores.isfinite(), scores, 0.0).double().clamp(min=0)
    total = usable.sum()
    return torch.where(total > 0, usable / total, 1 / len(scores))
