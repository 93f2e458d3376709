"""What is installed, and which backend serves which operation."""

from __future__ import annotations

import torch

from fastis import kernels
from fastis.kernels.extension import _C, MISSING


def show_config() -> None:
    """Prints versions, devices, and which backend serves which operation (or why it can't)."""
    import platform
    from importlib.metadata import PackageNotFoundError, version

    import numpy

    from fastis import __version__

    print(f"fastis {__version__}, python {platform.python_version()}, {platform.platform()}")
    print(f"torch {torch.__version__}, numpy {numpy.__version__}")
    if _C is None:
        print(f"compiled extension: missing: {MISSING}")
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
        for operation in kernels.OPERATIONS:
            why = {b: kernels.missing(b, operation, device_type) for b in kernels.BACKENDS}
            candidates = (*kernels.FASTEST_FIRST[device_type][operation], "reference")
            served = [b for b in candidates if not why[b]]
            lacking = [f"{b}: {reason}" for b, reason in why.items() if reason]
            print(f"{operation} on {device_type}: {', '.join(served)}", *lacking, sep="; ")
