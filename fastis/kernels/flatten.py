"""Flattening in PyTorch: csrc/flatten.h. What the next importance draw is made from."""

from __future__ import annotations

from bisect import bisect_left
from typing import NamedTuple

import torch
from torch import Tensor

from fastis.kernels.code import weight_of
from fastis.kernels.constants import FLATTEN, Constants
from fastis.kernels.layout import (
    EXPONENT,
    LAST,
    LAST_UNSEEN,
    NO_EXPONENT,
    OTHERS_NUMBER,
    OTHERS_SUM,
    SEEN,
    TOTAL,
    UNIFORM_WEIGHT,
    Table,
    active,
)

_MOST = 1 << 62  # of a sum of weights


class Distribution(NamedTuple):
    """What the next importance draw is made from."""

    weights: Tensor  # int64 [N]: every item's integer weight as drawn; 0 for excluded ones
    total: int  # their sum
    active: int  # how many items are not excluded: the N of coefficients
    capped: Tensor  # int64 [k]: the seen items above the cap, ascending; drawn first


def distribution(table: Table) -> Distribution:
    """The flattened integer weights of all N items. O(N)."""
    constants, items = table.constants, active(table)
    is_seen = table.column(LAST) >= 0
    weights = unflattened(table)
    capped = torch.zeros(0, dtype=torch.int64, device=weights.device)
    if items < constants.num_samples and items <= constants.max_alike:
        return _alike(table, items)
    if constants.flatten == FLATTEN["mix"]:
        offset = mix_offset(weights, constants, items)
        if int(weights.sum()) + items * offset >= _MOST:
            return _alike(table, items)
        weights = torch.where(table.is_active(), weights + offset, 0)
    if constants.flatten == FLATTEN["cap"]:
        theta = water_level(
            weights, constants.batch_size, constants.cap_numerator, constants.cap_denominator
        )
        capped = torch.nonzero(is_seen & (weights > theta)).flatten()
        weights = weights.clamp(max=theta)
    return Distribution(weights, int(weights.sum()), items, capped)


def _alike(table: Table, items: int) -> Distribution:
    """Where so many items are excluded that nothing else meets the cap."""
    weights = table.is_active().long()
    return Distribution(weights, items, items, weights.new_zeros(0))


def unflattened(table: Table) -> Tensor:
    """int64 [N]: every item's integer weight, the mean of the seen for unseen ones, 0 for excluded
    ones. O(N)."""
    seen, total = int(table.scalars[SEEN]), int(table.scalars[TOTAL])
    e0 = int(table.scalars[EXPONENT])
    mean_weight = UNIFORM_WEIGHT if seen == 0 else total // seen
    weights = weight_of(table.codes(), e0 if e0 != NO_EXPONENT else 0)
    return torch.where(table.column(LAST) == LAST_UNSEEN, mean_weight, weights)


def others_of(table: Table) -> tuple[float, int]:
    """Of a shard: the sum of the importances in the others, and of how many samples, as last heard
    of; zeros for a table on its own."""
    total = float(table.scalars.view(torch.float64)[OTHERS_SUM])
    return total, int(table.scalars[OTHERS_NUMBER])


def tell_of_others(table: Table, total: float, number: int) -> None:
    """Sets :func:`others_of`."""
    table.scalars.view(torch.float64)[OTHERS_SUM] = total
    table.scalars[OTHERS_NUMBER] = number


def water_level(weights: Tensor, batch_size: int, numerator: int, denominator: int) -> int:
    """theta, such that p = min(W, theta) / sum min(W, theta) meets B p <= numerator / denominator.

    With k capped, theta = floor(D T_rest / (B - k D)); k the smallest with W_(k+1) <= theta
    (math: flattening). Python's integers: exact.
    """
    most = max(0, -(-batch_size * denominator // numerator) - 1)
    largest = torch.topk(weights, min(most + 1, weights.numel())).values
    prefix, total = torch.cumsum(largest, 0), int(weights.sum())

    def level(capped: int) -> int:
        rest = total - int(prefix[capped - 1]) if capped > 0 else total
        return numerator * rest // (batch_size * denominator - capped * numerator)

    # Once an uncapped weight is not above its level, no smaller one is: so a bisection.
    met = bisect_left(range(len(largest)), True, key=lambda k: int(largest[k]) <= level(k))
    return min(level(min(met, len(largest) - 1)), _MOST)


def mix_offset(weights: Tensor, constants: Constants, items: int) -> int:
    """c >= 0 such that p = (W + c) / (T + N c) of N active items meets the cap: a mixture with
    uniform draws."""
    batch = constants.batch_size * constants.cap_denominator
    over = batch * int(weights.max()) - constants.cap_numerator * int(weights.sum())
    divisor = constants.cap_numerator * items - batch
    return max(0, -(-over // divisor))
