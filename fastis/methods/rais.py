"""RAIS: robust approximate importance sampling (Johnson & Guestrin 2018)."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from fastis import check
from fastis.kernels.layout import DRAWS, LAST, UNIFORM_FROM, UPDATES, Table
from fastis.kernels.state import LARGEST_SCORE
from fastis.kernels.table import Observation
from fastis.methods.base import FOREVER
from fastis.methods.weighted import Distinct, Weighted, assign, clamped, usable
from fastis.saved import FINITE, NOT_NEGATIVE, POSITIVE, Range

_DECAYS = (0.0, 0.5, 0.9)  # of the averages h_1, h_2, h_3
_FEATURES = len(_DECAYS) + 1
_SQUARE, _COEFFICIENT = _FEATURES, _FEATURES + 1  # columns of the buffer, after the features
_GAIN_SMOOTHING = 0.99
LARGEST_SQUARE = LARGEST_SCORE**2
LARGEST = 1e9  # of an option: finite, and no product of it overflows


@dataclass(frozen=True)
class RAIS(Weighted):
    """Samples by a robust regression of the squared gradient norm on the norms seen before.

    Each sample has features s = [h_1, h_2, h_3, mean over the data of h_1], averages of its squared
    norms x^2 with decays 0, 0.5, 0.9. With c, d >= 0 fitted to the last observations::

        p_i ~ sqrt(c.s_i + k d.s_i)
        c = argmin sum r (x^2 - c.s)^2 / (c_old.s + e)^2
        d = argmin sum r (|x^2 - c.s| - d.s)^2 / (c_old.s + e)^2

    c.s is the expected squared norm and d.s its uncertainty. Coefficients are 1/(N p). The learning
    rate is multiplied by the gain (its square root for Adam, ours), and the run's progress is its
    sum, the effective iterations (:class:`fastis.EffectiveIterationsLR`)::

        gain = E|G_u|^2 / E|G_p|^2,   E|G_u|^2 = E|G_p|^2 + (1/B) E[(r - r^2) |g|^2]

    with G_u, G_p the minibatch's mean gradient under uniform draws and under p; both expectations
    are moving averages (0.99). Without ``mean_grad``, |G_p|^2 is taken as (1/B) E[r^2 |g|^2]. Where
    the estimate of E|G_u|^2 is not positive, the gain is 1 (ours).

    The authors' code and formulas were not found: the regression follows the paper's idea, its
    features, e (1 % of the mean x^2), the non-negative least squares (exact, by trying all subsets
    of the four features) and the buffer are ours. Between fits the mean of h_1 in a weight is that
    of the sample's last visit or the last fit. A fit costs O(N) and is a host decision: not for
    CUDA graphs.

    Parameters
    ----------
    uncertainty : float
        k, how much the uncertainty counts (1).
    refit_epochs : float
        epochs between two fits (0.1).
    buffer_size : int
        observations that a fit goes by (20,000, the last ones).
    warmup_epochs : int
        epochs without replacement at the start (2); the gain is 1 in them.
    estimator, smoothing
        see :class:`fastis.methods.Method`.

    Raises
    ------
    TypeError, ValueError
        naming the option, what was expected and what came.
    """

    name: ClassVar[str] = "rais"
    adjusts_lr: ClassVar[bool] = True  # by a gain of its own
    memory_ranges: ClassVar[dict[str, Range]] = {
        "history": Range(0.0, 2 * LARGEST_SQUARE),
        "first": FINITE,
        "buffer": FINITE,
        "buffered": Range(0, FOREVER),
        "c": Range(0.0, 1e200),  # a ratio of two float32 is far below; no product overflows
        "d": Range(0.0, 1e200),
        "moments": FINITE,
        "gain": POSITIVE,
        "effective_iterations": NOT_NEGATIVE,
    }

    uncertainty: float = 1.0
    refit_epochs: float = 0.1
    buffer_size: int = 20_000

    def __post_init__(self) -> None:
        super().__post_init__()
        check.number("uncertainty", self.uncertainty, 0.0, LARGEST)
        check.number("refit_epochs", self.refit_epochs, 0.0, LARGEST, "(]")
        check.integer("buffer_size", self.buffer_size, 1)

    def memory(self, table: Table) -> dict[str, Tensor]:
        n, device = table.constants.num_samples, table.device

        def double(*values: float) -> Tensor:
            return torch.tensor(values, dtype=torch.float64, device=device)

        return {
            # h_1, h_2, h_3
            "history": torch.zeros((n, len(_DECAYS)), dtype=torch.float32, device=device),
            "first": double(0.0, 0.0),  # sum of h_1 over the seen samples, and how many those are
            "buffer": torch.zeros(
                (self.buffer_size, _FEATURES + 2), dtype=torch.float32, device=device
            ),
            "buffered": torch.zeros((), dtype=torch.int64, device=device),  # observations ever
            # Until the first fit the steadiest average is the prediction.
            "c": double(0.0, 0.0, 1.0, 0.0),
            "d": double(0.0, 0.0, 0.0, 0.0),
            "moments": double(0.0, 0.0),  # E|G_p|^2, and E|G_u|^2 less that; times the same factor
            "gain": double(1.0)[0],
            "effective_iterations": double(0.0)[0],
        }

    # The step ------------------------------------------------------------------------------------

    def learn(self, table: Table, observation: Observation, kept: Distinct) -> None:
        fresh = table.column(LAST)[kept.indices] < 0
        self._remember(table, kept, fresh)
        self._observe(table, kept, fresh)
        # What is not usable stays so: the table counts and skips it.
        new_weights = self.weights(
            table, self._features(table, clamped(table, observation.indices))
        )
        new_weights = torch.where(usable(observation.observed), new_weights, observation.observed)
        updates, constants = table.count_on_host(UPDATES) + 1, table.constants
        self.update_table(table, observation._replace(observed=new_weights))
        if updates > constants.warmup_draws:
            self._measure_gain(table, observation)
        table.memory["effective_iterations"] += table.memory["gain"]
        every = max(1, round(self.refit_epochs * constants.batches_per_epoch))
        if updates % every == 0 and int(table.memory["buffered"]) > 0:
            self._fit(table)
            everything = torch.arange(constants.num_samples, device=table.device)
            fitted = self.weights(table, self._features(table, everything))
            assign(table, fitted, which=table.column(LAST) >= 0)

    def _features(self, table: Table, i: Tensor) -> Tensor:
        """s, float32 [n, 4], of the samples ``i`` as they stand."""
        total, seen = table.memory["first"].unbind()
        # The running sum is rounded: a mean of squares may come out below 0.
        mean_first = (total / seen.clamp(min=1)).clamp(0.0, LARGEST_SQUARE).float()
        return torch.cat([table.memory["history"][i], mean_first.expand(len(i), 1)], dim=1)

    def weights(self, table: Table, features: Tensor) -> Tensor:
        """sqrt(c.s + k d.s), float32 [n]."""
        slopes = table.memory["c"] + self.uncertainty * table.memory["d"]
        return (features.double() @ slopes).clamp(min=0).sqrt().float()

    def _remember(self, table: Table, kept: Distinct, fresh: Tensor) -> None:
        """Into the ring buffer: what was known before, what came, and the coefficient.

        Row k of the known ones goes to place ``buffered + k``. How many there are the host does not
        know: each of the places that a minibatch can fill takes its row, or stays as it is.
        """
        buffer, buffered = table.memory["buffer"], table.memory["buffered"]
        known = kept.counts & ~fresh
        features = self._features(table, kept.indices)
        square = kept.observed.square()
        rows = torch.cat([features, square[:, None], kept.weights[:, None]], dim=1)
        in_order = known.logical_not().to(torch.uint8).argsort(stable=True)
        number = known.sum()
        # Of more rows than the buffer holds the last ones.
        begin = (number - self.buffer_size).clamp(min=0)
        offset = torch.arange(min(len(rows), self.buffer_size), device=rows.device) + begin
        places = (offset - begin + buffered) % self.buffer_size
        taken = rows[in_order[offset.clamp(max=len(rows) - 1)]]
        buffer[places] = torch.where((offset < number)[:, None], taken, buffer[places])
        buffered += number - begin

    def _observe(self, table: Table, kept: Distinct, fresh: Tensor) -> None:
        history, first = table.memory["history"], table.memory["first"]
        before, square = history[kept.indices], kept.observed.square()[:, None]
        # Numbers of the host's: a tensor of them would have to be copied to the device.
        columns = zip(before.split(1, 1), _DECAYS, strict=True)
        after = torch.cat([h + (1 - decay) * (square - h) for h, decay in columns], 1)
        learnt = torch.where(fresh[:, None], square, after)
        kept.write(history, learnt)
        gained = torch.where(kept.counts, (learnt - before)[:, 0], 0.0).double().sum()
        first += torch.stack([gained, (fresh & kept.counts).sum().double()])

    def _measure_gain(self, table: Table, observation: Observation) -> None:
        r, g2 = observation.weights.double(), observation.score.double().square()
        n = len(r)
        if observation.mean_grad is None:
            minibatch = (r * r * g2).mean() / n
        else:
            minibatch = observation.mean_grad.double().square().sum()
        now = torch.stack([minibatch, ((r - r * r) * g2).mean() / n])
        moments = table.memory["moments"]
        learnt = moments.lerp(now, 1 - _GAIN_SMOOTHING)
        moments.copy_(torch.where(now.isfinite().all(), learnt, moments))
        gain = 1 + moments[1] / moments[0]
        good = gain.isfinite() & (gain > 0) & (table.scalars[DRAWS] <= table.scalars[UNIFORM_FROM])
        table.memory["gain"].copy_(torch.where(good, gain, 1.0))

    # The regression ------------------------------------------------------------------------------

    def _fit(self, table: Table) -> None:
        memory = table.memory
        rows = memory["buffer"][: min(int(memory["buffered"]), self.buffer_size)].double()
        s, square, r = rows[:, :_FEATURES], rows[:, _SQUARE], rows[:, _COEFFICIENT]
        e = 0.01 * square.mean().clamp(min=0.0) + torch.finfo(torch.float32).tiny
        trust = r / ((s @ memory["c"]).clamp(min=0.0) + e).square()
        memory["c"].copy_(non_negative_least_squares(s, square, trust))
        error = (square - s @ memory["c"]).abs()
        memory["d"].copy_(non_negative_least_squares(s, error, trust))

    # What can be read ----------------------------------------------------------------------------

    def lr_factor(self, table: Table, rule: str) -> Tensor:
        return table.memory["gain"].clone()

    def effective_iterations(self, table: Table) -> Tensor:
        return table.memory["effective_iterations"].clone()


def non_negative_least_squares(a: Tensor, y: Tensor, weights: Tensor) -> Tensor:
    """argmin over x >= 0 of sum_n weights_n (y_n - a_n . x)^2: float64 [k], k small.

    a [n, k], y and weights >= 0 [n], float64. Exact: the minimum is the unconstrained one of some
    subset of the columns, and all 2^k - 1 are tried.
    """
    gram = (a.T @ (weights[:, None] * a)).cpu().numpy()
    right = (a.T @ (weights * y)).cpu().numpy()
    k = len(right)
    best, least = np.zeros(k), 0.0  # no column at all
    for size in range(1, k + 1):
        for columns in combinations(range(k), size):
            chosen = list(columns)
            x = np.linalg.lstsq(gram[np.ix_(chosen, chosen)], right[chosen], rcond=None)[0]
            if (x < 0).any() or not np.isfinite(x).all():
                continue
            value = x @ gram[np.ix_(chosen, chosen)] @ x - 2 * right[chosen] @ x
            if value < least:
                least, best = value, np.zeros(k)
                best[chosen] = x
    return torch.from_numpy(best).to(a.device)
