"""Time of the losses against PyTorch's: checks the values first, then times, one thread.

    python bench/bench_loss.py [--json FILE] [--seconds 5] [--threads 1]

What is timed, call by call in turns with its peer, so that neither finds its code and data in the
nearest caches:

- ``step``: ``fastis.cross_entropy`` forward and backward, score and mean gradient included, against
  ``F.cross_entropy`` forward and backward (no score);
- ``own backward``: the step with ``out.backward()`` in place of ``out.loss.backward()``, against
  the latter;
- ``kernel``: the compiled function alone on outputs that exist, gradient written, against the
  forward pass of ``F.cross_entropy`` alone;
- ``unfused``: the usual way to the same score (log_softmax, softmax, norm) beside the torch step.

Bytes moved by the kernel: 2 B C of the logits' size (each logit read, each gradient written once);
the torch step reads or writes 6 of them. The ratio is that of the medians, ours over the peer's.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from math import nan
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))

import torch
import torch.nn.functional as F

import fastis
from bench.report import Report, make_parser
from bench.timing import Times, interleaved
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


# What is compared, and with what.
PEERS = {
    "step": "torch step",
    "own backward": "step",
    "unfused": "torch step",
    "kernel": "torch forward",
}


def steps(logits: torch.Tensor, target: torch.Tensor) -> dict[str, Callable[[], object]]:
    """Forward and backward: torch, fastis, and torch with the score computed beside it."""

    def theirs() -> None:
        logits.grad = None
        F.cross_entropy(logits, target).backward()

    def ours() -> torch.Tensor:
        logits.grad = None
        out = fastis.cross_entropy(logits, target)
        out.loss.backward()
        return out.score

    def own_backward() -> torch.Tensor:
        logits.grad = None
        out = fastis.cross_entropy(logits, target)
        out.backward()
        return out.score

    def unfused() -> torch.Tensor:
        logits.grad = None
        log_p = torch.log_softmax(logits, 1)
        F.nll_loss(log_p, target).backward()
        with torch.no_grad():
            g = log_p.exp()
            g[torch.arange(len(target)), target] -= 1
            return g.norm(dim=1)

    return {
        "torch step": theirs,
        "step": ours,
        "own backward": own_backward,
        "unfused": unfused,
    }


def kernels(logits: torch.Tensor, target: torch.Tensor) -> dict[str, Callable[[], object]]:
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

    return {"torch forward": lambda: F.cross_entropy(logits, target), "kernel": ours}


def check(logits: torch.Tensor, target: torch.Tensor) -> None:
    """Nothing wrong gets a number."""
    theirs, ours, own_backward, unfused = steps(logits, target).values()
    theirs()
    expected = logits.grad.clone()
    for step in (ours, own_backward):
        score = step()
        torch.testing.assert_close(logits.grad, expected, rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(score, unfused(), rtol=1e-5, atol=1e-6)


def measure(shape: tuple[int, int], seconds: float) -> Times:
    torch.manual_seed(0)
    logits = torch.randn(shape, requires_grad=True)
    target = torch.randint(shape[1], shape[:1])
    check(logits, target)
    times = Times()
    for cases in (steps(logits, target), kernels(logits, target)):
        times |= interleaved(cases, seconds=seconds / 2, calls=1)
    return times


def main(argv: list[str] | None = None) -> int:
    parser = make_parser(__doc__, "a measurement")
    parser.add_argument("--seconds", type=float, default=5.0, help="of each shape")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="a moment each")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    report = Report("loss", ("what", "shape", "us", "torch us", "ratio", "target"), args.json)
    for shape in SHAPES:
        times = measure(shape, 0.05 if args.quick else args.seconds)
        for what, peer in PEERS.items():
            us, peer_us, target = times.us(what), times.us(peer), TARGETS.get((what, shape))
            row = {"isa": _C.isa(), "what": what, "shape": shape, "us": us, "peer_us": peer_us}
            row["us_quartiles"] = times.spread_us(what).quartiles
            report.store({**row, "ratio": us / peer_us, "target": target})
            cells = times.spread_us(what).text(), f"{peer_us:.1f}", f"{us / peer_us:.2f}"
            report.line(what, "x".join(map(str, shape)), *cells, target)
    report.show()
    return 0


if __name__ == "__main__":
    sys.exit(main())
