"""What the experiments run: for each a function that lists its training runs.

A plan gets the settings, the length of the runs and the rows there are, by key, and returns every
run that it wants; it is asked again after each new row, so that later runs may depend on earlier
ones. Equal configurations are the same run, whichever experiments want it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

from bench.config import RunConfig
from bench.report import Row

Rows = Mapping[str, Row]

COMPARED = ("emais", "scan", "uniform", "rais", "presampling", "confidence", "confvar")
COMPARED += ("self_paced", "loss", "online_batch", "prioritized")
# No coefficients, or not quite: the variance traces, N_ems and S mean nothing for them.
# Presampling's draws share their candidates: N_ems and S of rows from before the sampler took that
# into account are too good.
WITHOUT_TRACES = ("confidence", "confvar", "self_paced", "online_batch", "prioritized")
WITHOUT_TRACES += ("presampling",)
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
