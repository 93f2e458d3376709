"""Draws from given weights on a GPU: csrc/cuda/{categorical,alias}.cu.

What the host has to know of the weights it reads twice: how large they are, for the shift, then
their total in integers. Everything else stays on the device.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastis.kernels.cuda.launch import failure, launch
from fastis.kernels.extension import _C
from fastis.kernels.layout import SUM_BITS
from fastis.kernels.quantize import Weights

_TILE = 256  # weights to one of the running sums (kTile of csrc/device/categorical.h)
_ALIGNMENT = 16  # bytes: four weights are read by one access
# Codes of the formats, as csrc/cpu/entry_points.h lists them.
_FORMATS = {
    torch.float32: 0,
    torch.float64: 1,
    torch.bfloat16: 2,
    torch.float16: 3,
    torch.int64: 4,
}


def _call(name: str, device: torch.device, *arguments: int) -> None:
    launch(getattr(_C, f"cuda_{name}"), device, *arguments)


def _scratch(name: str, n: int, device: torch.device) -> Tensor:
    """uint8: what the launch of that name needs besides its arguments, for n weights."""
    size = getattr(_C, f"cuda_{name}_bytes")(n, device.index)
    if size < 0:
        raise failure(-size)
    return torch.empty(size, dtype=torch.uint8, device=device)


def _described(values: Tensor) -> tuple[int, int, int]:
    return _FORMATS[values.dtype], values.data_ptr(), values.numel()


def weigh(values: Tensor) -> Weights | None:
    """See :func:`fastis.kernels.reference.categorical.weigh`; one running sum for 256 weights."""
    if values.data_ptr() % _ALIGNMENT:
        values = values.clone()
    shift = 0
    if values.is_floating_point():
        found = torch.zeros(3, dtype=torch.int64, device=values.device)
        _call("survey", values.device, *_described(values), found.data_ptr())
        found = found.cpu()
        (most, total), unusable = found[:2].view(torch.float64).tolist(), int(found[2])
        if unusable or most == 0:
            return None
        shift = _shift_of(values, most, total)
    ends = _running_sums(values, shift)
    return Weights(values, shift, int(ends[-1]), ends)


def _shift_of(values: Tensor, most: float, total: float) -> int:
    """What :func:`fastis.kernels.quantize.shift_of` says, mostly without reading again.

    It asks for the bit length of n plus the sum of integers that are each off by less than 1. The
    sum of the floats tells it, right to 2^-24, unless a power of two is that near.
    """
    n = values.numel()
    first = SUM_BITS - (n - 1).bit_length() - math.frexp(most)[1]
    scaled = _times_two_to(total, first)
    low, high = scaled * (1 - 2.0**-24), scaled * (1 + 2.0**-24) + 2.0 * n
    if low > 1 and high < 2.0**62 and math.frexp(low)[1] == math.frexp(high)[1]:
        bits = math.frexp(low)[1]
    else:
        bits = (int(_running_sums(values, first)[-1]) + n).bit_length()
    return first + SUM_BITS - bits


def _times_two_to(value: float, shift: int) -> float:
    try:
        return math.ldexp(value, shift)
    except OverflowError:
        return math.inf


def _running_sums(values: Tensor, shift: int) -> Tensor:
    """int64 [ceil(N / 256)]: running sums of the integers, by tiles."""
    n, device = values.numel(), values.device
    ends = torch.empty(-(-n // _TILE), dtype=torch.int64, device=device)
    memory = _scratch("running_sums", n, device)
    where = ends.data_ptr(), memory.data_ptr(), memory.numel()
    _call("running_sums", device, *_described(values), shift, *where)
    return ends


def integers(weights: Weights) -> Tensor:
    """See :func:`fastis.kernels.reference.categorical.integers`."""
    values = weights.values
    out = torch.empty(values.numel(), dtype=torch.int64, device=values.device)
    _call("integers", values.device, *_described(values), weights.shift, out.data_ptr())
    return out


def search(weights: Weights, seed: int, first: int, count: int) -> tuple[Tensor, Tensor]:
    """See :func:`fastis.kernels.reference.categorical.search`."""
    values, drawn = weights.values, _empty_draws(count, weights.values.device)
    _call(
        "search",
        values.device,
        *_described(values),
        weights.shift,
        weights.ends.data_ptr(),
        weights.total,
        seed,
        first,
        count,
        *(part.data_ptr() for part in drawn),
    )
    return drawn


def alias_build(weights: Weights) -> Tensor:
    """See :func:`fastis.kernels.reference.categorical.alias_build`."""
    values, device, n = weights.values, weights.values.device, weights.values.numel()
    table = torch.empty((n, 2), dtype=torch.int64, device=device)
    before = torch.empty((-(-n // _TILE) + 1, 3), dtype=torch.int64, device=device)
    before[0] = 0
    memory = _scratch("alias_build", n, device)
    _call(
        "alias_build",
        device,
        *_described(values),
        weights.shift,
        weights.total,
        before.data_ptr(),
        table.data_ptr(),
        memory.data_ptr(),
        memory.numel(),
    )
    return table


def alias_draw(
    table: Tensor, total: int, seed: int, first: int, count: int
) -> tuple[Tensor, Tensor]:
    """See :func:`fastis.kernels.reference.categorical.alias_draw`."""
    drawn = _empty_draws(count, table.device)
    of_table = table.data_ptr(), len(table), total
    where = (part.data_ptr() for part in drawn)
    _call("alias_draw", table.device, *of_table, seed, first, count, *where)
    return drawn


def alias_resolve(table: Tensor, total: int, points: Tensor) -> tuple[Tensor, Tensor]:
    """See :func:`fastis.kernels.reference.categorical.alias_resolve`."""
    count = points.numel()
    drawn = _empty_draws(count, table.device)
    of_table = table.data_ptr(), len(table), total
    where = (part.data_ptr() for part in drawn)
    _call("alias_resolve", table.device, *of_table, points.data_ptr(), count, *where)
    return drawn


def draw_points(total: int, seed: int, first: int, count: int, device: torch.device) -> Tensor:
    """See :func:`fastis.kernels.reference.categorical.draw_points`."""
    points = torch.empty(count, dtype=torch.int64, device=device)
    _call("draw_points", points.device, total, seed, first, count, points.data_ptr())
    return points


def _empty_draws(count: int, device: torch.device) -> tuple[Tensor, Tensor]:
    indices = torch.empty(count, dtype=torch.int64, device=device)
    return indices, torch.empty(count, dtype=torch.float32, device=device)
