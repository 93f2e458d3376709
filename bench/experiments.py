"""The experiments of the papers, as lists of training runs. A new one is a function and an entry.

[K] is Kutsuna 2025 (arXiv 2501.13296), [KF] Katharopoulos & Fleuret 2018 (1803.00942). A plan gets
the settings and the rows there are, by key, and returns every run that it wants; it is asked again
after each new row, so that later runs may depend on earlier ones. Equal configurations are the same
run, whichever experiments want it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

from bench.config import RunConfig
from bench.report import Row

Rows = Mapping[str, Row]

COMPARED = ("emais", "scan", "uniform", "rais", "presampling", "confidence", "confvar")
COMPARED += ("self_paced", "loss", "online_batch", "prioritized")
# No coefficients, or not quite: the variance traces, N_ems and S mean nothing for them.
BIASED = ("confidence", "confvar", "self_paced", "online_batch", "prioritized")
# The same with an extra forward pass at every step, whatever tau is.
ALWAYS_SCORING: dict[str, Any] = {"tau_threshold": 0.0}
VARIANTS: tuple[tuple[str, dict[str, Any]], ...] = (
    *((method, {}) for method in COMPARED),
    ("presampling", ALWAYS_SCORING),
)
# EMAIS of ours: forgets faster, and lets no coefficient exceed 11.
FASTER: dict[str, Any] = {"floor": 0.1, "tau_scale": 0.25}
# These follow the predicted probability of the one right class.
NEED_ONE_CLASS = ("confidence", "confvar")
PAPER_ITERATIONS = 25_000
TAUS = (1000, 5000, 10_000, 25_000)
GRID = (0.01, 0.03, 0.1)
TRACES = ("trace_is", "trace_uniform", "trace_optimal")


@dataclass(frozen=True)
class Settings:
    """What all runs of one invocation share.

    ``data`` is the data file's name, as rows have it. ``iterations`` of None: the experiment's own.
    """

    data: str
    seeds: int = 3
    iterations: tuple[int, ...] | None = None
    seconds: float = 75.0
    device: str = "cpu"

    def config(self, method: str, lr: float, seed: int, **changes: Any) -> RunConfig:
        return RunConfig(method, lr, seed, data=self.data, device=self.device, **changes)


@dataclass(frozen=True)
class Experiment:
    """A named list of runs.

    Attributes
    ----------
    title : str
        what it shows and where in which paper.
    plan : callable
        (settings, iterations, rows) -> the runs of that length.
    iterations : int
        the default length of a run.
    longer : tuple of int
        the paper's other lengths: by ``--iterations``.
    curves : tuple of str
        curves that its rows must have; a row without them is measured again.
    panels : tuple of str
        the curves of its figure.
    x : "step" or "seconds"
        what the figure's curves are drawn against.
    compared_with : str
        label of the runs that the table's differences are to.
    note : str
        what a reader must know: choices of ours, what differs from the paper.
    """

    title: str
    plan: Callable[[Settings, int, Rows], list[RunConfig]]
    iterations: int = 6250
    longer: tuple[int, ...] = ()
    curves: tuple[str, ...] = ()
    panels: tuple[str, ...] = ("train_loss", "test_error")
    x: str = "step"
    compared_with: str = "scan"
    note: str = ""

    def configs(self, settings: Settings, rows: Rows) -> list[RunConfig]:
        """Every run wanted now, equal ones once."""
        lengths = settings.iterations or (self.iterations,)
        wanted = [c for length in lengths for c in self.plan(settings, length, rows)]
        return list({c.key: c for c in wanted}.values())

    def has(self, config: RunConfig, rows: Rows) -> bool:
        """Whether there is a row of this run with all that the experiment needs."""
        row = rows.get(config.key)
        return row is not None and all(name in row["curves"] for name in self.curves)


def table2(settings: Settings, iterations: int, rows: Rows) -> list[RunConfig]:
    seeds = range(settings.seeds)
    return [
        settings.config(method, 0.01, seed, iterations=iterations, options=options)
        for seed, (method, options) in product(seeds, VARIANTS)
    ]


def final_loss(row: Row) -> float:
    """The train loss; infinite for a run that diverged."""
    loss = row["final"]["train_loss"]
    return math.inf if loss is None else loss


def best_of_grid(grid: list[RunConfig], rows: Rows) -> RunConfig | None:
    """The run of least final train loss; None until all of them are there."""
    if not all(config.key in rows for config in grid):
        return None
    return min(grid, key=lambda config: final_loss(rows[config.key]))


def best_lr(settings: Settings, iterations: int, rows: Rows) -> list[RunConfig]:
    wanted, best = [], []
    for method, options in VARIANTS:
        grid = [
            settings.config(method, lr, 0, iterations=iterations, options=options) for lr in GRID
        ]
        wanted += grid
        if winner := best_of_grid(grid, rows):
            best.append(winner)
        if winner and method == "emais":
            best.append(replace(winner, method="scan", lr=matched_lr(winner, rows)))
    return wanted + [
        replace(config, seed=seed) for seed, config in product(range(settings.seeds), best)
    ]


def matched_lr(emais: RunConfig, rows: Rows) -> float:
    """The learning rate that an EMAIS run had on average over its second half, before the
    schedule: two significant digits of its base rate times its mean factor."""
    return float(f"{emais.lr * rows[emais.key]['final']['lr_factor']:.2g}")


def wall_clock(settings: Settings, iterations: int, rows: Rows) -> list[RunConfig]:
    """The runs of ``best_lr`` that its question about time is about, and nothing beside them."""
    grid = {
        method: [settings.config(method, lr, 0, iterations=iterations) for lr in GRID]
        for method in ("emais", "scan", "uniform")
    }
    best = {method: best_of_grid(configs, rows) for method, configs in grid.items()}
    if not all(best.values()):
        return [config for configs in grid.values() for config in configs]
    wanted = [config for config in best.values() if config]
    wanted.append(replace(wanted[0], options=FASTER))
    wanted.append(replace(wanted[0], method="scan", lr=matched_lr(wanted[0], rows)))
    return [replace(config, seed=s) for s, config in product(range(settings.seeds), wanted)]


def table6(settings: Settings, iterations: int, rows: Rows) -> list[RunConfig]:
    adam = {"optimizer": "adam", "momentum": 0.0, "iterations": iterations}
    methods = ("emais", "rais", "scan", "uniform")
    runs = [(method, 0.001) for method in methods]
    emais = settings.config("emais", 0.001, 0, **adam)
    if emais.key in rows:
        runs.append(("scan", matched_lr(emais, rows)))
    return [
        settings.config(method, lr, seed, **adam)
        for seed, (method, lr) in product(range(settings.seeds), runs)
    ]


def fig1(settings: Settings, iterations: int, rows: Rows) -> list[RunConfig]:
    scaled = [tau * iterations / PAPER_ITERATIONS for tau in TAUS]
    options: list[dict[str, Any]] = [{}, {"tau_scale": 0.25}, *({"tau": tau} for tau in scaled)]
    return [
        settings.config("emais", 0.01, seed, iterations=iterations, options=choice)
        for seed, choice in product(range(settings.seeds), options)
    ]


def fig2(settings: Settings, iterations: int, rows: Rows) -> list[RunConfig]:
    runs = ({"method": "emais"}, {"method": "uniform", "batch_size_like": "emais"})
    runs += ({"method": "uniform"}, {"method": "scan"})
    return [
        settings.config(lr=0.01, seed=seed, iterations=iterations, **run)
        for seed, run in product(range(settings.seeds), runs)
    ]


def fig6(settings: Settings, iterations: int, rows: Rows) -> list[RunConfig]:
    return [
        settings.config("emais", 0.01, seed, iterations=iterations, lr_adjust=adjust)
        for seed, adjust in product(range(settings.seeds), (True, False))
    ]


def fig7(settings: Settings, iterations: int, rows: Rows) -> list[RunConfig]:
    options: list[dict[str, Any]] = [{}, {"refresh_every": max(1, iterations // 25)}]
    return [
        settings.config("emais", 0.01, seed, iterations=iterations, options=choice)
        for seed, choice in product(range(settings.seeds), options)
    ]


def fig9(settings: Settings, iterations: int, rows: Rows) -> list[RunConfig]:
    return [
        settings.config("emais", 0.01, seed, iterations=iterations)
        for seed in range(settings.seeds)
    ]


# [KF]'s three scores; "upper_bound" is the method's default.
PRESAMPLING: tuple[dict[str, Any], ...] = ({}, {"score": "loss"}, {"score": "gradient_norm"})


def kf(settings: Settings, iterations: int, rows: Rows) -> list[RunConfig]:
    runs = [("uniform", {}), ("emais", {}), *(("presampling", score) for score in PRESAMPLING)]
    runs += [("online_batch", {}), ("prioritized", {})]
    timed = {"iterations": iterations, "seconds": settings.seconds}
    return [
        settings.config(method, 0.03, seed, options=options, **timed)
        for seed, (method, options) in product(range(settings.seeds), runs)
    ]


def kf_sequence(settings: Settings, iterations: int, rows: Rows) -> list[RunConfig]:
    on_cuda = settings.device.startswith("cuda")
    task = {
        "dataset": "permuted_pixels" if on_cuda else "permuted_rows",
        "model": "lstm",
        "optimizer": "adam",
        "momentum": 0.0,
        "weight_decay": 0.0,
        "batch_size": 32,
        "clip_norm": 1.0,
        "iterations": iterations,
        "seconds": settings.seconds,
    }
    # No exact gradient norms: torch.func has no per-sample rule for the LSTM's kernel.
    runs = [("uniform", {}), ("emais", {}), *(("presampling", s) for s in PRESAMPLING[:2])]
    return [
        settings.config(method, 0.001, seed, options=options, **task)
        for seed, (method, options) in product(range(settings.seeds), runs)
    ]


def multilabel(settings: Settings, iterations: int, rows: Rows) -> list[RunConfig]:
    task = {"dataset": "fashion_tiles", "model": "cnn", "weight_decay": 1e-4}
    methods = [method for method in COMPARED if method not in NEED_ONE_CLASS]
    return [
        settings.config(method, 0.1, seed, iterations=iterations, **task)
        for seed, method in product(range(settings.seeds), methods)
    ]


def cifar10(settings: Settings, iterations: int, rows: Rows) -> list[RunConfig]:
    task = {"dataset": "cifar10", "model": "resnet18", "weight_decay": 5e-4}
    return [
        settings.config(method, 0.1, seed, iterations=iterations, **task)
        for seed, method in product(range(settings.seeds), COMPARED)
    ]


def cifar10_cnn(settings: Settings, iterations: int, rows: Rows) -> list[RunConfig]:
    task = {"dataset": "cifar10", "model": "cnn", "weight_decay": 5e-4, "iterations": iterations}
    methods = ("scan", "uniform", "emais", "loss", "presampling", "online_batch")
    runs = [*((method, {}) for method in methods), ("emais", FASTER)]
    return [
        settings.config(method, lr, seed, options=options, **task)
        for seed, lr, (method, options) in product(range(settings.seeds), (0.03, 0.1), runs)
    ]


def stratified(settings: Settings, iterations: int, rows: Rows) -> list[RunConfig]:
    schemes = ("multinomial", "stratified", "systematic")
    orders = ("fashion_mnist", "fashion_by_class")
    return [
        settings.config("emais", 0.03, seed, iterations=iterations, dataset=order, scheme=scheme)
        for seed, order, scheme in product(range(settings.seeds), orders, schemes)
    ]


def tau_scale(settings: Settings, iterations: int, rows: Rows) -> list[RunConfig]:
    options: list[dict[str, Any]] = [{}, {"tau_scale": 0.5}, {"tau_scale": 0.25}]
    return [
        settings.config("emais", 0.03, seed, iterations=iterations, options=choice)
        for seed, choice in product(range(settings.seeds), options)
    ]


def last_layer(settings: Settings, iterations: int, rows: Rows) -> list[RunConfig]:
    return [
        settings.config("emais", 0.03, seed, iterations=iterations, score=score)
        for seed, score in product(range(settings.seeds), ("logits", "last_layer"))
    ]


def estimator(settings: Settings, iterations: int, rows: Rows) -> list[RunConfig]:
    options: list[dict[str, Any]] = [{}, {"estimator": "plugin"}]
    return [
        settings.config("emais", 0.03, seed, iterations=iterations, options=choice)
        for seed, choice in product(range(settings.seeds), options)
    ]


def auto(settings: Settings, iterations: int, rows: Rows) -> list[RunConfig]:
    runs: list[tuple[str, dict[str, Any]]] = [("emais", {}), ("auto", {}), ("auto", FASTER)]
    return [
        settings.config(method, lr, seed, iterations=iterations, options=options)
        for seed, lr, (method, options) in product(range(settings.seeds), (0.03, 0.1), runs)
    ]


def max_lr(settings: Settings, iterations: int, rows: Rows) -> list[RunConfig]:
    changes: list[dict[str, Any]] = [
        {"lr": 0.03},
        {"lr": 0.1, "max_lr": 0.1},
        {"lr": 0.03, "options": {"tau_scale": 0.25}, "max_lr": 0.1},
        {"lr": 0.1, "options": {"tau_scale": 0.25}, "max_lr": 0.1},
    ]
    return [
        settings.config("emais", seed=seed, iterations=iterations, **change)
        for seed, change in product(range(settings.seeds), changes)
    ]


def floor(settings: Settings, iterations: int, rows: Rows) -> list[RunConfig]:
    options: list[dict[str, Any]] = [{}, {"floor": 0.1}, FASTER]
    return [
        settings.config("emais", lr, seed, iterations=iterations, options=choice)
        for seed, lr, choice in product(range(settings.seeds), (0.03, 0.1), options)
    ]


EXPERIMENTS = {
    "table2": Experiment(
        "Test error of every method at one learning rate ([K] Table 2)",
        table2,
        longer=(12_500, 25_000),
        note="The paper has no `loss`, `online_batch` and `prioritized` here. Methods whose factor "
        "raises the learning rate gain from a base rate that is below the best one: see `best_lr`.",
    ),
    "best_lr": Experiment(
        "Every method at its own best learning rate (not in the papers)",
        best_lr,
        note=f"Rule: of {', '.join(map(str, GRID))} the rate whose run of seed 0 has the least "
        "final train loss; then the other seeds at that rate. Seed 0 is among the seeds averaged. "
        "SGD-Scan runs also at EMAIS's best rate times its mean factor (two digits), the rate "
        "that EMAIS in effect had.",
    ),
    "wall_clock": Experiment(
        "Time to SGD-Scan's final loss (not in the papers)",
        wall_clock,
        curves=("seconds",),
        x="seconds",
        note="EMAIS, SGD-Scan and SGD-Uni at their best rates of `best_lr`; with `--again`, so "
        "that all were measured in one go with nothing else on the machine.",
    ),
    "table6": Experiment(
        "Adam ([K] Table 6)",
        table6,
        longer=(12_500, 25_000),
        note="Scan runs also at EMAIS's rate times its mean factor, here the square root of "
        "N_ems / B: what EMAIS in effect had.",
    ),
    "fig1": Experiment(
        "Efficiency S for fixed time constants and linear tau ([K] Figure 1)",
        fig1,
        panels=("efficiency",),
        note=f"The paper's fixed tau of {', '.join(map(str, TAUS))} belong to {PAPER_ITERATIONS} "
        "iterations; shorter runs have them scaled by iterations / 25000. tau_scale 0.25 is ours: "
        "tau = t/4.",
    ),
    "fig2": Experiment(
        "EMAIS against uniform minibatches of N_ems samples ([K] Figure 2)",
        fig2,
        panels=("train_loss", "test_error", "effective_batch_size"),
        compared_with="emais",
        note="At each step the dynamic run draws as many samples, uniformly, as the N_ems that an "
        "EMAIS run of the same seed has there; its learning rate follows the size (eq. 8).",
    ),
    "fig6": Experiment(
        "Without adjusting the learning rate ([K] Figure 6)",
        fig6,
        panels=("train_loss", "test_error", "effective_batch_size", "lr"),
    ),
    "fig7": Experiment(
        "Additional updates of the whole table ([K] Figure 7)",
        fig7,
        panels=("train_loss", "test_error", "efficiency"),
        note="Every iterations / 25: the paper's interval was lost in our copy of it.",
    ),
    "fig9": Experiment(
        "Efficiency and traces of the gradient variance over training ([K] Figure 9)",
        fig9,
        curves=TRACES,
        panels=("efficiency", *TRACES),
    ),
    "kf": Experiment(
        "Loss and error against training time ([KF] Figure 7)",
        kf,
        curves=("seconds",),
        x="seconds",
        note="LeNet-5 on Fashion-MNIST, not a wide ResNet on CIFAR. Every run has the same "
        "training time, and the cosine schedule ends with it.",
    ),
    "kf_sequence": Experiment(
        "Permuted sequences with an LSTM against training time ([KF] Figure 9)",
        kf_sequence,
        curves=("seconds",),
        x="seconds",
        note="Adam 0.001, minibatch 32 and gradients clipped to norm 1 are from memory of the "
        "paper: the numbers were lost in our copy. On a CPU a step of the sequence is 28 pixels "
        "(28 steps), on a GPU one pixel (784 steps).",
    ),
    "multilabel": Experiment(
        "Multi-label classification with binary cross-entropy (as [K] Table 4)",
        multilabel,
        note="Not chest X-rays: four Fashion-MNIST images tiled in one of 56 x 56, labelled with "
        "the set of their classes. Methods that follow the one right class's probability don't "
        "apply.",
    ),
    "cifar10": Experiment(
        "ResNet-18 on CIFAR-10 (as [K] Table 3, which has CINIC-10)", cifar10, iterations=17_500
    ),
    "cifar10_cnn": Experiment(
        "A small convolutional network on CIFAR-10 (what a CPU can do of cifar10)",
        cifar10_cnn,
        panels=("train_loss", "test_error", "efficiency"),
        note="Four convolutions, random crops and flips: far from fitting its training set, so "
        "that scores differ less and there is less to gain than on Fashion-MNIST.",
    ),
    "stratified": Experiment(
        "Drawing by slices, data in the file's order and sorted by class (not in the papers)",
        stratified,
        note="N_ems and the learning rate are those of independent draws: a lower bound.",
    ),
    "last_layer": Experiment(
        "The last layer's gradient norm as the score (not in the papers)",
        last_layer,
        panels=("train_loss", "test_error", "effective_batch_size"),
        note="|g| sqrt(|h|^2 + 1), h the last layer's input. Its traces are those of that layer's "
        "gradient, with |G|^2 taken as 0: N_ems and S are not of the same gradient.",
    ),
    "estimator": Experiment("Plug-in traces instead of unbiased ones (the paper's)", estimator),
    "floor": Experiment(
        "A higher floor of the weights (not in the papers)",
        floor,
        panels=("train_loss", "test_error", "efficiency"),
        note="The default floor is 0.001 of the mean weight: no coefficient exceeds 1001. With 0.1 "
        "none exceeds 11.",
    ),
    "auto": Experiment(
        "Uniform draws while importance sampling is not predicted to pay (not in the papers)",
        auto,
        panels=("train_loss", "test_error", "efficiency"),
    ),
    "max_lr": Experiment(
        "A largest learning rate that the factor may reach (not in the papers)",
        max_lr,
        panels=("train_loss", "test_error", "lr"),
        note="`EffectiveBatchLR(max_lr=0.1)`: 0.1 is the largest rate that uniform sampling trains "
        "well with here. The schedule starts at the base rate.",
    ),
    "tau_scale": Experiment(
        "A slope below 1 for the linear time constant (not in the papers)",
        tau_scale,
        note="tau = max(tau_scale t, 1): 1 is the paper's.",
        panels=("train_loss", "test_error", "efficiency"),
    ),
}
