"""What a sampling method is: options, and how a minibatch is observed.

A method is a small frozen dataclass of options. The :class:`fastis.Sampler` owns what changes (the
clocks, the table of states, the variance averages) and asks the method three things: how long draws
are without replacement, which constants its table has, and what it observes of a scored loss.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Protocol

from torch import Tensor

from fastis import check

ESTIMATORS = ("unbiased", "plugin")
FOREVER = 2**62


class Scored(Protocol):
    """What the sampler needs of a loss: ``fastis.ScoredLoss`` is one."""

    @property
    def losses(self) -> Tensor: ...
    @property
    def score(self) -> Tensor: ...
    @property
    def mean_grad(self) -> Tensor | None: ...


@dataclass(frozen=True)
class Method:
    """Options that every method has.

    Parameters
    ----------
    estimator : "unbiased" or "plugin"
        of the variance traces: with the B/(B-1) corrections, or as in Kutsuna 2025, eqs. 10-12.
    smoothing : float in [0, 1)
        how much of the moments' moving averages an iteration keeps.
    """

    name: ClassVar[str]
    has_records: ClassVar[bool] = False

    estimator: str = "unbiased"
    smoothing: float = 0.99

    def __post_init__(self) -> None:
        check.choice("estimator", self.estimator, ESTIMATORS)
        if check.number("smoothing", self.smoothing, 0.0) >= 1:
            raise ValueError(f"smoothing must be in [0, 1), got {self.smoothing!r}")

    def options(self) -> dict[str, Any]:
        """Name and value of every option, for saving and comparing."""
        return asdict(self)

    def warmup_draws(self, batches_per_epoch: int) -> int:
        """How many of the first minibatches are drawn without replacement."""
        raise NotImplementedError

    def constants(self) -> dict[str, Any]:
        """The method's own entries of :class:`fastis.table.Constants`."""
        return {"smoothing": self.smoothing, "unbiased": self.estimator == "unbiased"}

    def observed(self, out: Scored) -> Tensor:
        """[n]: what the table keeps averages of."""
        return out.score
