"""The update on a GPU: csrc/cuda/sampler.cu, one launch, no host synchronisation."""

from __future__ import annotations

from torch import Tensor

from fastis.kernels import _C
from fastis.kernels.cuda_launch import launch, minibatch
from fastis.table import Table


def update(
    table: Table,
    indices: Tensor,
    observed: Tensor,
    weights: Tensor,
    score: Tensor,
    mean_grad: Tensor | None,
) -> bool:
    """See :func:`fastis.kernels.reference_update.update`. Indices out of range are left out."""
    if indices.numel() > 0:
        launch(
            _C.cuda_update,
            table.device,
            table.device_handle,
            *minibatch(indices, observed, weights, score, mean_grad),
        )
    return True


def rescale(table: Table) -> None:
    """See :func:`fastis.kernels.reference_update.rescale`."""
    launch(_C.cuda_rescale, table.device, table.device_handle)
