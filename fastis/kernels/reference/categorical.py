"""Draws from fixed weights in plain PyTorch: the oracle of every other backend."""

from __future__ import annotations

import torch
from torch import Tensor

from fastis.kernels.alias import capacities, index_bits
from fastis.kernels.quantize import IntegerWeights, coefficients, quantized, shift_of
from fastis.kernels.reference.philox import STREAM_WEIGHTS, random_words, scale
from fastis.kernels.table import Batch


def random_below(total: int, seed: int, first: int, count: int, device: torch.device) -> Tensor:
    """int64 [count], uniform in [0, total): numbers ``first`` ... of the stream of ``seed``."""
    positions = torch.arange(first, first + count, device=device)
    return scale(random_words(seed, STREAM_WEIGHTS, 0, positions), total)


def quantize(values: Tensor) -> IntegerWeights | None:
    """Integers for the weights ``values`` (float [N], or int64 [N] with 0 < sum < 2^62).

    None: a weight is negative or not finite, or all of them are 0.
    """
    shift = 0
    if values.is_floating_point():
        least, most = (float(v) for v in torch.aminmax(values))
        if not (least >= 0 and 0 < most < float("inf")):
            return None
        shift = shift_of(values)
    weights = IntegerWeights(values, shift, 0, values)
    prefix = torch.cumsum(integer_weights(weights), 0)
    return weights._replace(total=int(prefix[-1]), prefix=prefix)


def integer_weights(weights: IntegerWeights) -> Tensor:
    """int64 [N], of sum ``weights.total``."""
    if weights.values.dtype == torch.int64:
        return weights.values
    return quantized(weights.values, weights.shift)


def draw(weights: IntegerWeights, seed: int, first: int, count: int) -> Batch:
    """Draws ``first`` ... of the stream of ``seed``, [count]."""
    points = random_below(weights.total, seed, first, count, weights.values.device)
    indices = torch.searchsorted(weights.prefix, points, right=True)
    return Batch(
        indices,
        coefficients(integer_weights(weights), weights.total, indices, weights.values.numel()),
    )


def alias_build(weights: IntegerWeights) -> Tensor:
    """The alias table of the weights, int64 [N, 2]: 16 bytes a bucket (csrc/alias.h).

    A bucket's first number is ``own << bits | alias``: bucket i gives its first ``own`` units to
    item i and the rest to item ``alias``. The second holds r of item i and of ``alias`` (float32).

    Huebschle-Schneider & Sanders 2019: sweep light items (weight below their bucket's capacity) and
    heavy ones in order; the heavy item fills light buckets until what is left of it fits its own.
    Where the sweep stands follows from prefix sums of deficits and surpluses.
    """
    w, total = integer_weights(weights), weights.total
    n = w.numel()
    capacity = capacities(total, n, w.device)
    light = torch.nonzero(w < capacity).flatten()
    heavy = torch.nonzero(w >= capacity).flatten()
    deficit = torch.cumsum((capacity - w)[light], 0)
    surplus = torch.cumsum((w - capacity)[heavy], 0)
    own, alias = w.clone(), torch.arange(n, device=w.device)
    before = deficit - (capacity - w)[light]
    alias[light] = heavy[torch.searchsorted(surplus, before, right=True)]
    # A heavy item leaves its own bucket short by what the last light bucket took too much.
    reached = torch.cat([deficit.new_zeros(1), deficit])
    filled = reached[torch.searchsorted(reached, surplus)]
    own[heavy] = capacity[heavy] + surplus - filled
    alias[heavy[:-1]] = heavy[1:]
    r = coefficients(w, total, torch.arange(n, device=w.device), n)
    second = torch.stack([r, r[alias]], dim=1).view(torch.int64)
    return torch.cat([(own << index_bits(n) | alias)[:, None], second], dim=1)


def alias_draw(table: Tensor, total: int, seed: int, first: int, count: int) -> Batch:
    """Draws ``first`` ... of the stream of ``seed``, [count]."""
    points = random_below(total, seed, first, count, table.device)
    return alias_inverse_cdf(table, total, points)


def alias_inverse_cdf(table: Tensor, total: int, points: Tensor) -> Batch:
    """The items at ``points`` below ``total``, int64 [n], and their coefficients."""
    n = len(table)
    larger, capacity = total % n, total // n
    border = larger * (capacity + 1)
    in_larger = points < border
    unit = torch.where(in_larger, capacity + 1, max(capacity, 1))
    base = torch.where(in_larger, 0, border)
    bucket = torch.div(points - base, unit, rounding_mode="floor")
    offset = points - base - bucket * unit
    bucket = bucket + torch.where(in_larger, 0, larger)
    word = table[bucket, 0]
    is_alias = offset >= word >> index_bits(n)
    indices = torch.where(is_alias, word & ((1 << index_bits(n)) - 1), bucket)
    return Batch(indices, table.view(torch.float32)[bucket, 2 + is_alias.long()])
