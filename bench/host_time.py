"""Time that a training step's calls take on the host beside a GPU; measured without one.

    python bench/host_time.py [--seconds S]

Launches start nothing: Triton's end at a driver that isn't there, those of the extension at a
function that returns 0. Tensors lie in the host's memory, so allocating one is cheaper than the
device's by some tenths of a microsecond, and the drivers' part of a launch (2 to 4 us) comes on
top. Medians of interleaved rounds, batch 128, 10 classes, float32, one thread.

Target: sample, cross_entropy, update and backward at most 40 us in all.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

sys.path.append(str(Path(__file__).resolve().parents[1]))

import torch
import torch.nn.functional as F

import fastis
from bench import timing
from bench.report import Report, make_parser
from fastis import kernels

TARGET_US = 40.0
BATCH_SIZE, NUM_CLASSES, NUM_SAMPLES = 128, 10, 60_000


def zero(*_: object) -> int:
    return 0


def true(*_: object) -> bool:
    return True


class NoEntryPoints:
    """fastis._C's launches for CUDA, without the launch."""

    def __getattr__(self, name: str) -> Callable[..., int]:
        setattr(self, name, zero)
        return zero


@contextlib.contextmanager
def without_a_device() -> Iterator[None]:
    """Lets the GPU's Python serve the CPU's tensors, up to where something would be launched."""
    from bench import fake_triton
    from fastis.kernels.cuda import categorical as cuda_categorical
    from fastis.kernels.cuda import scale as cuda_scale
    from fastis.kernels.cuda import table as cuda_table
    from fastis.kernels.triton import loss as triton_loss

    fake_triton.pretend()
    nothing = NoEntryPoints()
    with contextlib.ExitStack() as stack:
        for module in (cuda_categorical, cuda_scale, cuda_table):
            stack.enter_context(mock.patch.object(module, "_C", nothing))
        stream = mock.patch.object(torch._C, "_cuda_getCurrentRawStream", zero, create=True)
        stack.enter_context(stream)
        stack.enter_context(mock.patch.object(triton_loss, "_compiled_scales", true))
        served = {"table": cuda_table, "categorical": cuda_categorical, "loss": triton_loss}
        chosen = {(operation, "cpu"): module for operation, module in served.items()}
        stack.enter_context(mock.patch.dict(kernels._chosen, chosen))
        yield


def calls() -> dict[str, Callable[[], object]]:
    sampler = fastis.Sampler(
        NUM_SAMPLES, BATCH_SIZE, method=fastis.methods.EMAIS(warmup_epochs=0), seed=0
    )
    logits = torch.randn(BATCH_SIZE, NUM_CLASSES, requires_grad=True)
    target = torch.randint(NUM_CLASSES, (BATCH_SIZE,))
    batch = sampler.sample()
    out = fastis.cross_entropy(logits, target, batch.weights)
    one, grad = torch.ones(()), torch.empty(BATCH_SIZE, NUM_CLASSES)

    def loss() -> fastis.ScoredLoss:
        return fastis.cross_entropy(logits, target, batch.weights)

    def step(with_backward: bool = True) -> None:
        drawn = sampler.sample()
        scored = fastis.cross_entropy(logits, target, drawn.weights)
        sampler.update(drawn, scored)
        if with_backward:
            scored.loss.backward()
            logits.grad = None

    def peer() -> None:
        F.cross_entropy(logits, target).backward()
        logits.grad = None

    scale = kernels.kernels_for("loss", "cpu").scale_grad
    return {
        "sample": sampler.sample,
        "cross_entropy": loss,
        "update": lambda: sampler.update(batch, out),
        "update_and_sample": lambda: sampler.update_and_sample(batch, out),
        "scale_grad": lambda: scale(grad, one),
        "step without backward": lambda: step(False),
        "step": step,
        "F.cross_entropy + backward on the CPU, with its arithmetic": peer,
    }


def main(argv: list[str] | None = None) -> int:
    parser = make_parser(__doc__)
    parser.add_argument("--seconds", type=float, default=5.0)
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    with without_a_device():
        times = timing.interleaved(calls(), seconds=args.seconds, turn=5e-3, clock=timing.thread)
    report = Report("host time", ("call", "us"))
    for name in times:
        report.line(name, times.spread_us(name).text())
    report.show()
    step = times.us("step")
    met = "met" if step <= TARGET_US else "NOT met"
    print(f"a step takes {step:.1f} us of at most {TARGET_US:.0f}: {met}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
