"""The contract between operations and backends, and the choice between them.

The step's data flow is ``loss -> table``: a scored loss, what the table learns of it, and the next
draw. Draws from a caller's own weights are a third column, which a training step does not enter;
weighted BatchNorm is a fourth, which knows nothing of the others.
``fastis/kernels/{backend}/{operation}.py`` is a cell of the matrix, and all cells of a column have
the same functions with the same signatures:

==========  ====  =====  ===========  ==========
backend     loss  table  categorical  batch_norm
==========  ====  =====  ===========  ==========
reference   yes   yes    yes          yes
cpu         yes   yes    yes          yes
triton      yes
cuda              yes    yes
==========  ====  =====  ===========  ==========

``reference`` is plain PyTorch and runs on every device: the oracle of the tests and the fall-back
where nothing faster was built. ``triton`` serves CUDA tensors, and CPU tensors only for tests: in
Triton's interpreter (``TRITON_INTERPRET=1``) and when it is asked for. The fastest backend that is
installed for a device is chosen once and remembered; :func:`backend` forces one.

The modules beside the folders are what all backends share: the columns' contracts (``loss``,
``table``, and ``quantize`` for ``categorical``), the table's tensors and constants (``layout``,
``memory``), and the arithmetic of csrc/*.h in PyTorch (``code``, ``flatten``, ``state``,
``variance``, ``alias``, ``formats``).
"""

from __future__ import annotations

import contextlib
import importlib
import os
from collections.abc import Iterator
from types import ModuleType

import torch

from fastis.kernels import extension
from fastis.kernels.extension import _C

BACKENDS = ("reference", "cpu", "triton", "cuda")
OPERATIONS = ("loss", "table", "categorical", "batch_norm")
# Backends in order of speed, by the device of the tensors and the operation.
FASTEST_FIRST: dict[str, dict[str, tuple[str, ...]]] = {
    "cpu": dict.fromkeys(OPERATIONS, ("cpu",)),
    "cuda": {"loss": ("triton",), "table": ("cuda",), "categorical": ("cuda",), "batch_norm": ()},
}
# (backend, device, operation) that serves only when it is forced.
_ON_REQUEST = {("triton", "cpu", "loss")}
# The oldest release that the kernels were compiled and interpreted with.
_OLDEST_TRITON = (3, 6)

_forced: str | None = None
_chosen: dict[tuple[str, str], ModuleType] = {}


def missing(name: str, operation: str, device_type: str) -> str:
    """Why backend ``name`` can't do ``operation`` on ``device_type``; empty when it can."""
    if name == "reference":
        return ""
    named = name in FASTEST_FIRST.get(device_type, {}).get(operation, ())
    if not named and (name, device_type, operation) not in _ON_REQUEST:
        return f"backend {name!r} has no {operation} kernels for {device_type} tensors"
    if name == "triton" and device_type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        return (
            "its kernels run on CPU tensors only in Triton's interpreter "
            "(TRITON_INTERPRET=1, set before triton is imported)"
        )
    return _not_installed(name)


def _not_installed(name: str) -> str:
    """Why backend ``name`` is not there for any device; empty when it is."""
    if name == "triton":
        return _triton_missing()
    if name == "cuda" and _C is not None:
        return _cuda_missing()
    return "" if name == "reference" else extension.MISSING


def _cuda_missing() -> str:
    """Why the CUDA kernels can't run here; empty when they can, or when there is no device to ask.

    The choice is made for all devices at once: one that is visible and can't run them rules them
    out. The others are asked by their compute capability alone, because loading a kernel takes
    memory on each of them (a context).
    """
    if not hasattr(_C, "cuda_update"):
        return "fastis._C was built without CUDA (no nvcc at build time, or FASTIS_CUDA=0)"
    if not torch.cuda.is_available():
        return ""
    for index in range(torch.cuda.device_count()):
        capability = torch.cuda.get_device_capability(index)
        if not _has_code_for(capability, _C.cuda_targets):
            return (
                f"fastis._C, built for {_C.cuda_targets}, has no code for cuda:{index} (compute "
                f"capability {capability[0]}.{capability[1]}): build with FASTIS_CUDA_ARCHS="
                f"{capability[0]}{capability[1]}, or hide the device (CUDA_VISIBLE_DEVICES)"
            )
    return str(_C.cuda_missing(torch.cuda.current_device()))


def _has_code_for(capability: tuple[int, int], targets: str) -> bool:
    """Machine code serves its own generation from its release on, PTX whatever came later."""
    for target in targets.split():
        kind, _, name = target.partition("_")
        if not name.isdigit():  # sm_90a serves that one release
            if kind == "sm" and divmod(int(name[:-1]), 10) == capability:
                return True
            continue
        major, minor = divmod(int(name), 10)
        newer = capability >= (major, minor)
        if newer and (kind == "compute" or major == capability[0]):
            return True
    return False


def _triton_missing() -> str:
    """Why there is no usable triton; empty when there is. Imports it: not called on the way in."""
    try:
        import triton
    except Exception as error:  # a broken installation raises whatever it likes
        return f"triton could not be imported ({error})"
    if tuple(map(int, triton.__version__.split(".")[:2])) < _OLDEST_TRITON:
        oldest = ".".join(map(str, _OLDEST_TRITON))
        return f"triton {triton.__version__} is older than {oldest}, the oldest release supported"
    return ""


def kernels_for(operation: str, device_type: str) -> ModuleType:
    """The module of kernels for ``operation`` on tensors of ``device_type`` ("cpu", "cuda", ...).

    Raises
    ------
    RuntimeError
        when a forced backend can't serve it, naming what is missing.
    """
    try:
        return _chosen[operation, device_type]
    except KeyError:
        pass
    if _forced is None:
        candidates = (*FASTEST_FIRST.get(device_type, {}).get(operation, ()), "reference")
        name = next(c for c in candidates if not missing(c, operation, device_type))
    else:
        name = _forced
        why = missing(name, operation, device_type)
        if why:
            raise RuntimeError(f"backend {name!r} was asked for, but {why}")
    module = importlib.import_module(f"fastis.kernels.{name}.{operation}")
    _chosen[operation, device_type] = module
    return module


@contextlib.contextmanager
def backend(name: str) -> Iterator[None]:
    """Forces one backend inside a ``with`` block, for the whole process.

    ``fastis.backend("reference")`` runs plain PyTorch everywhere: slow, and the truth that every
    other backend is tested against.

    Parameters
    ----------
    name : str
        one of :data:`fastis.kernels.BACKENDS`.

    Raises
    ------
    ValueError
        for an unknown name.
    RuntimeError
        for a backend that is not installed, naming what is missing; later, inside the block, for an
        operation that the backend lacks on the tensors' device. Never a silent fall-back.
    """
    global _forced
    if name not in BACKENDS:
        raise ValueError(f"name must be one of {', '.join(BACKENDS)}, got {name!r}")
    why = _not_installed(name)
    if why:
        raise RuntimeError(f"backend {name!r} was asked for, but {why}")
    before, _forced = _forced, name
    _chosen.clear()
    try:
        yield
    finally:
        _forced = before
        _chosen.clear()
