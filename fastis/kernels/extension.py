"""The compiled extension ``fastis._C``, or None and why."""

from __future__ import annotations

try:
    import fastis._C  # noqa: F401 (its error names what is missing; the next line's would not)
    from fastis import _C as _C
except ImportError as error:
    _C = None  # type: ignore[assignment]
    MISSING = f"the compiled extension fastis._C could not be imported ({error})"
    if isinstance(error, ModuleNotFoundError):
        MISSING += ": fastis was installed with FASTIS_NO_EXTENSION=1, or not built for this Python"
else:
    MISSING = ""
