"""Which tensors the kernels can read: those whose values lie in memory of their own.

Kernels get addresses. A tensor may have none (sparse, a wrapper around other tensors, a symbol in a
trace, zeros that were never written, storage that was freed), or its memory may hold something else
than its values (lazily negated). torch resolves all that on the way to a kernel; whoever reads
memory past torch has to ask. The hot paths test what can go wrong and come here to have it named.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.parameter import Parameter

_PYTHON = torch._C.DispatchKey.Python


def is_wrapper(tensor: Tensor) -> bool:
    """Whether Python computes with it (``__torch_dispatch__``): its own memory says nothing."""
    return torch._C._dispatch_keys(tensor).has(_PYTHON)


def unwrapped(tensor: Tensor) -> Tensor:
    """A constant of a subclass that is a name only (``as_subclass``), as the tensor that it is."""
    if type(tensor) is Tensor:
        return tensor
    if type(tensor) is Parameter:
        return tensor.detach()
    if is_wrapper(tensor):
        return tensor
    with torch._C.DisableTorchFunctionSubclass():
        return tensor.as_subclass(Tensor)


def check_dense(name: str, value: object) -> Tensor:
    """A tensor of the dense, strided kind, or a wrapper of such.

    Raises
    ------
    TypeError
        naming the argument.
    """
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
    if value.is_nested:
        raise TypeError(f"{name} must be a dense tensor, got a nested one")
    if value.layout != torch.strided:
        raise TypeError(f"{name} must be a dense tensor, got layout {value.layout}")
    return value


def written(name: str, value: object) -> Tensor:
    """:func:`check_dense`, with memory for zeros that have none: no operator sees these."""
    tensor = check_dense(name, value)
    return tensor.clone() if tensor._is_zerotensor() else tensor


def readable(name: str, value: object) -> Tensor:
    """``value`` as a tensor whose memory holds its values.

    Raises
    ------
    TypeError, ValueError
        naming the argument.
    """
    tensor = unwrapped(check_dense(name, value))
    if is_wrapper(tensor):
        raise TypeError(
            f"{name} must be a plain tensor, got {type(tensor).__name__}, which has no memory of "
            "its own"
        )
    if tensor.device.type == "meta":
        return tensor  # the comparison of devices says more
    if not in_memory(tensor):
        if not tensor._is_zerotensor():
            raise TypeError(
                f"{name} must be a plain tensor with memory of its own, got one without, or with "
                "less than its shape asks for"
            )
        return tensor.clone()
    return tensor.resolve_neg()


def in_memory(tensor: Tensor) -> bool:
    """Whether all elements lie in memory, from ``data_ptr()`` on by the strides."""
    try:
        if tensor.data_ptr() == 0:
            return tensor.numel() == 0
        storage = tensor.untyped_storage().nbytes()
    except RuntimeError:  # inside of torch.func, for one
        return False
    steps = zip(tensor.shape, tensor.stride(), strict=True)
    last = tensor.storage_offset() + sum((size - 1) * stride for size, stride in steps)
    return tensor.numel() == 0 or (last + 1) * tensor.itemsize <= storage
