"""Builds ``fastis._C``: C++ always, CUDA when nvcc is found (``FASTIS_CUDA=0|1`` forces).

``FASTIS_NO_EXTENSION=1`` builds nothing: a wheel of pure Python, with the reference backend and
Triton's losses, for machines without a compiler.

The extension knows nothing of torch: its entry points take raw pointers and sizes, so one wheel
serves every torch. The files under csrc/cpu are compiled once per instruction set and the best one
that the machine has is chosen at import; everything else is compiled once.
"""

import os
import platform
import re
import shutil
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pybind11
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import PlatformError

HERE = Path(__file__).parent
# Those that this nvcc knows are compiled, and PTX of the oldest and the newest of them besides:
# devices between and beyond them compile that when it is loaded.
CUDA_ARCHITECTURES = ("80", "90", "100", "120")
ISA_FLAGS: dict[str, list[str]] = {"baseline": []}
MACROS = []
if platform.machine().lower() in ("x86_64", "amd64", "i686"):
    avx2, avx512 = ["avx2", "fma", "f16c", "bmi2"], ["avx512f", "avx512bw", "avx512dq", "avx512vl"]
    ISA_FLAGS["avx2"] = [f"-m{name}" for name in avx2]
    ISA_FLAGS["avx512"] = [f"-m{name}" for name in avx512 + avx2[1:]]
    MACROS = [("FASTIS_X86", "1")]
# clang on macOS has no OpenMP of its own: the losses then run on one thread.
OPENMP = [] if platform.system() == "Darwin" else ["-fopenmp"]
# Contraction is off everywhere: the state update promises equal bits on every backend, and a
# silently fused multiply-add would break that. The losses ask for fma by name where they want it.
CXX_FLAGS = [
    "-std=c++17",
    "-O3",
    "-fvisibility=hidden",
    "-ffp-contract=off",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-Wall",
    "-Wextra",
    "-Wno-psabi",
]
# FASTIS_SANITIZE=address,undefined, say: for .ci/sanitize, into a folder of its own, no wheel.
SANITIZE = os.environ.get("FASTIS_SANITIZE", "")
SANITIZE_FLAGS = [f"-fsanitize={SANITIZE}", "-fno-sanitize-recover=all"] if SANITIZE else []
if SANITIZE:
    CXX_FLAGS += [*SANITIZE_FLAGS, "-O1", "-g1", "-fno-omit-frame-pointer", "-D_GLIBCXX_ASSERTIONS"]


def relative(pattern: str) -> list[str]:
    return sorted(str(path.relative_to(HERE)) for path in HERE.glob(pattern))


def wants_extension() -> bool:
    """False where FASTIS_NO_EXTENSION=1 asks for pure Python."""
    without = os.environ.get("FASTIS_NO_EXTENSION", "0")
    if without not in ("0", "1"):
        raise ValueError(f"FASTIS_NO_EXTENSION must be 0, 1 or unset, got {without!r}")
    if without == "1" and os.environ.get("FASTIS_CUDA") == "1":
        raise ValueError("FASTIS_CUDA=1 demands the extension, FASTIS_NO_EXTENSION=1 forbids it")
    return without == "0"


def find_nvcc() -> str | None:
    """The path of nvcc, or None; raises when FASTIS_CUDA=1 demands one that is not there."""
    wanted = os.environ.get("FASTIS_CUDA", "auto")
    if wanted not in ("auto", "0", "1"):
        raise ValueError(f"FASTIS_CUDA must be 0, 1 or unset, got {wanted!r}")
    if wanted == "0":
        return None
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    nvcc = shutil.which("nvcc", path=str(Path(home) / "bin")) if home else None
    nvcc = nvcc or shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
    if nvcc is None and wanted == "1":
        raise RuntimeError("FASTIS_CUDA=1, but nvcc was found neither in CUDA_HOME nor on PATH")
    if nvcc and not relative("csrc/cuda/*.cu"):
        raise RuntimeError(
            f"{nvcc} was found, but no CUDA sources in csrc/cuda: this copy of the sources is "
            "incomplete; FASTIS_CUDA=0 builds without CUDA"
        )
    return nvcc


def cuda_targets(nvcc: str) -> list[str]:
    """What to compile for, as ``sm_90`` or ``compute_90`` (PTX): FASTIS_CUDA_ARCHS, or the default.

    FASTIS_CUDA_ARCHS="80 90" names compute capabilities, for a build that is over sooner.
    """
    listing = subprocess.run([nvcc, "--list-gpu-code"], capture_output=True, text=True, check=True)
    known = re.findall(r"^sm_(\w+)$", listing.stdout, re.MULTILINE)
    wanted = re.findall(r"[^\s,;]+", os.environ.get("FASTIS_CUDA_ARCHS", "").replace(".", ""))
    unknown = [name for name in wanted if name not in known]
    if unknown:
        raise ValueError(
            f"FASTIS_CUDA_ARCHS must name targets of {nvcc} ({', '.join(known)}), "
            f"got {', '.join(unknown)}"
        )
    chosen = wanted or [name for name in CUDA_ARCHITECTURES if name in known]
    if not chosen:
        raise RuntimeError(
            f"{nvcc} knows none of {', '.join(CUDA_ARCHITECTURES)}; name others in "
            "FASTIS_CUDA_ARCHS, or leave CUDA out by FASTIS_CUDA=0"
        )
    oldest, newest = (f(chosen, key=lambda n: int(re.sub(r"\D", "", n))) for f in (min, max))
    return [f"sm_{name}" for name in chosen] + sorted({f"compute_{oldest}", f"compute_{newest}"})


def find_cudart(nvcc: str) -> str:
    """The folder of libcudart_static.a; nvcc itself says where it is installed (it may be a script
    elsewhere on PATH), and installations differ in the folder's name."""
    listing = subprocess.run(
        [nvcc, "-dryrun", "-x", "cu", os.devnull], capture_output=True, text=True
    )
    top = re.search(r"^#\$ TOP=(.*)$", listing.stderr, re.MULTILINE)
    home = Path(top.group(1)) if top else Path(nvcc).resolve().parents[1]
    for pattern in ("lib64", "lib", "targets/*/lib"):
        for folder in home.glob(pattern):
            if (folder / "libcudart_static.a").exists():
                return str(folder)
    raise RuntimeError(
        f"nvcc was found, but no libcudart_static.a below {home}; FASTIS_CUDA=0 skips"
    )


class BuildExtension(build_ext):
    """Compiles csrc/cpu once per instruction set and csrc/cuda with nvcc, then links one module."""

    def build_extensions(self) -> None:
        command = getattr(self.compiler, "compiler_so_cxx", None)  # of compilers as on Unix
        if command and shutil.which(command[0]) is None:
            raise PlatformError(
                f"fastis._C needs a C++17 compiler, but {command[0]!r} was not found: install one "
                "(Debian, Ubuntu: apt install g++) or name one in CXX. FASTIS_NO_EXTENSION=1 "
                "installs without: plain PyTorch on CPUs, right but slow"
            )
        find_nvcc()  # raises before a minute of compiling, not after
        super().build_extensions()

    def build_extension(self, ext: Extension) -> None:
        objects, macros = [], []
        for isa, flags in ISA_FLAGS.items():
            sources = relative("csrc/cpu/*.cpp")
            objects += self.compile_cpp(sources, isa, [("FASTIS_ISA", isa)], flags)
        nvcc = find_nvcc()
        if nvcc:
            targets = cuda_targets(nvcc)
            objects += self.compile_cuda(nvcc, targets)
            named = " ".join(targets)
            macros = [("FASTIS_CUDA", "1"), ("FASTIS_CUDA_TARGETS", f'"{named}"')]
        objects += self.compile_cpp(relative("csrc/*.cpp"), "host", macros)
        self.link(ext, objects, nvcc)

    def compile_cpp(
        self,
        sources: list[str],
        folder: str,
        macros: list[tuple[str, str]],
        flags: Sequence[str] = (),
    ) -> list[str]:
        """The objects, in a folder of their own; several files at a time."""

        def compile_one(source: str) -> str:
            (compiled,) = self.compiler.compile(
                [source],
                output_dir=str(Path(self.build_temp) / folder),
                macros=MACROS + macros,
                # Relative to the project so that no build path enters the objects.
                include_dirs=["csrc", pybind11.get_include()],
                extra_postargs=[*CXX_FLAGS, *OPENMP, *flags],
                depends=relative("csrc/**/*.h"),
            )
            return compiled

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            return list(pool.map(compile_one, sources))

    def link(self, ext: Extension, objects: list[str], nvcc: str | None = None) -> None:
        strip = ["-Wl,-s"] if platform.system() == "Linux" and not SANITIZE else []
        # torch carries libgomp.so.1 too and is imported first, so both share one thread pool.
        self.compiler.link_shared_object(
            objects,
            self.get_ext_fullpath(ext.name),
            extra_postargs=[*OPENMP, *SANITIZE_FLAGS, *strip],
            library_dirs=[find_cudart(nvcc)] if nvcc else [],
            libraries=["cudart_static", "rt", "dl", "pthread"] if nvcc else [],
            build_temp=self.build_temp,
            target_lang="c++",
        )

    def compile_cuda(self, nvcc: str, targets: list[str]) -> list[str]:
        flags = ["-std=c++17", "-O3", "--fmad=false", "-Icsrc", "-DFASTIS_CUDA=1"]
        flags += ["-Xcompiler", "-fPIC", "--threads", "2"]
        for target in targets:
            virtual = target.replace("sm_", "compute_")
            flags.append(f"-gencode=arch={virtual},code={target}")
        folder = Path(self.build_temp) / "cuda"
        folder.mkdir(parents=True, exist_ok=True)
        objects = {s: str(folder / (Path(s).stem + ".o")) for s in relative("csrc/cuda/*.cu")}
        with ThreadPoolExecutor(max(1, (os.cpu_count() or 1) // 2)) as pool:
            commands = [[nvcc, "-c", source, "-o", o, *flags] for source, o in objects.items()]
            list(pool.map(self.spawn, commands))
        return list(objects.values())


if __name__ == "__main__":  # tests/native.py builds with what is above
    sources = relative("csrc/*.cpp") + relative("csrc/cpu/*.cpp")
    setup(
        ext_modules=[Extension("fastis._C", sources, language="c++")] if wants_extension() else [],
        cmdclass={"build_ext": BuildExtension},
    )
