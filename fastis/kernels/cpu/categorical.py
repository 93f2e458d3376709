"""Draws from given weights on the CPU: csrc/cpu/{categorical,alias_*}.cpp."""

from __future__ import annotations

import torch
from torch import Tensor

from fastis.kernels.extension import _C
from fastis.kernels.memory import empty
from fastis.kernels.quantize import Weights

# Of given weights: code of the format.
_FORMATS = {
    torch.float32: 0,
    torch.float64: 1,
    torch.bfloat16: 2,
    torch.float16: 3,
    torch.int64: 4,
}
_GROUP = 64  # weights to one of the running sums
# Weights from which there are several threads. Fewer take 0.2 ms to weigh: what a busy core may
# keep the others waiting is more.
_PARALLEL_WEIGHTS = 1 << 20


def _threads(n: int) -> int:
    return 1 if n < _PARALLEL_WEIGHTS else torch.get_num_threads()


def weigh(values: Tensor) -> Weights | None:
    """See :func:`fastis.kernels.reference.categorical.weigh`; one running sum for 64 weights."""
    n = values.numel()
    ends = values.new_empty(-(-n // _GROUP), dtype=torch.int64)
    found = values.new_empty(2, dtype=torch.int64)
    code = _FORMATS[values.dtype]
    if not _C.weigh(code, values.data_ptr(), n, _threads(n), ends.data_ptr(), found.data_ptr()):
        return None
    shift, total = found.tolist()
    return Weights(values, shift, total, ends)


def integers(weights: Weights) -> Tensor:
    """See :func:`fastis.kernels.reference.categorical.integers`."""
    values, n = weights.values, weights.values.numel()
    out = empty((n,), torch.int64, values.device)
    code = _FORMATS[values.dtype]
    _C.integers(code, values.data_ptr(), n, weights.shift, _threads(n), out.data_ptr())
    return out


def search(weights: Weights, seed: int, first: int, count: int) -> tuple[Tensor, Tensor]:
    """See :func:`fastis.kernels.reference.categorical.search`."""
    indices = weights.ends.new_empty(count)
    coefficients = weights.ends.new_empty(count, dtype=torch.float32)
    _C.search(
        _FORMATS[weights.values.dtype],
        weights.values.data_ptr(),
        weights.values.numel(),
        weights.shift,
        weights.ends.data_ptr(),
        weights.total,
        seed,
        first,
        count,
        indices.data_ptr(),
        coefficients.data_ptr(),
    )
    return indices, coefficients


def alias_build(weights: Weights) -> Tensor:
    """See :func:`fastis.kernels.reference.categorical.alias_build`."""
    values, n = weights.values, weights.values.numel()
    table = empty((n, 2), torch.int64, values.device)
    _C.alias_build(
        _FORMATS[values.dtype],
        values.data_ptr(),
        n,
        weights.shift,
        weights.total,
        _threads(n),
        table.data_ptr(),
    )
    return table


def alias_draw(
    table: Tensor, total: int, seed: int, first: int, count: int
) -> tuple[Tensor, Tensor]:
    """See :func:`fastis.kernels.reference.categorical.alias_draw`."""
    indices = table.new_empty(count)
    coefficients = table.new_empty(count, dtype=torch.float32)
    _C.alias_draw(
        table.data_ptr(),
        len(table),
        total,
        seed,
        first,
        count,
        indices.data_ptr(),
        coefficients.data_ptr(),
    )
    return indices, coefficients


def alias_resolve(table: Tensor, total: int, points: Tensor) -> tuple[Tensor, Tensor]:
    """See :func:`fastis.kernels.reference.categorical.alias_resolve`."""
    indices = torch.empty_like(points)
    coefficients = points.new_empty(points.shape, dtype=torch.float32)
    _C.alias_resolve(
        table.data_ptr(),
        len(table),
        total,
        points.data_ptr(),
        points.numel(),
        indices.data_ptr(),
        coefficients.data_ptr(),
    )
    return indices, coefficients


def draw_points(total: int, seed: int, first: int, count: int, device: torch.device) -> Tensor:
    """See :func:`fastis.kernels.reference.categorical.draw_points`."""
    points = torch.empty(count, dtype=torch.int64, device=device)
    _C.draw_points(total, seed, first, count, points.data_ptr())
    return points
