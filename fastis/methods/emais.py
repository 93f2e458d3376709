"""EMAIS: importance from moving statistics of the gradient norm (Kutsuna 2025, Algorithms 1, 2)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor

from fastis import check
from fastis.batch import Scored
from fastis.kernels import kernels_for
from fastis.kernels.constants import IMPORTANCE
from fastis.kernels.layout import UPDATES, Table
from fastis.kernels.state import observe_all
from fastis.kernels.table import Observation
from fastis.methods.base import Method, ScoreFn
from fastis.methods.scoring import score_all


@dataclass(frozen=True)
class EMAIS(Method):
    """Samples in proportion to the moving mean and variance of each sample's logit-gradient norm.

    With dt iterations since the sample's last observation and alpha = exp(-dt / tau)::

        d = |g| - m;   m += (1 - alpha) d;   v = alpha (v + (1 - alpha) d^2)
        w = sqrt(m^2 + v)  ("rms")   or   m + sqrt(v)  ("sum");   p ~ max(w, floor mean(w))

    Unseen samples have the mean weight of the seen ones. Coefficients are 1/(N p). The learning
    rate's factor is the gain, or N_ems / B (eq. 8): :meth:`fastis.Sampler.lr_factor`.

    Parameters
    ----------
    tau : "linear" or float
        "linear": tau = max(t, 1), the plain time average over the run so far ("Linear-tau", sec.
        6.3.2). A number: that many iterations.
    tau_scale : float above 0
        with "linear": tau = max(tau_scale t, 1). 1 is the paper's; 0.25 (ours) forgets faster while
        the network learns.
    importance : "rms" or "sum"
        "rms" is the variance-optimal weight for a random norm; "sum" is one reading of the paper's
        "summing these statistics", whose formula was lost in our copy.
    warmup_epochs : int
        epochs without replacement before importance sampling starts (the paper: 2).
    floor : float in [1e-6, 1]
        least importance, as a part of the mean (ours): no coefficient exceeds 1 + 1/floor, 11.
    least_gain : float
        draws are uniform, without replacement, while the gain predicted is below it (ours); 0:
        never. The gain is that of ``lr_factor(rule="gain")``, known 3 / (1 - smoothing) iterations
        after the warm-up. While draws are uniform it is predicted from their traces and from the
        efficiency S of before. For CUDA graphs too: the choice is made on the device, and holds
        from the draw after the next.
    refresh_every : int
        every so many iterations all samples are scored anew with the parameters of the moment (sec.
        9.8), by ``score_fn``; 0: never. Costs a forward pass over the data, and waits for it.
    score_fn : callable
        indices int64 [n] -> the ScoredLoss of these samples from a forward pass of the user's
        (called under ``torch.no_grad()``), or float [n], their scores.
    estimator, smoothing
        see :class:`fastis.methods.Method`.

    Raises
    ------
    TypeError, ValueError
        naming the option, what was expected and what came.
    """

    name: ClassVar[str] = "emais"
    has_states: ClassVar[bool] = True
    fused: ClassVar[bool] = True  # without a score_fn
    folds: ClassVar[bool] = True
    renews: ClassVar[bool] = True
    adjusts_lr: ClassVar[bool] = True

    tau: str | float = "linear"
    tau_scale: float = 0.25
    importance: str = "rms"
    warmup_epochs: int = 2
    floor: float = 0.1
    least_gain: float = 1.25
    refresh_every: int = 0
    score_fn: ScoreFn | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.tau, str):
            if self.tau != "linear":
                raise ValueError(f"tau must be 'linear' or a positive number, got {self.tau!r}")
        elif check.number("tau", self.tau, 0.0) == 0:
            raise ValueError(f"tau must be 'linear' or a positive number, got {self.tau!r}")
        check.number("tau_scale", self.tau_scale, 0.0, float("inf"), "()")
        check.choice("importance", self.importance, IMPORTANCE)
        check.integer("warmup_epochs", self.warmup_epochs, 0)
        check.number("floor", self.floor, 1e-6, 1.0)
        check.number("least_gain", self.least_gain, 0.0)
        check.integer("refresh_every", self.refresh_every, 0)
        check.function("score_fn", self.score_fn, optional=True)
        if self.score_fn is not None:
            object.__setattr__(self, "fused", False)
        if (self.score_fn is None) != (self.refresh_every == 0):
            raise ValueError(
                "refresh_every and score_fn must be given together, got "
                f"refresh_every={self.refresh_every}, score_fn={self.score_fn!r}"
            )

    @classmethod
    def published(cls, **options: Any) -> EMAIS:
        """With the paper's time constant, tau = t, next to no floor, 0.001, and without pauses.

        For its experiments; the defaults measured better. Equal::

            EMAIS(**{"tau_scale": 1.0, "floor": 1e-3, "least_gain": 0.0, **options})

        Parameters
        ----------
        **options
            any of the class, in place of those settings.

        Raises
        ------
        TypeError, ValueError
            as the class does.
        """
        return cls(**{"tau_scale": 1.0, "floor": 1e-3, "least_gain": 0.0, **options})

    def warmup_draws(self, batches_per_epoch: int) -> int:
        return self.warmup_epochs * batches_per_epoch

    def constants(self) -> dict[str, Any]:
        return {
            **super().constants(),
            "tau": 0.0 if self.tau == "linear" else float(self.tau),
            "tau_scale": float(self.tau_scale),
            "importance": IMPORTANCE[self.importance],
            "floor": self.floor,
            "least_gain": float(self.least_gain),
        }

    def update(self, table: Table, observation: Observation) -> None:
        refreshed, iteration = None, 0
        if self.score_fn is not None and len(observation.indices) > 0:
            iteration = table.count_on_host(UPDATES)
            if (iteration + 1) % self.refresh_every == 0:
                # Before anything changes: the user's function may fail.
                refreshed = score_all(self.score_fn, table, self.observed)
        super().update(table, observation)
        if refreshed is not None:
            observe_all(table, refreshed, iteration)
            kernels_for("table", table.device.type).rescale(table)


@dataclass(frozen=True)
class Loss(EMAIS):
    """EMAIS on the loss instead of the gradient norm: p ~ the moving statistics of each loss.

    The same formulas, options and coefficients as :class:`EMAIS`, with x = the sample's loss. (The
    baseline "loss" of Katharopoulos & Fleuret 2018 is :class:`Presampling` with score="loss".)
    """

    name: ClassVar[str] = "loss"

    def observed(self, out: Scored) -> Tensor:
        return out.losses
