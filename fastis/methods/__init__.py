"""Sampling methods, each selectable by name or as an object that carries its options."""

from __future__ import annotations

from fastis.methods.base import Method
from fastis.methods.emais import EMAIS
from fastis.methods.uniform import Scan, Uniform

BY_NAME: dict[str, type[Method]] = {m.name: m for m in (EMAIS, Scan, Uniform)}

__all__ = ["BY_NAME", "EMAIS", "Method", "Scan", "Uniform", "from_name"]


def from_name(method: str | Method) -> Method:
    """``method`` itself, or the method of that name with its default options."""
    if isinstance(method, Method):
        return method
    if not isinstance(method, str):
        raise TypeError(
            "method must be a name or an object from fastis.methods, "
            f"got {type(method).__name__} {method!r}"
        )
    if method not in BY_NAME:
        raise ValueError(f"method must be one of {', '.join(map(repr, BY_NAME))}, got {method!r}")
    return BY_NAME[method]()
