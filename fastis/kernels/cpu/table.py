"""The table on the CPU: csrc/cpu/{table_update,update_cap,table_draw}.cpp."""

from __future__ import annotations

from torch import Tensor

from fastis.kernels.extension import _C
from fastis.kernels.layout import Table


def update(
    table: Table,
    indices: Tensor,
    observed: Tensor,
    weights: Tensor,
    score: Tensor,
    mean_grad: Tensor | None,
) -> bool:
    """See :func:`fastis.kernels.reference.table.update`."""
    return _C.update(
        table.handle,
        indices.data_ptr(),
        observed.data_ptr(),
        weights.data_ptr(),
        score.data_ptr(),
        indices.numel(),
        0 if mean_grad is None else mean_grad.data_ptr(),
        0 if mean_grad is None else mean_grad.numel(),
    )


def rescale(table: Table) -> None:
    """See :func:`fastis.kernels.reference.table.rescale`."""
    _C.rescale(table.handle)


def draw(table: Table, indices: Tensor, weights: Tensor) -> None:
    """See :func:`fastis.kernels.reference.table.draw`."""
    _C.draw(table.handle, indices.data_ptr(), weights.data_ptr())


def update_and_draw(
    table: Table,
    indices: Tensor,
    observed: Tensor,
    weights: Tensor,
    score: Tensor,
    mean_grad: Tensor | None,
    next_indices: Tensor,
    next_weights: Tensor,
) -> bool:
    """See :func:`fastis.kernels.reference.table.update_and_draw`."""
    if not update(table, indices, observed, weights, score, mean_grad):
        return False
    draw(table, next_indices, next_weights)
    return True
