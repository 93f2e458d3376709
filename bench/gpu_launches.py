"""Compiles, without a GPU, the Triton kernels that the GPU's tests and benchmarks launch.

    TRITON_CACHE_DIR=DIR python bench/gpu_launches.py [--sm 90] [--jobs 2]

Every call is made on meta tensors against a driver that isn't there (bench/fake_triton.py), so
Triton stores the kernels under the keys by which a run on the GPU looks them up, given the same
release of Triton. Then prunes the cache to what such a run reads. ``bench/gpu_prepare.sh`` does it.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

sys.path.append(str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor

from bench.report import make_parser
from fastis.kernels.loss import CrossEntropyOptions, ElementwiseOptions, Wanted

Call = Callable[[], object]
KEPT = (".json", ".cubin", ".so")


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def cross_entropy(
    shape: tuple[int, ...],
    dtype: torch.dtype,
    *,
    r: bool = True,
    classes: bool = False,
    smoothing: float = 0.0,
    soft: bool = False,
    reduce: bool = True,
    grad: bool = True,
    mean: bool | None = None,
    denominator: float | None = None,
) -> None:
    """One call as fastis.cross_entropy makes it, and its backward pass."""
    from fastis.kernels.triton import loss as triton_loss

    target = meta(*shape) if soft else meta(*shape[:-1], dtype=torch.int64)
    if denominator is None and r:
        denominator = float(torch.Size(shape[:-1]).numel())
    if mean is None:
        mean = len(shape) == 2 and shape[-1] <= 4096
    options = CrossEntropyOptions(meta(shape[-1]) if classes else None, -100, smoothing)
    out = triton_loss.cross_entropy(
        meta(*shape, dtype=dtype), target, meta(shape[0]) if r else None, options,
        Wanted(denominator, reduce, grad, mean),
    )  # fmt: skip
    if out[4] is not None:
        backward(out[4], meta() if reduce else meta(shape[0]), dtype)


def backward(grad: Tensor, grad_output: Tensor, dtype: torch.dtype) -> None:
    """By Triton, whichever kernel the device will choose."""
    from fastis.kernels.triton import loss as triton_loss

    for kept in (False, True):
        with mock.patch.object(triton_loss, "_keeps_graph", return_value=kept):
            triton_loss.scale_grad(grad, grad_output, dtype)


def of_tests() -> Iterator[Call]:
    """What tests/test_cuda_loss.py launches."""
    sys.path.append(str(Path(__file__).resolve().parents[1] / "tests"))
    import test_cuda_loss as tests

    bf16, fp32 = torch.bfloat16, torch.float32
    for shape, dtype in tests.CASES:
        yield lambda s=shape, d=dtype: cross_entropy(s, d, r=False)
        yield lambda s=shape, d=dtype: cross_entropy(s, d, classes=True)
    for shape in [(128, 10), (512, 1000), (8, 128256), (4, 9, 300)]:
        for dtype in (fp32, bf16):
            for soft in (False, True):
                options = {"soft": soft, "smoothing": 0.1}
                yield lambda s=shape, d=dtype, o=options: cross_entropy(s, d, **o)
                yield lambda s=shape, d=dtype, o=options: cross_entropy(s, d, classes=True, **o)
    for n in (10, 1000, 5000):
        for smoothing in (0.0, 0.1):
            options = {"smoothing": smoothing, "reduce": False, "r": False}
            yield lambda n=n, o=options: cross_entropy((9, n), fp32, **o)
        yield lambda n=n: cross_entropy((64, n), fp32, r=False, grad=False)
        yield lambda n=n: cross_entropy((64, n), fp32, reduce=False)
    for rows in (17000, 40):
        yield lambda n=rows: cross_entropy((n, 128256), bf16, r=False, denominator=1.0)
    for shape in [(128, 10), (4096, 10), (2048, 1000), (64, 128256), (8, 99, 777), (64, 32000),
                  (4, 50, 300)]:  # fmt: skip
        for smoothing in (0.0, 0.1):
            for r in (False, True):
                options = {"smoothing": smoothing, "r": r}
                yield lambda s=shape, o=options: cross_entropy(s, bf16, **o)
    for shape in [(128, 10), (512, 1000), (4, 150528)]:
        for dtype in tests.FLOATS:
            yield lambda s=shape, d=dtype: elementwise_losses(s, d)


def elementwise_losses(shape: tuple[int, int], dtype: torch.dtype) -> None:
    from fastis.kernels.triton import loss as triton_loss

    rows, outputs = shape
    wanted = Wanted(float(rows), True, False, outputs <= 4096)
    tensors = meta(*shape, dtype=dtype), meta(*shape), meta(rows)
    for loss, pos_weight in (
        (triton_loss.binary_cross_entropy_with_logits, meta(outputs)),
        (triton_loss.mse_loss, None),
    ):
        loss(*tensors, ElementwiseOptions(pos_weight, float(outputs)), wanted)


def of_benchmarks() -> Iterator[Call]:
    """What the benchmarks launch: their shapes, the ceilings, the geometries that are compared."""
    from bench import bench_gpu_loss
    from fastis.kernels.triton import geometry as triton_geometry
    from fastis.kernels.triton import loss as triton_loss

    yield ceilings
    for shape in bench_gpu_loss.SHAPES:
        size, dtype = shape[:2], shape[2]
        for grad in (False, True):
            yield lambda s=size, d=dtype, g=grad: cross_entropy(s, d, grad=g, mean=False)
        yield lambda s=size, d=dtype: cross_entropy(s, d)
    yield lambda: cross_entropy((128, 10), torch.bfloat16)

    def tuned(size: tuple[int, int], dtype: torch.dtype, grad: bool, plan: object) -> None:
        with mock.patch.object(triton_loss, "row_launch", return_value=plan):
            cross_entropy(size, dtype, grad=grad, mean=False)

    for rows, classes, dtype in bench_gpu_loss.SHAPES[:2]:
        for grad in (False, True):
            plan = triton_geometry.row_launch(
                rows, classes, vector=16 // dtype.itemsize, itemsize=dtype.itemsize,
                with_grad=grad, with_mean_grad=False,
            )  # fmt: skip
            for other in bench_gpu_loss.alternatives(plan):
                options = ((rows, classes), dtype, grad, other)
                yield lambda o=options: tuned(*o)


def ceilings() -> None:
    from bench import gpu_ceilings as kernels

    source, out = meta(1 << 20, dtype=torch.int32), meta(1, dtype=torch.int32)
    kernels.empty_kernel[(1,)](num_warps=1)
    kernels.read_kernel[(1,)](source, out, source.numel(), BLOCK=4096, num_warps=8)
    for words in (1, 2):
        items = meta(1_000_000, words, dtype=torch.int64)
        for block in (256, 1024):
            kernels.gather_kernel[(1,)](
                items, meta(1, dtype=torch.int64), len(items), 1 << 24, WORDS=words, BLOCK=block,
                num_warps=8,
            )  # fmt: skip


def compile_part(architecture: int, part: int, parts: int, most: int | None) -> int:
    """Every ``parts``-th call; how many failed."""
    from bench import fake_triton

    fake_triton.pretend(architecture)
    failed = 0
    calls = [*of_tests(), *of_benchmarks()][:most]
    for number, call in enumerate(calls[part::parts]):
        try:
            call()
        except Exception as error:
            failed += 1
            print(f"call {part + parts * number} of {len(calls)} does not compile: {error!r:.300}")
    fake_triton.compile_launchers()
    return failed


def prune(cache: Path) -> tuple[int, int]:
    """Leaves what a run reads: kernels, their descriptions, launchers. Kernels and bytes left."""
    files = [path for path in cache.rglob("*") if path.is_file()]
    for path in files:
        if not path.name.endswith(KEPT):
            path.unlink()
    left = [path for path in files if path.exists()]
    return sum(p.suffix == ".cubin" for p in left), sum(p.stat().st_size for p in left)


def main(argv: list[str] | None = None) -> int:
    parser = make_parser(__doc__)
    parser.add_argument("--sm", type=int, default=90, help="architecture, 10 x compute capability")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--most", type=int, help="no more than the first so many calls")
    args = parser.parse_args(argv)
    if "TRITON_CACHE_DIR" not in os.environ:
        parser.error("TRITON_CACHE_DIR must name the folder to be filled")
    import triton

    start = time.monotonic()
    parts = [(args.sm, part, args.jobs, args.most) for part in range(args.jobs)]
    with multiprocessing.get_context("spawn").Pool(args.jobs) as pool:
        failed = sum(pool.starmap(compile_part, parts))
    kernels, size = prune(Path(os.environ["TRITON_CACHE_DIR"]))
    print(
        f"triton {triton.__version__}: {kernels} kernels for sm_{args.sm}, {size / 2**20:.1f} MiB, "
        f"{time.monotonic() - start:.0f} s, {failed} failed"
    )
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
