"""What a training step with EMAIS costs against one with uniform random draws.

    python bench/bench_step.py [--json FILE]
    python bench/bench_step.py --data fashion_mnist.npz --model lenet5 --batch-size 32 64 128 256
    python bench/bench_step.py --dataset cifar10 --data cifar10_jpeg.npz --model cnn cnn_bn

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
from dataclasses import replace
from itertools import product
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))

import torch
import torch.nn.functional as F

import fastis
from bench.experiments.datasets import Dataset
from bench.experiments.models import MODELS, build_model
from bench.experiments.tasks import TASKS, load_task_data
from bench.report import Report, make_parser
from bench.timing import Times, clock_of, interleaved

TARGETS = {"lenet5": 0.99, "mlp": 0.95}
LR, MOMENTUM, WEIGHT_DECAY = 0.01, 0.9, 1e-3
# The schedule is longer than any measurement: the learning rate stays near its start.
SCHEDULE = 1_000_000


class Loop:
    """What both loops share: their own network from the same start, and the optimizer."""

    def __init__(self, model: str, data: Dataset, batch_size: int) -> None:
        self.x, self.y, self.batch_size = data.x_train, data.y_train, batch_size
        x = self.x
        self.augment = data.augment or (lambda images: images)
        torch.manual_seed(0)
        self.model = build_model(model, data.image_shape, data.num_classes).to(x.device)
        # On CUDA: a learning rate on the device, for the scaled rate to get there without waiting.
        on_cuda = x.device.type == "cuda"
        lr = torch.tensor(LR, device=x.device) if on_cuda else LR
        options = {"momentum": MOMENTUM, "weight_decay": WEIGHT_DECAY, "fused": on_cuda or None}
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr, **options)
        self.scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, SCHEDULE)

    def logits(self, indices: torch.Tensor) -> torch.Tensor:
        return self.model(self.augment(self.x[indices]))

    def learn(self, loss: torch.Tensor) -> torch.Tensor:
        loss.backward()
        self.optimizer.step()
        self.scheduler.step()
        self.optimizer.zero_grad()
        return loss.detach()


class UniformLoop(Loop):
    def step(self) -> torch.Tensor:
        indices = torch.randint(len(self.y), (self.batch_size,), device=self.x.device)
        return self.learn(F.cross_entropy(self.logits(indices), self.y[indices]))


class EmaisLoop(Loop):
    def __init__(self, model: str, data: Dataset, batch_size: int) -> None:
        super().__init__(model, data, batch_size)
        method, n = fastis.methods.EMAIS(warmup_epochs=0), len(self.y)
        self.sampler = fastis.Sampler(n, batch_size, method=method, device=self.x.device, seed=0)
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
        logits = self.logits(batch.indices)
        out = fastis.cross_entropy(logits, self.y[batch.indices], batch.weights)
        self.sampler.update(batch, out)
        return self.learn(out.loss)


def tile(data: Dataset, num_samples: int) -> Dataset:
    """With the training set repeated to ``num_samples`` samples."""
    which = torch.arange(num_samples) % len(data.y_train)
    return replace(data, x_train=data.x_train[which], y_train=data.y_train[which])


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
    parser.add_argument("--dataset", choices=TASKS, default="fashion_mnist")
    parser.add_argument("--data", help="the data set's .npz (default: Fashion-MNIST's subset)")
    parser.add_argument("--model", nargs="+", choices=MODELS, default=list(TARGETS))
    parser.add_argument("--num-samples", type=int, default=60_000, help="the set is tiled to this")
    parser.add_argument("--batch-size", type=int, nargs="+", default=[128])
    parser.add_argument("--pairs", type=int, default=60, help="pairs of blocks")
    parser.add_argument("--seconds", type=float, default=0.3, help="length of a block")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    data = tile(load_task_data(args.dataset, args.data), args.num_samples).to(args.device)
    head = ("model", "batch", "uniform us/step", "emais us/step", "ratio (quartiles)", "target")
    report = Report("step", head, args.json)
    for model, batch_size in product(args.model, args.batch_size):
        loops = {"uniform": UniformLoop, "emais": EmaisLoop}
        made = {name: loop(model, data, batch_size) for name, loop in loops.items()}
        validate(made["emais"])
        cases = {name: loop.step for name, loop in made.items()}
        clock = clock_of(data.x_train.device)
        times = interleaved(cases, rounds=args.pairs, turn=args.seconds, clock=clock)
        setting = {"num_samples": args.num_samples, "batch_size": batch_size, "device": args.device}
        if args.dataset != "fashion_mnist":
            setting["dataset"] = args.dataset
        report.store({"model": model, **setting, **figures(times)}, data.x_train.device)
        cells = (f"{times.us(name):.1f}" for name in cases)
        target = TARGETS.get(model, "-") if batch_size == 128 else "-"
        report.line(model, batch_size, *cells, times.ratio("uniform", "emais").text(".4f"), target)
    report.show()
    return 0


if __name__ == "__main__":
    sys.exit(main())
