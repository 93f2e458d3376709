"""The update on a GPU: csrc/cuda/sampler.cu, one launch, no host synchronisation.

To rescale for states written from outside, the reference's operations serve (they synchronise).
"""

from __future__ import annotations

from torch import Tensor

from fastis.kernels import _C
from fastis.kernels.cuda_launch import launch, minibatch
from fastis.kernels.reference_update import rescale
from fastis.table import Table

__all__ = ["rescale", "update"]


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
