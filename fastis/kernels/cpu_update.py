"""The update on the CPU: csrc/cpu/update.cpp."""

from __future__ import annotations

from torch import Tensor

from fastis.kernels import _C
from fastis.table import Table


def in_range(indices: Tensor, num_samples: int) -> bool:
    """Are all indices (int64 [n]) in [0, num_samples)?"""
    return _C.in_range(indices.data_ptr(), indices.numel(), num_samples)


def update(
    table: Table,
    indices: Tensor,
    observed: Tensor,
    weights: Tensor,
    score: Tensor,
    mean_grad: Tensor | None,
) -> None:
    """See :func:`fastis.kernels.reference_update.update`."""
    _C.update(
        table.handle,
        indices.data_ptr(),
        observed.data_ptr(),
        weights.data_ptr(),
        score.data_ptr(),
        indices.numel(),
        0 if mean_grad is None else mean_grad.data_ptr(),
        0 if mean_grad is None else mean_grad.numel(),
    )
