"""Flattening by power, p ~ w^gamma, without host synchronisation: PyTorch operations alone.

The operations are the same on every device, and on one device what is reported is what is drawn.
Between devices gamma may differ in its last bits, as their float64 exponentials, logarithms and
sums do; draws then agree but for points at the borders of items.

O(N): on the CPU Newton's steps end when they can; on other devices, where the host does not wait
for them, all ``_NEWTON_STEPS`` are made.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastis.table import SUM_BITS, Constants

_NEWTON_STEPS = 30
_NO_CAP = 1 << 62


def flatten_by_power(weights: Tensor, constants: Constants) -> tuple[Tensor, Tensor]:
    """int64 [N] -> the weights that are drawn from, int64 [N]; which are at the cap, bool [N]."""
    powers = quantised(powered(weights, constants))
    theta = water_level(powers, constants)
    return powers.minimum(theta), powers > theta


def powered(weights: Tensor, constants: Constants) -> Tensor:
    """float64 [N] in [0, 1]: (W / Wmax)^gamma, gamma <= 1 the largest that meets the cap.

    log sum (W/Wmax)^gamma is convex and falling in gamma, so Newton's steps from gamma = 0 stay on
    the side where the cap holds.
    """
    logs = weights.double().log()
    logs = logs - logs.max()
    least = math.log(constants.batch_size * constants.cap_denominator / constants.cap_numerator)
    gamma = torch.zeros((), dtype=torch.float64, device=weights.device)
    done = torch.zeros((), dtype=torch.bool, device=weights.device)
    for _ in range(_NEWTON_STEPS):
        values = (gamma * logs).exp()
        value, slope = values.sum(), (values * logs).sum()
        step = torch.where(slope != 0, (least - value.log()) * value / slope, 1.0)
        gamma = torch.where(done, gamma, (gamma + step.clamp(min=0.0)).clamp(max=1.0))
        done |= (step < 1e-12) | (gamma == 1.0)
        if weights.device.type == "cpu" and bool(done):
            break
    return (gamma * logs).exp()


def quantised(values: Tensor) -> Tensor:
    """float64 [N] with a largest of 1 -> int64 [N] with a sum of about 2^61, at least 1 each.

    A power of two times them, cut off: the shift is the one that
    :func:`fastis.kernels.reference_weights.shift_of` finds.
    """
    n = values.numel()
    first = SUM_BITS - (n - 1).bit_length() - 1  # of the exponent 1 that frexp gives 1.0
    scaled = values * 2.0**first
    at_most = scaled.long().clamp(min=1).sum() + n
    powers = torch.ones(62, dtype=torch.int64, device=values.device).cumsum(0) - 1
    bits = (at_most >= torch.ones_like(powers) << powers).sum()
    factor = (torch.ones_like(bits) << (SUM_BITS - bits)).double()
    return (scaled * factor).long().clamp(min=1)


def water_level(weights: Tensor, constants: Constants) -> Tensor:
    """theta as 0-d int64: :func:`fastis.kernels.reference_weights.water_level`, in 64 bits.

    As in csrc/weights.h: the products stay below 2^62 (checked when the sampler is built).
    """
    numerator = constants.cap_numerator
    batch = constants.batch_size * constants.cap_denominator
    largest = torch.topk(weights, min(constants.max_heavy + 1, weights.numel())).values
    rest = weights.sum() - (largest.cumsum(0) - largest)
    capped = torch.arange(len(largest), device=weights.device)
    divisor = batch - capped * numerator
    quotient, remainder = rest // divisor, rest % divisor
    within = quotient < _NO_CAP // numerator
    level = numerator * torch.where(within, quotient, 0) + numerator * remainder // divisor
    level = torch.where(within, level, _NO_CAP).clamp(max=_NO_CAP)
    right = (largest <= level).cumsum(0) > 0
    first = (~right).sum().clamp(max=len(largest) - 1)
    return level[first]
