"""What a training step with EMAIS costs against one with uniform random draws.

    python bench/bench_step.py [--json FILE]

Two loops with the same network, gather, optimizer and cosine schedule take turns in one process:
``fastis`` (sample, loss and score, update, scaled learning rate; past its warm-up) and ``torch``
(``randint``, ``F.cross_entropy``). The ratio of steps per second is the median over pairs of
neighbouring blocks. Targets at batch 128, one thread and
N = 60,000: at least 0.99 with LeNet-5 and 0.95 with an MLP 784-256-10.

A step of the MLP moves about 0.4 MB of images and 2.4 MB of parameters, gradients and momenta; the
sampler touches 128 entries of 16 bytes and the sums above them.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))

import torch
import torch.nn.functional as F

import fastis
from bench.experiments.datasets import load_dataset
from bench.experiments.models import build_model
from bench.report import Report, make_parser
from bench.timing import Times, clock_of, interleaved

TARGETS = {"lenet5": 0.99, "mlp": 0.95}
LR, MOMENTUM, WEIGHT_DECAY = 0.01, 0.9, 1e-3
# The schedule is longer than any measurement: the learning rate stays near its start.
SCHEDULE = 1_000_000


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

    def learn(self, loss: torch.Tensor) -> torch.Tensor:
        loss.backward()
        self.optimizer.step()
        self.scheduler.step()
        self.optimizer.zero_grad()
        return loss.detach()


class UniformLoop(Loop):
    def step(self) -> torch.Tensor:
        indices = torch.randint(len(self.y), (self.batch_size,), device=self.x.device)
        return self.learn(F.cross_entropy(self.model(self.x[indices]), self.y[indices]))


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

    def step(self) -> torch.Tensor:
        batch = self.sampler.sample()
        logits = self.model(self.x[batch.indices])
        out = fastis.cross_entropy(logits, self.y[batch.indices], batch.weights)
        self.sampler.update(batch, out)
        return self.learn(out.loss)


def tile(x: torch.Tensor, num_samples: int) -> torch.Tensor:
    """``x`` repeated along its first dimension to ``num_samples`` entries."""
    copies = -(-num_samples // len(x))
    return x.repeat(copies, *[1] * (x.ndim - 1))[:num_samples].contiguous()


def validate(loop: EmaisLoop) -> None:
    """A wrong loop gets no number: draws, coefficients, loss and gradient against plain torch."""
    for _ in range(20):
        loop.step()
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
    assert torch.isfinite(loop.step()), "a loss that is not finite"


def figures(times: Times) -> dict[str, object]:
    """Of a row; the ratio is that of steps per second."""
    ratio = times.ratio("uniform", "emais")
    return {
        "ratio": round(ratio.median, 4),
        "ratio_quartiles": [round(end, 4) for end in ratio.quartiles],
        "uniform_us_per_step": round(times.us("uniform"), 1),
        "emais_us_per_step": round(times.us("emais"), 1),
        "pairs": len(times["emais"]),
    }


def main(argv: list[str] | None = None) -> int:
    parser = make_parser(__doc__, "a model")
    parser.add_argument("--data", help="Fashion-MNIST's .npz (default: the subset)")
    parser.add_argument("--model", nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--num-samples", type=int, default=60_000, help="the set is tiled to this")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--pairs", type=int, default=60, help="pairs of blocks")
    parser.add_argument("--seconds", type=float, default=0.3, help="length of a block")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    dataset = load_dataset("fashion_mnist", args.data)
    x = tile(dataset.x_train, args.num_samples).to(args.device)
    y = tile(dataset.y_train, args.num_samples).to(args.device)
    head = ("model", "uniform us/step", "emais us/step", "ratio (quartiles)", "target")
    report = Report("step", head, args.json)
    for model in args.model:
        loops = {"uniform": UniformLoop, "emais": EmaisLoop}
        made = {name: loop(model, x, y, args.batch_size) for name, loop in loops.items()}
        validate(made["emais"])
        cases = {name: loop.step for name, loop in made.items()}
        blocks = {"rounds": args.pairs, "turn": args.seconds, "clock": clock_of(x.device)}
        times = interleaved(cases, **blocks)
        setting = {name: vars(args)[name] for name in ("num_samples", "batch_size", "device")}
        report.store({"model": model, **setting, **figures(times)}, x.device)
        cells = (f"{times.us(name):.1f}" for name in cases)
        report.line(model, *cells, times.ratio("uniform", "emais").text(".4f"), TARGETS[model])
    report.show()
    return 0


if __name__ == "__main__":
    sys.exit(main())
