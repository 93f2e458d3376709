"""The table on the CPU: csrc/cpu/{table_update,update_cap,table_draw}.cpp."""

from __future__ import annotations

from torch import Tensor

from fastis.kernels.extension import _C
from fastis.kernels.layout import Table
from fastis.kernels.table import Batch, Observation

IS_ATOMIC = True  # an update or a draw is one call, which holds the GIL


def update(table: Table, observation: Observation) -> None:
    """See :func:`fastis.kernels.reference.table.update`."""
    indices, weights, observed, score, mean_grad = observation
    _C.update(
        table.handle,
        indices.data_ptr(),
        weights.data_ptr(),
        observed.data_ptr(),
        score.data_ptr(),
        indices.numel(),
        0 if mean_grad is None else mean_grad.data_ptr(),
        0 if mean_grad is None else mean_grad.numel(),
    )


def refresh(table: Table, indices: Tensor, observed: Tensor) -> None:
    """See :func:`fastis.kernels.reference.table.refresh`."""
    addresses = indices.data_ptr(), 0, observed.data_ptr(), 0
    _C.update(table.handle, *addresses, indices.numel(), 0, 0)


def fold(table: Table, observation: Observation, iteration: int) -> None:
    """See :func:`fastis.kernels.reference.table.fold`."""
    indices, _, observed, _, _ = observation
    addresses = indices.data_ptr(), 0, observed.data_ptr(), 0, indices.numel(), 0, 0
    _C.fold(table.handle, *addresses, iteration)


def rescale(table: Table) -> None:
    """See :func:`fastis.kernels.reference.table.rescale`."""
    _C.rescale(table.handle)


def draw(table: Table, batch: Batch) -> None:
    """See :func:`fastis.kernels.reference.table.draw`."""
    indices, weights = batch
    _C.draw(table.handle, indices.data_ptr(), weights.data_ptr())


def update_and_draw(table: Table, observation: Observation, next_batch: Batch) -> None:
    """See :func:`fastis.kernels.reference.table.update_and_draw`."""
    update(table, observation)
    draw(table, next_batch)
