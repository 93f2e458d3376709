"""Launches Triton kernels without Triton's Python at every call, and not unprepared in a capture.

``kernel[grid](...)`` looks at every argument anew (types, which of them are 1 or a multiple of 16)
to find the compiled kernel: 9 to 16 us on the host, more than a small kernel runs. Here the kernel
that the first such call returns is kept under what the choice depends on and launched itself, by
``compiled[grid](...)``. What that needs is the same in all releases from 3.6 on; where it is
missing, every launch goes the ordinary way.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

# The compiled kernel and its constants in the order of its parameters.
_ready: dict[tuple[object, ...], tuple[Any, tuple[Any, ...]]] = {}


def launch(
    kernel: Any, grid: tuple[int, ...], num_warps: int, *arguments: Any, **constants: Any
) -> None:
    """Launches on the device of the first tensor.

    Contraction into fused multiply-adds is wanted (no result depends on it by more than rounding)
    and asked for by name, because its default is not the same in all releases of Triton.

    Raises RuntimeError where a CUDA graph is captured and the kernel was never launched before.
    """
    device = None
    # By identity: to hash a kernel is to hash its source.
    key: list[object] = [id(kernel), num_warps, *constants.values()]
    for argument in arguments:  # Triton has kernels of their own for types, 1, multiples of 16.
        if isinstance(argument, Tensor):
            device = device or argument.device
            key += (argument.dtype, argument.data_ptr() % 16 == 0)
        elif argument is None or type(argument) is float:
            key.append(type(argument))
        elif argument == 1:
            key.append(1)
        else:
            key += (argument % 16 == 0, -(2**31) <= argument < 2**31)
    key.append(device)
    assert device is not None
    if _is_cuda(device) and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            _launch_here(tuple(key), device, kernel, grid, num_warps, arguments, constants)
    else:
        _launch_here(tuple(key), device, kernel, grid, num_warps, arguments, constants)


def _launch_here(
    key: tuple[object, ...], device: torch.device, kernel: Any, grid: tuple[int, ...],
    num_warps: int, arguments: tuple[Any, ...], constants: dict[str, Any],
) -> None:  # fmt: skip
    ready = _ready.get(key)
    if ready is not None:
        compiled, values = ready
        compiled[(*grid, 1, 1)[:3]](*arguments, *values)
        return
    if _is_cuda(device) and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            f"{kernel.__name__} is launched for the first time with these shapes, dtypes and "
            "options while a CUDA graph is being captured, where it can be neither compiled nor "
            "loaded: call the loss once with them before the capture"
        )
    compiled = kernel[grid](*arguments, **constants, num_warps=num_warps, enable_fp_fusion=True)
    if hasattr(type(compiled), "__getitem__"):  # (The interpreter returns nothing.)
        names = kernel.arg_names[len(arguments) :]
        _ready[key] = compiled, tuple(constants[name] for name in names)


def _is_cuda(device: torch.device) -> bool:
    return device.type == "cuda"
