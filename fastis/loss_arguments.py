"""Checks of what users pass to the losses; every complaint names the argument, the wish, the fact.

The public functions test one cheap condition on the hot path and come here to explain a failure or
to convert what was legal but not what the kernels take.
"""

from __future__ import annotations

import numbers
from typing import TypeAlias

import torch
from torch import Tensor

from fastis.dense import check_dense, unwrapped
from fastis.kernels.formats import compute_dtype

Denominator: TypeAlias = "float | Tensor | None"

DTYPES = frozenset({torch.float32, torch.float64, torch.bfloat16, torch.float16})
REDUCTIONS = frozenset({"mean", "sum", "none"})


def describe(value: object) -> str:
    """A short account of a value for error messages."""
    if isinstance(value, Tensor) and not value.is_nested:
        return f"{value.dtype} tensor of shape {list(value.shape)} on {value.device}"
    return f"{value!r} ({type(value).__name__})"


def check_logits(name: str, logits: Tensor, shapes: str, dims: tuple[int, ...]) -> None:
    """A floating tensor with an allowed number of dimensions."""
    if not isinstance(logits, Tensor):
        raise TypeError(f"{name} must be a tensor, got {describe(logits)}")
    if logits.dtype not in DTYPES:
        raise TypeError(
            f"{name} must be float32, float64, bfloat16 or float16, got {describe(logits)}"
        )
    if logits.dim() not in dims or (dims == (2, 3) and logits.shape[-1] == 0):
        raise ValueError(f"{name} must have shape {shapes}, got {describe(logits)}")


def check_reduction(name: str, reduction: str, allowed: frozenset[str] = REDUCTIONS) -> None:
    """One of the reductions."""
    if reduction not in allowed:
        raise ValueError(f"{name} must be one of {sorted(allowed)}, got {describe(reduction)}")


def same_device(name: str, tensor: Tensor, like: Tensor) -> None:
    """Tensors of one loss live on one device; moving them would be a hidden copy."""
    if tensor.device != like.device:
        raise ValueError(f"{name} must be on {like.device} like the logits, got {describe(tensor)}")


def constant(name: str, tensor: Tensor, shape: torch.Size, like: Tensor) -> Tensor:
    """A floating tensor of ``shape`` without gradient, in the compute dtype of ``like``."""
    if (
        type(tensor) is Tensor
        and tensor.dtype is compute_dtype(like.dtype)
        and tensor.shape == shape
        and tensor.device == like.device
        and not tensor.requires_grad
        and tensor.layout is torch.strided
        and tensor.is_contiguous()
    ):
        return tensor
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a tensor, got {describe(tensor)}")
    if tensor.dtype.is_complex or tensor.dtype == torch.bool:
        raise TypeError(f"{name} must be a tensor of real numbers, got {describe(tensor)}")
    tensor = unwrapped(check_dense(name, tensor))
    if tensor.shape != shape:
        raise ValueError(f"{name} must have shape {list(shape)}, got {describe(tensor)}")
    same_device(name, tensor, like)
    if tensor.requires_grad:
        raise ValueError(
            f"{name} must not require grad: these losses are differentiable in the logits only; "
            f"pass {name}.detach(), or use scored_loss"
        )
    return tensor.to(compute_dtype(like.dtype)).contiguous()


def class_target(logits: Tensor, target: Tensor) -> Tensor:
    """Class indices as int64 ``logits.shape[:-1]``, or probabilities like the logits."""
    if not isinstance(target, Tensor):
        raise TypeError(f"target must be a tensor, got {describe(target)}")
    if target.dtype.is_floating_point:
        return constant("target", target, logits.shape, logits)
    if target.dtype not in (torch.int64, torch.uint8):
        raise TypeError(
            "target must hold int64 class indices or floating-point class probabilities, "
            f"got {describe(target)}"
        )
    target = unwrapped(check_dense("target", target))
    if target.shape != logits.shape[:-1]:
        raise ValueError(
            f"target must have shape {list(logits.shape[:-1])} for logits of shape "
            f"{list(logits.shape)} (the class dimension is the last one), got {describe(target)}"
        )
    same_device("target", target, logits)
    return target.long()


def label_target(logits: Tensor, target: Tensor) -> Tensor:
    """A target of the logits' shape, in the compute dtype."""
    if isinstance(target, Tensor) and target.dtype == torch.bool:
        target = target.to(compute_dtype(logits.dtype))
    return constant("target", target, logits.shape, logits)


def pos_weights(logits: Tensor, pos_weight: Tensor | None) -> Tensor | None:
    """``[L]`` (one per label) or a single number, expanded to one per label."""
    if pos_weight is None:
        return None
    labels = logits.shape[1:]
    if isinstance(pos_weight, Tensor) and pos_weight.numel() == 1 and pos_weight.dim() <= 1:
        pos_weight = pos_weight.reshape(()).expand(labels)
    return constant("pos_weight", pos_weight, labels, logits).reshape(-1)


def class_options(
    logits: Tensor, class_weights: Tensor | None, ignore_index: int, label_smoothing: float
) -> Tensor | None:
    """Checks the options of cross-entropy and returns the class weights in the compute dtype."""
    if not isinstance(ignore_index, int) or not -(2**31) <= ignore_index < 2**31:
        raise ValueError(f"ignore_index must be a 32-bit integer, got {describe(ignore_index)}")
    if not isinstance(label_smoothing, numbers.Real) or not 0 <= label_smoothing <= 1:
        raise ValueError(f"label_smoothing must be in [0, 1], got {describe(label_smoothing)}")
    if class_weights is None:
        return None
    return constant("class_weights", class_weights, logits.shape[-1:], logits)


def check_denominator(denominator: Denominator, reduction: str, like: Tensor) -> Denominator:
    """A number, or a tensor of one number on the logits' device."""
    if denominator is None:
        return None
    if reduction != "mean":
        raise ValueError(
            f"denominator must be None with reduction={reduction!r}, got {describe(denominator)}"
        )
    if isinstance(denominator, Tensor):
        if denominator.numel() != 1:
            raise ValueError(f"denominator must be one number, got {describe(denominator)}")
        if denominator.device.type == "cpu" and like.device.type != "cpu":
            return float(denominator)
        return constant("denominator", denominator.reshape(()), torch.Size(()), like)
    if isinstance(denominator, bool) or not isinstance(denominator, numbers.Real):
        raise TypeError(f"denominator must be a number or a tensor, got {describe(denominator)}")
    return float(denominator)
