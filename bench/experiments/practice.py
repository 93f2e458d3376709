"""The experiments for practitioners: does importance sampling pay, and with which options?

Rates are searched with seed 0, for uniform sampling (SGD-Scan) alone where methods are compared at
the same base rate.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from bench.experiments.config import DEFAULTS, OURS, OURS_WITH_GAIN, RunConfig
from bench.experiments.experiment import Experiment, Once, Rows, Settings, collector, searched
from bench.experiments.tasks import TASKS
from bench.report import Row

# Name -> method and what else is changed.
Ways = dict[str, tuple[str, dict[str, Any]]]

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
    "CIFAR-10, BatchNorm": Setting(
        "cifar10_plain", "cnn_bn", 5000, (0.03, 0.1, 0.3, 0.6), SMALL_CNN
    ),
    "CIFAR-10, BatchNorm, augmented": Setting(
        "cifar10", "cnn_bn", 5000, (0.03, 0.1, 0.3, 0.6), SMALL_CNN
    ),
    "permuted rows, LSTM": Setting("permuted_rows", "lstm", 10_000, (0.0005, 0.001, 0.002), LSTM),
}
# Those that are repeated, and those of seed 0 alone.
CANDIDATES: Ways = {
    "gain": ("emais", OURS_WITH_GAIN),
    "pausing": ("emais", DEFAULTS),
}
TRIED: Ways = {
    "published": ("emais", {}),
    "linear": ("emais", {"options": OURS}),
    "root": ("emais", {"options": OURS, "lr_rule": "root"}),
    "rate kept": ("emais", {"options": OURS, "lr_adjust": False}),
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


def uniform_grid(setting: Setting, settings: Settings) -> list[RunConfig]:
    return [setting.config(settings, "scan", lr) for lr in setting.rates]


def at_own_rates(
    setting: Setting, ways: Ways, settings: Settings, rows: Rows
) -> list[RunConfig | Once]:
    runs: list[RunConfig | Once] = []
    for method, changes in ways.values():
        grid = [setting.config(settings, method, lr, **changes) for lr in setting.rates]
        runs += searched(grid, best_of(grid, rows))
    return runs


@experiment("Options at uniform sampling's best rate, on every task")
def defaults(settings: Settings, rows: Rows) -> list[RunConfig | Once]:
    """`published`: the paper's tau = t, floor 0.001 and linear rule; all others tau = t/4 and floor
    0.1. `gain`, `linear`, `root` (of the gain): by which rule the rate follows; `rate kept`: it
    doesn't; `pausing`, the default: as `gain`, uniform while less than 1.25 is predicted. The base
    rate is that of SGD-Scan's least final test error of seed 0, which is among the seeds averaged.
    Fashion-MNIST and CIFAR-10 are two files, and two commands."""
    runs: list[RunConfig | Once] = []
    for setting in SETTINGS.values():
        if not setting.is_of(settings.data):
            continue
        grid = uniform_grid(setting, settings)
        best = best_of(grid, rows)
        runs += searched(grid, best)
        if best is not None:
            for name, (method, changes) in (CANDIDATES | TRIED).items():
                config = setting.config(settings, method, best.lr, **changes)
                runs.append(config if name in CANDIDATES else Once(config))
    return runs


# What makes rare classes count: nothing, the loss, the draw; and EMAIS beside the first two.
BALANCING: Ways = {
    "SGD-Scan": ("scan", {}),
    "SGD-Scan, class weights": ("scan", {"class_weights": True}),
    "WeightedRandomSampler": ("class_balanced", {}),
    "EMAIS": ("emais", OURS_WITH_GAIN),
    "EMAIS, class weights": ("emais", OURS_WITH_GAIN | {"class_weights": True}),
}


@experiment("Imbalanced classes: Fashion-MNIST, long-tailed by a factor of 100")
def imbalance(settings: Settings, rows: Rows) -> list[RunConfig | Once]:
    """Every way at its own rate of least test error of seed 0. The test set is balanced."""
    return at_own_rates(SETTINGS["long-tailed"], BALANCING, settings, rows)


WRONGLY_LABELLED = ("20 % wrong labels", "40 % wrong labels")


def by_length(task: str, settings: Settings, rows: Rows) -> list[list[RunConfig]]:
    """For each length the runs of COMPARED at SGD-Scan's best rate; none while that isn't known."""
    setting = SETTINGS[task]
    best = best_of(uniform_grid(setting, settings), rows)
    if best is None:
        return []
    lengths = (setting.iterations // 4, setting.iterations // 2, setting.iterations)
    shorter = [replace(setting, iterations=length) for length in lengths]
    return [
        [one.config(settings, method, best.lr, **changes) for method, changes in COMPARED.values()]
        for one in shorter
    ]


@experiment("Wrong labels, at fewer steps")
def wrong_labels(settings: Settings, rows: Rows) -> list[RunConfig | Once]:
    """At SGD-Scan's best rate of `defaults`: whether a lower train loss comes with a higher test
    error, for uniform sampling too."""
    runs: list[RunConfig | Once] = []
    for task in WRONGLY_LABELLED:
        runs += map(Once, uniform_grid(SETTINGS[task], settings))
        runs += [config for one in by_length(task, settings, rows) for config in one]
    return runs


PEERS: Ways = {
    "SGD-Scan": ("scan", {}),
    "InfoBatch": ("infobatch", {}),
    "SeTa": ("seta", {}),
    "online importance": ("online_importance", {}),
    "EMAIS": ("emais", OURS_WITH_GAIN),
}


@experiment("As many samples for every method: LeNet-5 on Fashion-MNIST")
def peers(settings: Settings, rows: Rows) -> list[RunConfig | Once]:
    """InfoBatch (Qin et al. 2024), SeTa (Zhou et al. 2025) and online importance sampling (Salaun
    et al. 2023) with their authors' settings, every method at its own rate of least test error of
    seed 0, all with as many steps: methods that prune see the samples that they keep more often."""
    return at_own_rates(SETTINGS["Fashion-MNIST"], PEERS, settings, rows)


NORMALISED: Ways = {
    "SGD-Scan": ("scan", {}),
    "EMAIS": ("emais", OURS_WITH_GAIN),
    "EMAIS, weighted BatchNorm": ("emais", OURS_WITH_GAIN | {"weighted_norm": True}),
}
LENGTHS = (2500, 5000, 10_000)


@experiment("BatchNorm: the best within a number of steps, a small network on CIFAR-10")
def batch_norm(settings: Settings, rows: Rows) -> list[RunConfig | Once]:
    """Every method and length at its own rate of least test error of seed 0."""
    setting, runs = SETTINGS["CIFAR-10, BatchNorm"], []
    for length in LENGTHS:
        runs += at_own_rates(replace(setting, iterations=length), NORMALISED, settings, rows)
    return runs


@dataclass(frozen=True)
class Budgets:
    """Minibatch size and rate are searched for each method and each budget of time.

    Attributes
    ----------
    step_ms : dict
        minibatch size -> milliseconds of a step with uniform draws in plain torch, on one idle
        core: what lengths are computed with, so that a run's outcome does not depend on the load of
        the machine. ``bench_step.py`` measures them.
    rates : tuple of float
        ascending, each about twice the one before.
    start : (int, float)
        minibatch size and rate that every search starts from.
    """

    dataset: str
    model: str
    step_ms: dict[int, float]
    rates: tuple[float, ...]
    start: tuple[int, float]
    seconds: tuple[int, ...]
    others: dict[str, Any] = field(default_factory=dict)
    compared: Ways = field(default_factory=dict)

    def config(
        self, settings: Settings, method: str, seconds: float, cell: tuple[int, float]
    ) -> RunConfig:
        batch_size, lr = cell
        name, changes = self.compared[method]
        ms = self.step_ms[batch_size] + (0.0 if name == "scan" else FASTIS_MS)
        values = {"dataset": self.dataset, "model": self.model, **self.others, **changes}
        config = settings.config(name, lr, batch_size=batch_size, **values)
        return replace(config, iterations=10 * round(100 * seconds / ms))

    def neighbours(self, cell: tuple[int, float], seconds: float) -> list[tuple[int, float]]:
        """Sizes and rates next to it, one at a time and both in the same direction; of the longest
        time, rates alone."""
        sizes = sorted(self.step_ms)
        i, j = sizes.index(cell[0]), self.rates.index(cell[1])
        moves = [(0, 1), (0, -1)]
        if seconds < max(self.seconds):
            moves += [(1, 0), (-1, 0), (1, 1), (-1, -1)]
        near = ((i + down, j + right) for down, right in moves)
        return [
            (sizes[a], self.rates[b])
            for a, b in near
            if 0 <= a < len(sizes) and 0 <= b < len(self.rates)
        ]

    def first_cell(
        self, settings: Settings, rows: Rows, method: str, seconds: float
    ) -> tuple[int, float] | None:
        """Where a search starts: at the best of the next shorter time; None until it is known."""
        shorter = [other for other in self.seconds if other < seconds]
        if not shorter:
            return self.start
        best = self.search(settings, rows, method, max(shorter))[1]
        return None if best is None else (best.batch_size, best.lr)

    def search(
        self, settings: Settings, rows: Rows, method: str, seconds: float
    ) -> tuple[list[RunConfig], RunConfig | None]:
        """The runs so far, and the best one once all cells around it are there."""
        start = self.first_cell(settings, rows, method, seconds)
        if start is None:
            return [], None
        visited = {start: self.config(settings, method, seconds, start)}
        while True:
            best = best_of(list(visited.values()), rows)
            if best is None:
                return list(visited.values()), None
            around = self.neighbours((best.batch_size, best.lr), seconds)
            if all(cell in visited for cell in around):
                return list(visited.values()), best
            for cell in around:
                visited.setdefault(cell, self.config(settings, method, seconds, cell))


# What the sampler adds to a step: sample, loss with scores and update, less the uniform draw and
# torch's loss (bench_step.py).
FASTIS_MS = 0.17
COMPARED: Ways = {
    "SGD-Scan": ("scan", {}),
    "EMAIS": ("emais", OURS_WITH_GAIN),
}
WITHOUT_PAUSES: Ways = {
    "SGD-Scan": ("scan", {}),
    "EMAIS without pauses": ("emais", OURS_WITH_GAIN),
}
RATES = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.4)
FASHION = Budgets(
    "fashion_mnist",
    "lenet5",
    {32: 1.87, 64: 3.23, 128: 6.2, 256: 11.8, 512: 23.6},
    RATES,
    (64, 0.05),
    (20, 60, 180),
    compared=WITHOUT_PAUSES,
)
CIFAR = Budgets(
    "cifar10_plain",
    "cnn",
    {32: 2.36, 64: 4.3, 128: 8.2, 256: 15.7, 512: 31.5},
    RATES,
    (64, 0.1),
    (60, 180),
    SMALL_CNN,
    WITHOUT_PAUSES | {"EMAIS": ("emais", DEFAULTS)},
)
AUGMENTED = replace(
    CIFAR,
    dataset="cifar10",
    step_ms={32: 2.86, 64: 5.2, 128: 9.6, 256: 17.6, 512: 36.0},
    seconds=(60,),
)


BUDGETS = {
    "budgets_fashion": FASHION,
    "budgets_cifar": CIFAR,
    "budgets_augmented": AUGMENTED,
}


def budget_runs(budgets: Budgets, settings: Settings, rows: Rows) -> list[RunConfig | Once]:
    runs: list[RunConfig | Once] = []
    for seconds in budgets.seconds:
        for method in budgets.compared:
            runs += searched(*budgets.search(settings, rows, method, seconds))
    return runs


@experiment("The best within a time, minibatch size and rate tuned: LeNet-5 on Fashion-MNIST")
def budgets_fashion(settings: Settings, rows: Rows) -> list[RunConfig | Once]:
    """A search starts in the middle of a grid of minibatch sizes (powers of 2) and rates (1, 2, 5,
    10), that of a longer time where the one before ended, and goes to the cell of least test error
    of seed 0 until all cells around it are there (for the longest time, in the rate alone).
    Every schedule decays to the end of its own budget. Lengths come from the time of a step on an
    idle core, EMAIS' own time included."""
    return budget_runs(FASHION, settings, rows)


@experiment("The same for a small network on CIFAR-10")
def budgets_cifar(settings: Settings, rows: Rows) -> list[RunConfig | Once]:
    return budget_runs(CIFAR, settings, rows)


@experiment("The same with random crops and flips")
def budgets_augmented(settings: Settings, rows: Rows) -> list[RunConfig | Once]:
    return budget_runs(AUGMENTED, settings, rows)
