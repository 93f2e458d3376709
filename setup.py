"""Builds ``fastis._C``: C++ always, CUDA when nvcc is found (``FASTIS_CUDA=0|1`` forces).

The extension knows nothing of torch: its entry points take raw pointers and sizes, so one wheel
serves every torch. The files under csrc/cpu are compiled once per instruction set and the best one
that the machine has is chosen at import; everything else is compiled once.
"""

import os
import platform
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from glob import glob
from pathlib import Path

import pybind11
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

HERE = Path(__file__).parent
# Those that this nvcc knows are compiled, and PTX of the oldest and the newest of them besides:
# devices between and beyond them compile that when it is loaded.
CUDA_ARCHITECTURES = ("80", "90", "100", "120")
X86_ISA_FLAGS = {
    "baseline": [],
    "avx2": ["-mavx2", "-mfma", "-mf16c", "-mbmi2"],
    "avx512": ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mf16c", "-mbmi2"],
}
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


def relative(pattern: str) -> list[str]:
    return sorted(str(Path(p).relative_to(HERE)) for p in glob(str(HERE / pattern)))


def find_nvcc() -> str | None:
    """The path of nvcc, or None; raises when FASTIS_CUDA=1 demands one that is not there."""
    wanted = os.environ.get("FASTIS_CUDA", "auto")
    if wanted not in ("auto", "0", "1"):
        raise ValueError(f"FASTIS_CUDA must be 0, 1 or unset, got {wanted!r}")
    if wanted == "0" or not relative("csrc/cuda/*.cu"):
        return None
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    nvcc = shutil.which("nvcc", path=str(Path(home) / "bin")) if home else None
    nvcc = nvcc or shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
    if nvcc is None and wanted == "1":
        raise RuntimeError("FASTIS_CUDA=1, but nvcc was found neither in CUDA_HOME nor on PATH")
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

    def build_extension(self, ext: Extension) -> None:
        is_x86 = platform.machine().lower() in ("x86_64", "amd64", "i686")
        isa_flags = X86_ISA_FLAGS if is_x86 else {"baseline": []}
        macros = [("FASTIS_X86", "1")] if is_x86 else []
        # clang on macOS has no OpenMP of its own: the losses then run on one thread.
        openmp = [] if platform.system() == "Darwin" else ["-fopenmp"]
        # Includes are relative to the project so that no build path enters the objects.
        include = ["csrc", *ext.include_dirs]
        objects = []
        for isa, flags in isa_flags.items():
            objects += self.compiler.compile(
                relative("csrc/cpu/*.cpp"),
                output_dir=str(Path(self.build_temp) / isa),
                macros=[*macros, ("FASTIS_ISA", isa)],
                include_dirs=include,
                extra_postargs=[*CXX_FLAGS, *openmp, *flags],
                depends=ext.depends,
            )
        nvcc = find_nvcc()
        if nvcc:
            targets = cuda_targets(nvcc)
            objects += self.compile_cuda(nvcc, targets)
            named = " ".join(targets)
            macros += [("FASTIS_CUDA", "1"), ("FASTIS_CUDA_TARGETS", f'"{named}"')]
        objects += self.compiler.compile(
            relative("csrc/*.cpp"),
            output_dir=str(Path(self.build_temp) / "host"),
            macros=macros,
            include_dirs=include,
            extra_postargs=CXX_FLAGS,
            depends=ext.depends,
        )
        # torch carries libgomp.so.1 too and is imported first, so both share one thread pool.
        self.compiler.link_shared_object(
            objects,
            self.get_ext_fullpath(ext.name),
            extra_postargs=[*openmp, *(["-Wl,-s"] if platform.system() == "Linux" else [])],
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


setup(
    ext_modules=[
        Extension(
            "fastis._C",
            sources=relative("csrc/*.cpp") + relative("csrc/cpu/*.cpp"),
            include_dirs=[pybind11.get_include()],
            depends=relative("csrc/*.h") + relative("csrc/cpu/*.h") + relative("csrc/device/*.h"),
            language="c++",
        )
    ],
    cmdclass={"build_ext": BuildExtension},
)
