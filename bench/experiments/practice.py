"""The experiments for practitioners: does importance sampling pay, and with which options?

Rates are searched with seed 0, for uniform sampling (SGD-Scan) alone where methods are compared at
the same base rate.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from bench.experiments.config import RunConfig
from bench.experiments.experiment import Experiment, Once, Rows, Settings, collector, searched
from bench.experiments.tasks import TASKS
from bench.report import Row

# Forgets faster than the published settings, and lets no coefficient exceed 11.
FASTER: dict[str, Any] = {"floor": 0.1, "tau_scale": 0.25}

EXPERIMENTS: dict[str, Experiment] = {}
experiment = collector(EXPERIMENTS)


@dataclass(frozen=True)
class Setting:
    """What is trained, how long, and the base rates that uniform sampling is tried with."""

    dataset: str
    model: str
    iterations: int
    rates: tuple[float, ...]
    others: dict[str, Any] = field(default_factory=dict)

    def is_of(self, data: str) -> bool:
        """Whether that data file is its task's."""
        return ("cifar10" in data) == (TASKS[self.dataset].source == "cifar10")

    def config(self, settings: Settings, method: str, lr: float, **changes: Any) -> RunConfig:
        values = {"dataset": self.dataset, "model": self.model, **self.others, **changes}
        return replace(settings.config(method, lr, **values), iterations=self.iterations)


SMALL_CNN: dict[str, Any] = {"weight_decay": 5e-4}
LSTM: dict[str, Any] = {
    "optimizer": "adam",
    "momentum": 0.0,
    "weight_decay": 0.0,
    "batch_size": 32,
    "clip_norm": 1.0,
}
SETTINGS = {
    "Fashion-MNIST": Setting("fashion_mnist", "lenet5", 6250, (0.03, 0.06, 0.1)),
    "long-tailed": Setting("fashion_long_tail", "lenet5", 3000, (0.03, 0.06, 0.1)),
    "20 % wrong labels": Setting("fashion_noise20", "lenet5", 10_000, (0.01, 0.03, 0.1)),
    "40 % wrong labels": Setting("fashion_noise40", "lenet5", 10_000, (0.01, 0.03, 0.1)),
    "CIFAR-10": Setting("cifar10_plain", "cnn", 5000, (0.03, 0.1, 0.2, 0.3), SMALL_CNN),
    "CIFAR-10, augmented": Setting("cifar10", "cnn", 5000, (0.03, 0.1, 0.2, 0.3), SMALL_CNN),
    "CIFAR-10, BatchNorm": Setting("cifar10_plain", "cnn_bn", 5000, (0.03, 0.1, 0.3), SMALL_CNN),
    "CIFAR-10, BatchNorm, augmented": Setting(
        "cifar10", "cnn_bn", 5000, (0.03, 0.1, 0.3), SMALL_CNN
    ),
    "permuted rows, LSTM": Setting("permuted_rows", "lstm", 10_000, (0.0005, 0.001, 0.002), LSTM),
}
GAIN: dict[str, Any] = {"options": FASTER, "lr_rule": "gain"}
CANDIDATES: dict[str, dict[str, Any]] = {
    "published": {},
    "linear": {"options": FASTER},
    "gain": GAIN,
    "rate kept": {"options": FASTER, "lr_adjust": False},
}


def test_error(row: Row) -> float:
    """In percent; infinite for a run that diverged."""
    error = row["final"]["test_error"]
    return math.inf if error is None or row["final"]["train_loss"] is None else error


def best_of(grid: Sequence[RunConfig], rows: Rows) -> RunConfig | None:
    """The run of least test error; None until all of them are there."""
    if not all(config.key in rows for config in grid):
        return None
    return min(grid, key=lambda config: test_error(rows[config.key]))


@experiment("Options at uniform sampling's best rate, on every task")
def defaults(settings: Settings, rows: Rows) -> list[RunConfig | Once]:
    """The rate is that of SGD-Scan's least final test error of seed 0, which is among the seeds
    averaged. Fashion-MNIST and CIFAR-10 are two files, and two commands."""
    runs: list[RunConfig | Once] = []
    for setting in SETTINGS.values():
        if not setting.is_of(settings.data):
            continue
        grid = [setting.config(settings, "scan", lr) for lr in setting.rates]
        best = best_of(grid, rows)
        runs += searched(grid, best)
        if best is not None:
            runs += [
                setting.config(settings, "emais", best.lr, **changes)
                for changes in CANDIDATES.values()
            ]
    return runs


# What makes rare classes count: nothing, the loss, the draw; and EMAIS beside the first two.
BALANCING: dict[str, tuple[str, dict[str, Any]]] = {
    "SGD-Scan": ("scan", {}),
    "SGD-Scan, class weights": ("scan", {"class_weights": True}),
    "WeightedRandomSampler": ("class_balanced", {}),
    "EMAIS": ("emais", GAIN),
    "EMAIS, class weights": ("emais", GAIN | {"class_weights": True}),
}


@experiment("Imbalanced classes: Fashion-MNIST, long-tailed by a factor of 100")
def imbalance(settings: Settings, rows: Rows) -> list[RunConfig | Once]:
    """Every way at its own rate of least test error of seed 0. The test set is balanced."""
    setting, runs = SETTINGS["long-tailed"], []
    for method, changes in BALANCING.values():
        grid = [setting.config(settings, method, lr, **changes) for lr in setting.rates]
        runs += searched(grid, best_of(grid, rows))
    return runs
