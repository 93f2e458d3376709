"""Draws from fixed weights on a GPU: csrc/cuda/{categorical,alias}.cu.

What the host has to know of the weights it reads twice: how large they are, for the shift, then
their total in integers. Everything else stays on the device.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastis.kernels.constants import SUM_BITS
from fastis.kernels.cuda.launch import failure, launch
from fastis.kernels.extension import _C
from fastis.kernels.quantize import IntegerWeights, arguments
from fastis.kernels.table import Batch, empty_batch

_TILE = 256  # weights to one of the prefix sums (kTile of csrc/device/categorical.h)
_ALIGNMENT = 16  # bytes: four weights are read by one access


def _call(name: str, device: torch.device, *arguments: int) -> None:
    launch(getattr(_C, f"cuda_{name}"), device, *arguments)


def _scratch(name: str, n: int, device: torch.device) -> Tensor:
    """uint8: what the launch of that name needs besides its arguments, for n weights."""
    size = getattr(_C, f"cuda_{name}_bytes")(n, device.index)
    if size < 0:
        raise failure(-size)
    return torch.empty(size, dtype=torch.uint8, device=device)


def quantize(values: Tensor) -> IntegerWeights | None:
    """See :func:`fastis.kernels.reference.categorical.quantize`; prefix sums over 256 weights."""
    device = values.device
    if values.data_ptr() % _ALIGNMENT:
        values = values.clone()
    prefix = torch.empty(-(-values.numel() // _TILE), dtype=torch.int64, device=device)
    weights = IntegerWeights(values, 0, 0, prefix)
    if values.is_floating_point():
        found = torch.zeros(3, dtype=torch.int64, device=device)
        _call("reduce", device, *arguments(*weights), found.data_ptr())
        found = found.cpu()
        (most, total), unusable = found[:2].view(torch.float64).tolist(), int(found[2])
        if unusable or most == 0:
            return None
        weights = weights._replace(shift=_shift_of(weights, most, total))
    return weights._replace(total=_prefix_sums(weights))


def _shift_of(weights: IntegerWeights, most: float, total: float) -> int:
    """What :func:`fastis.kernels.quantize.shift_of` says, mostly without reading again.

    It asks for the bit length of n plus the sum of integers that are each off by less than 1. The
    sum of the floats tells it, right to 2^-24, unless a power of two is that near.
    """
    n = weights.values.numel()
    first = SUM_BITS - (n - 1).bit_length() - math.frexp(most)[1]
    scaled = _times_two_to(total, first)
    low, high = scaled * (1 - 2.0**-24), scaled * (1 + 2.0**-24) + 2.0 * n
    if low > 1 and high < 2.0**62 and math.frexp(low)[1] == math.frexp(high)[1]:
        bits = math.frexp(low)[1]
    else:
        bits = (_prefix_sums(weights._replace(shift=first)) + n).bit_length()
    return first + SUM_BITS - bits


def _times_two_to(value: float, shift: int) -> float:
    try:
        return math.ldexp(value, shift)
    except OverflowError:
        return math.inf


def _prefix_sums(weights: IntegerWeights) -> int:
    """Fills ``weights.prefix``, and reads the total from the device."""
    device = weights.values.device
    memory = _scratch("prefix_sums", weights.values.numel(), device)
    _call("prefix_sums", device, *arguments(*weights), memory.data_ptr(), memory.numel())
    return int(weights.prefix[-1])


def integer_weights(weights: IntegerWeights) -> Tensor:
    """See :func:`fastis.kernels.reference.categorical.integer_weights`."""
    values = weights.values
    out = torch.empty(values.numel(), dtype=torch.int64, device=values.device)
    _call("integer_weights", values.device, *arguments(*weights), out.data_ptr())
    return out


def draw(weights: IntegerWeights, seed: int, first: int, count: int) -> Batch:
    """See :func:`fastis.kernels.reference.categorical.draw`."""
    batch, addresses = empty_batch(weights.prefix, count)
    draws = seed, first, count
    _call("categorical_draw", weights.values.device, *arguments(*weights), *draws, *addresses)
    return batch


def alias_build(weights: IntegerWeights) -> Tensor:
    """See :func:`fastis.kernels.reference.categorical.alias_build`."""
    device, n = weights.values.device, weights.values.numel()
    table = torch.empty((n, 2), dtype=torch.int64, device=device)
    before = torch.empty((-(-n // _TILE) + 1, 3), dtype=torch.int64, device=device)
    before[0] = 0
    memory = _scratch("alias_build", n, device)
    addresses = before.data_ptr(), table.data_ptr(), memory.data_ptr()
    _call("alias_build", device, *arguments(*weights), *addresses, memory.numel())
    return table


def alias_draw(table: Tensor, total: int, seed: int, first: int, count: int) -> Batch:
    """See :func:`fastis.kernels.reference.categorical.alias_draw`."""
    batch, addresses = empty_batch(table, count)
    where = table.data_ptr(), len(table), total, seed, first, count
    _call("alias_draw", table.device, *where, *addresses)
    return batch


def alias_inverse_cdf(table: Tensor, total: int, points: Tensor) -> Batch:
    """See :func:`fastis.kernels.reference.categorical.alias_inverse_cdf`."""
    count = points.numel()
    batch, addresses = empty_batch(table, count)
    where = table.data_ptr(), len(table), total, points.data_ptr(), count
    _call("alias_inverse_cdf", table.device, *where, *addresses)
    return batch


def random_below(total: int, seed: int, first: int, count: int, device: torch.device) -> Tensor:
    """See :func:`fastis.kernels.reference.categorical.random_below`."""
    out = torch.empty(count, dtype=torch.int64, device=device)
    _call("random_below", out.device, total, seed, first, count, out.data_ptr())
    return out
