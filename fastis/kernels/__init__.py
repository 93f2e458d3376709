"""The contract between operations and backends, and the choice between them.

The step's data flow is ``loss -> update -> sample``. Each operation has one module per backend that
implements it, named ``{backend}_{operation}``, and all modules of a column have the same functions
with the same signatures:

==========  ==================  ====================  ====================
backend     loss                update                sample
==========  ==================  ====================  ====================
reference   reference_loss      reference_update      reference_sample
cpu         cpu_loss            cpu_update            cpu_sample
triton      triton_loss
cuda                            cuda_update           cuda_sample
==========  ==================  ====================  ====================

A column may be spread over further files: those of ``cuda_sample`` for given weights and alias
tables are in ``cuda_weights``.

``reference`` is plain PyTorch and runs on every device: the oracle of the tests and the fall-back
where nothing faster was built. ``triton`` serves CUDA tensors, and CPU tensors only for tests: in
Triton's interpreter (``TRITON_INTERPRET=1``) and when it is asked for. The fastest backend that is
installed for a device is chosen once and remembered; :func:`backend` forces one.
"""

from __future__ import annotations

import contextlib
import importlib
import os
from collections.abc import Iterator
from types import ModuleType

import torch

try:
    import fastis._C  # noqa: F401 (its error names what is missing; the next line's would not)
    from fastis import _C as _C
except ImportError as error:  # a source tree that was never built, or a wheel for another machine
    _C = None  # type: ignore[assignment]
    _C_MISSING = f"the compiled extension fastis._C could not be imported ({error})"
else:
    _C_MISSING = ""

BACKENDS = ("reference", "cpu", "triton", "cuda")
OPERATIONS = ("loss", "update", "sample")
# Backends in order of speed, by the device of the tensors and the operation.
_FASTEST_FIRST = {
    "cpu": {"loss": ("cpu",), "update": ("cpu",), "sample": ("cpu",)},
    "cuda": {"loss": ("triton",), "update": ("cuda",), "sample": ("cuda",)},
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
    named = name in _FASTEST_FIRST.get(device_type, {}).get(operation, ())
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
    return "" if name == "reference" else _C_MISSING


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
        candidates = (*_FASTEST_FIRST.get(device_type, {}).get(operation, ()), "reference")
        name = next(c for c in candidates if not missing(c, operation, device_type))
    else:
        name = _forced
        why = missing(name, operation, device_type)
        if why:
            raise RuntimeError(f"backend {name!r} was asked for, but {why}")
    module = importlib.import_module(f"fastis.kernels.{name}_{operation}")
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


def show_config() -> None:
    """Prints versions, devices, and which backend serves which operation (or why it can't)."""
    import platform
    from importlib.metadata import PackageNotFoundError, version

    import numpy

    from fastis import __version__

    print(f"fastis {__version__}, python {platform.python_version()}, {platform.platform()}")
    print(f"torch {torch.__version__}, numpy {numpy.__version__}")
    if _C is None:
        print(f"compiled extension: missing: {_C_MISSING}")
    else:
        print(f"compiled extension: {_C.build_info()}, instruction set in use: {_C.isa()}")
    try:
        print(f"triton {version('triton')}")
    except PackageNotFoundError:
        print("triton: not installed")
    print(f"threads: {torch.get_num_threads()}")
    devices = ["cpu"]
    if torch.cuda.is_available():
        devices.append("cuda")
        for index in range(torch.cuda.device_count()):
            print(f"cuda:{index}: {torch.cuda.get_device_name(index)}")
    else:
        reason = "torch was built without CUDA" if torch.version.cuda is None else "no device found"
        print(f"cuda: not available ({reason})")
    for device_type in devices:
        for operation in OPERATIONS:
            candidates = (*_FASTEST_FIRST[device_type].get(operation, ()), "reference")
            served = [b for b in candidates if not missing(b, operation, device_type)]
            lacking = [
                f"{b}: {why}" for b in BACKENDS if (why := missing(b, operation, device_type))
            ]
            print(f"{operation} on {device_type}: {', '.join(served)}", *lacking, sep="; ")
