"""The update on a GPU: csrc/cuda/sampler.cu, one launch, no host synchronisation."""

from __future__ import annotations

import torch
from torch import Tensor

from fastis.kernels import _C
from fastis.table import Table

# Of the current stream, by the device's index; absent where torch was built without CUDA.
stream_of = getattr(torch._C, "_cuda_getCurrentRawStream", None)


def check(error: int) -> None:
    """Raises what a launch reported."""
    if error:
        raise RuntimeError(f"a CUDA launch of fastis failed: {_C.cuda_error_string(error)}")


def update(
    table: Table,
    indices: Tensor,
    observed: Tensor,
    weights: Tensor,
    score: Tensor,
    mean_grad: Tensor | None,
) -> bool:
    """See :func:`fastis.kernels.reference_update.update`. Indices out of range are left out."""
    if indices.numel() == 0:
        return True
    device = table.device.index
    check(
        _C.cuda_update(
            table.device_handle,
            indices.data_ptr(),
            observed.data_ptr(),
            weights.data_ptr(),
            score.data_ptr(),
            indices.numel(),
            0 if mean_grad is None else mean_grad.data_ptr(),
            0 if mean_grad is None else mean_grad.numel(),
            device,
            stream_of(device),
        )
    )
    return True
