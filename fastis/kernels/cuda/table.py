"""The table on a GPU: csrc/cuda/table.cu, one launch, no host synchronisation."""

from __future__ import annotations

from torch import Tensor

from fastis.kernels.cuda.launch import launch, minibatch
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
    """See :func:`fastis.kernels.reference.table.update`. Indices out of range are left out."""
    if indices.numel() > 0:
        launch(
            _C.cuda_update,
            table.device,
            table.device_handle,
            *minibatch(indices, observed, weights, score, mean_grad),
        )
    return True


def rescale(table: Table) -> None:
    """See :func:`fastis.kernels.reference.table.rescale`."""
    launch(_C.cuda_rescale, table.device, table.device_handle)


def draw(table: Table, indices: Tensor, weights: Tensor) -> None:
    """See :func:`fastis.kernels.reference.table.draw`."""
    addresses = table.device_handle, indices.data_ptr(), weights.data_ptr()
    launch(_C.cuda_draw, table.device, *addresses)


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
    """See :func:`fastis.kernels.reference.table.update_and_draw`: one launch.

    Indices out of range are left out.
    """
    if indices.numel() == 0:
        update(table, indices, observed, weights, score, mean_grad)
        draw(table, next_indices, next_weights)
        return True
    launch(
        _C.cuda_update_and_draw,
        table.device,
        table.device_handle,
        *minibatch(indices, observed, weights, score, mean_grad),
        next_indices.data_ptr(),
        next_weights.data_ptr(),
    )
    return True
