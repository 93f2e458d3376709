"""What a training step with EMAIS costs against one with uniform random draws.

    python bench/bench_step.py [--json FILE]

Two loops with the same network, gather, optimizer and cosine schedule take turns in one process:
``fastis`` (sample, loss and score, update, scaled learning rate; past its warm-up) and ``torch``
(``randint``, ``F.cross_entropy``). The ratio of steps per second is the median over pairs of
neighbouring blocks, so a slow phase of the machine hits both. Targets at batch 128, one thread and
N = 60,000: at least 0.99 with LeNet-5 and 0.95 with an MLP 784-256-10.

A step of the MLP moves about 0.4 MB of images and 2.4 MB of parameters, gradients and momenta; the
sampler touches 128 entries of 16 bytes and the sums above them.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

sys.path.append(str(Path(__file__).resolve().parents[1]))

import torch
import torch.nn.functional as F
from tqdm import tqdm

import fastis
from bench.datasets import load_dataset
from bench.loop import synchronize
from bench.models import build_model
from bench.provenance import provenance
from bench.report import aligned, append_row

TARGETS = {"lenet5": 0.99, "mlp": 0.95}
LR, MOMENTUM, WEIGHT_DECAY = 0.01, 0.9, 1e-3
# The schedule is longer than any measurement: the learning rate stays near its start.
SCHEDULE = 1_000_000
Steps = Callable[[int], torch.Tensor]


class Loop:
    """What both loops share: their own network from the same start, and the optimizer."""

    def __init__(self, model: str, x: torch.Tensor, y: torch.Tensor, batch_size: int) -> None:
        self.x, self.y, self.batch_size = x, y, batch_size
        torch.manual_seed(0)
        self.model = build_model(model, tuple(x.shape[1:]), int(y.max()) + 1).to(x.device)
        # On CUDA: a learning rate on the device, for the scaled rate to get there without waiting.
        on_cuda = x.device.type == "cuda"
        lr = torch.tensor(LR, device=x.device) if on_cuda else LR
        options = {"momentum": MOMENTUM, "weight_decay": WEIGHT_DECAY, "fused": on_cuda or None}
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr, **options)
        self.scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, SCHEDULE)


class UniformLoop(Loop):
    def steps(self, count: int) -> torch.Tensor:
        x, y, n, device = self.x, self.y, len(self.y), self.x.device
        for _ in range(count):
            indices = torch.randint(n, (self.batch_size,), device=device)
            loss = F.cross_entropy(self.model(x[indices]), y[indices])
            loss.backward()
            self.optimizer.step()
            self.scheduler.step()
            self.optimizer.zero_grad()
        return loss.detach()


class EmaisLoop(Loop):
    def __init__(self, model: str, x: torch.Tensor, y: torch.Tensor, batch_size: int) -> None:
        super().__init__(model, x, y, batch_size)
        method = fastis.methods.EMAIS(warmup_epochs=0)
        self.sampler = fastis.Sampler(len(y), batch_size, method=method, device=x.device, seed=0)
        self.scheduler = fastis.EffectiveBatchLR(self.scheduler, self.sampler)
        self.sweep()

    @torch.no_grad()
    def sweep(self) -> None:
        """Scores every sample once: what the warm-up of a real run leaves behind."""
        everything = torch.arange(len(self.y), device=self.x.device)
        parts = [
            fastis.cross_entropy(self.model(self.x[i]), self.y[i]) for i in everything.split(2000)
        ]
        ones = torch.ones(len(self.y), device=self.x.device)
        self.sampler.update(fastis.Batch(everything, ones), parts)

    def steps(self, count: int) -> torch.Tensor:
        x, y, sampler = self.x, self.y, self.sampler
        for _ in range(count):
            batch = sampler.sample()
            out = fastis.cross_entropy(
                self.model(x[batch.indices]), y[batch.indices], batch.weights
            )
            sampler.update(batch, out)
            out.loss.backward()
            self.optimizer.step()
            self.scheduler.step()
            self.optimizer.zero_grad()
        return out.loss.detach()


def tile(x: torch.Tensor, num_samples: int) -> torch.Tensor:
    """``x`` repeated along its first dimension to ``num_samples`` entries."""
    copies = -(-num_samples // len(x))
    return x.repeat(copies, *[1] * (x.ndim - 1))[:num_samples].contiguous()


def validate(loop: EmaisLoop) -> None:
    """A wrong loop gets no number: draws, coefficients, loss and gradient against plain torch."""
    loop.steps(20)
    n, sampler = len(loop.y), loop.sampler
    probabilities = sampler.probabilities()
    batch = sampler.sample()
    assert batch.indices.min() >= 0, "an index below 0"
    assert batch.indices.max() < n, f"an index of {n} or above"
    expected = (1 / (n * probabilities[batch.indices])).float()
    # float32's own rounding, twice: of the division and of the result.
    torch.testing.assert_close(batch.weights, expected, rtol=3e-7, atol=0)
    assert batch.weights.unique().numel() > 1, "still in the uniform phase"

    logits = loop.model(loop.x[batch.indices]).detach().requires_grad_()
    target = loop.y[batch.indices]
    out = fastis.cross_entropy(logits, target, batch.weights)
    (gradient,) = torch.autograd.grad(out.loss, logits)
    loss = (batch.weights * F.cross_entropy(logits, target, reduction="none")).mean()
    (expected,) = torch.autograd.grad(loss, logits)
    torch.testing.assert_close(out.loss, loss)
    torch.testing.assert_close(gradient, expected)
    assert torch.isfinite(loop.steps(20)), "a loss that is not finite"


def block_seconds(steps: Steps, count: int, device: torch.device) -> float:
    synchronize(device)
    start = time.perf_counter()
    steps(count)
    synchronize(device)
    return time.perf_counter() - start


def compare(
    emais: EmaisLoop, uniform: UniformLoop, pairs: int, seconds_per_block: float
) -> dict[str, float]:
    """Interleaved blocks; the order within a pair changes from pair to pair."""
    device = emais.x.device
    block_seconds(uniform.steps, 20, device)
    count = max(10, round(20 * seconds_per_block / block_seconds(uniform.steps, 20, device)))
    ratios, uniform_times, emais_times = [], [], []
    for pair in tqdm(range(pairs), leave=False, unit="pair"):
        order = (uniform.steps, emais.steps) if pair % 2 else (emais.steps, uniform.steps)
        times = {steps: block_seconds(steps, count, device) / count for steps in order}
        uniform_times.append(times[uniform.steps])
        emais_times.append(times[emais.steps])
        ratios.append(uniform_times[-1] / emais_times[-1])
    ratios.sort()
    return {
        "ratio": round(median(ratios), 4),
        "ratio_quartiles": [round(ratios[pairs // 4], 4), round(ratios[(3 * pairs) // 4], 4)],
        "uniform_us_per_step": round(1e6 * median(uniform_times), 1),
        "emais_us_per_step": round(1e6 * median(emais_times), 1),
        "steps_per_block": count,
        "pairs": pairs,
    }


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", help="Fashion-MNIST's .npz (default: the subset)")
    parser.add_argument("--model", nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--num-samples", type=int, default=60_000, help="the set is tiled to this")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--pairs", type=int, default=60, help="pairs of blocks")
    parser.add_argument("--seconds", type=float, default=0.3, help="length of a block")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path, help="file to append a row a model to")
    args = parser.parse_args(argv)

    torch.set_num_threads(args.threads)
    dataset = load_dataset("fashion_mnist", args.data)
    x = tile(dataset.x_train, args.num_samples).to(args.device)
    y = tile(dataset.y_train, args.num_samples).to(args.device)
    lines = [("model", "uniform us/step", "emais us/step", "ratio", "quartiles", "target")]
    for model in args.model:
        emais = EmaisLoop(model, x, y, args.batch_size)
        validate(emais)
        result = compare(emais, UniformLoop(model, x, y, args.batch_size), args.pairs, args.seconds)
        setting = {name: vars(args)[name] for name in ("num_samples", "batch_size", "device")}
        row = {"benchmark": "step", "model": model, **setting, **result, **provenance(x.device)}
        if args.json:
            append_row(args.json, row)
        quartiles = "{:.4f} to {:.4f}".format(*row["ratio_quartiles"])
        times = (f"{row['uniform_us_per_step']:.1f}", f"{row['emais_us_per_step']:.1f}")
        lines.append((model, *times, f"{row['ratio']:.4f}", quartiles, f"{TARGETS[model]:.2f}"))
    print(aligned(lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())
