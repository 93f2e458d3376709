"""Draws on a GPU: csrc/cuda/sampler.cu, one launch, no host synchronisation."""

from __future__ import annotations

from torch import Tensor

from fastis.kernels import _C, cuda_update
from fastis.kernels.cuda_launch import launch, minibatch
from fastis.kernels.cuda_weights import (
    alias_build,
    alias_draw,
    alias_resolve,
    draw_points,
    integers,
    search,
    weigh,
)
from fastis.kernels.reference_sample import locate
from fastis.table import Table

__all__ = [
    "alias_build",
    "alias_draw",
    "alias_resolve",
    "draw",
    "draw_points",
    "integers",
    "locate",
    "search",
    "update_and_draw",
    "weigh",
]


def draw(table: Table, indices: Tensor, weights: Tensor) -> None:
    """See :func:`fastis.kernels.reference_sample.draw`."""
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
    """See :func:`fastis.kernels.reference_sample.update_and_draw`: one launch.

    Indices out of range are left out.
    """
    if indices.numel() == 0:
        cuda_update.update(table, indices, observed, weights, score, mean_grad)
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
