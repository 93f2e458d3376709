"""One training run: a configuration and a data set in, one result row out.

The step is the one of the README; everything else here reads figures and keeps time. Device values
are read once per block of steps, so that a step never waits for the device, and the clock runs over
the blocks only: evaluation and reading are not in the time per step.
"""

from __future__ import annotations

import math
import sys
import time
from dataclasses import asdict, dataclass
from statistics import fmean

import torch
import torch.nn.functional as F
from tqdm import tqdm

import fastis
from bench.datasets import Dataset
from bench.models import build_model
from bench.provenance import provenance

STEPS_PER_READING = 50
CURVE_POINTS = 50
# The curves' train loss is taken on this many fixed images; the final one on the whole set.
CURVE_SAMPLES = 1000
EVALUATION_BATCH = 500


@dataclass(frozen=True)
class RunConfig:
    """All that a run's outcome depends on; two runs with equal configurations are the same run."""

    method: str
    lr: float
    seed: int
    dataset: str = "fashion_mnist"
    data: str = "embedded"  # or the file's name
    model: str = "lenet5"
    optimizer: str = "sgd"
    iterations: int = 2000
    batch_size: int = 128
    momentum: float = 0.9
    weight_decay: float = 1e-3
    device: str = "cpu"

    @property
    def label(self) -> str:
        return f"{self.method} lr {self.lr:g} seed {self.seed}"


class Run:
    """The network, optimizer, sampler and scheduler of one configuration."""

    def __init__(self, config: RunConfig, dataset: Dataset) -> None:
        self.config, self.dataset = config, dataset
        self.device = torch.device(config.device)
        # The seed fixes the initial network whatever the method: the methods are paired by seed.
        torch.manual_seed(config.seed)
        model = build_model(config.model, dataset.image_shape, dataset.num_classes)
        self.model = model.to(self.device)
        self.optimizer = make_optimizer(config, self.model)
        self.sampler = fastis.Sampler(
            num_samples=len(dataset.y_train),
            batch_size=config.batch_size,
            method=config.method,
            device=self.device,
            seed=config.seed,
        )
        cosine = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, config.iterations)
        self.scheduler = fastis.EffectiveBatchLR(cosine, self.sampler, optimizer=config.optimizer)

    def train(self, steps: int) -> torch.Tensor:
        """Takes ``steps`` steps; the last minibatch's loss, 0-d, still on the device."""
        images, labels, augment = self.dataset.x_train, self.dataset.y_train, self.dataset.augment
        for _ in range(steps):
            batch = self.sampler.sample()
            x, y = images[batch.indices], labels[batch.indices]
            if augment is not None:
                x = augment(x)
            out = fastis.cross_entropy(self.model(x), y, batch.weights)
            self.sampler.update(batch, out)
            out.loss.backward()
            self.optimizer.step()
            self.scheduler.step()
            self.optimizer.zero_grad()
        return out.loss.detach()

    def timed_train(self, steps: int) -> tuple[float, float]:
        """Takes ``steps`` steps; the last loss and the milliseconds per step."""
        synchronize(self.device)
        start = time.perf_counter()
        loss = self.train(steps)
        synchronize(self.device)
        seconds = time.perf_counter() - start
        return loss.item(), 1e3 * seconds / steps

    def reading(self) -> dict[str, float]:
        """What the sampler and the scheduler say now."""
        return {
            "effective_batch_size": float(self.sampler.variance.effective_batch_size),
            "efficiency": float(self.sampler.variance.efficiency),
            "lr_factor": float(self.sampler.lr_factor(self.config.optimizer)),
            "lr": float(self.optimizer.param_groups[0]["lr"]),
        }


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def make_optimizer(config: RunConfig, model: torch.nn.Module) -> torch.optim.Optimizer:
    """SGD with momentum, or Adam. On CUDA the learning rate is a tensor on the device, so that the
    factor of the effective batch size reaches the optimizer without a host synchronisation."""
    lr, options = config.lr, {"weight_decay": config.weight_decay}
    if config.device.startswith("cuda"):
        lr = torch.tensor(config.lr, device=config.device)
        options["fused"] = True
    if config.optimizer == "adam":
        return torch.optim.Adam(model.parameters(), lr, **options)
    return torch.optim.SGD(model.parameters(), lr, momentum=config.momentum, **options)


@torch.no_grad()
def evaluate(
    model: torch.nn.Module, images: torch.Tensor, labels: torch.Tensor
) -> tuple[float, float]:
    """Mean cross-entropy and error in percent over ``images [N, C, H, W]``, in eval mode."""
    model.eval()
    loss = torch.zeros((), dtype=torch.float64, device=images.device)
    wrong = torch.zeros((), dtype=torch.int64, device=images.device)
    for x, y in zip(images.split(EVALUATION_BATCH), labels.split(EVALUATION_BATCH), strict=True):
        logits = model(x)
        loss += F.cross_entropy(logits, y, reduction="sum")
        wrong += (logits.argmax(1) != y).sum()
    model.train()
    return loss.item() / len(labels), 100 * wrong.item() / len(labels)


def run(config: RunConfig, dataset: Dataset, position: int = 0, leave: bool = True) -> dict:
    """Trains and returns the result row; ``position`` is the progress bar's line."""
    dataset = dataset.to(config.device)
    state = Run(config, dataset)
    some = torch.randperm(len(dataset.y_train), generator=torch.Generator().manual_seed(0))
    some = some[:CURVE_SAMPLES].to(config.device)
    x_some, y_some = dataset.x_train[some], dataset.y_train[some]

    block = min(STEPS_PER_READING, max(1, config.iterations // CURVE_POINTS))
    evaluate_every = block * max(1, round(config.iterations / block / CURVE_POINTS))
    readings, milliseconds, curve = [], [], []
    # A log file gets a line now and then; a terminal shows every reading.
    interval = 0.1 if sys.stderr.isatty() else 20
    with tqdm(
        total=config.iterations,
        desc=config.label,
        position=position,
        leave=leave,
        mininterval=interval,
    ) as bar:
        while bar.n < config.iterations:
            steps = min(block, config.iterations - bar.n)
            loss, ms = state.timed_train(steps)
            milliseconds.append(ms)
            readings.append({"step": bar.n + steps, **state.reading()})
            now = readings[-1]
            bar.set_postfix_str(
                f"loss {loss:.3f}, S {now['efficiency']:.2f}, "
                f"N_ems {now['effective_batch_size']:.0f}",
                refresh=False,
            )
            bar.update(steps)
            if bar.n % evaluate_every == 0 or bar.n == config.iterations:
                train_loss, _ = evaluate(state.model, x_some, y_some)
                _, test_error = evaluate(state.model, dataset.x_test, dataset.y_test)
                curve.append({**now, "train_loss": train_loss, "test_error": test_error})
    return result_row(state, readings, milliseconds, curve)


def result_row(
    state: Run, readings: list[dict], milliseconds: list[float], curve: list[dict]
) -> dict:
    """Configuration, provenance, final metrics and curves as plain JSON values."""
    dataset, batch_size = state.dataset, state.config.batch_size
    train_loss, train_error = evaluate(state.model, dataset.x_train, dataset.y_train)
    test_loss, test_error = evaluate(state.model, dataset.x_test, dataset.y_test)
    late = readings[len(readings) // 2 :]
    final = {
        "test_error": test_error,
        "test_loss": test_loss,
        "train_error": train_error,
        "train_loss": train_loss,
        "efficiency": mean_of(late, "efficiency"),
        "relative_batch_size": mean_of(late, "effective_batch_size") / batch_size,
        "lr_factor": mean_of(late, "lr_factor"),
        "ms_per_step": lower_quartile(milliseconds[len(milliseconds) // 2 :]),
    }
    names = [name for name in curve[0] if name != "step"]
    curves = {name: [json_number(point[name]) for point in curve] for name in names}
    return {
        "config": asdict(state.config),
        **provenance(state.device),
        "final": {name: json_number(value) for name, value in final.items()},
        "curves": {"step": [point["step"] for point in curve], **curves},
    }


def lower_quartile(times: list[float]) -> float:
    """A time that other load on the machine, which only ever adds, spoils less than the median."""
    return sorted(times)[len(times) // 4]


def mean_of(readings: list[dict], name: str) -> float:
    """The mean of the readings that are defined (S is not while its estimate has no sign)."""
    values = [reading[name] for reading in readings if math.isfinite(reading[name])]
    return fmean(values) if values else math.nan


def json_number(value: float) -> float | None:
    """Six significant digits; None for NaN and infinities, which JSON does not have."""
    return float(f"{value:.6g}") if math.isfinite(value) else None
