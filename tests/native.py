"""The tests' own extension, tests/csrc: what fastis._C does not show.

The device's code run on the host, and the compiled draw at points of the tests' choice. It is built
when a test first asks for it, by setup.py's compiler and flags, for the instruction set that
fastis._C chose, and kept under build/ until a source changes.
"""

from __future__ import annotations

import fcntl
import functools
import hashlib
import importlib.util
import os
import runpy
import subprocess
import sys
import sysconfig
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[1]
# What the compiled draw is made of; tests/csrc/inverse_cdf.cpp includes csrc/cpu/table_draw.cpp.
DRAW = ["csrc/cpu/tree.cpp", "csrc/cpu/update_cap.cpp"]


@functools.cache
def native() -> ModuleType:
    """The extension; skips the test where there is no compiler."""
    from fastis import _C

    isa = _C.isa()
    folder = ROOT / "build" / "native" / _fingerprint(isa)
    path = folder / f"native{sysconfig.get_config_var('EXT_SUFFIX')}"
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # pytest-xdist: the first worker builds for all
        if not path.exists():
            _build(isa, folder)
    spec = importlib.util.spec_from_file_location("native", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _fingerprint(isa: str) -> str:
    found = hashlib.sha256(f"{isa} {os.environ.get('FASTIS_SANITIZE')} {sys.version}".encode())
    sources = [*ROOT.glob("csrc/**/*.*"), *ROOT.glob("tests/csrc/*"), ROOT / "setup.py"]
    for path in sorted(sources):
        found.update(path.read_bytes())
    return found.hexdigest()[:16]


def _build(isa: str, folder: Path) -> None:
    # A preloaded sanitizer is for this process, not for the compiler.
    environment = {k: v for k, v in os.environ.items() if k != "LD_PRELOAD"} | {"FASTIS_CUDA": "0"}
    command = [sys.executable, __file__, isa, "-q", "build_ext", f"--build-lib={folder}"]
    command.append(f"--build-temp={folder}")
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if "needs a C++17 compiler" in done.stderr:
        pytest.skip("tests/csrc needs a C++17 compiler")
    if done.returncode != 0:
        raise RuntimeError(f"tests/csrc could not be built:\n{done.stdout}{done.stderr}")


def main(isa: str, *arguments: str) -> None:
    from setuptools import Distribution

    package = runpy.run_path("setup.py")
    sources = [*DRAW, *package["relative"]("tests/csrc/*.cpp")]

    class BuildNative(package["BuildExtension"]):
        def build_extension(self, ext):
            flags = package["ISA_FLAGS"][isa]
            self.link(ext, self.compile_cpp(sources, "temp", [("FASTIS_ISA", isa)], flags))

    class WithoutProject(Distribution):
        def parse_config_files(self, *_, **__):
            """pyproject.toml is fastis's; a setuptools of before its time can't read it."""

    package["setup"](
        distclass=WithoutProject,
        name="native",
        packages=[],
        ext_modules=[package["Extension"]("native", sources, language="c++")],
        cmdclass={"build_ext": BuildNative},
        script_args=list(arguments),
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
