"""A GPU for Triton that isn't there: launches compile as they would on one, and start nothing.

:func:`pretend` makes it Triton's driver for this process. A launch then goes all the way through
Triton's Python (argument binding, caches, compilation by ptxas) and ends in a function that does
nothing: good for filling a cache that a machine with a GPU reuses, and for timing the host's part.
"""

from __future__ import annotations

import hashlib
import re
import subprocess
import sysconfig
import tempfile
from pathlib import Path
from typing import Any, ClassVar

from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.runtime import driver
from triton.runtime.cache import get_cache_manager


class Utils:
    """What Triton asks of a device: an H200's answers."""

    @staticmethod
    def get_device_properties(device: int) -> dict[str, int]:
        return {"max_shared_mem": 232448, "multiprocessor_count": 132, "max_num_regs": 65536,
                "warpSize": 32, "sm_clock_rate": 1980000, "mem_clock_rate": 3201000,
                "mem_bus_width": 6144}  # fmt: skip

    @staticmethod
    def load_binary(name: str, kernel: bytes, shared: int, device: int) -> tuple[int, ...]:
        return 1, 1, 64, 0, 1024  # module, function, registers, spills, most threads a block


class Launcher:
    """A launch of one signature: counted, not made."""

    launches = 0
    sources: ClassVar[dict[str, None]] = {}  # of the launchers that Triton would compile, by text

    def __init__(self, source: Any, metadata: Any) -> None:
        Launcher._keep(source, metadata)

    @staticmethod
    def _keep(source: Any, metadata: Any) -> None:
        from triton.backends.nvidia import driver as nvidia

        make = getattr(nvidia, "make_launcher", None)
        if make is None:  # newer releases have one launcher for all signatures
            return
        names = source.fn.arg_names
        constants = {
            (names.index(k),) if isinstance(k, str) else k: v for k, v in source.constants.items()
        }
        tensors = getattr(metadata, "tensordesc_meta", None)
        Launcher.sources[make(constants, dict(source.signature), tensors)] = None

    def __call__(self, *_: Any) -> None:
        Launcher.launches += 1


class FakeDriver(DriverBase):
    """One device of compute capability ``architecture / 10``."""

    def __init__(self, architecture: int) -> None:
        super().__init__()
        self.architecture = architecture
        self.utils = Utils()
        self.launcher_cls = Launcher

    @classmethod
    def is_active(cls) -> bool:
        return True

    def map_python_to_cpp_type(self, ty: str) -> str:
        from triton.backends.nvidia.driver import ty_to_cpp

        return ty_to_cpp(ty)

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.architecture, 32)

    def get_current_device(self) -> int:
        return 0

    def set_current_device(self, device: int) -> None: ...

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> Any:
        import torch

        return torch.device("meta")

    def get_benchmarker(self) -> Any:
        raise NotImplementedError("nothing runs on a device that isn't there")


def pretend(architecture: int = 90) -> FakeDriver:
    """Makes the fake device Triton's, for the rest of the process."""
    made = FakeDriver(architecture)
    driver.set_active(made)
    return made


def compile_launchers() -> int:
    """Compiles into Triton's cache what its launches need beside the kernels; how many.

    They are linked against a library of the driver's name, which is not here: one that has the
    functions that they call, since linkers leave out libraries of which nothing is needed.
    """
    from triton.backends.nvidia import driver as nvidia
    from triton.runtime import build

    texts = dict.fromkeys(Launcher.sources, "__triton_launcher")
    texts[(Path(nvidia.dirname) / "driver.c").read_text()] = "cuda_utils"
    with tempfile.TemporaryDirectory() as folder:
        called = sorted(set(re.findall(r"\bcu[A-Z]\w+(?=\()", "\n".join(texts))))
        stubs = Path(folder) / "stubs.c"
        stubs.write_text("\n".join(f"void {name}(void) {{}}" for name in called))
        library = str(Path(folder) / "libcuda.so.1")
        command = ["gcc", "-shared", "-Wl,-soname,libcuda.so.1", "-o", library, str(stubs)]
        subprocess.run(command, check=True)
        for text, name in texts.items():
            source = Path(folder) / f"{name}.c"
            source.write_text(text)
            made = build._build(
                name, str(source), folder, [folder], nvidia.include_dirs, ["libcuda.so.1"], []
            )
            key = hashlib.sha256((text + build.platform_key()).encode()).hexdigest()
            suffix = sysconfig.get_config_var("EXT_SUFFIX")
            content = Path(made).read_bytes()
            get_cache_manager(key).put(content, f"{name}{suffix}", binary=True)
    return len(texts)
