"""EMAIS: importance from moving statistics of the gradient norm (Kutsuna 2025, Algorithms 1, 2)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from fastis import check
from fastis.methods.base import Method
from fastis.table import IMPORTANCE


@dataclass(frozen=True)
class EMAIS(Method):
    """Samples in proportion to the moving mean and variance of each sample's logit-gradient norm.

    With dt iterations since the sample's last observation and alpha = exp(-dt / tau)::

        d = |g| - m;   m += (1 - alpha) d;   v = alpha (v + (1 - alpha) d^2)
        w = sqrt(m^2 + v)  ("rms")   or   m + sqrt(v)  ("sum");   p ~ max(w, floor mean(w))

    Unseen samples have the mean weight of the seen ones.

    Parameters
    ----------
    tau : "linear" or float
        "linear": tau = max(t, 1), the plain time average over the run so far ("Linear-tau", sec.
        6.3.2). A number: that many iterations.
    importance : "rms" or "sum"
        "rms" is the variance-optimal weight for a random norm; "sum" is one reading of the paper's
        "summing these statistics", whose formula was lost in our copy.
    warmup_epochs : int
        epochs without replacement before importance sampling starts (the paper: 2).
    floor : float in [1e-6, 1]
        least importance, as a part of the mean (ours): no coefficient exceeds 1 + 1/floor.
    estimator, smoothing
        see :class:`fastis.methods.Method`.
    """

    name: ClassVar[str] = "emais"
    has_records: ClassVar[bool] = True

    tau: str | float = "linear"
    importance: str = "rms"
    warmup_epochs: int = 2
    floor: float = 1e-3

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.tau, str):
            check.choice("tau", self.tau, ["linear"])
        elif check.number("tau", self.tau, 0.0) == 0:
            raise ValueError(f"tau must be 'linear' or positive, got {self.tau!r}")
        check.choice("importance", self.importance, IMPORTANCE)
        check.integer("warmup_epochs", self.warmup_epochs, 0)
        check.number("floor", self.floor, 1e-6, 1.0)

    def warmup_draws(self, batches_per_epoch: int) -> int:
        return self.warmup_epochs * batches_per_epoch

    def constants(self) -> dict[str, Any]:
        return {
            **super().constants(),
            "tau": 0.0 if self.tau == "linear" else float(self.tau),
            "importance": IMPORTANCE[self.importance],
            "floor": self.floor,
        }
