"""The loss column on the CPU: allocates the outputs and calls the compiled kernels.

Same functions, signatures and results as :mod:`fastis.kernels.reference_loss`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastis import _C
from fastis.kernels.reference_loss import Scored, compute_dtype, grad_dtype, raise_bad_label
from fastis.kernels.reference_loss import scale_grad as _multiply

__all__ = [
    "binary_cross_entropy_with_logits",
    "compute_dtype",
    "cross_entropy",
    "grad_dtype",
    "mse_loss",
    "scale_grad",
]

_FORMATS = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
# Elements from which a second thread was measured to win.
_PARALLEL_ELEMENTS = 1 << 16

_empty = torch.empty
_float32 = torch.float32


def _pointer(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _threads(elements: int) -> int:
    return 1 if elements < _PARALLEL_ELEMENTS else torch.get_num_threads()


def cross_entropy(
    logits: Tensor,
    target: Tensor,
    weights: Tensor | None,
    class_weights: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    denominator: float | Tensor | None,
    reduce: bool,
    with_grad: bool,
    with_mean_grad: bool,
) -> Scored:
    """Rows of unit column stride are read where they lie; other strides are copied first."""
    shape = logits.shape
    batch, num_classes = shape[0], shape[-1]
    tokens = 1
    if len(shape) == 3:
        tokens = shape[1]
        logits = logits.reshape(-1, num_classes)
    if not logits.is_contiguous() and (num_classes > 1 and logits.stride(1) != 1):
        logits = logits.contiguous()
    dtype = logits.dtype
    loss, losses, score, mean_grad = _outputs(dtype, batch, num_classes, reduce, with_mean_grad)
    grad = _empty(shape, dtype=grad_dtype(dtype)) if with_grad else None
    target = target.contiguous()
    by_index = target.dtype is torch.int64
    labels = target.data_ptr()
    bad_row = _C.cross_entropy(
        _FORMATS[dtype],
        logits.data_ptr(),
        logits.stride(0),
        labels if by_index else 0,
        0 if by_index else labels,
        0 if weights is None else weights.data_ptr(),
        0 if class_weights is None else class_weights.data_ptr(),
        batch,
        tokens,
        num_classes,
        ignore_index,
        label_smoothing,
        (math.nan if denominator is None else float(denominator)) if reduce else 1.0,
        reduce,
        0 if grad is None else grad.data_ptr(),
        loss.data_ptr(),
        losses.data_ptr(),
        score.data_ptr(),
        0 if mean_grad is None else mean_grad.data_ptr(),
        _threads(batch * tokens * num_classes),
    )
    if bad_row >= 0:
        raise_bad_label(target.view(-1), bad_row, num_classes)
    return loss, losses, score, mean_grad, grad


def binary_cross_entropy_with_logits(
    logits: Tensor,
    target: Tensor,
    weights: Tensor | None,
    pos_weight: Tensor | None,
    divisor: float,
    denominator: float | Tensor,
    reduce: bool,
    with_grad: bool,
    with_mean_grad: bool,
) -> Scored:
    """Binary cross-entropy of ``[B, L]`` logits; a sample's sum over labels is over ``divisor``."""
    return _label_loss(
        0, logits, target, weights, pos_weight, divisor, denominator, reduce, with_grad,
        with_mean_grad,
    )  # fmt: skip


def mse_loss(
    prediction: Tensor,
    target: Tensor,
    weights: Tensor | None,
    divisor: float,
    denominator: float | Tensor,
    reduce: bool,
    with_grad: bool,
    with_mean_grad: bool,
) -> Scored:
    """Squared error of ``[B, L]``; a sample's sum is over ``divisor``."""
    return _label_loss(
        1, prediction, target, weights, None, divisor, denominator, reduce, with_grad,
        with_mean_grad,
    )  # fmt: skip


def scale_grad(grad: Tensor, grad_output: Tensor, dtype: torch.dtype) -> Tensor:
    """``grad`` times ``grad_output`` in ``dtype``: ``grad`` itself where that is exactly 1."""
    if grad.dtype is dtype and grad_output.dim() == 0:
        if grad_output.dtype is _float32:
            if _C.is_one(grad_output.data_ptr()):
                return grad
        elif grad_output.item() == 1:
            return grad
    return _multiply(grad, grad_output, dtype)


def _outputs(
    dtype: torch.dtype, batch: int, columns: int, reduce: bool, with_mean_grad: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """loss, losses, score and mean_grad, uninitialised."""
    dtype = compute_dtype(dtype)
    return (
        _empty((), dtype=dtype) if reduce else _empty(batch, dtype=dtype),
        _empty(batch, dtype=dtype),
        _empty(batch, dtype=dtype),
        _empty(columns, dtype=dtype) if with_mean_grad else None,
    )


def _label_loss(
    kind: int,
    logits: Tensor,
    target: Tensor,
    weights: Tensor | None,
    pos_weight: Tensor | None,
    divisor: float,
    denominator: float | Tensor,
    reduce: bool,
    with_grad: bool,
    with_mean_grad: bool,
) -> Scored:
    logits, target = logits.contiguous(), target.contiguous()
    dtype = logits.dtype
    batch, num_labels = logits.shape
    loss, losses, score, mean_grad = _outputs(dtype, batch, num_labels, reduce, with_mean_grad)
    grad = _empty(logits.shape, dtype=grad_dtype(dtype)) if with_grad else None
    _C.label_loss(
        kind,
        _FORMATS[dtype],
        logits.data_ptr(),
        target.data_ptr(),
        _pointer(weights),
        _pointer(pos_weight),
        batch,
        num_labels,
        divisor,
        float(denominator) if reduce else 1.0,
        reduce,
        _pointer(grad),
        loss.data_ptr(),
        losses.data_ptr(),
        score.data_ptr(),
        _pointer(mean_grad),
        _threads(batch * num_labels),
    )
    return loss, losses, score, mean_grad, grad
