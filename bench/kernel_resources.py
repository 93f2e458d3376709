"""Registers, spills, waves and instructions of the GPU kernels, compiled here without a GPU.

    python bench/kernel_resources.py            # compile all, write results/kernel_resources.json
    python bench/kernel_resources.py --check    # compile all and compare with that file
    python bench/kernel_resources.py --sm 90    # some architectures; writes nothing
    python bench/kernel_resources.py --sm 90 --append after   # rows to kernel_resources.jsonl

Every launch that the losses make for the shapes below is recorded (on meta tensors: no data, no
device) and its kernel compiled for every architecture with the constants and warps it would be
launched with, as Triton would on the first call. The sources in csrc/cuda are compiled by nvcc,
with the flags of setup.py, where there is one; where there is none, a line says that they were
skipped. The numbers are read from the cubins with the cuobjdump that Triton carries.

``--check`` fails on a kernel that does not compile, on one that is missing from the file, on
registers that grew by more than a slack since it was written, and on code that breaks a rule of
:mod:`bench.kernel_rules`.
"""

from __future__ import annotations

import datetime
import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

sys.path.append(str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor

from bench import sass
from bench.kernel_rules import ARCHITECTURES, LOOPED, complaints
from bench.report import append_row, make_parser, markdown_table
from fastis.kernels.loss import CrossEntropyOptions, ElementwiseOptions, Wanted

RESULTS = Path(__file__).parent / "results" / "kernel_resources.json"
ROWS = RESULTS.with_suffix(".jsonl")
_TYPES = {
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.int64: "i64",
}


class Usage(NamedTuple):
    """What a kernel takes: registers and stack a thread, shared memory a block in bytes."""

    registers: int
    shared: int
    local: int


class Launch(NamedTuple):
    """A kernel as it was asked for: everything that decides its machine code."""

    kernel: Any
    signature: dict[str, str]
    constants: dict[str, Any]
    divisible: tuple[str, ...]
    num_warps: int
    max_registers: int | None
    programs: int

    @property
    def key(self) -> str:
        """Two launches with one key are one compiled kernel."""
        name = self.kernel.__name__
        return repr((name, *self[1:-1]))


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def losses() -> Iterator[tuple[str, Callable[[], object]]]:
    """Named calls that between them launch every kernel in the configurations that matter."""
    from fastis.kernels.triton import loss as triton_loss

    bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
    short = {bf16: "bf16", fp16: "fp16", fp32: "fp32"}

    def cross_entropy(
        *shape: int, dtype: torch.dtype = bf16, grad: bool = True, mean: bool = False,
        soft: bool = False, smoothing: float = 0.0, r: bool = True, classes: bool = False,
    ) -> tuple[str, Callable[[], object]]:  # fmt: skip
        target = meta(*shape) if soft else meta(*shape[:-1], dtype=torch.int64)
        weights = meta(shape[0]) if r else None
        options = CrossEntropyOptions(meta(shape[-1]) if classes else None, -100, smoothing)
        wanted = Wanted(float(shape[0]) if r else None, True, grad, mean)
        words = [
            "cross_entropy", "x".join(map(str, shape)), short[dtype], *["soft"] * soft,
            *["smoothed"] * bool(smoothing), *["class_weights"] * classes, *["grad"] * grad,
            *["mean_grad"] * mean,
        ]  # fmt: skip
        return " ".join(words), lambda: triton_loss.cross_entropy(
            meta(*shape, dtype=dtype), target, weights, options, wanted
        )

    def elementwise(
        name: str, *shape: int, dtype: torch.dtype = bf16, mean: bool = True
    ) -> tuple[str, Callable[[], object]]:
        options = ElementwiseOptions(meta(shape[1]) if name.startswith("binary") else None)
        wanted = Wanted(float(shape[0]), True, True, mean)
        words = [name, "x".join(map(str, shape)), short[dtype], "grad", *["mean_grad"] * mean]
        return " ".join(words), lambda: getattr(triton_loss, name)(
            meta(*shape, dtype=dtype), meta(*shape), meta(shape[0]), options, wanted
        )

    yield cross_entropy(8192, 128256, grad=False)
    yield cross_entropy(8192, 128256)
    yield cross_entropy(8192, 128256, dtype=fp32)
    yield cross_entropy(8192, 128256, dtype=fp32, grad=False)
    yield cross_entropy(8192, 50257)
    yield cross_entropy(8192, 50257, grad=False)
    yield cross_entropy(16, 2048, 32000, r=False, classes=True)
    yield cross_entropy(8192, 32000, dtype=fp16)
    yield cross_entropy(32768, 1000, grad=False)
    yield cross_entropy(32768, 1000)
    yield cross_entropy(32768, 1000, mean=True)
    yield cross_entropy(4096, 10, dtype=fp32, mean=True)
    yield cross_entropy(128, 10, dtype=fp32, mean=True, r=False)
    yield cross_entropy(4096, 4096, dtype=fp32, mean=True)
    yield cross_entropy(4096, 1000, soft=True, mean=True)
    yield cross_entropy(4096, 1000, smoothing=0.1, mean=True)
    yield cross_entropy(4096, 4096, dtype=fp32, soft=True, classes=True, mean=True)
    yield cross_entropy(8192, 128256, smoothing=0.1)
    yield cross_entropy(1024, 32000, soft=True, classes=True)
    yield elementwise("binary_cross_entropy_with_logits", 4096, 1000)
    yield elementwise("binary_cross_entropy_with_logits", 256, 150528, mean=False)
    yield elementwise("mse_loss", 4096, 4096, dtype=fp32)
    yield elementwise("mse_loss", 128, 10, dtype=fp32)
    grad, half = meta(8192, 1000, dtype=bf16), meta(8192, 1000)
    scale = triton_loss.scale_grad

    def in_place() -> None:
        with mock.patch.object(triton_loss, "_keeps_graph", return_value=False):
            scale(grad, meta())

    yield "scale_grad bf16 in place", in_place
    yield "scale_grad bf16", lambda: scale(grad, meta())
    yield "scale_grad fp32 to fp16", lambda: scale(half, meta(), fp16)
    yield "scale_grad bf16 by rows", lambda: scale(grad, meta(8192))


def recorded() -> dict[str, list[Launch]]:
    """The launches behind each named call."""
    from fastis.kernels.triton import loss as triton_loss

    launches: dict[str, list[Launch]] = {}
    for name, call in losses():
        found = launches[name] = []

        def record(kernel, grid, num_warps, *arguments, found=found, **constants):  # type: ignore
            found.append(_as_launched(kernel, grid[0], num_warps, arguments, constants))

        with mock.patch.object(triton_loss, "_launch", record):
            call()
    return launches


def _as_launched(
    kernel: Any,
    programs: int,
    num_warps: int,
    arguments: tuple[Any, ...],
    constants: dict[str, Any],
) -> Launch:
    """Types and specialisations as Triton derives them from the arguments of a launch."""
    signature, fixed, divisible = {}, dict(constants), []
    max_registers = fixed.pop("maxnreg", None)
    for parameter, value in zip(kernel.params, arguments, strict=False):
        name, special = parameter.name, not parameter.do_not_specialize
        if value is None or (special and type(value) is int and value == 1):
            fixed[name] = value
        elif isinstance(value, Tensor):
            signature[name] = "*" + _TYPES[value.dtype]
            divisible.append(name)  # torch aligns its allocations
        elif isinstance(value, float):
            signature[name] = "fp32"
        else:
            signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if special and value % 16 == 0:
                divisible.append(name)
    for name in kernel.arg_names:
        if name in fixed:
            signature[name] = "constexpr"
    ordered = {name: signature[name] for name in kernel.arg_names}
    return Launch(kernel, ordered, fixed, tuple(divisible), num_warps, max_registers, programs)


def compiled(launch: Launch, architecture: int) -> Any:
    """The kernel compiled for compute capability ``architecture / 10``."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = launch.kernel.arg_names
    attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in launch.divisible}
    source = ASTSource(launch.kernel, launch.signature, launch.constants, attributes)
    options = {"num_warps": launch.num_warps, "maxnreg": launch.max_registers}
    options["enable_fp_fusion"] = True
    return triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)


def cuobjdump() -> str:
    """The one that Triton carries."""
    import triton.backends.nvidia

    return str(Path(triton.backends.nvidia.__file__).parent / "bin" / "cuobjdump")


def dumped(cubin: bytes, option: str) -> str:
    """What cuobjdump says of a cubin."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [cuobjdump(), option, file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def resource_usage(cubin: bytes) -> dict[str, Usage]:
    """Usage by kernel of a cubin, Triton's or nvcc's; of shared memory the static part."""
    pattern = r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)"
    return {
        name: Usage(int(registers), int(shared), int(stack) + int(local))
        for name, registers, stack, shared, local in re.findall(
            pattern, dumped(cubin, "--dump-resource-usage")
        )
    }


def resident(usage: Usage, num_warps: int) -> int:
    """Programs that one multiprocessor of an H200 holds at a time."""
    registers = -(-usage.registers // 8) * 8 * 32 * num_warps
    shared = usage.shared + 1024  # which each of them costs
    return min(65536 // registers, 233472 // shared, 64 // num_warps, 32)


def loops_of(launch: Launch, listing: str) -> list[dict[str, Any]]:
    """The loops over the logits: those of a sweep, and the one over the tiles."""
    (code,) = sass.functions(listing).values()
    kernel, itemsize = launch.kernel.__name__, {"*fp32": 4}.get(launch.signature["logits_ptr"], 2)
    if kernel.endswith("sweeps_kernel"):
        loops = [loop for loop in sass.innermost_loops(code) if max(loop.loads, default=0) >= 4]
    else:
        loops = [loop for loop in sass.outermost_loops(code) if loop.loads]
    return [
        {
            "instructions": len(loop.path),
            "shuffles": loop.count("SHFL"),
            "elements": sum(n * width for width, n in loop.loads.items() if width >= 8) // itemsize,
            "loads": {str(width): n for width, n in sorted(loop.loads.items())},
            "stores": {str(width): n for width, n in sorted(loop.stores.items())},
        }
        for loop in loops
    ]


def measure(architectures: Iterable[int]) -> Iterator[dict[str, Any]]:
    """A row per distinct kernel and architecture, of the widest of its launches."""
    widest: dict[str, tuple[str, Launch]] = {}
    for call, launches in recorded().items():
        for launch in launches:
            first, before = widest.get(launch.key, (call, launch))
            widest[launch.key] = first, max(before, launch, key=lambda one: one.programs)
    for call, launch in widest.values():
        for architecture in architectures:
            row = {"kernel": launch.kernel.__name__, "call": call, "sm": architecture}
            yield row | about(launch, architecture)


def about(launch: Launch, architecture: int) -> dict[str, Any]:
    """What is to be known of a compiled kernel."""
    name, kernel = launch.kernel.__name__, compiled(launch, architecture)
    (usage,) = resource_usage(kernel.asm["cubin"]).values()
    # What Triton lays out in shared memory is asked for at launch.
    usage = usage._replace(shared=kernel.metadata.shared)
    row: dict[str, Any] = {"num_warps": launch.num_warps, **usage._asdict()}
    row |= {"programs": launch.programs, "resident": resident(usage, launch.num_warps)}
    if name in LOOPED or name.endswith("sweeps_kernel"):
        row["loops"] = loops_of(launch, dumped(kernel.asm["cubin"], "-sass"))
    return row


def measure_cuda(architectures: Iterable[int]) -> Iterator[dict[str, Any]]:
    """A row per kernel of csrc/cuda and architecture; none without nvcc."""
    nvcc = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
    if nvcc is None:
        print("skipped: csrc/cuda, for want of nvcc")
        return
    top = Path(__file__).resolve().parents[1]
    for source in sorted((top / "csrc" / "cuda").glob("*.cu")):
        for architecture in architectures:
            with tempfile.TemporaryDirectory() as folder:
                cubin = Path(folder) / "kernels.cubin"
                command = [nvcc, "-cubin", str(source), "-o", str(cubin), f"-I{top / 'csrc'}"]
                command += ["-std=c++17", "-O3", "--fmad=false", "-DFASTIS_CUDA=1"]
                subprocess.run([*command, f"-arch=sm_{architecture}"], check=True)
                found = resource_usage(cubin.read_bytes())
                codes = sass.functions(dumped(cubin.read_bytes(), "-sass"))
            for mangled, usage in sorted(found.items()):
                name = cuda_name(mangled)
                if name is None:
                    continue
                row = {"kernel": name, "call": source.name, "sm": architecture}
                constant = sum("CONSTANT" in i.opcode for i in codes[mangled] if i.base == "LDG")
                yield {**row, "num_warps": 8, **usage._asdict(), "constant_loads": constant}


def cuda_name(mangled: str) -> str | None:
    """A kernel of ours with its template's argument; None for those of CUB."""
    ours = re.search(r"4cuda.*?\d+([a-z_]+_kernel)(?:E|I.*?\d+([A-Z][A-Za-z]+?)E)", mangled)
    if ours is None or "3cub" in mangled.split("_kernel")[0]:
        return None
    return ours[1] + (f"<{ours[2]}>" if ours[2] else "")


def append(rows: list[dict[str, Any]], label: str) -> None:
    """The rows with date and compiler behind the others, for the record."""
    import triton

    now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    stamp = {"date": now, "label": label, "triton": triton.__version__, "torch": torch.__version__}
    for row in rows:
        append_row(ROWS, {**stamp, **row})


def table(rows: list[dict[str, Any]]) -> str:
    columns = ("num_warps", "sm", "registers", "shared", "local", "programs", "resident")
    lines = [("kernel", "call", *columns, "instructions")]
    for row in rows:
        steps = [f"{x['instructions']}/{x['elements']}" for x in row.get("loops", ())]
        cells = (str(row.get(column, "")) for column in columns)
        lines.append((row["kernel"], row["call"], *cells, " ".join(steps)))
    return markdown_table(lines)


def main(argv: list[str] | None = None) -> int:
    parser = make_parser(__doc__)
    parser.add_argument("--check", action="store_true", help="compare with the file, write nothing")
    parser.add_argument("--sm", type=int, nargs="+", default=ARCHITECTURES, help="architectures")
    parser.add_argument("--append", metavar="LABEL", help=f"Triton's rows to results/{ROWS.name}")
    args = parser.parse_args(argv)
    import triton

    rows = [*measure(args.sm), *(() if args.append else measure_cuda(args.sm))]
    print(f"triton {triton.__version__}")
    print(table(rows))
    if args.append:
        append(rows, args.append)
    if (set(args.sm) != set(ARCHITECTURES) or args.append) and not args.check:
        return 0
    if args.check:
        found = complaints(rows, json.loads(RESULTS.read_text())["kernels"])
        print("\n".join(found) or f"{len(rows)} compiled kernels as in {RESULTS.name}")
        return bool(found)
    lines = ",\n".join("  " + json.dumps(row) for row in rows)
    RESULTS.write_text(
        f'{{"triton": "{triton.__version__}", "kernels": [\n{lines}\n]}}\n', encoding="utf-8"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
