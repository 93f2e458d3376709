"""Distributed importance sampling: the last score of every sample, whoever computed it (Alain,
Lamb, Sankar, Courville & Bengio 2016, arXiv 1511.06481)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from fastis import check
from fastis.kernels import kernels_for, layout
from fastis.kernels.layout import (
    CODE,
    DRAWS,
    EXCLUDED,
    EXPONENT,
    LAST,
    LAST_UNSEEN,
    LATE,
    LATEST,
    MEAN,
    NO_EXPONENT,
    PAUSE,
    SEEN,
    TOTAL,
    UPDATES,
    VAR,
    Table,
    may_read,
)
from fastis.kernels.state import LARGEST_SCORE
from fastis.kernels.table import Observation
from fastis.methods.base import Method

_LOOKS = 8  # for stale scores, while one becomes stale


@dataclass(frozen=True)
class Distributed(Method):
    """Samples in proportion to each sample's last gradient norm and a constant.

    The scores come from processes that do nothing else (:class:`fastis.scoring.Scorer`), by
    :meth:`fastis.Sampler.fold`, and from the minibatches trained on::

        p_i ~ |g_i| + c,   c = constant * mean |g|

    Theirs (Alain et al. 2016): scorers with a copy of the parameters, a constant against stale
    scores, a limit of staleness, uniform draws while few scores are usable. Ours: c is relative to
    the mean score of the table when a score arrives (theirs is absolute: 10, 1, 0.1), so that it
    need not be tuned; a stale sample has the mean weight (with theirs it is left out, which biases
    the estimate); the minibatch's own scores count, which are there anyway; the gradient norm is
    the one at the logits, where theirs is that of all parameters. Coefficients are 1/(N p). The
    sampler's cap applies; the learning rate is not adjusted.

    ``sampler.mean`` and ``.importance`` are the scores with the constant added.

    Parameters
    ----------
    constant : float of at least 0
        c, as a part of the mean score (0.1). The larger, the nearer to uniform sampling.
    max_age : int, optional
        iterations of the training from which on a score is stale, and its sample counts as unseen;
        None: never. Stale scores are looked for eight times while one becomes stale, O(N) each.
    min_usable : float in [0, 1]
        draws are uniform, without replacement, while scores of a smaller part of the samples are
        usable (0.1).
    estimator, smoothing
        see :class:`fastis.methods.Method`.

    Raises
    ------
    TypeError, ValueError
        naming the option, what was expected and what came.
    """

    name: ClassVar[str] = "distributed"
    has_states: ClassVar[bool] = True
    folds: ClassVar[bool] = True
    renews: ClassVar[bool] = True

    constant: float = 0.1
    max_age: int | None = None
    min_usable: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        check.number("constant", self.constant, 0.0, float("inf"), "[)")
        if self.max_age is not None:
            check.integer("max_age", self.max_age, 1, LATEST - LATE)
        check.number("min_usable", self.min_usable, 0.0, 1.0)

    def warmup_draws(self, batches_per_epoch: int) -> int:
        return 0

    def constants(self) -> dict[str, Any]:
        return {**super().constants(), "tau": -1.0}

    def memory(self, table: Table) -> dict[str, Tensor]:
        n, b = table.constants.num_samples, table.constants.batch_size
        if self.min_usable > 0 and b > n:
            raise ValueError(
                f"batch_size must be at most num_samples={n} while min_usable={self.min_usable:g} "
                f"asks for draws without replacement, got {b}"
            )
        self._pause_while_few(table)
        return {}

    def update(self, table: Table, observation: Observation) -> None:
        super().update(table, self._with_constant(table, observation))
        if len(observation.indices) == 0:
            return
        if self.max_age is not None:
            every = max(1, self.max_age // _LOOKS)
            if table.count_on_host(UPDATES) % every == 0:
                forget_stale(table, self.max_age)
        self._pause_while_few(table)

    def fold(self, table: Table, observation: Observation, iteration: int | None) -> None:
        super().fold(table, self._with_constant(table, observation), iteration)
        self._pause_while_few(table)

    def clear(self, table: Table, indices: Tensor, last: int) -> None:
        super().clear(table, indices, last)
        self._pause_while_few(table)

    def _with_constant(self, table: Table, observation: Observation) -> Observation:
        """|x| + c for every score x of n."""
        x = observation.observed.abs()
        mean = mean_weight(table) / (1 + self.constant)  # constants are in it
        if not (may_read(table.device) and float(mean) > 0):
            finite = x < LARGEST_SCORE
            own = torch.where(finite, x.double(), 0).sum() / finite.sum().clamp(min=1)
            mean = torch.where(mean > 0, mean, own)
        return observation._replace(observed=x + (self.constant * mean).float())

    def _pause_while_few(self, table: Table) -> None:
        """Uniform draws from the next one on, or the end of them, as many scores as there are."""
        scalars, n = table.scalars, table.constants.num_samples
        if may_read(table.device):  # the same at once
            counts = scalars.tolist()
            is_few = counts[SEEN] < self.min_usable * (n - counts[EXCLUDED])
            is_paused = layout.is_paused(counts[PAUSE], counts[DRAWS])
            if is_few != is_paused:
                scalars[PAUSE] = counts[DRAWS] * 2 + is_few
            return
        draws, word = scalars[DRAWS], scalars[PAUSE]
        few = scalars[SEEN] < self.min_usable * (n - scalars[EXCLUDED]).double()
        paused = (draws >= word >> 1) == (word & 1).bool()
        scalars[PAUSE].copy_(torch.where(few == paused, word, draws * 2 + few))


def mean_weight(table: Table) -> Tensor:
    """0-d float64: the mean importance of the seen samples; 0 if there are none."""
    scalars = table.scalars
    if may_read(table.device):  # the same at once
        counts = scalars.tolist()
        scale_of_one = 2.0 ** (max(counts[EXPONENT], -1000) - 15)
        value = float(counts[TOTAL]) / float(max(counts[SEEN], 1)) * scale_of_one
        return scalars.new_tensor(value if counts[SEEN] > 0 else 0.0, dtype=torch.float64)
    mean = scalars[TOTAL].double() / scalars[SEEN].clamp(min=1)
    # A weight is its integer times 2^(e0 - 15), whose bits these are.
    scale = ((scalars[EXPONENT].clamp(min=-1000) - 15 + 1023) << 52).view(torch.float64)
    return torch.where(scalars[SEEN] > 0, mean * scale, 0.0)


def forget_stale(table: Table, max_age: int) -> None:
    """Samples whose last observation is more than ``max_age`` iterations ago are unseen. O(N)."""
    last, scalars = table.column(LAST), table.scalars
    age = ((scalars[UPDATES] & LATEST) - last) & LATEST
    stale = (last >= 0) & (age > max_age) & (age <= LATEST - LATE)
    for at, value in ((MEAN, 0.0), (VAR, 0.0), (LAST, LAST_UNSEEN), (CODE, 0)):
        table.column(at).masked_fill_(stale, value)
    kernels_for("table", table.device.type).rescale(table)
    none = scalars[SEEN] == 0  # of whom a rescale leaves the totals as they were
    scalars[TOTAL].masked_fill_(none, 0)
    scalars[EXPONENT].masked_fill_(none, NO_EXPONENT)
