"""Weighted batch normalisation on the CPU: one compiled call forward, one backward.

Same functions, signatures and results as :mod:`fastis.kernels.reference.batch_norm`, which serves
what the kernels don't: float16, and statistics that several processes share.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.parameter import Parameter

from fastis.kernels.batch_norm import Merge, Running
from fastis.kernels.extension import _C
from fastis.kernels.formats import FORMAT_CODES
from fastis.kernels.reference import batch_norm as reference

_CODES = {d: FORMAT_CODES[d] for d in (torch.float32, torch.float64, torch.bfloat16)}
_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}
_PLAIN = (Tensor, Parameter)
# Elements from which several threads are used, as by the losses.
_PARALLEL_ELEMENTS = 1 << 18
_STILL = (0, 0, 0, 0.0)


def forward(
    x: Tensor,
    share: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    running: Running | None = None,
    merge: Merge | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """``y``, in the memory format of ``x``, mean and variance; moves what is ``running``."""
    code = _CODES.get(x.dtype)
    if code is None or merge is not None:
        return reference.forward(x, share, weight, bias, eps, running, merge)
    weight, bias = _readable("weight", weight), _readable("bias", bias)
    moved = running is not None and _is_moved(running, share.dtype)
    x, last = _laid_out(x)
    y = torch.empty_like(x)
    mean = share.new_empty(x.shape[1])
    var = torch.empty_like(mean)
    _C.batch_norm_forward(
        code,
        *_shape(x, last),
        x.data_ptr(),
        share.data_ptr(),
        0 if weight is None else weight.data_ptr(),
        0 if bias is None else bias.data_ptr(),
        eps,
        *(_moving(running) if running is not None and moved else _STILL),
        mean.data_ptr(),
        var.data_ptr(),
        y.data_ptr(),
        _threads(x),
    )
    if running is not None and not moved:
        running.move(mean, var)
    return y, mean, var


def backward(
    grad_output: Tensor,
    x: Tensor,
    share: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    var: Tensor,
    eps: float,
    with_input: bool,
    merge: Merge | None = None,
) -> tuple[Tensor | None, Tensor, Tensor]:
    """Gradients in ``x`` (None unless ``with_input``), ``weight`` and ``bias``."""
    code = _CODES.get(x.dtype)
    if code is None or merge is not None:
        return reference.backward(grad_output, x, share, weight, mean, var, eps, with_input, merge)
    weight = _readable("weight", weight)
    x, last = _laid_out(x)
    if last or not _is_flat(grad_output):
        memory_format = _LAST[x.dim()] if last else torch.contiguous_format
        grad_output = _in_memory("grad_output", grad_output, memory_format)
    grad = torch.empty_like(x) if with_input else None
    grad_weight, grad_bias = torch.empty_like(mean), torch.empty_like(mean)
    _C.batch_norm_backward(
        code,
        *_shape(x, last),
        grad_output.data_ptr(),
        x.data_ptr(),
        share.data_ptr(),
        0 if weight is None else weight.data_ptr(),
        mean.data_ptr(),
        var.data_ptr(),
        eps,
        0 if grad is None else grad.data_ptr(),
        grad_weight.data_ptr(),
        grad_bias.data_ptr(),
        _threads(x),
    )
    return grad, grad_weight, grad_bias


def _is_flat(tensor: Tensor) -> bool:
    """Whether its elements follow each other in memory."""
    if type(tensor) not in _PLAIN or not tensor.is_contiguous():
        return False
    return tensor.data_ptr() != 0 and not tensor.is_neg()


def _readable(name: str, parameter: Tensor | None) -> Tensor | None:
    if parameter is None or _is_flat(parameter):
        return parameter
    return _in_memory(name, parameter, torch.contiguous_format)


def _in_memory(name: str, value: Tensor, memory_format: torch.memory_format) -> Tensor:
    """The values in memory of their own: of lazily negated tensors, and of zeros without any."""
    found = value.detach().resolve_neg().clone(memory_format=memory_format)
    if type(found) is not Tensor or found.data_ptr() == 0:
        raise TypeError(f"{name} must be a plain tensor, got {type(value).__name__}")
    return found


def _is_moved(running: Running, dtype: torch.dtype) -> bool:
    """Whether the kernel can move the running statistics."""
    mean, var = running.mean, running.var
    if not (mean.dtype is var.dtype is running.correction.dtype is dtype):
        return False
    return _is_flat(mean) and _is_flat(var)


def _moving(running: Running) -> tuple[int, int, int, float]:
    mean, var, momentum, correction = running
    return mean.data_ptr(), var.data_ptr(), correction.data_ptr(), float(momentum)


def _laid_out(x: Tensor) -> tuple[Tensor, bool]:
    """A tensor that the kernels can walk through, and whether its channels come last."""
    if x.is_contiguous():
        return x, False
    last = _LAST.get(x.dim())
    if last is not None and x.is_contiguous(memory_format=last):
        return x, True
    return x.contiguous(), False


def _shape(x: Tensor, last: bool) -> tuple[int, int, int, bool]:
    batch, channels, *lengths = x.shape
    spatial = math.prod(lengths)
    return batch, channels, spatial, last or spatial == 1


def _threads(x: Tensor) -> int:
    return 1 if x.numel() < _PARALLEL_ELEMENTS else torch.get_num_threads()
