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
from typing import Any, ClassVar

import torch
from torch import Tensor

from fastis import check
from fastis.batch import Scored
from fastis.kernels import kernels_for
from fastis.kernels.flatten import distribution
from fastis.kernels.layout import (
    DRAWS,
    FACTOR,
    GAIN,
    LAST_EXCLUDED,
    NEVER,
    PAUSE,
    UNIFORM_FROM,
    UPDATES,
    Table,
)
from fastis.kernels.table import Batch, Observation
from fastis.kernels.variance import ESTIMATORS
from fastis.saved import Range

_PLAIN: tuple[type, ...] = (bool, int, float)
FOREVER = NEVER  # warm-up draws of a method that does nothing else
# Of the learning rate: whose, and by which rule (:meth:`Method.lr_factor`).
OPTIMIZERS, RULES = ("sgd", "adam"), ("linear", "gain")
DEFAULT_RULE = "gain"
PHASES = ("warm-up", "importance", "uniform")  # of the draws: a phase is a position here


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

    Raises
    ------
    TypeError, ValueError
        naming the option, what was expected and what came.

    The traces are those of a method with coefficients; for the others they have no meaning.
    """

    name: ClassVar[str]
    # Does the table keep a state and a weight for every sample?
    has_states: ClassVar[bool] = False
    # What the tensors of :meth:`memory` can hold: a state with other values is not loaded. A tensor
    # that is not named here may hold anything.
    memory_ranges: ClassVar[Mapping[str, Range]] = {}
    # Are a step's draw and update those of the kernels, with nothing beside them? Left to itself in
    # a subclass, true where it has neither of its own.
    fused: ClassVar[bool] = True
    # Are a minibatch's weights the coefficients 1/(N p) of its draws?
    has_coefficients: ClassVar[bool] = True
    # Is the table one of scores, so that such may come from elsewhere (:meth:`fold`)?
    folds: ClassVar[bool] = False
    # Can samples be reset and excluded (:meth:`clear`)?
    renews: ClassVar[bool] = False
    # Does the learning rate follow N_ems (:meth:`lr_factor`)? If not, the factor is 1.
    adjusts_lr: ClassVar[bool] = False

    estimator: str = "unbiased"
    smoothing: float = 0.99

    def __init_subclass__(cls) -> None:
        if not {"draw", "update", "update_and_draw"}.isdisjoint(vars(cls)):
            cls.fused = vars(cls).get("fused", False)

    def __post_init__(self) -> None:
        for option in fields(self):  # numbers of numpy would not survive weights_only=True
            value: Any = getattr(self, option.name)
            if isinstance(value, numbers.Real) and type(value) not in _PLAIN:
                plain = int(value) if isinstance(value, numbers.Integral) else float(value)
                object.__setattr__(self, option.name, plain)
        check.choice("estimator", self.estimator, ESTIMATORS)
        check.number("smoothing", self.smoothing, 0.0, 1.0, "[)")

    # What the sampler asks once ------------------------------------------------------------------

    def options(self) -> dict[str, Any]:
        """Name and value of every option but functions, for saving and comparing."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.compare}

    def described(self) -> str:
        """Name and options, to compare with those in other processes."""
        return f"{self.name} with {self.options()}"

    def warmup_draws(self, batches_per_epoch: int) -> int:
        """How many of the first minibatches are drawn without replacement."""
        raise NotImplementedError

    def constants(self) -> dict[str, Any]:
        """The method's own entries of :class:`fastis.kernels.constants.Constants`."""
        return {"smoothing": self.smoothing, "unbiased": self.estimator == "unbiased"}

    def memory(self, table: Table) -> dict[str, Tensor]:
        """Tensors that the method wants kept in ``table.memory``, on the table's device."""
        return {}

    def grow(self, table: Table) -> None:
        """Does what a method has to when a state of fewer samples was loaded: the last are new."""

    # The step ------------------------------------------------------------------------------------

    def draw(self, table: Table, batch: Batch) -> None:
        """The next minibatch, into ``batch``: int64 ``[B]`` and float32 ``[B]``."""
        kernels_for("table", table.device.type).draw(table, batch)
        table.tick_on_host(DRAWS)

    def next_batch(self, table: Table, batch: Batch) -> None:
        """:meth:`draw`, unless the user asks for uniform draws."""
        (Method.draw if table.uniform else type(self).draw)(self, table, batch)

    def observed(self, out: Scored) -> Tensor:
        """``[n]``: what is observed of every sample of a minibatch."""
        return out.score

    def update(self, table: Table, observation: Observation) -> None:
        """One iteration; none for an empty observation.

        Raises
        ------
        IndexError
            on the CPU, for an index out of range, before anything has changed.
        """
        kernels_for("table", table.device.type).update(table, observation)
        if len(observation.indices) > 0:
            table.tick_on_host(UPDATES)

    def fold(self, table: Table, observation: Observation, iteration: int | None) -> None:
        """Scores from outside of the draws, of the parameters of ``iteration`` (None: the present
        one): the states learn of them, and neither the variance averages nor the clock.

        Raises
        ------
        IndexError
            as :meth:`update`.
        """
        kernels_for("table", table.device.type).fold(table, observation, iteration)

    def clear(self, table: Table, indices: Tensor, last: int) -> None:
        """Makes samples unseen or excluded, as ``last`` says: ``LAST_UNSEEN`` or
        ``LAST_EXCLUDED``. A method with ``renews`` that remembers more of a sample forgets it."""
        kernels_for("table", table.device.type).clear(table, indices, last)
        table.excludes |= last == LAST_EXCLUDED

    def update_and_draw(self, table: Table, observation: Observation, next_batch: Batch) -> None:
        """:meth:`update`, then :meth:`draw` into ``next_batch``; by one kernel if ``fused``."""
        if self.fused:
            kernels = kernels_for("table", table.device.type)
            kernels.update_and_draw(table, observation, next_batch)
        else:
            self.update(table, observation)
            self.next_batch(table, next_batch)

    # What can be read ----------------------------------------------------------------------------

    def phase(self, table: Table) -> Tensor:
        """0-d int64: how the next minibatch is drawn, a position in ``PHASES``."""
        draws = table.scalars[DRAWS]
        word = table.scalars[PAUSE]
        uniform = (draws >= table.scalars[UNIFORM_FROM]) | ((draws >= word >> 1) == (word & 1))
        phase = 1 + (uniform | self.draws_uniformly(table)).long()
        if table.states is None:  # nothing to warm up
            return phase
        return torch.where(draws < table.constants.warmup_draws, 0, phase)

    def draws_uniformly(self, table: Table) -> Tensor:
        """0-d bool: whether :meth:`draw` takes all samples for alike after the warm-up."""
        return table.scalars.new_full((), table.states is None, dtype=torch.bool)

    def probabilities(self, table: Table) -> Tensor:
        """float64 [N]: the probabilities of each draw of the next minibatch; 0 for all where all
        samples are excluded. O(N)."""
        if table.states is None or PHASES[int(self.phase(table))] != "importance":
            weights = table.is_active().double()
            return weights / weights.sum().clamp(min=1)
        drawn = distribution(table)
        return drawn.weights.double() / float(max(drawn.total, 1))

    def lr_factor(self, table: Table, rule: str) -> Tensor:
        """0-d float64: what SGD's learning rate is multiplied with, by the "linear" or "gain"."""
        factor = table.variance[GAIN if rule == "gain" else FACTOR]
        return factor.clone() if self.adjusts_lr else torch.ones_like(factor)

    def effective_iterations(self, table: Table) -> Tensor:
        """0-d float64: how far the run is, in iterations of uniform sampling."""
        return table.scalars[UPDATES].double()
