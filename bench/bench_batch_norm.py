"""Time of the weighted BatchNorm layers against PyTorch's: forward and backward, statistics moved.

    python bench/bench_batch_norm.py [--json FILE] [--seconds 5] [--threads 1]

Checks values and gradients first, with equal coefficients; then ours and torch's layer take turns,
call by call, so that neither finds its code and data in the nearest caches. Bytes moved by ours: 2
of the input's size forward and 3 backward where a channel fits the second-level cache; images with
channels last are read twice more forward and twice more backward.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor, nn

import fastis
from bench.report import Report, make_parser
from bench.timing import Times, interleaved
from fastis import _C

SHAPES = ((128, 512), (128, 64, 16, 16), (128, 256, 7, 7), (128, 512, 2, 2))
# The ratio to torch's layer that is not to be exceeded.
TARGETS = {(128, 512): 1.05, (128, 64, 16, 16): 1.05}


def problem(shape: tuple[int, ...], channels_last: bool) -> tuple[nn.Module, Tensor, Tensor]:
    """torch's layer, an input and the gradient of the output."""
    layer = (nn.BatchNorm1d if len(shape) == 2 else nn.BatchNorm2d)(shape[1])
    memory = torch.channels_last if channels_last else torch.contiguous_format
    x, grad_output = (torch.randn(shape).contiguous(memory_format=memory) for _ in range(2))
    return layer, x.requires_grad_(), grad_output


def step(layer: nn.Module, x: Tensor, grad_output: Tensor) -> Callable[[], None]:
    def run() -> None:
        x.grad = None
        layer.zero_grad()
        layer(x).backward(grad_output)

    return run


def results(layer: nn.Module, x: Tensor, grad_output: Tensor) -> list[Tensor]:
    step(layer, x, grad_output)()
    return [t.clone() for t in (x.grad, *(p.grad for p in layer.parameters()), *layer.buffers())]


def measure(shape: tuple[int, ...], channels_last: bool, seconds: float) -> Times:
    torch.manual_seed(0)
    layer, x, grad_output = problem(shape, channels_last)
    weighted = fastis.weighted_batch_norm(copy.deepcopy(layer))
    with fastis.batch_weights(torch.ones(shape[0])):
        expected = results(layer, x, grad_output)
        for ours, theirs in zip(results(weighted, x, grad_output), expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=5e-3)  # sums of 32768 terms
    with fastis.batch_weights(torch.rand(shape[0])):
        cases = {"torch": step(layer, x, grad_output), "fastis": step(weighted, x, grad_output)}
        return interleaved(cases, seconds=seconds, calls=1)


def main(argv: list[str] | None = None) -> int:
    parser = make_parser(__doc__, "a measurement")
    parser.add_argument("--seconds", type=float, default=5.0, help="of each shape")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="a moment each")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    names = ("shape", "memory", "us", "torch us", "ratio", "target")
    report = Report("batch_norm", names, args.json)
    for shape in SHAPES:
        for channels_last in (False, True) if len(shape) == 4 else (False,):
            times = measure(shape, channels_last, 0.05 if args.quick else args.seconds)
            us, peer_us = times.us("fastis"), times.us("torch")
            target = None if channels_last else TARGETS.get(shape)
            row = {"isa": _C.isa(), "shape": shape, "channels_last": channels_last, "us": us}
            row |= {"us_quartiles": times.spread_us("fastis").quartiles, "peer_us": peer_us}
            report.store({**row, "ratio": us / peer_us, "target": target})
            memory = "channels last" if channels_last else "channels first"
            cells = times.spread_us("fastis").text(), f"{peer_us:.1f}", f"{us / peer_us:.2f}"
            report.line("x".join(map(str, shape)), memory, *cells, target)
    report.show()
    return 0


if __name__ == "__main__":
    sys.exit(main())
