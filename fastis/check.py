"""Checks of arguments: an error names the argument, what was expected and what came.

Numbers and choices first, then tensors, then what the losses take. Hot paths test one cheap
condition and come here to have a failure named, or to convert what is legal but not what the
kernels take.

Kernels get addresses, so their tensors need values in memory of their own. A tensor may have none
(sparse, a wrapper around other tensors, a symbol in a trace, zeros that were never written, storage
that was freed), or its memory may hold something else than its values (lazily negated). torch
resolves all that on the way to a kernel; whoever reads memory past torch has to ask.
"""

from __future__ import annotations

import numbers
import operator
from collections.abc import Iterable, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.nn.parameter import Parameter

from fastis.kernels.formats import compute_dtype
from fastis.kernels.loss import CrossEntropyOptions, Denominator

LOGITS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
REDUCTIONS = ("mean", "sum", "none")
_NOT_CLASS_WEIGHTS = ", a coefficient a sample (torch's weight of classes is class_weights=)"
_AS_LONG = dict.fromkeys((torch.int32, torch.int16, torch.int8), ": pass target.long()")
_NAMES_OF_TORCH = {
    "weight": "weights of the classes are class_weights= (of cross_entropy), weights= are the "
    "coefficients of the samples",
    "size_average": "use reduction=",
    "reduce": "use reduction=",
}
_PYTHON = torch._C.DispatchKey.Python


def describe(value: object) -> str:
    """The type of a value and what it is, for errors about its type."""
    if isinstance(value, Tensor):
        return f"Tensor of shape {list(value.shape)}, {value.dtype} on {value.device}"
    return "None" if value is None else f"{type(value).__name__} {_short(value)}"


def _short(value: object) -> str:
    """Its repr, unless that is longer than anyone would read (or Python would print)."""
    if isinstance(value, int) and value.bit_length() > 128:
        return f"an int of {value.bit_length()} bits"
    if isinstance(value, (tuple, list)) and any(isinstance(part, Tensor) for part in value):
        return f"of {', '.join(type(part).__name__ for part in value[:8])}"
    if isinstance(value, dict) and any(isinstance(part, Tensor) for part in value.values()):
        return f"of {', '.join(map(repr, list(value)[:8]))}"
    return repr(value)


def integer(name: str, value: Any, least: int, most: int | None = None) -> int:
    """``value`` as an int in [least, most]; bool and float are refused."""
    try:
        found = operator.index(value)
    except TypeError:
        found = None
    if found is None or isinstance(value, bool):
        raise TypeError(f"{name} must be an int, got {describe(value)}")
    if found < least or (most is not None and found > most):
        span = f"at least {least}" if most is None else f"in [{least}, {most}]"
        raise ValueError(f"{name} must be {span}, got {_short(found)}")
    return found


def number(
    name: str,
    value: Any,
    least: float = float("-inf"),
    most: float = float("inf"),
    interval: str = "[]",
) -> float:
    """``value`` as a float from ``least`` to ``most``; NaN is refused, numbers of numpy are not.

    ``interval`` says which of the two belong to it: "[)" is [least, most).
    """
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be a number, got {describe(value)}")
    try:
        found = float(value)
    except OverflowError:  # an int that no float holds
        found = float("nan")
    above = found >= least if interval[0] == "[" else found > least
    if not (above and (found <= most if interval[1] == "]" else found < most)):
        span = f"{interval[0]}{least:g}, {most:g}{interval[1]}"
        raise ValueError(f"{name} must be in {span}, got {_short(value)}")
    return found


def choice(name: str, value: Any, choices: Iterable[str]) -> str:
    """``value``, one of the strings ``choices``."""
    known = list(choices)
    if not isinstance(value, str) or value not in known:
        expected = ", ".join(map(repr, known))
        raise ValueError(f"{name} must be one of {expected}, got {value!r}")
    return value


def function(name: str, value: Any, *, optional: bool = False) -> None:
    """Refuses what can't be called; None is fine where it is ``optional``."""
    if not (callable(value) or (optional and value is None)):
        raise TypeError(f"{name} must be callable, got {describe(value)}")


# Tensors


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


def tensor(name: str, value: object) -> Tensor:
    """A tensor of the dense, strided kind, or a wrapper of such."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
    if value.is_nested:
        raise TypeError(f"{name} must be a dense tensor, got a nested one")
    if value.layout != torch.strided:
        raise TypeError(f"{name} must be a dense tensor, got layout {value.layout}")
    return value


def written(name: str, value: object) -> Tensor:
    """:func:`tensor`, with memory for zeros that have none: no operator sees these."""
    found = tensor(name, value)
    return found.clone() if found._is_zerotensor() else found


def readable(name: str, value: object) -> Tensor:
    """``value`` as a tensor whose memory holds its values."""
    found = unwrapped(tensor(name, value))
    if is_wrapper(found):
        raise TypeError(
            f"{name} must be a plain tensor, got {type(found).__name__}, which has no memory of "
            "its own"
        )
    if found.device.type == "meta":
        return found  # the comparison of devices says more
    if not in_memory(found):
        if not found._is_zerotensor():
            raise TypeError(
                f"{name} must be a plain tensor with memory of its own, got one without, or with "
                "less than its shape asks for"
            )
        return found.clone()
    return found.resolve_neg()


def _of_shape(name: str, value: Tensor, shape: Sequence[int], why: str = "") -> None:
    if value.shape != torch.Size(shape):
        raise ValueError(f"{name} must have shape {list(shape)}{why}, got {list(value.shape)}")


def _of_dtype(name: str, value: Tensor, dtypes: Sequence[torch.dtype]) -> None:
    if value.dtype not in dtypes:
        wanted = " or ".join(map(str, dtypes))
        raise TypeError(f"{name} must have dtype {wanted}, got {value.dtype}")


def _on_device(name: str, value: Tensor, device: torch.device) -> None:
    """Moving it there would be a hidden copy."""
    if value.device != device:
        advice = " (batch.to(device) moves a minibatch)" if name == "weights" else ""
        raise ValueError(f"{name} must be on {device}, got {value.device}{advice}")


def vector(
    name: str, value: Any, length: int | None, dtypes: tuple[torch.dtype, ...], device: torch.device
) -> Tensor:
    """``value`` as a contiguous 1-D tensor without graph of one of ``dtypes`` on ``device``.

    Its memory can be read by its address (:func:`readable`), but on "meta".
    """
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
    if value.dim() != 1 or (length is not None and value.shape[0] != length):
        expected = "[n]" if length is None else f"[{length}]"
        raise ValueError(f"{name} must have shape {expected}, got {list(value.shape)}")
    _of_dtype(name, value, dtypes)
    _on_device(name, value, device)
    found = readable(name, value).detach().contiguous()
    return found if type(found) is Tensor else readable(name, found)  # as in a mode of fake tensors


# Arguments of the losses


def unknown_arguments(function: str, names: Iterable[str]) -> NoReturn:
    """Raises what Python would, and what the name that torch has is called here."""
    name = next(iter(names))
    hint = _NAMES_OF_TORCH.get(name)
    advice = f": {hint}" if hint else ""
    raise TypeError(f"{function}() got an unexpected keyword argument {name!r}{advice}")


def logits(name: str, value: Any, shapes: str, dims: tuple[int, ...]) -> None:
    """A floating tensor with an allowed number of dimensions."""
    if not isinstance(value, Tensor):
        several = isinstance(value, (tuple, list, dict))
        advice = ": for several outputs there is scored_loss" if several else ""
        raise TypeError(f"{name} must be a tensor, got {describe(value)}{advice}")
    if value.dtype not in LOGITS:
        raise TypeError(f"{name} must be float32, float64, bfloat16 or float16, got {value.dtype}")
    if value.dim() not in dims or (dims == (2, 3) and value.shape[-1] == 0):
        images = dims == (2, 3) and value.dim() > 3
        advice = ": the classes are the last dimension, z.flatten(2).mT; y.flatten(1)"
        found = f"{list(value.shape)}{advice if images else ''}"
        raise ValueError(f"{name} must have shape {shapes}, got {found}")


def constant(name: str, value: Any, shape: Sequence[int], like: Tensor, why: str = "") -> Tensor:
    """A floating tensor of ``shape`` without gradient, in the compute dtype of ``like``."""
    dtype = compute_dtype(like.dtype)
    if (
        type(value) is Tensor
        and value.dtype is dtype
        and value.shape == shape
        and value.device == like.device
        and not value.requires_grad
        and value.layout is torch.strided
        and value.is_contiguous()
    ):
        return value
    if isinstance(value, Tensor) and (value.dtype.is_complex or value.dtype == torch.bool):
        raise TypeError(f"{name} must be a tensor of real numbers, got {value.dtype}")
    found = unwrapped(tensor(name, value))
    _of_shape(name, found, shape, why)
    _on_device(name, found, like.device)
    if found.requires_grad:
        raise ValueError(
            f"{name} must not require grad: these losses are differentiable in the logits only; "
            f"pass {name}.detach(), or use scored_loss"
        )
    return found.to(dtype).contiguous()


def class_target(like: Tensor, value: Any) -> Tensor:
    """Class indices as int64 ``like.shape[:-1]``, or probabilities like the logits ``like``."""
    if isinstance(value, Tensor) and value.dtype.is_floating_point:
        return constant("target", value, like.shape, like)
    if isinstance(value, Tensor) and value.dtype not in (torch.int64, torch.uint8):
        raise TypeError(
            "target must hold int64 class indices or floating-point class probabilities, "
            f"got {value.dtype}{_AS_LONG.get(value.dtype, '')}"
        )
    found = unwrapped(tensor("target", value))
    why = f" for logits of shape {list(like.shape)} (the class dimension is the last one)"
    _of_shape("target", found, like.shape[:-1], why)
    _on_device("target", found, like.device)
    return found.long()


def elementwise_target(like: Tensor, value: Any) -> Tensor:
    """A target of the logits' shape, in the compute dtype."""
    if isinstance(value, Tensor) and value.dtype == torch.bool:
        value = value.to(compute_dtype(like.dtype))
    return constant("target", value, like.shape, like)


def pos_weight(like: Tensor, value: Any) -> Tensor | None:
    """``[L]`` (one per output) or a single number, expanded to one per output."""
    if value is None:
        return None
    outputs = like.shape[1:]
    if isinstance(value, Tensor) and value.numel() == 1 and value.dim() <= 1:
        value = value.reshape(()).expand(outputs)
    return constant("pos_weight", value, outputs, like).reshape(-1)


def class_options(
    like: Tensor, class_weights: Any, ignore_index: Any, label_smoothing: Any
) -> CrossEntropyOptions:
    """The options of cross-entropy, the class weights in the compute dtype."""
    ignore_index = integer("ignore_index", ignore_index, -(2**31), 2**31 - 1)
    label_smoothing = number("label_smoothing", label_smoothing, 0, 1)
    if class_weights is not None:
        class_weights = constant("class_weights", class_weights, like.shape[-1:], like)
    return CrossEntropyOptions(class_weights, ignore_index, label_smoothing)


def denominator(value: Any, reduction: str, like: Tensor) -> Denominator:
    """None, a number, or a tensor of one number on the logits' device."""
    if value is None:
        return None
    if reduction != "mean":
        raise ValueError(
            f"denominator must be None with reduction={reduction!r}, got {describe(value)}"
        )
    if not isinstance(value, Tensor):
        return number("denominator", value)
    if value.numel() != 1:
        raise ValueError(f"denominator must be one number, got shape {list(value.shape)}")
    if value.device.type == "cpu" and like.device.type != "cpu":
        return float(value)
    return constant("denominator", value.reshape(()), (), like)


def weighting(
    like: Tensor, weights: Any, reduction: Any, denominator_: Any
) -> tuple[Tensor | None, Denominator]:
    """The coefficients in the compute dtype and the denominator (None: the loss's default)."""
    if reduction != "mean" or denominator_ is not None:
        choice("reduction", reduction, REDUCTIONS)
        denominator_ = denominator(denominator_, reduction, like)
        if reduction != "mean":
            denominator_ = 1.0
    if weights is not None:
        weights = constant("weights", weights, like.shape[:1], like, _NOT_CLASS_WEIGHTS)
    return weights, denominator_
