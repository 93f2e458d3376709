"""What a sampling method is: options, what it remembers, and how it draws and learns.

A method is a small frozen dataclass of options. All that changes belongs to the sampler's
:class:`fastis.kernels.layout.Table`, which is saved and loaded as a whole: clocks, the states of
the samples with the tree over them, variance averages, and the tensors that the method asks for in
:meth:`Method.memory`. So one object can serve any number of samplers.
"""

from __future__ import annotations

import numbers
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor

from fastis import check
from fastis.kernels import kernels_for
from fastis.kernels.flatten import distribution
from fastis.kernels.layout import DRAWS, FACTOR, UPDATES, Table
from fastis.saved import Range

_PLAIN: tuple[type, ...] = (bool, int, float)
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


class Observation(NamedTuple):
    """What one minibatch of n draws has shown, checked, on the table's device."""

    indices: Tensor  # int64 [n]
    weights: Tensor  # float32 [n], the coefficients of the draw
    observed: Tensor  # float32 [n], what the method observes (Method.observed)
    score: Tensor  # float32 [n]
    mean_grad: Tensor | None  # float32 [C]


# indices int64 [n] on the sampler's device -> the scored loss of these samples, or float [n] there.
ScoreFn = Callable[[Tensor], "Scored | Tensor"]


@dataclass(frozen=True, kw_only=True)
class Method:
    """Options that every method has.

    Parameters
    ----------
    estimator : "unbiased" or "plugin"
        of the variance traces: with the B/(B-1) corrections, or as in Kutsuna 2025, eqs. 10-12.
    smoothing : float in [0, 1)
        how much of the moments' moving averages an iteration keeps.

    The traces are those of a method with coefficients; for the others they have no meaning.
    """

    name: ClassVar[str]
    # Does the table keep a state and a weight for every sample?
    has_records: ClassVar[bool] = False
    # What the tensors of :meth:`memory` can hold: a state with other values is not loaded. A tensor
    # that is not named here may hold anything.
    memory_ranges: ClassVar[Mapping[str, Range]] = {}
    # Does the learning rate follow N_ems (:meth:`lr_factor`)? If not, the factor is 1.
    adjusts_lr: ClassVar[bool] = False

    estimator: str = "unbiased"
    smoothing: float = 0.99

    def __post_init__(self) -> None:
        for option in fields(self):  # numbers of numpy would not survive weights_only=True
            value: Any = getattr(self, option.name)
            if isinstance(value, numbers.Real) and type(value) not in _PLAIN:
                plain = int(value) if isinstance(value, numbers.Integral) else float(value)
                object.__setattr__(self, option.name, plain)
        check.choice("estimator", self.estimator, ESTIMATORS)
        if check.number("smoothing", self.smoothing, 0.0) >= 1:
            raise ValueError(f"smoothing must be in [0, 1), got {self.smoothing!r}")

    # What the sampler asks once ------------------------------------------------------------------

    def options(self) -> dict[str, Any]:
        """Name and value of every option but functions, for saving and comparing."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.compare}

    def warmup_draws(self, batches_per_epoch: int) -> int:
        """How many of the first minibatches are drawn without replacement."""
        raise NotImplementedError

    def constants(self) -> dict[str, Any]:
        """The method's own entries of :class:`fastis.kernels.layout.Constants`."""
        return {"smoothing": self.smoothing, "unbiased": self.estimator == "unbiased"}

    def memory(self, table: Table) -> dict[str, Tensor]:
        """Tensors that the method wants kept in ``table.memory``, on the table's device."""
        return {}

    # The step ------------------------------------------------------------------------------------

    def draw(self, table: Table, indices: Tensor, weights: Tensor) -> None:
        """The next minibatch, into ``indices`` int64 [B] and ``weights`` float32 [B]."""
        kernels_for("table", table.device.type).draw(table, indices, weights)

    def observed(self, out: Scored) -> Tensor:
        """[n]: what is observed of every sample of a minibatch."""
        return out.score

    def update(self, table: Table, seen: Observation) -> bool:
        """One iteration; False when an index is out of range, and then nothing has changed."""
        indices, weights, observed, score, mean_grad = seen
        update: Callable[..., bool] = kernels_for("table", table.device.type).update
        return update(table, indices, observed, weights, score, mean_grad)

    @property
    def is_plain(self) -> bool:
        """Are :meth:`draw` and :meth:`update` those of the kernels, with nothing beside them?"""
        return type(self).draw is Method.draw and type(self).update is Method.update

    def update_and_draw(
        self, table: Table, seen: Observation, following: tuple[Tensor, Tensor]
    ) -> bool:
        """:meth:`update`, then :meth:`draw` into ``following``: by one kernel if both are plain."""
        if self.is_plain:
            indices, weights, observed, score, mean_grad = seen
            both: Callable[..., bool] = kernels_for("table", table.device.type).update_and_draw
            return both(table, indices, observed, weights, score, mean_grad, *following)
        if not self.update(table, seen):
            return False
        self.draw(table, *following)
        return True

    # What can be read ----------------------------------------------------------------------------

    def probabilities(self, table: Table) -> Tensor:
        """float64 [N]: the probabilities of each draw of the next minibatch. O(N)."""
        n = table.constants.num_samples
        if table.records is None or int(table.scalars[DRAWS]) < table.constants.warmup_draws:
            return torch.full((n,), 1 / n, dtype=torch.float64, device=table.device)
        drawn = distribution(table)
        return drawn.weights.double() / float(drawn.total)

    def lr_factor(self, table: Table) -> Tensor:
        """0-d float64: what SGD's learning rate is multiplied with."""
        factor = table.variance[FACTOR]
        return factor.clone() if self.adjusts_lr else torch.ones_like(factor)

    def effective_iterations(self, table: Table) -> Tensor:
        """0-d float64: how far the run is, in iterations of uniform sampling."""
        return table.scalars[UPDATES].double()
