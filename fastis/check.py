"""Checks of arguments: an error names the argument, what was expected and what came."""

from __future__ import annotations

import numbers
import operator
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from fastis.dense import readable as readable


def integer(name: str, value: Any, least: int, most: int | None = None) -> int:
    """``value`` as an int in [least, most]; bool and float are refused."""
    try:
        number = operator.index(value)
    except TypeError:
        number = None
    if number is None or isinstance(value, bool):
        raise TypeError(f"{name} must be an int, got {type(value).__name__} {value!r}")
    if number < least or (most is not None and number > most):
        span = f"at least {least}" if most is None else f"in [{least}, {most}]"
        raise ValueError(f"{name} must be {span}, got {_short(number)}")
    return number


def number(name: str, value: Any, least: float, most: float = float("inf")) -> float:
    """``value`` as a float in [least, most]; NaN is refused, numbers of numpy are not."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be a number, got {type(value).__name__} {value!r}")
    try:
        found = float(value)
    except OverflowError:  # an int that no float holds
        found = float("nan")
    if not least <= found <= most:
        raise ValueError(f"{name} must be in [{least:g}, {most:g}], got {_short(value)}")
    return found


def _short(value: Any) -> str:
    """Its repr, unless it has more digits than anyone would read (or Python would print)."""
    if isinstance(value, int) and value.bit_length() > 128:
        return f"an int of {value.bit_length()} bits"
    return repr(value)


def choice(name: str, value: Any, choices: Iterable[str]) -> str:
    """``value``, one of the strings ``choices``."""
    known = list(choices)
    if not isinstance(value, str) or value not in known:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, known))}, got {value!r}")
    return value


def function(name: str, value: Any, *, optional: bool = False) -> None:
    """Refuses what can't be called; None is fine where it is ``optional``."""
    if not (callable(value) or (optional and value is None)):
        raise TypeError(f"{name} must be callable, got {type(value).__name__} {value!r}")


def vector(
    name: str, value: Any, length: int | None, dtypes: tuple[torch.dtype, ...], device: torch.device
) -> Tensor:
    """``value`` as a contiguous 1-D tensor without graph of one of ``dtypes`` on ``device``.

    Its memory can be read by its address (:func:`fastis.dense.readable`), but on "meta".
    """
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
    if value.dim() != 1 or (length is not None and value.shape[0] != length):
        expected = "[n]" if length is None else f"[{length}]"
        raise ValueError(f"{name} must have shape {expected}, got {list(value.shape)}")
    if value.dtype not in dtypes:
        wanted = " or ".join(str(d) for d in dtypes)
        raise TypeError(f"{name} must have dtype {wanted}, got {value.dtype}")
    if value.device != device:
        raise ValueError(f"{name} must be on {device}, got {value.device}")
    found = readable(name, value).detach().contiguous()
    return found if type(found) is Tensor else readable(name, found)  # as in a mode of fake tensors
