"""Time of the losses against PyTorch's: checks the values first, then times, one thread.

    python bench/bench_loss.py [--json FILE] [--repeats 4000] [--threads 1]

What is timed, each interleaved with its peer so that a slow moment hits both:

- ``step``: ``fastis.cross_entropy`` forward and backward, score and mean gradient included, against
  ``F.cross_entropy`` forward and backward (no score);
- ``kernel``: the compiled function alone on outputs that exist, gradient written, against the
  forward pass of ``F.cross_entropy`` alone;
- ``unfused``: the usual way to the same score (log_softmax, softmax, norm) beside the torch step.

Bytes moved by the kernel: 2 B C of the logits' size (each logit read, each gradient written once);
the torch step reads or writes 6 of them. The ratio is that of the medians, ours over the peer's.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from math import nan
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))

import torch
import torch.nn.functional as F

import fastis
from bench.provenance import provenance
from bench.report import aligned, append_row
from fastis import _C

SHAPES = ((128, 10), (4096, 10), (4096, 1000))
# Ratios to the peer that are not to be exceeded.
TARGETS = {
    ("step", (128, 10)): 1.1,
    ("step", (4096, 10)): 0.2,
    ("step", (4096, 1000)): 0.35,
    ("kernel", (128, 10)): 0.30,
    ("kernel", (4096, 10)): 0.15,
    ("kernel", (4096, 1000)): 0.55,
}


def medians(functions: list[Callable[[], object]], repeats: int) -> list[float]:
    """Median microseconds of each function, called in turn."""
    times: list[list[int]] = [[] for _ in functions]
    for turn in range(repeats + 20):
        for function, kept in zip(functions, times, strict=True):
            start = time.perf_counter_ns()
            function()
            if turn >= 20:
                kept.append(time.perf_counter_ns() - start)
    return [statistics.median(kept) / 1e3 for kept in times]


def steps(logits: torch.Tensor, target: torch.Tensor) -> list[Callable[[], object]]:
    """Forward and backward: torch, fastis, and torch with the score computed beside it."""

    def theirs() -> None:
        logits.grad = None
        F.cross_entropy(logits, target).backward()

    def ours() -> torch.Tensor:
        logits.grad = None
        out = fastis.cross_entropy(logits, target)
        out.loss.backward()
        return out.score

    def unfused() -> torch.Tensor:
        logits.grad = None
        log_p = torch.log_softmax(logits, 1)
        F.nll_loss(log_p, target).backward()
        with torch.no_grad():
            g = log_p.exp()
            g[torch.arange(len(target)), target] -= 1
            return g.norm(dim=1)

    return [theirs, ours, unfused]


def kernels(logits: torch.Tensor, target: torch.Tensor) -> list[Callable[[], object]]:
    """The compiled function on outputs that exist, and torch's forward pass."""
    logits = logits.detach()
    batch, num_classes = logits.shape
    outputs = [torch.empty_like(logits), torch.empty(()), torch.empty(batch), torch.empty(batch)]
    outputs.append(torch.empty(num_classes))
    arguments = (
        *(0, logits.data_ptr(), num_classes, target.data_ptr(), 0, 0, 0),
        *(batch, 1, num_classes, -100, 0.0, nan, True),
        *(output.data_ptr() for output in outputs),
        torch.get_num_threads(),
    )

    def ours(keep: object = outputs) -> None:
        _C.cross_entropy(*arguments)

    return [lambda: F.cross_entropy(logits, target), ours]


def check(logits: torch.Tensor, target: torch.Tensor) -> None:
    """Nothing wrong gets a number."""
    theirs, ours, unfused = steps(logits, target)
    theirs()
    expected = logits.grad.clone()
    score = ours()
    torch.testing.assert_close(logits.grad, expected, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(score, unfused(), rtol=1e-5, atol=1e-6)


def rows(repeats: int) -> list[dict[str, object]]:
    """One row per measurement."""
    results: list[dict[str, object]] = []
    for shape in SHAPES:
        torch.manual_seed(0)
        logits = torch.randn(shape, requires_grad=True)
        target = torch.randint(shape[1], shape[:1])
        check(logits, target)
        times = max(30, repeats * 1280 // max(shape[0] * shape[1], 1280))
        theirs, ours, unfused = medians(steps(logits, target), times)
        forward, kernel = medians(kernels(logits, target), times)
        for name, value, peer in (
            ("step", ours, theirs),
            ("unfused", unfused, theirs),
            ("kernel", kernel, forward),
        ):
            target_ratio = TARGETS.get((name, shape))
            row = {"what": name, "shape": shape, "us": value, "peer_us": peer}
            results.append({**row, "ratio": value / peer, "target": target_ratio})
    return results


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="file to append a row a measurement to")
    parser.add_argument("--repeats", type=int, default=4000, help="of the smallest shape")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="a few repeats only")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    lines = [("what", "shape", "us", "torch us", "ratio", "target")]
    for row in rows(30 if args.quick else args.repeats):
        if args.json:
            setting = {"benchmark": "loss", "isa": _C.isa()}
            append_row(args.json, {**setting, **row, **provenance(torch.device("cpu"))})
        target = "-" if row["target"] is None else f"{row['target']:.2f}"
        shape = "x".join(map(str, row["shape"]))
        times = (f"{row['us']:.1f}", f"{row['peer_us']:.1f}", f"{row['ratio']:.2f}")
        lines.append((row["what"], shape, *times, target))
    print(aligned(lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())
