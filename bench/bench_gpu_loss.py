"""Time of the Triton losses on a GPU against PyTorch's and against what its memory allows.

    python bench/bench_gpu_loss.py [--json FILE] [--quick] [--tune] [--shape 8192x128256xbfloat16]

Checks the values first, measures the copy and read ceilings in the same run, then times. Device
time is that of a replayed CUDA graph of calls on different data, together much larger than the
cache; the time of a call with its work on the host is the column "eager". What is timed:

- ``score``: ``cross_entropy`` of the backend, loss and score, no gradient. Must move B C logits
  once. Peer: the forward pass of ``F.cross_entropy``.
- ``grad``: the same call with the gradient written. Must move 2 B C. Peer: as above.
- ``step``: ``fastis.cross_entropy`` forward and backward with mean gradient. Peer: the same of
  ``F.cross_entropy``; also compiled, and Liger's where it is installed.

Targets: ``score`` at 92 % of the read ceiling for [8192 x 128256] and 80 % for [32768 x 1000], and
at most 0.5 of its peer; ``grad`` at 90 % of the copy ceiling, at most 1.0 of its peer and 0.4 of
forward and backward together. ``--tune`` times other launch geometries instead; ``--winner FILE``
takes the fastest of those that FILE has.
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

sys.path.append(str(Path(__file__).resolve().parents[1]))

import torch
import torch.nn.functional as F
from torch import Tensor

import fastis
from bench.report import Report, Row, make_parser, read_rows
from bench.timing import device_us, host_and_device
from fastis.kernels.loss import CrossEntropyOptions, Wanted

Shape = tuple[int, int, torch.dtype]
SHAPES: tuple[Shape, ...] = (
    (8192, 128256, torch.bfloat16),
    (32768, 1000, torch.bfloat16),
    (4096, 10, torch.float32),
    (128, 10, torch.float32),
)
# Fractions of the ceiling to be reached, by what and classes.
OF_CEILING = {("score", 128256): 0.92, ("score", 1000): 0.80, ("grad", 128256): 0.90}
# Times over that of a peer not to be exceeded, for the two large shapes.
OF_PEER = {("score", "forward"): 0.5, ("grad", "forward"): 1.0, ("grad", "step"): 0.4}
LARGE = 1 << 24
# Bytes of the data that one graph goes through: several times the largest cache.
COLD_BYTES = 512 << 20


def bytes_moved(what: str, shape: Shape) -> int:
    """The fewest bytes of logits and gradient; a label and the results of a row are 24 more."""
    rows, classes, dtype = shape
    once = rows * classes * dtype.itemsize
    return {"score": 1, "grad": 2, "step": 2}[what] * once + 24 * rows


def copies_of(shape: Shape) -> int:
    """How many inputs a graph rotates through: enough to keep the cache cold, two to twenty."""
    return min(max(-(-COLD_BYTES // bytes_moved("score", shape)), 2), 20)


Data = tuple[Tensor, Tensor, Tensor]


def data_of(shape: Shape) -> Data:
    """Logits that require grad, labels, coefficients."""
    rows, classes, dtype = shape
    logits = (2 * torch.randn(rows, classes, device="cuda", dtype=dtype)).requires_grad_()
    target = torch.randint(classes, (rows,), device="cuda")
    return logits, target, torch.rand(rows, device="cuda") + 0.5


def raw(data: Data, with_grad: bool) -> tuple[Tensor | None, ...]:
    """The backend's function alone, without mean gradient and without autograd."""
    logits, target, weights = data
    wanted = Wanted(float(len(target)), True, with_grad, False)
    kernels = fastis.kernels.kernels_for("loss", "cuda")
    return kernels.cross_entropy(logits.detach(), target, weights, CrossEntropyOptions(), wanted)


def stepping(loss_of: Callable[[Data], Tensor]) -> Callable[[Data], None]:
    """Forward and backward of a loss."""

    def step(data: Data) -> None:
        data[0].grad = None
        loss_of(data).backward()

    return step


def peers() -> dict[str, Callable[[Data], object]]:
    """Other ways to the loss: forward passes, and steps of forward and backward."""
    compiled = torch.compile(F.cross_entropy)
    found: dict[str, Callable[[Data], object]] = {
        "forward": lambda data: F.cross_entropy(data[0].detach(), data[1]),
        "step": stepping(lambda data: F.cross_entropy(data[0], data[1])),
        "compiled forward": lambda data: compiled(data[0].detach(), data[1]),
        "compiled step": stepping(lambda data: compiled(data[0], data[1])),
    }
    try:
        from liger_kernel.transformers.functional import liger_cross_entropy
    except ImportError:
        pass
    else:  # writes the gradient over the logits, so its input is a copy that it may spoil
        spoiled: dict[int, Tensor] = {}

        def liger(data: Data) -> Tensor:
            logits = spoiled.setdefault(id(data[0]), data[0].detach().clone().requires_grad_())
            return liger_cross_entropy(logits, data[1])

        found["liger step"] = stepping(liger)
    return found


def ours() -> dict[str, Callable[[Data], object]]:
    return {
        "score": lambda data: raw(data, False),
        "grad": lambda data: raw(data, True),
        "step": stepping(lambda data: fastis.cross_entropy(*data).loss),
    }


def check(data: Data) -> None:
    """Nothing wrong gets a number: some rows against float64, all rows against torch's loss."""
    logits, target, weights = data
    loss, losses, score, _, grad = raw(data, True)
    rows = torch.linspace(0, len(target) - 1, min(len(target), 256), device="cuda").long()
    z = logits.detach()[rows].double().requires_grad_()
    truth = F.cross_entropy(z, target[rows], reduction="none")
    (g,) = torch.autograd.grad(truth.sum(), z)
    torch.testing.assert_close(losses[rows].double(), truth.detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(score[rows].double(), g.norm(dim=1), rtol=1e-5, atol=1e-7)
    g *= weights[rows, None] / len(target)
    rtol = 2**-8 if logits.dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(grad[rows].double(), g, rtol=rtol, atol=1e-9)
    theirs = F.cross_entropy(logits.detach().float(), target, reduction="none")
    torch.testing.assert_close(losses, theirs, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(loss, (weights * theirs).mean(), rtol=1e-4, atol=1e-4)


def measure(shape: Shape, ceiling: dict[str, float], repeats: int) -> Iterator[dict[str, object]]:
    """A row per function, ours and the peers'."""
    torch.manual_seed(0)
    sets = [data_of(shape) for _ in range(copies_of(shape))]
    check(sets[0])
    rows, classes, dtype = shape
    times: dict[str, float] = {}
    for side, functions in (("torch", peers()), ("fastis", ours())):
        for what, function in functions.items():
            calls = [lambda d=data, f=function: f(d) for data in sets]
            us = device_us(calls, repeats)
            many = 3 if rows * classes > LARGE else 200
            eager = host_and_device(calls[0], many) / many * 1e6
            row: dict[str, object] = {
                "side": side, "what": what, "shape": (rows, classes), "us": us, "eager_us": eager,
                "dtype": str(dtype).removeprefix("torch."),
            }  # fmt: skip
            if side == "torch":
                times[what] = us
            else:
                row |= verdict(what, shape, us, times, ceiling)
            yield row


def verdict(
    what: str, shape: Shape, us: float, peer_us: dict[str, float], ceiling: dict[str, float]
) -> dict[str, object]:
    """Ratios to the peers and to the ceiling, and whether the targets are met (None: no target)."""
    classes = shape[1]
    reached = bytes_moved(what, shape) / us * 1e6 / ceiling["read" if what == "score" else "copy"]
    ratios = {peer: us / theirs for peer, theirs in peer_us.items()}
    wanted = OF_CEILING.get((what, classes))
    goals = [] if wanted is None else [reached >= wanted]
    if shape[0] * classes > LARGE:
        goals += [
            ratios[peer] <= most
            for (name, peer), most in OF_PEER.items()
            if name == what and peer in ratios
        ]
    return {"of_ceiling": reached, "of_peer": ratios, "met": all(goals) if goals else None}


def line_of(row: dict[str, object]) -> tuple[str, ...]:
    """One line of the printed table."""
    ratios: dict[str, float] = row.get("of_peer", {})  # type: ignore[assignment]
    shape = "x".join(map(str, row["shape"])) + " " + str(row["dtype"])  # type: ignore[call-overload]
    share = "" if "of_ceiling" not in row else f"{100 * float(row['of_ceiling']):.0f} %"
    cells = [f"{ratios[peer]:.2f}" if peer in ratios else "" for peer in ("forward", "step")]
    met = {True: "yes", False: "NO", None: ""}[row.get("met")]  # type: ignore[index]
    times = [f"{row['us']:.1f}", f"{row['eager_us']:.1f}"]
    return (shape, f"{row['side']} {row['what']}", *times, share, *cells, met)


HEADER = ("shape", "what", "us", "eager", "ceiling", "/forward", "/step", "target")


def tune(shape: Shape, repeats: int) -> Iterator[dict[str, object]]:
    """Times of ``score`` and ``grad`` under other launch geometries."""
    from fastis.kernels.triton import loss as triton_loss

    rows, classes, _ = shape
    sets = [data_of(shape) for _ in range(copies_of(shape))]
    for with_grad in (False, True):
        for other in alternatives(plan_of(shape, with_grad)):
            with mock.patch.object(triton_loss, "row_launch", lambda *_, o=other, **__: o):
                check(sets[0])
                us = device_us([lambda d=d, g=with_grad: raw(d, g) for d in sets], repeats)
            speed = bytes_moved("grad" if with_grad else "score", shape) / us / 1e6
            print(f"{rows}x{classes} grad={with_grad} {us:9.1f} us {speed:6.2f} TB/s {other}")
            yield {"what": "grad" if with_grad else "score", "shape": (rows, classes), "us": us,
                   "kind": type(other).__name__, "plan": other._asdict()}  # fmt: skip


@contextlib.contextmanager
def winners(path: Path | None) -> Iterator[None]:
    """Launches by the fastest geometry that ``path`` has of a shape, where it has any."""
    from fastis.kernels.triton import geometry as triton_geometry
    from fastis.kernels.triton import loss as triton_loss

    rows: list[Row] = []
    if path is not None:  # a call's record (bench/gpu_check.py), or rows alone
        is_record = path.suffix == ".json"
        rows = json.loads(path.read_text())["rows"] if is_record else read_rows(path)
    rows = [row for row in rows if row.get("benchmark") == "gpu loss tuned"]
    best: dict[tuple[object, ...], Row] = {}
    for row in sorted(rows, key=lambda r: -r["us"]):
        rows_and_classes = tuple(row["shape"])
        best[(*rows_and_classes, row["what"] == "grad")] = row

    def row_launch(
        rows: int, classes: int, *, with_grad: bool, with_mean_grad: bool, **rest: Any
    ) -> Any:
        row = best.get((rows, classes, with_grad))
        if row is None or with_mean_grad:
            options = {"with_grad": with_grad, "with_mean_grad": with_mean_grad}
            return triton_geometry.row_launch(rows, classes, **options, **rest)
        return getattr(triton_geometry, row["kind"])(**row["plan"])

    for (*shape, _), row in best.items():
        print(f"{'x'.join(map(str, shape))} {row['what']}: {row['us']:.1f} us by {row['plan']}")
    with mock.patch.object(triton_loss, "row_launch", row_launch):
        yield


def shape_of(text: str) -> Shape:
    rows, classes, dtype = text.split("x")
    return int(rows), int(classes), getattr(torch, dtype)


def plan_of(shape: Shape, with_grad: bool) -> tuple:
    """The launch as it is planned."""
    from fastis.kernels.triton.geometry import row_launch

    rows, classes, dtype = shape
    return row_launch(
        rows, classes, vector=16 // dtype.itemsize, itemsize=dtype.itemsize, with_grad=with_grad,
        with_mean_grad=False,
    )  # fmt: skip


def alternatives(plan: tuple) -> Iterator[tuple]:
    """The plan, and others around it."""
    from fastis.kernels.triton.geometry import Sweeps

    yield plan
    if isinstance(plan, Sweeps):
        for num_warps in (4, 8, 16):
            for chunks in (2, 4):
                for stages in (1, 2, 4):
                    yield plan._replace(
                        num_warps=num_warps, lanes=32 * num_warps, chunks=chunks, stages=stages
                    )
    else:
        for num_warps in (1, 2, 4):
            for programs in (1056, 2112, 4224, 8448, 1 << 20):
                tiles = -(-(1 << 30) // plan.block_rows)
                yield plan._replace(num_warps=num_warps, programs=min(programs, tiles))


def main(argv: list[str] | None = None) -> int:
    parser = make_parser(__doc__, "a measurement")
    parser.add_argument("--quick", action="store_true", help="a few repeats only")
    parser.add_argument("--tune", action="store_true", help="compare launch geometries instead")
    parser.add_argument("--winner", type=Path, help="file with rows of --tune, to launch by")
    parser.add_argument("--shape", type=shape_of, nargs="+", help="rows x classes x dtype")
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print("bench_gpu_loss.py measures a GPU, and torch finds none here", file=sys.stderr)
        return 2
    repeats = 5 if args.quick else 30
    shapes = args.shape or (SHAPES[:2] if args.tune else SHAPES)
    if args.tune:
        report = Report("gpu loss tuned", (), args.json)
        for shape in shapes:
            for row in tune(shape, repeats):
                report.store(row, "cuda")
        return 0
    from bench.gpu_ceilings import ceilings

    ceiling = ceilings(repeats)
    for name, speed in ceiling.items():
        print(f"{name} ceiling: {speed / 1e12:.2f} TB/s")
    report = Report("gpu loss", HEADER, args.json)
    with winners(args.winner):
        for shape in shapes:
            for row in measure(shape, ceiling, repeats):
                report.line(*line_of(row))
                report.store({"ceiling": ceiling, **row}, "cuda")
            torch.cuda.empty_cache()
    report.show()
    return 0


if __name__ == "__main__":
    sys.exit(main())
