"""The state of the samples and its update, in PyTorch: csrc/state.h, bit for bit.

Each line is one IEEE operation in float32 (float64 for the importance).
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastis.kernels.layout import LAST, LATE, LATEST, MEAN, SKIPPED, VAR, Table

LARGEST_SCORE = 2.0**60


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


def clock_of(updates: int) -> int:
    """The iteration ``updates`` as states hold it: modulo 2^31, so that no run is too long."""
    return updates & LATEST


def interval(last: Tensor, updates: int) -> Tensor:
    """Iterations since samples were last observed, modulo 2^31, 1 for unseen ones.

    0 where iteration ``updates`` has nothing to add: where the sample was observed in it, or in a
    later one (by up to ``LATE``).
    """
    passed = (clock_of(updates) - last) & LATEST
    return torch.where(last < 0, 1, torch.where(passed > LATEST - LATE, 0, passed))


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
    """Observes every active sample that has not been observed in ``iteration``; float32 [N]. O(N).

    Of the states alone: :func:`rescale` of the backend in use has to follow.
    """
    usable, is_active = observed.abs() < LARGEST_SCORE, table.is_active()
    table.scalars[SKIPPED] += (~usable & is_active).sum()
    usable &= is_active
    usable &= interval(table.column(LAST), iteration) > 0
    new = smoothed(table, slice(None), observed, iteration)
    for at, values in zip((MEAN, VAR), new, strict=True):
        table.column(at)[:] = torch.where(usable, values, table.column(at))
    table.column(LAST)[:] = torch.where(usable, clock_of(iteration), table.column(LAST))
