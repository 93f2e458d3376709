"""The update in plain PyTorch: scores of a minibatch into the state table and the variance traces.

The oracle of every other backend, bit for bit in the table: each line is one IEEE operation in
float32 (float64 for the importance), as in csrc/state.h. Reads counts on the host.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastis.kernels.reference_variance import Moments, minibatch_moments, traces_of
from fastis.kernels.reference_weights import (
    code_of,
    exponent_of,
    floor_of,
    mantissa_of,
    weight_of,
)
from fastis.table import (
    CODE,
    EFFECTIVE_BATCH_SIZE,
    EFFICIENCY,
    EXPONENT,
    FACTOR,
    LAST,
    LATE,
    LATEST,
    MEAN,
    SECOND,
    SEEN,
    SKIPPED,
    TOTAL,
    TRACE_IS,
    TRACE_OPTIMAL,
    TRACE_UNIFORM,
    UPDATES,
    VALID,
    VAR,
    WEIGHT,
    Table,
)

LARGEST_SCORE = 2.0**60


def update(
    table: Table,
    indices: Tensor,
    observed: Tensor,
    weights: Tensor,
    score: Tensor,
    mean_grad: Tensor | None,
) -> bool:
    """One iteration of the sampler's clock of updates; an empty one is none.

    False when an index is out of range: nothing has changed then. (A backend that would have to
    wait for the device to know says True, and leaves such indices out.)

    Parameters
    ----------
    indices : int64 [n]; duplicates are legal, the first usable position wins
    observed : float32 [n], what the table keeps averages of (the score, or the loss)
    weights, score : float32 [n], for the variance traces
    mean_grad : float32 [C] or None, minibatch mean of r g
    """
    if bool(((indices < 0) | (indices >= table.constants.num_samples)).any()):
        return False
    if indices.numel() == 0:
        return True
    if table.records is not None:
        update_state(table, indices, observed)
    else:
        table.scalars[SKIPPED] += (~(observed.abs() < LARGEST_SCORE)).sum()
    update_variance(table, weights, score, mean_grad)
    table.scalars[UPDATES] += 1
    return True


def decay(y: Tensor) -> tuple[Tensor, Tensor]:
    """exp(-y) and 1 - exp(-y), float32, y >= 0: a fixed sequence of single operations."""
    y = torch.where(y < 80.0, y, 80.0)
    k = (y * 1.44269504 + 0.5).int()
    kf = k.float()
    r = (kf * 0.693359375 - y) + kf * -2.12194440e-4
    p = r * 1.98412698e-4 + 1.38888889e-3
    for coefficient in (8.33333333e-3, 4.16666667e-2, 1.66666667e-1, 0.5):
        p = p * r + coefficient
    p = p * (r * r) + r
    two_to_minus_k = ((127 - k) << 23).view(torch.float32)
    scaled = two_to_minus_k * p
    return two_to_minus_k + scaled, (1.0 - two_to_minus_k) - scaled


def importance_of(mean: Tensor, var: Tensor, kind: int) -> Tensor:
    """sqrt(m^2 + v) (kind 0) or m + sqrt(v) (kind 1); float32 in and out, float64 within."""
    m, v = mean.double(), var.double()
    return ((m * m + v).sqrt() if kind == 0 else m + v.sqrt()).float()


def first_positions(indices: Tensor, usable: Tensor) -> Tensor:
    """Positions (ascending) of the first usable occurrence of every distinct index."""
    positions = torch.nonzero(usable).flatten()
    distinct, inverse = torch.unique(indices[positions], return_inverse=True)
    first = torch.full_like(distinct, indices.numel())
    first = first.scatter_reduce(0, inverse, positions, "amin")
    return first.sort().values


def update_state(table: Table, indices: Tensor, observed: Tensor) -> None:
    """Kutsuna 2025, Algorithm 1, with weights as integers (math: state table, exactness)."""
    constants, scalars = table.constants, table.scalars
    updates = int(scalars[UPDATES])
    total, seen, e0 = (int(scalars[at]) for at in (TOTAL, SEEN, EXPONENT))
    usable = observed.abs() < LARGEST_SCORE
    scalars[SKIPPED] += (~usable).sum()
    keep = first_positions(indices, usable)
    keep = keep[interval(table.column(LAST)[indices[keep]], updates) > 0]
    i, x = indices[keep], observed[keep]

    fresh = table.column(LAST)[i] < 0
    new_mean, new_var = smoothed(table, i, x, updates)
    importance = importance_of(new_mean, new_var, constants.importance)
    codes = code_of(importance, floor_of(total, seen, e0, constants.floor))

    old_codes = table.codes()[i]
    table.column(MEAN)[i], table.column(VAR)[i] = new_mean, new_var
    table.column(LAST)[i] = clock_of(updates)
    table.column(CODE)[i] = codes
    scalars[VALID] = 0
    shift = exponent_of(codes) - e0
    if bool(((shift < 0) | (shift > max_shift(indices.numel()))).any()):
        return rescale(table)
    total += int(weight_of(codes, e0).sum())
    total -= int(weight_of(old_codes, e0).sum()) if seen else 0
    scalars[TOTAL] = total
    scalars[SEEN] += fresh.sum()
    if exceeds_limit(table):
        rescale(table)


def clock_of(updates: int) -> int:
    """The iteration ``updates`` as records hold it: modulo 2^31, so that no run is too long."""
    return updates & LATEST


def interval(last: Tensor, updates: int) -> Tensor:
    """Iterations since samples were last observed, modulo 2^31, 1 for unseen ones.

    0 where iteration ``updates`` has nothing to add: where the sample was observed in it, or in a
    later one (by up to ``LATE``).
    """
    passed = (clock_of(updates) - last) & LATEST
    return torch.where(last < 0, 1, torch.where(passed > LATEST - LATE, 0, passed))


def exceeds_limit(table: Table) -> bool:
    """Is the sum of all weights, those of the unseen included, more than the draw has room for?"""
    total, seen = int(table.scalars[TOTAL]), int(table.scalars[SEEN])
    of_unseen = (table.constants.num_samples - seen) * (total // seen) if seen else 0
    return total + of_unseen > table.constants.total_limit


def smoothed(table: Table, i: Tensor | slice, x: Tensor, updates: int) -> tuple[Tensor, Tensor]:
    """New mean and variance of samples ``i`` after observing ``x`` in iteration ``updates``."""
    tau = table.constants.tau
    mean, var, last = (table.column(at)[i] for at in (MEAN, VAR, LAST))
    if tau < 0:
        return x, torch.zeros_like(x)
    dt = interval(last, updates).float()
    # On x's device: CUDA divides by a host's number by multiplying with its inverse.
    linear = x.new_tensor(table.constants.tau_scale) * float(updates)
    tau_now = x.new_tensor(tau) if tau > 0 else linear.clamp(min=1)
    alpha, one_minus_alpha = decay(dt / tau_now)
    d = x - mean
    new_mean = torch.where(last < 0, x, mean + one_minus_alpha * d)
    return new_mean, torch.where(last < 0, 0.0, alpha * (var + one_minus_alpha * d * d))


def observe_all(table: Table, observed: Tensor, iteration: int) -> None:
    """Observes every sample that has not been observed in ``iteration``; float32 [N]. O(N).

    Of the states alone: :func:`rescale` of the backend in use has to follow.
    """
    usable = observed.abs() < LARGEST_SCORE
    table.scalars[SKIPPED] += (~usable).sum()
    usable &= interval(table.column(LAST), iteration) > 0
    new = smoothed(table, slice(None), observed, iteration)
    for at, values in zip((MEAN, VAR), new, strict=True):
        table.column(at)[:] = torch.where(usable, values, table.column(at))
    table.column(LAST)[:] = torch.where(usable, clock_of(iteration), table.column(LAST))


def max_shift(n: int) -> int:
    """The largest shift of a mantissa that n new weights can have without overflowing a sum."""
    return 61 - 16 - (n - 1).bit_length()


def rescale(table: Table) -> None:
    """Codes, e0 and totals anew from the states, with the floor at the present mean. O(N)."""
    constants, scalars = table.constants, table.scalars
    scalars[VALID] = 0
    is_seen = table.column(LAST) >= 0
    seen = int(is_seen.sum())
    scalars[SEEN] = seen
    if seen == 0:
        return
    mean, var = table.column(MEAN)[is_seen], table.column(VAR)[is_seen]
    importance = importance_of(mean, var, constants.importance)
    codes = code_of(importance, 0.0)
    # The mean, in integers relative to the largest weight: the same on every backend.
    largest = int(exponent_of(codes).max())
    spare = 62 - 16 - (constants.num_samples - 1).bit_length()
    below = (largest - exponent_of(codes)).clamp(max=63)
    relative_total = int(((mantissa_of(codes) << spare) >> below).sum())
    floor = floor_of(relative_total, seen, largest - spare, constants.floor)
    floor_code = code_of(torch.tensor(floor, dtype=torch.float32, device="cpu"), 0.0)
    e0 = int(exponent_of(floor_code)) - constants.headroom
    codes = code_of(importance, floor)
    table.column(CODE)[is_seen] = codes
    scalars[EXPONENT] = e0
    scalars[TOTAL] = weight_of(codes, e0).sum()


def update_variance(table: Table, weights: Tensor, score: Tensor, mean_grad: Tensor | None) -> None:
    """Kutsuna 2025, Proposition 4.1: moments of one minibatch, smoothed before any ratio."""
    smooth(table, minibatch_moments(weights.double(), score.double(), mean_grad), score.numel())


def smooth(table: Table, minibatch: Moments, n: int) -> None:
    """Moments of one minibatch of n draws into the averages; none if one of them is not finite."""
    moments = torch.stack(minibatch)
    if not bool(moments.isfinite().all()):
        return
    v, constants = table.variance, table.constants
    if int(table.scalars[UPDATES]) == constants.warmup_draws:
        v[:TRACE_IS] = 0.0  # another distribution from here on
    keep = constants.smoothing
    v[WEIGHT] = keep * v[WEIGHT] + (1 - keep)
    v[SECOND:TRACE_IS] = keep * v[SECOND:TRACE_IS] + (1 - keep) * moments
    derive(table, n)


def derive(table: Table, n: int) -> None:
    """Traces, effective minibatch size, efficiency and factor from the smoothed moments."""
    v, unbiased = table.variance, table.constants.unbiased
    moments = Moments(*(v[SECOND:TRACE_IS] / v[WEIGHT]).unbind())
    v[TRACE_IS], v[TRACE_UNIFORM], v[TRACE_OPTIMAL] = traces_of(moments, n, unbiased)
    A, U, O2, _ = moments
    o2 = (n * O2 - A) / (n - 1) if unbiased else O2
    v[EFFECTIVE_BATCH_SIZE] = n * v[TRACE_UNIFORM] / v[TRACE_IS]
    v[EFFICIENCY] = torch.where(U - o2 > 0, (A - o2) / (U - o2), torch.nan)
    factor = v[EFFECTIVE_BATCH_SIZE] / n
    adjust = int(table.scalars[UPDATES]) >= table.constants.warmup_draws
    good = torch.isfinite(factor) & (factor > 0)
    v[FACTOR] = torch.where(good, factor, 1.0) if adjust else 1.0
