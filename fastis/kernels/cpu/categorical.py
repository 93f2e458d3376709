"""Draws from fixed weights on the CPU: csrc/cpu/{categorical,alias_*}.cpp."""

from __future__ import annotations

import torch
from torch import Tensor

from fastis.kernels.extension import _C
from fastis.kernels.memory import empty
from fastis.kernels.quantize import IntegerWeights, arguments
from fastis.kernels.table import Batch, empty_batch

_GROUP = 64  # weights to one of the prefix sums
# Weights from which there are several threads. Fewer take 0.2 ms to quantize: what a busy core may
# keep the others waiting is more.
_PARALLEL_WEIGHTS = 1 << 20


def _threads(n: int) -> int:
    return 1 if n < _PARALLEL_WEIGHTS else torch.get_num_threads()


def quantize(values: Tensor) -> IntegerWeights | None:
    """See :func:`fastis.kernels.reference.categorical.quantize`; prefix sums over 64 weights."""
    n = values.numel()
    prefix = values.new_empty(-(-n // _GROUP), dtype=torch.int64)
    found = values.new_empty(2, dtype=torch.int64)
    if not _C.quantize(*arguments(values, 0, 0, prefix), _threads(n), found.data_ptr()):
        return None
    shift, total = found.tolist()
    return IntegerWeights(values, shift, total, prefix)


def integer_weights(weights: IntegerWeights) -> Tensor:
    """See :func:`fastis.kernels.reference.categorical.integer_weights`."""
    n = weights.values.numel()
    out = empty((n,), torch.int64, weights.values.device)
    _C.integer_weights(*arguments(*weights), _threads(n), out.data_ptr())
    return out


def draw(weights: IntegerWeights, seed: int, first: int, count: int) -> Batch:
    """See :func:`fastis.kernels.reference.categorical.draw`."""
    prefix = weights.prefix
    indices, r = prefix.new_empty(count), prefix.new_empty(count, dtype=torch.float32)
    addresses = indices.data_ptr(), r.data_ptr()
    _C.categorical_draw(*arguments(*weights), seed, first, count, *addresses)
    return Batch(indices, r)


def alias_build(weights: IntegerWeights) -> Tensor:
    """See :func:`fastis.kernels.reference.categorical.alias_build`."""
    n = weights.values.numel()
    table = empty((n, 2), torch.int64, weights.values.device)
    _C.alias_build(*arguments(*weights), _threads(n), table.data_ptr())
    return table


def alias_draw(table: Tensor, total: int, seed: int, first: int, count: int) -> Batch:
    """See :func:`fastis.kernels.reference.categorical.alias_draw`."""
    indices, weights = table.new_empty(count), table.new_empty(count, dtype=torch.float32)
    _C.alias_draw(
        table.data_ptr(),
        len(table),
        total,
        seed,
        first,
        count,
        indices.data_ptr(),
        weights.data_ptr(),
    )
    return Batch(indices, weights)


def alias_inverse_cdf(table: Tensor, total: int, points: Tensor) -> Batch:
    """See :func:`fastis.kernels.reference.categorical.alias_inverse_cdf`."""
    count = points.numel()
    batch, addresses = empty_batch(table, count)
    where = table.data_ptr(), len(table), total, points.data_ptr(), count
    _C.alias_inverse_cdf(*where, *addresses)
    return batch


def random_below(total: int, seed: int, first: int, count: int, device: torch.device) -> Tensor:
    """See :func:`fastis.kernels.reference.categorical.random_below`."""
    out = torch.empty(count, dtype=torch.int64, device=device)
    _C.random_below(total, seed, first, count, out.data_ptr())
    return out
