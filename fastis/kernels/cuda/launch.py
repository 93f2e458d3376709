"""Launches on the current stream of a device."""

from __future__ import annotations

from collections.abc import Callable

import torch

from fastis.kernels.extension import _C


def launch(entry_point: Callable[..., int], device: torch.device, *arguments: int) -> None:
    """Calls one of ``fastis._C``'s CUDA entry points; raises what the launch reported."""
    index = device.index
    # What torch.cuda.current_stream(index).cuda_stream is, without the objects on the way.
    stream = torch._C._cuda_getCurrentRawStream(index)
    error = entry_point(*arguments, index, stream)
    if error:
        raise failure(error)


def failure(error: int) -> RuntimeError:
    """What a launch that reported ``error`` raises."""
    return RuntimeError(f"a CUDA launch of fastis failed: {_C.cuda_error_string(error)}")
