"""Integer weights and flattening in PyTorch: csrc/weights.h and csrc/cpu/update_cap.cpp."""

from __future__ import annotations

import math
from bisect import bisect_left
from typing import NamedTuple

import torch
from torch import Tensor

from fastis.table import (
    EXPONENT,
    FLATTEN,
    LAST,
    NO_EXPONENT,
    SEEN,
    SUM_BITS,
    TOTAL,
    UNIFORM_WEIGHT,
    Constants,
    Table,
)

TINIEST = 2.0**-100


def exponent_of(code: Tensor) -> Tensor:
    """Binary exponent of a code (int32 or int64) as int64."""
    return ((code.long() >> 23) & 0xFF) - 127


def mantissa_of(code: Tensor) -> Tensor:
    """The 16 significant bits of a code as int64."""
    return ((code.long() >> 8) & 0x7FFF) | 0x8000


def code_of(importance: Tensor, floor: float) -> Tensor:
    """float32 -> int32: floored, and rounded half-even to 16 significant bits."""
    floored = importance.clamp(min=max(floor, TINIEST))
    bits = floored.view(torch.int32)
    return (bits + 0x7F + ((bits >> 8) & 1)) & ~0xFF


def weight_of(code: Tensor, e0: int) -> Tensor:
    """mantissa16 << (exponent - e0) as int64; 0 for code 0 (unseen)."""
    shift = torch.where(code == 0, 0, exponent_of(code) - e0)
    return torch.where(code == 0, 0, mantissa_of(code) << shift)


def floor_of(total: int, seen: int, e0: int, eps: float) -> float:
    """eps times the mean importance of the seen samples, as a float32 value."""
    if seen == 0 or total == 0:
        return 0.0
    value = float(total) / float(seen) * 2.0 ** (e0 - 15) * eps
    return float(torch.tensor(value, dtype=torch.float64, device="cpu").float())


class Distribution(NamedTuple):
    """What the next importance draw is made from."""

    weights: Tensor  # int64 [N]: every item's integer weight as drawn
    total: int  # their sum
    capped: Tensor  # int64 [k]: the seen items above the cap, ascending; drawn first


def distribution(table: Table) -> Distribution:
    """The flattened integer weights of all N items. O(N)."""
    constants = table.constants
    seen, total = int(table.scalars[SEEN]), int(table.scalars[TOTAL])
    e0 = int(table.scalars[EXPONENT])
    mean_weight = UNIFORM_WEIGHT if seen == 0 else total // seen
    is_seen = table.column(LAST) >= 0
    codes = table.codes()
    weights = torch.where(is_seen, weight_of(codes, e0 if e0 != NO_EXPONENT else 0), mean_weight)
    capped = torch.zeros(0, dtype=torch.int64, device=weights.device)
    if constants.flatten == FLATTEN["mix"]:
        weights = weights + mix_offset(weights, constants)
    if constants.flatten == FLATTEN["cap"]:
        theta = water_level(
            weights, constants.batch_size, constants.cap_numerator, constants.cap_denominator
        )
        capped = torch.nonzero(is_seen & (weights > theta)).flatten()
        weights = weights.clamp(max=theta)
    return Distribution(weights, int(weights.sum()), capped)


def water_level(weights: Tensor, batch_size: int, numerator: int, denominator: int) -> int:
    """theta, such that p = min(W, theta) / sum min(W, theta) meets B p <= numerator / denominator.

    With k capped, theta = floor(D T_rest / (B - k D)); k the smallest with W_(k+1) <= theta
    (math: flattening). Python's integers: exact.
    """
    most = max(0, -(-batch_size * denominator // numerator) - 1)
    largest = torch.topk(weights, min(most + 1, weights.numel())).values
    ends, total = torch.cumsum(largest, 0), int(weights.sum())

    def level(capped: int) -> int:
        rest = total - int(ends[capped - 1]) if capped > 0 else total
        return numerator * rest // (batch_size * denominator - capped * numerator)

    # Once an uncapped weight is not above its level, no smaller one is: so a bisection.
    met = bisect_left(range(len(largest)), True, key=lambda k: int(largest[k]) <= level(k))
    return min(level(min(met, len(largest) - 1)), 1 << 62)


def mix_offset(weights: Tensor, constants: Constants) -> int:
    """c >= 0 such that p = (W + c) / (T + N c) meets the cap: a mixture with uniform draws."""
    batch = constants.batch_size * constants.cap_denominator
    over = batch * int(weights.max()) - constants.cap_numerator * int(weights.sum())
    divisor = constants.cap_numerator * constants.num_samples - batch
    return max(0, -(-over // divisor))


class Weights(NamedTuple):
    """Weights that add up to an integer."""

    values: Tensor  # float [N], whose integers are those of integers(); or int64 [N], the integers
    shift: int
    total: int
    ends: Tensor  # int64: running sums of the integers, spaced as the backend likes


def integers(values: Tensor, shift: int) -> Tensor:
    """floor(w 2^shift) as int64, but at least 1 where w > 0."""
    w = values.double()
    half = shift // 2  # in two factors, since 2^shift itself may overflow
    return torch.where(w > 0, (w * 2.0**half * 2.0 ** (shift - half)).long().clamp(min=1), 0)


def shift_of(values: Tensor) -> int:
    """The shift with which the integers of ``values``, not all 0, add up to about 2^61.

    A power of two alone, so that every backend gets the same integers. With it the bit length of
    the sum, were nothing cut off, is 61.
    """
    n = values.numel()
    _, exponent = math.frexp(float(values.max()))  # max < 2^exponent
    first = SUM_BITS - (n - 1).bit_length() - exponent
    at_most = int(integers(values, first).sum()) + n  # each integer is off by less than 1
    return first + SUM_BITS - at_most.bit_length()
