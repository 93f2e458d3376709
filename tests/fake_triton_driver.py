"""A Triton driver without a GPU: kernels are compiled for a real architecture, launches go nowhere.

``install()`` makes it the active one, before the first launch; ``launches`` counts.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.runtime import driver

launches: list[tuple[Any, ...]] = []
compiled: list[str] = []


def _load(name: str, *_: Any) -> tuple[int, int, int, int, int]:
    compiled.append(name)
    return 1, 1, 0, 0, 1024  # module, function, registers, spills, threads at most


class _Launcher:
    """Stands for the C launcher: takes what it would, remembers grid and arguments."""

    def __init__(self, source: Any, metadata: Any) -> None:
        pass

    def __call__(self, *given: Any) -> None:
        launches.append(given)


class FakeDriver(DriverBase):
    """One H200 at index 0 or whatever ``device`` says."""

    launcher_cls = _Launcher
    utils = SimpleNamespace(
        load_binary=_load,
        get_device_properties=lambda device: {"max_shared_mem": 232448},
        unload_module=lambda module: None,
    )
    device = 0

    @classmethod
    def is_active(cls) -> bool:
        return True

    def map_python_to_cpp_type(self, ty: str) -> str:
        return ty

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return self.device

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> Any:
        raise NotImplementedError

    def get_benchmarker(self) -> Any:
        raise NotImplementedError


def install() -> FakeDriver:
    fake = FakeDriver()
    driver.set_active(fake)
    return fake
