"""The loss column on the CPU: allocates the outputs and calls the compiled kernels.

Same functions, signatures and results as :mod:`fastis.kernels.reference.loss`.
"""

from __future__ import annotations

import functools
from math import nan

import torch
from torch import Tensor

from fastis import _C
from fastis.kernels.formats import FORMAT_CODES, Scored, compute_dtype, grad_dtype, raise_bad_label
from fastis.kernels.reference.loss import scale_grad as _multiply

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
    loss = _empty((), dtype=result) if reduce else _empty_like(losses)
    mean_grad = _empty(num_classes, dtype=result) if with_mean_grad else None
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
    return _multiply(grad, grad_output, dtype)


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
    batch, num_labels = logits.shape
    code, result, kept = _FORMATS[logits.dtype]
    losses = _empty(batch, dtype=result) if weights is None else _empty_like(weights)
    score = _empty_like(losses)
    loss = _empty((), dtype=result) if reduce else _empty_like(losses)
    mean_grad = _empty(num_labels, dtype=result) if with_mean_grad else None
    grad = _empty(logits.shape, dtype=kept) if with_grad else None
    _C.label_loss(
        kind,
        code,
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
