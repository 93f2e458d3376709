"""The backward pass of a loss on a GPU: csrc/cuda/scale.cu, one launch, no host synchronisation."""

from __future__ import annotations

import torch
from torch import Tensor

from fastis.kernels.cuda.launch import launch
from fastis.kernels.extension import _C
from fastis.kernels.formats import FORMAT_CODES


def scale(grad: Tensor, grad_output: Tensor, out: Tensor) -> Tensor:
    """``out = grad * grad_output``; in place (``out is grad``) a 0-d 1 changes nothing.

    ``grad`` and ``out`` are contiguous and not empty: float32, float64 or bfloat16 and the same, or
    float32 and float16, as gradients wait (:func:`fastis.kernels.formats.grad_dtype`).
    ``grad_output`` is 0-d or ``[B]``, any strides.
    """
    dtype = grad.dtype
    wide = torch.float64 if dtype is torch.float64 else torch.float32
    if grad_output.dtype is not wide:
        grad_output = grad_output.to(wide)
    size = grad.numel()
    rows, stride = (1, 0) if grad_output.dim() == 0 else (len(grad), grad_output.stride(0))
    launch(
        _C.cuda_scale_grad,
        grad.device,
        FORMAT_CODES[dtype],
        FORMAT_CODES[out.dtype],
        grad.data_ptr(),
        out.data_ptr(),
        grad_output.data_ptr(),
        rows,
        size // rows,
        stride,
    )
    return out
