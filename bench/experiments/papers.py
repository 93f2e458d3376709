"""The experiments of the papers, and ours beside them: for each a function that lists its runs.

Equal configurations are the same run, whichever experiments want it. [K] is Kutsuna 2025 (arXiv
2501.13296), [KF] Katharopoulos & Fleuret 2018 (1803.00942).
"""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import chain, product
from typing import Any

from bench.experiments.config import OURS, RunConfig
from bench.experiments.experiment import Experiment, Once, Rows, Settings, collector, searched
from bench.report import Row

COMPARED = ("emais", "scan", "uniform", "rais", "presampling", "confidence", "confvar")
COMPARED += ("self_paced", "loss", "online_batch", "prioritized")
# The same with an extra forward pass at every step, whatever tau is.
ALWAYS_SCORING: dict[str, Any] = {"tau_threshold": 0.0}
VARIANTS: tuple[tuple[str, dict[str, Any]], ...] = (
    *((method, {}) for method in COMPARED),
    ("presampling", ALWAYS_SCORING),
)
QUARTER: dict[str, Any] = {"tau_scale": 0.25}
# [KF]'s three scores; "upper_bound" is the method's default.
PRESAMPLING: tuple[dict[str, Any], ...] = ({}, {"score": "loss"}, {"score": "gradient_norm"})
# These follow the predicted probability of the one right class.
NEED_ONE_CLASS = ("confidence", "confvar")
PAPER_ITERATIONS = 25_000
TAUS = (1000, 5000, 10_000, 25_000)
GRID = (0.01, 0.03, 0.1)
TRACES = ("trace_is", "trace_uniform", "trace_optimal")
LONGER = (12_500, 25_000)
WITH_EFFICIENCY = ("train_loss", "test_error", "efficiency")
WITH_N_EMS = ("train_loss", "test_error", "effective_batch_size")


EXPERIMENTS: dict[str, Experiment] = {}
experiment = collector(EXPERIMENTS)


@experiment("Test error of every method at one learning rate ([K] Table 2)", longer=LONGER)
def table2(settings: Settings, rows: Rows) -> list[RunConfig]:
    """The paper has no `loss`, `online_batch` and `prioritized` here. Methods whose factor raises
    the learning rate gain from a base rate that is below the best one: see `best_lr`."""
    return [settings.config(method, options=options) for method, options in VARIANTS]


def final_loss(row: Row) -> float:
    """The train loss; infinite for a run that diverged."""
    loss = row["final"]["train_loss"]
    return math.inf if loss is None else loss


def best_of_grid(grid: list[RunConfig], rows: Rows) -> RunConfig | None:
    """The run of least final train loss; None until all of them are there."""
    if not all(config.key in rows for config in grid):
        return None
    return min(grid, key=lambda config: final_loss(rows[config.key]))


def matched(emais: RunConfig, rows: Rows) -> RunConfig:
    """SGD-Scan at the learning rate that an EMAIS run had on average over its second half, before
    the schedule: two significant digits of its base rate times its mean factor."""
    rate = float(f"{emais.lr * rows[emais.key]['final']['lr_factor']:.2g}")
    return replace(emais, method="scan", lr=rate)


def grid_of(config: RunConfig) -> list[RunConfig]:
    return [replace(config, lr=lr) for lr in GRID]


@experiment("Every method at its own best learning rate (not in the papers)")
def best_lr(settings: Settings, rows: Rows) -> list[RunConfig | Once]:
    """Rule: of 0.01, 0.03, 0.1 the rate whose run of seed 0 has the least final train loss; then
    the other seeds at that rate. Seed 0 is among the seeds averaged. SGD-Scan runs also at EMAIS's
    best rate times its mean factor (two digits), the rate that EMAIS in effect had."""
    grids = [grid_of(settings.config(method, options=options)) for method, options in VARIANTS]
    emais = best_of_grid(grids[0], rows)
    searches = (searched(grid, best_of_grid(grid, rows)) for grid in grids)
    return [*chain(*searches), *([matched(emais, rows)] if emais else [])]


@experiment("Time to SGD-Scan's final loss (not in the papers)", curves=("seconds",), x="seconds")
def wall_clock(settings: Settings, rows: Rows) -> list[RunConfig]:
    """EMAIS, SGD-Scan and SGD-Uni at their best rates of `best_lr`; with `--again`, so that all
    were measured in one go with nothing else on the machine."""
    grids = [grid_of(settings.config(method)) for method in ("emais", "scan", "uniform")]
    best = [config for grid in grids if (config := best_of_grid(grid, rows))]
    if len(best) < len(grids):
        return list(chain(*grids))
    return [*best, replace(best[0], options=OURS), matched(best[0], rows)]


@experiment("Adam ([K] Table 6)", longer=LONGER)
def table6(settings: Settings, rows: Rows) -> list[RunConfig]:
    """Scan runs also at EMAIS's rate times its mean factor, here the square root of N_ems / B: what
    EMAIS in effect had."""
    methods = ("emais", "rais", "scan", "uniform")
    runs = [settings.config(m, 0.001, optimizer="adam", momentum=0.0) for m in methods]
    return [*runs, *([matched(runs[0], rows)] if runs[0].key in rows else [])]


@experiment(
    "Efficiency S for fixed time constants and linear tau ([K] Figure 1)", panels=("efficiency",)
)
def fig1(settings: Settings, rows: Rows) -> list[RunConfig]:
    """The paper's fixed tau of 1000, 5000, 10000, 25000 belong to 25000 iterations; shorter runs
    have them scaled by iterations / 25000. tau_scale 0.25 is ours: tau = t/4."""
    linear = settings.config()
    fixed = ({"tau": tau * linear.iterations / PAPER_ITERATIONS} for tau in TAUS)
    return [linear, *(replace(linear, options=options) for options in (QUARTER, *fixed))]


@experiment(
    "EMAIS against uniform minibatches of N_ems samples ([K] Figure 2)",
    panels=WITH_N_EMS,
    compared_with="emais",
)
def fig2(settings: Settings, rows: Rows) -> list[RunConfig]:
    """At each step the dynamic run draws as many samples, uniformly, as the N_ems that an EMAIS run
    of the same seed has there; its learning rate follows the size (eq. 8)."""
    dynamic = settings.config("uniform", batch_size_like="emais")
    return [settings.config(), dynamic, settings.config("uniform"), settings.config("scan")]


@experiment(
    "Without adjusting the learning rate ([K] Figure 6)",
    panels=(*WITH_N_EMS, "lr"),
)
def fig6(settings: Settings, rows: Rows) -> list[RunConfig]:
    return [settings.config(lr_adjust=adjust) for adjust in (True, False)]


@experiment("Additional updates of the whole table ([K] Figure 7)", panels=WITH_EFFICIENCY)
def fig7(settings: Settings, rows: Rows) -> list[RunConfig]:
    """Every iterations / 25: the paper's interval was lost in our copy of it."""
    plain = settings.config()
    refreshed = {"refresh_every": max(1, plain.iterations // 25)}
    return [plain, replace(plain, options=refreshed)]


@experiment(
    "Efficiency and traces of the gradient variance over training ([K] Figure 9)",
    curves=TRACES,
    panels=("efficiency", *TRACES),
)
def fig9(settings: Settings, rows: Rows) -> list[RunConfig]:
    return [settings.config()]


@experiment(
    "Loss and error against training time ([KF] Figure 7)", curves=("seconds",), x="seconds"
)
def kf(settings: Settings, rows: Rows) -> list[RunConfig]:
    """LeNet-5 on Fashion-MNIST, not a wide ResNet on CIFAR. Every run has the same training time,
    and the cosine schedule ends with it."""
    runs = [("uniform", {}), ("emais", {}), *(("presampling", score) for score in PRESAMPLING)]
    runs += [("online_batch", {}), ("prioritized", {})]
    return [settings.config(m, 0.03, options, seconds=settings.seconds) for m, options in runs]


@experiment(
    "Permuted sequences with an LSTM against training time ([KF] Figure 9)",
    curves=("seconds",),
    x="seconds",
)
def kf_sequence(settings: Settings, rows: Rows) -> list[RunConfig]:
    """Adam 0.001, minibatch 32 and gradients clipped to norm 1 are from memory of the paper: the
    numbers were lost in our copy. On a CPU a step of the sequence is 28 pixels (28 steps), on a GPU
    one pixel (784 steps)."""
    on_cuda = settings.device.startswith("cuda")
    task = {
        "dataset": "permuted_pixels" if on_cuda else "permuted_rows",
        "model": "lstm",
        "optimizer": "adam",
        "momentum": 0.0,
        "weight_decay": 0.0,
        "batch_size": 32,
        "clip_norm": 1.0,
        "seconds": settings.seconds,
    }
    # No exact gradient norms: torch.func has no per-sample rule for the LSTM's kernel.
    runs = [("uniform", {}), ("emais", {}), *(("presampling", s) for s in PRESAMPLING[:2])]
    return [settings.config(method, 0.001, options, **task) for method, options in runs]


@experiment("Multi-label classification with binary cross-entropy (as [K] Table 4)")
def multilabel(settings: Settings, rows: Rows) -> list[RunConfig]:
    """Not chest X-rays: four Fashion-MNIST images tiled in one of 56 x 56, labelled with the set of
    their classes. Methods that follow the one right class's probability don't apply."""
    task = {"dataset": "fashion_tiles", "model": "cnn", "weight_decay": 1e-4}
    methods = [method for method in COMPARED if method not in NEED_ONE_CLASS]
    return [settings.config(method, 0.1, **task) for method in methods]


@experiment("ResNet-18 on CIFAR-10 (as [K] Table 3, which has CINIC-10)", iterations=17_500)
def cifar10(settings: Settings, rows: Rows) -> list[RunConfig]:
    task = {"dataset": "cifar10", "model": "resnet18", "weight_decay": 5e-4}
    return [settings.config(method, 0.1, **task) for method in COMPARED]


@experiment(
    "A small convolutional network on CIFAR-10 (what a CPU can do of cifar10)",
    panels=WITH_EFFICIENCY,
)
def cifar10_cnn(settings: Settings, rows: Rows) -> list[RunConfig]:
    """Four convolutions, random crops and flips: far from fitting its training set, so that scores
    differ less and there is less to gain than on Fashion-MNIST."""
    task = {"dataset": "cifar10", "model": "cnn", "weight_decay": 5e-4}
    methods = ("scan", "uniform", "emais", "loss", "presampling", "online_batch")
    runs = [*((method, {}) for method in methods), ("emais", OURS)]
    return [
        settings.config(method, lr, options, **task)
        for lr, (method, options) in product((0.03, 0.1), runs)
    ]


@experiment("Drawing by slices, data in the file's order and sorted by class (not in the papers)")
def stratified(settings: Settings, rows: Rows) -> list[RunConfig]:
    """N_ems and the learning rate are those of independent draws: a lower bound."""
    schemes = ("multinomial", "stratified", "systematic")
    orders = ("fashion_mnist", "fashion_by_class")
    return [
        settings.config(lr=0.03, dataset=order, scheme=scheme)
        for order, scheme in product(orders, schemes)
    ]


@experiment("The last layer's gradient norm as the score (not in the papers)", panels=WITH_N_EMS)
def last_layer(settings: Settings, rows: Rows) -> list[RunConfig]:
    """|g| sqrt(|h|^2 + 1), h the last layer's input. Its traces are those of that layer's gradient,
    with |G|^2 taken as 0: N_ems and S are not of the same gradient."""
    return [settings.config(lr=0.03, score=score) for score in ("logits", "last_layer")]


@experiment("Plug-in traces instead of unbiased ones (the paper's)")
def estimator(settings: Settings, rows: Rows) -> list[RunConfig]:
    options: tuple[dict[str, Any], ...] = ({}, {"estimator": "plugin"})
    return [settings.config(lr=0.03, options=choice) for choice in options]


@experiment("A higher floor of the weights (not in the papers)", panels=WITH_EFFICIENCY)
def floor(settings: Settings, rows: Rows) -> list[RunConfig]:
    """The default floor is 0.001 of the mean weight: no coefficient exceeds 1001. With 0.1 none
    exceeds 11."""
    options: tuple[dict[str, Any], ...] = ({}, {"floor": 0.1}, OURS)
    return [settings.config(lr=lr, options=choice) for lr, choice in product((0.03, 0.1), options)]


@experiment(
    "A largest learning rate that the factor may reach (not in the papers)",
    panels=("train_loss", "test_error", "lr"),
)
def max_lr(settings: Settings, rows: Rows) -> list[RunConfig]:
    """`EffectiveBatchLR(max_lr=0.1)`: 0.1 is the largest rate that uniform sampling trains well
    with here. The schedule starts at the base rate."""
    return [
        settings.config(lr=0.03),
        settings.config(lr=0.1, max_lr=0.1),
        settings.config(lr=0.03, options=QUARTER, max_lr=0.1),
        settings.config(lr=0.1, options=QUARTER, max_lr=0.1),
    ]


@experiment(
    "A slope below 1 for the linear time constant (not in the papers)", panels=WITH_EFFICIENCY
)
def tau_scale(settings: Settings, rows: Rows) -> list[RunConfig]:
    """tau = max(tau_scale t, 1): 1 is the paper's."""
    options: tuple[dict[str, Any], ...] = ({}, {"tau_scale": 0.5}, QUARTER)
    return [settings.config(lr=0.03, options=choice) for choice in options]
