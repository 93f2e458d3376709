"""The loss column on the CPU: allocates the outputs and calls the compiled kernels.

The contract: :mod:`fastis.kernels.loss`.
"""

from __future__ import annotations

import functools
from math import nan

import torch
from torch import Tensor

from fastis.kernels.extension import _C
from fastis.kernels.formats import FORMAT_CODES, compute_dtype, grad_dtype
from fastis.kernels.loss import (
    CrossEntropyOptions,
    ElementwiseOptions,
    Scored,
    Wanted,
    raise_bad_label,
    scaled,
)

# Of the logits: code of the format, dtype of the results, dtype of the gradient.
_FORMATS = {
    dtype: (code, compute_dtype(dtype), grad_dtype(dtype))
    for dtype, code in FORMAT_CODES.items()
    if dtype.is_floating_point
}
# Elements from which a second thread was measured to win.
_PARALLEL_ELEMENTS = 1 << 18

# Looked up once: at a batch of 128 the calls around the kernel cost more than the kernel.
_empty = functools.partial(torch.empty, device=torch.device("cpu"))  # whatever the default is
_empty_like = torch.empty_like
_float32 = torch.float32
_int64 = torch.int64
_is_one = _C.is_one
_cross_entropy = _C.cross_entropy


def cross_entropy(
    logits: Tensor,
    target: Tensor,
    weights: Tensor | None,
    options: CrossEntropyOptions,
    wanted: Wanted,
) -> Scored:
    """Rows of unit column stride are read where they lie; other strides are copied first."""
    class_weights, ignore_index, label_smoothing = options
    denominator, reduce, with_grad, with_mean_grad = wanted
    shape = logits.shape
    tokens = 1
    if len(shape) == 2:
        batch, num_classes = shape
    else:
        batch, tokens, num_classes = shape
        logits = logits.detach().reshape(batch * tokens, num_classes)
    dense = logits.is_contiguous()
    if not dense and num_classes > 1 and logits.stride(1) != 1:
        logits = logits.contiguous()
    dtype = logits.dtype
    code, result, kept = _FORMATS[dtype]
    losses = _empty(batch, dtype=result) if weights is None else _empty_like(weights)
    score = _empty_like(losses)
    loss = losses.new_empty(()) if reduce else _empty_like(losses)
    mean_grad = losses.new_empty(num_classes) if with_mean_grad else None
    grad = None
    if with_grad:
        like = dense and kept is dtype and len(shape) == 2
        grad = _empty_like(logits) if like else _empty(shape, dtype=kept)
    target = target.contiguous()
    labels = target.data_ptr()
    by_index = target.dtype is _int64
    elements = batch * tokens * num_classes
    bad_row = _cross_entropy(
        code,
        logits.data_ptr(),
        num_classes if dense else logits.stride(0),
        labels if by_index else 0,
        0 if by_index else labels,
        0 if weights is None else weights.data_ptr(),
        0 if class_weights is None else class_weights.data_ptr(),
        batch,
        tokens,
        num_classes,
        ignore_index,
        label_smoothing,
        1.0 if not reduce else nan if denominator is None else float(denominator),
        reduce,
        0 if grad is None else grad.data_ptr(),
        loss.data_ptr(),
        losses.data_ptr(),
        score.data_ptr(),
        0 if mean_grad is None else mean_grad.data_ptr(),
        1 if elements < _PARALLEL_ELEMENTS else torch.get_num_threads(),
    )
    if bad_row >= 0:
        raise_bad_label(target.view(-1), bad_row, num_classes)
    return loss, losses, score, mean_grad, grad


def binary_cross_entropy_with_logits(
    logits: Tensor,
    target: Tensor,
    weights: Tensor | None,
    options: ElementwiseOptions,
    wanted: Wanted,
) -> Scored:
    """Strides other than contiguous ones are copied first."""
    return _elementwise(0, logits, target, weights, options, wanted)


def mse_loss(
    prediction: Tensor,
    target: Tensor,
    weights: Tensor | None,
    options: ElementwiseOptions,
    wanted: Wanted,
) -> Scored:
    """Strides other than contiguous ones are copied first."""
    return _elementwise(1, prediction, target, weights, options, wanted)


def scale_grad(grad: Tensor, grad_output: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """``grad`` times ``grad_output``: ``grad`` itself where that is exactly 1."""
    if dtype is None and grad_output.dim() == 0:
        if grad_output.dtype is _float32:
            try:
                if _is_one(grad_output.data_ptr()) and not grad_output.is_neg():
                    return grad
            except RuntimeError:  # within torch.func.vmap there is no memory to look at
                pass
        elif grad_output.item() == 1:
            return grad
    return scaled(grad, grad_output, dtype)


def _elementwise(
    kind: int,  # ElementwiseLoss::Kind
    logits: Tensor,
    target: Tensor,
    weights: Tensor | None,
    options: ElementwiseOptions,
    wanted: Wanted,
) -> Scored:
    pos_weight, divisor = options
    denominator, reduce, with_grad, with_mean_grad = wanted
    logits, target = logits.contiguous(), target.contiguous()
    batch, outputs = logits.shape
    code, result, kept = _FORMATS[logits.dtype]
    losses = _empty(batch, dtype=result) if weights is None else _empty_like(weights)
    score = _empty_like(losses)
    loss = losses.new_empty(()) if reduce else _empty_like(losses)
    mean_grad = losses.new_empty(outputs) if with_mean_grad else None
    grad = _empty(logits.shape, dtype=kept) if with_grad else None
    _C.elementwise_loss(
        kind,
        code,
        logits.data_ptr(),
        target.data_ptr(),
        0 if weights is None else weights.data_ptr(),
        0 if pos_weight is None else pos_weight.data_ptr(),
        batch,
        outputs,
        divisor,
        1.0 if not reduce or denominator is None else float(denominator),
        reduce,
        0 if grad is None else grad.data_ptr(),
        loss.data_ptr(),
        losses.data_ptr(),
        score.data_ptr(),
        0 if mean_grad is None else mean_grad.data_ptr(),
        1 if batch * outputs < _PARALLEL_ELEMENTS else torch.get_num_threads(),
    )
    return loss, losses, score, mean_grad, grad
