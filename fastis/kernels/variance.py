"""Moments of a minibatch and the variance traces that follow from them (Kutsuna 2025, Prop. 4.1).

With coefficients r, gradients g of norm x, and E the mean over the minibatch (or the exact mean
under the sampling in force)::

    A = E[r^2 x^2]     U = E[r x^2]     O = E[r x]     G = E[r g]

Plain arithmetic on tensors of any batch shape, as in csrc/variance.h; smoothed over iterations by
:func:`smooth`, taken as they are by :mod:`fastis.variance`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastis.kernels.layout import (
    DRAWS,
    EFFECTIVE_BATCH_SIZE,
    EFFICIENCY,
    FACTOR,
    GAIN,
    PAUSE,
    PAUSED_EFFICIENCY,
    SECOND,
    TRACE_IS,
    TRACE_OPTIMAL,
    TRACE_UNIFORM,
    UNIFORM_FROM,
    UPDATES,
    WEIGHT,
    Table,
    without_replacement,
)

ESTIMATORS = ("unbiased", "plugin")


class Moments(NamedTuple):
    """A, U, O^2 and |G|^2, each ``[...]`` float64; averages of them are moments again."""

    second: Tensor
    uniform: Tensor
    first_squared: Tensor
    mean_squared: Tensor


def minibatch_moments(r: Tensor, x: Tensor, mean_grad: Tensor | None) -> Moments:
    """Moments of minibatches: r, x float64 [..., B], mean_grad [..., P]; None counts as G = 0."""
    if mean_grad is None:
        mean_squared = r.new_zeros(r.shape[:-1])
    else:
        mean_squared = mean_grad.double().square().sum(-1)
    return Moments(
        second=(r * x).square().mean(-1),
        uniform=(r * x * x).mean(-1),
        first_squared=(r * x).mean(-1).square(),
        mean_squared=mean_squared,
    )


def of_two_stages(minibatch: Moments, n: int, candidates: int) -> Moments:
    """Moments as of n independent draws, from those of n draws out of a few uniform candidates.

    The n draws share the M ``candidates``, whose own scatter their moments don't show: n times the
    variance of the minibatch's mean is V_is + (n / M) V_uni, with V_is that of draws from these
    candidates. From the minibatch, with mu2 and O_2 the unbiased |G|^2 and O^2 of the candidates::

        V_uni = M/(M-1) (U - mu2)     |G|^2 = U - V_uni     V_opt = M/(M-1) (O_2 - mu2)
    """
    A, U, O2, G2 = minibatch
    m = candidates
    if n < 2 or m < 2:
        nan = A.new_tensor(float("nan"))
        return Moments(nan, nan, nan, nan)
    within = n / (n - 1) * (A - G2)
    mu2, o2 = (n * G2 - A) / (n - 1), (n * O2 - A) / (n - 1)
    uniform, optimal = m / (m - 1) * (U - mu2), m / (m - 1) * (o2 - mu2)
    trace = within + n / m * uniform
    mean_squared = U - uniform + trace / n  # |G|^2 and what its estimate is above it
    kept = (n - 1) / n
    return Moments(mean_squared + kept * trace, U, mean_squared + kept * optimal, mean_squared)


def traces_of(moments: Moments, n: int, unbiased: bool) -> tuple[Tensor, Tensor, Tensor]:
    """tr V_is, tr V_uni and tr V_opt from moments of minibatches of n draws.

    ``unbiased=False`` is the plug-in form of eqs. 10-12, exact when the moments are. Unbiased
    forms of n = 1 are NaN or infinite: one draw says nothing about a variance.
    """
    A, U, O2, G2 = moments
    if not unbiased:
        return A - G2, U - G2, O2 - G2
    bessel = n / (n - 1) if n > 1 else float("inf")
    mu2 = (n * G2 - A) / (n - 1)
    return bessel * (A - G2), U - mu2, bessel * (O2 - G2)


def smooth(table: Table, minibatch: Moments, n: int) -> None:
    """Moments of one minibatch of n draws into the averages; none if one of them is not finite."""
    if not bool(torch.stack(minibatch).isfinite().all()):
        return
    constants = table.constants
    if int(table.scalars[UPDATES]) == constants.warmup_draws:
        table.variance[:TRACE_IS] = 0.0  # another distribution from here on
    average(table, minibatch, n, n, constants.smoothing)


def average(table: Table, moments: Moments, n: int, batch_size: int, keep: float) -> None:
    """Moments of n draws into the averages, which keep so much of what they are; the traces and
    factors that follow are those of minibatches of ``batch_size``."""
    v = table.variance
    v[WEIGHT] = keep * v[WEIGHT] + (1 - keep)
    v[SECOND:TRACE_IS] = keep * v[SECOND:TRACE_IS] + (1 - keep) * torch.stack(moments)
    derive(table, n, batch_size)
    pause_or_resume(table, n, batch_size)


def derive(table: Table, n: int, batch_size: int) -> None:
    """Traces, effective minibatch size, efficiency, factor and gain from the smoothed moments of n
    draws, for minibatches of ``batch_size``.

    The gain of a larger minibatch (AdaScale, Johnson et al. 2020; the ratio of RAIS), with mu2 the
    squared norm of the mean gradient, at least 0::

        (mu2 + tr V_uni / B) / (mu2 + tr V_is / B)
    """
    v, unbiased = table.variance, table.constants.unbiased
    moments = Moments(*(v[SECOND:TRACE_IS] / v[WEIGHT]).unbind())
    v[TRACE_IS], v[TRACE_UNIFORM], v[TRACE_OPTIMAL] = traces_of(moments, n, unbiased)
    A, U, O2, G2 = moments
    o2 = (n * O2 - A) / (n - 1) if unbiased else O2
    v[EFFECTIVE_BATCH_SIZE] = batch_size * v[TRACE_UNIFORM] / v[TRACE_IS]
    v[EFFICIENCY] = torch.where(U - o2 > 0, (A - o2) / (U - o2), torch.nan)
    mu2 = (n * G2 - A) / (n - 1) if unbiased else G2
    signal = batch_size * mu2.clamp(min=0)
    factor = v[EFFECTIVE_BATCH_SIZE] / batch_size
    ratios = torch.stack([factor, (signal + v[TRACE_UNIFORM]) / (signal + v[TRACE_IS])])
    # Not for minibatches without replacement.
    draws, updates = (int(table.scalars[at]) for at in (DRAWS, UPDATES))
    adjust = updates >= table.constants.warmup_draws and not without_replacement(table, draws - 1)
    good = torch.isfinite(ratios) & (ratios > 0)
    v[FACTOR : GAIN + 1] = torch.where(good, ratios, 1.0) if adjust else 1.0


# The averages are those of this many time constants at least when anything is decided by them.
_SETTLED = 0.95  # 1 - exp(-3)
_RESUME_ABOVE = 1.05  # times the least gain: not to and fro


def pause_or_resume(table: Table, n: int, batch_size: int) -> None:
    """Stops importance sampling where the gain is too small, and goes on where it would be large
    enough if S were as it was: uniform minibatches show tr V_uni and tr V_opt alone.

    From the draw after the next on, whether that one has begun (on a device, beside this update) or
    not.
    """
    v, constants, scalars = table.variance, table.constants, table.scalars
    draws = int(scalars[DRAWS])
    if constants.least_gain <= 0 or float(v[WEIGHT]) < _SETTLED:
        return
    if int(scalars[UPDATES]) < constants.warmup_draws or draws - 1 >= int(scalars[UNIFORM_FROM]):
        return  # there it is uniform anyway
    paused = float(v[PAUSED_EFFICIENCY]) >= 0
    if paused:
        moments = Moments(*(v[SECOND:TRACE_IS] / v[WEIGHT]).unbind())
        A, G2 = moments.second, moments.mean_squared
        mu2 = (n * G2 - A) / (n - 1) if constants.unbiased else G2
        signal = batch_size * mu2.clamp(min=0)
        trace = v[TRACE_OPTIMAL] + v[PAUSED_EFFICIENCY] * (v[TRACE_UNIFORM] - v[TRACE_OPTIMAL])
        gain = (signal + v[TRACE_UNIFORM]) / (signal + trace)
        if not bool(gain > _RESUME_ABOVE * constants.least_gain):
            return
        v[PAUSED_EFFICIENCY] = -1.0
    else:
        if not bool(v[GAIN] < constants.least_gain):
            return
        # Above 0.9, or not defined: it may not be so bad later.
        v[PAUSED_EFFICIENCY] = v[EFFICIENCY].nan_to_num(0.9).clamp(0.0, 0.9)
    scalars[PAUSE] = (draws + 1) * 2 + (not paused)
    v[:TRACE_IS] = 0.0  # another distribution
