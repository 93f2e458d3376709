"""The update on the CPU: csrc/cpu/update.cpp."""

from __future__ import annotations

from torch import Tensor

from fastis.kernels import _C
from fastis.table import Table


def update(
    table: Table,
    indices: Tensor,
    observed: Tensor,
    weights: Tensor,
    score: Tensor,
    mean_grad: Tensor | None,
) -> bool:
    """See :func:`fastis.kernels.reference_update.update`."""
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
    """See :func:`fastis.kernels.reference_update.rescale`."""
    _C.rescale(table.handle)
