"""The experiments of the papers, by name. A new one is a plan (bench/plans.py) and an entry here.

[K] is Kutsuna 2025 (arXiv 2501.13296), [KF] Katharopoulos & Fleuret 2018 (1803.00942).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from bench import plans
from bench.config import RunConfig
from bench.plans import GRID, PAPER_ITERATIONS, TAUS, TRACES, Rows, Settings

Plan = Callable[[Settings, int, Rows], list[RunConfig]]


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
    plan: Plan
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


EXPERIMENTS = {
    "table2": Experiment(
        "Test error of every method at one learning rate ([K] Table 2)",
        plans.table2,
        longer=(12_500, 25_000),
        note="The paper has no `loss`, `online_batch` and `prioritized` here. Methods whose factor "
        "raises the learning rate gain from a base rate that is below the best one: see `best_lr`.",
    ),
    "best_lr": Experiment(
        "Every method at its own best learning rate (not in the papers)",
        plans.best_lr,
        note=f"Rule: of {', '.join(map(str, GRID))} the rate whose run of seed 0 has the least "
        "final train loss; then the other seeds at that rate. Seed 0 is among the seeds averaged. "
        "SGD-Scan runs also at EMAIS's best rate times its mean factor (two digits), the rate "
        "that EMAIS in effect had.",
    ),
    "wall_clock": Experiment(
        "Time to SGD-Scan's final loss (not in the papers)",
        plans.wall_clock,
        curves=("seconds",),
        x="seconds",
        note="EMAIS, SGD-Scan and SGD-Uni at their best rates of `best_lr`; with `--again`, so "
        "that all were measured in one go with nothing else on the machine.",
    ),
    "table6": Experiment(
        "Adam ([K] Table 6)",
        plans.table6,
        longer=(12_500, 25_000),
        note="Scan runs also at EMAIS's rate times its mean factor, here the square root of "
        "N_ems / B: what EMAIS in effect had.",
    ),
    "fig1": Experiment(
        "Efficiency S for fixed time constants and linear tau ([K] Figure 1)",
        plans.fig1,
        panels=("efficiency",),
        note=f"The paper's fixed tau of {', '.join(map(str, TAUS))} belong to {PAPER_ITERATIONS} "
        "iterations; shorter runs have them scaled by iterations / 25000. tau_scale 0.25 is ours: "
        "tau = t/4.",
    ),
    "fig2": Experiment(
        "EMAIS against uniform minibatches of N_ems samples ([K] Figure 2)",
        plans.fig2,
        panels=("train_loss", "test_error", "effective_batch_size"),
        compared_with="emais",
        note="At each step the dynamic run draws as many samples, uniformly, as the N_ems that an "
        "EMAIS run of the same seed has there; its learning rate follows the size (eq. 8).",
    ),
    "fig6": Experiment(
        "Without adjusting the learning rate ([K] Figure 6)",
        plans.fig6,
        panels=("train_loss", "test_error", "effective_batch_size", "lr"),
    ),
    "fig7": Experiment(
        "Additional updates of the whole table ([K] Figure 7)",
        plans.fig7,
        panels=("train_loss", "test_error", "efficiency"),
        note="Every iterations / 25: the paper's interval was lost in our copy of it.",
    ),
    "fig9": Experiment(
        "Efficiency and traces of the gradient variance over training ([K] Figure 9)",
        plans.fig9,
        curves=TRACES,
        panels=("efficiency", *TRACES),
    ),
    "kf": Experiment(
        "Loss and error against training time ([KF] Figure 7)",
        plans.kf,
        curves=("seconds",),
        x="seconds",
        note="LeNet-5 on Fashion-MNIST, not a wide ResNet on CIFAR. Every run has the same "
        "training time, and the cosine schedule ends with it.",
    ),
    "kf_sequence": Experiment(
        "Permuted sequences with an LSTM against training time ([KF] Figure 9)",
        plans.kf_sequence,
        curves=("seconds",),
        x="seconds",
        note="Adam 0.001, minibatch 32 and gradients clipped to norm 1 are from memory of the "
        "paper: the numbers were lost in our copy. On a CPU a step of the sequence is 28 pixels "
        "(28 steps), on a GPU one pixel (784 steps).",
    ),
    "multilabel": Experiment(
        "Multi-label classification with binary cross-entropy (as [K] Table 4)",
        plans.multilabel,
        note="Not chest X-rays: four Fashion-MNIST images tiled in one of 56 x 56, labelled with "
        "the set of their classes. Methods that follow the one right class's probability don't "
        "apply.",
    ),
    "cifar10": Experiment(
        "ResNet-18 on CIFAR-10 (as [K] Table 3, which has CINIC-10)",
        plans.cifar10,
        iterations=17_500,
    ),
    "cifar10_cnn": Experiment(
        "A small convolutional network on CIFAR-10 (what a CPU can do of cifar10)",
        plans.cifar10_cnn,
        panels=("train_loss", "test_error", "efficiency"),
        note="Four convolutions, random crops and flips: far from fitting its training set, so "
        "that scores differ less and there is less to gain than on Fashion-MNIST.",
    ),
    "stratified": Experiment(
        "Drawing by slices, data in the file's order and sorted by class (not in the papers)",
        plans.stratified,
        note="N_ems and the learning rate are those of independent draws: a lower bound.",
    ),
    "last_layer": Experiment(
        "The last layer's gradient norm as the score (not in the papers)",
        plans.last_layer,
        panels=("train_loss", "test_error", "effective_batch_size"),
        note="|g| sqrt(|h|^2 + 1), h the last layer's input. Its traces are those of that layer's "
        "gradient, with |G|^2 taken as 0: N_ems and S are not of the same gradient.",
    ),
    "estimator": Experiment(
        "Plug-in traces instead of unbiased ones (the paper's)", plans.estimator
    ),
    "floor": Experiment(
        "A higher floor of the weights (not in the papers)",
        plans.floor,
        panels=("train_loss", "test_error", "efficiency"),
        note="The default floor is 0.001 of the mean weight: no coefficient exceeds 1001. With 0.1 "
        "none exceeds 11.",
    ),
    "auto": Experiment(
        "Uniform draws while importance sampling is not predicted to pay (not in the papers)",
        plans.auto,
        panels=("train_loss", "test_error", "efficiency"),
    ),
    "max_lr": Experiment(
        "A largest learning rate that the factor may reach (not in the papers)",
        plans.max_lr,
        panels=("train_loss", "test_error", "lr"),
        note="`EffectiveBatchLR(max_lr=0.1)`: 0.1 is the largest rate that uniform sampling trains "
        "well with here. The schedule starts at the base rate.",
    ),
    "tau_scale": Experiment(
        "A slope below 1 for the linear time constant (not in the papers)",
        plans.tau_scale,
        note="tau = max(tau_scale t, 1): 1 is the paper's.",
        panels=("train_loss", "test_error", "efficiency"),
    ),
}
