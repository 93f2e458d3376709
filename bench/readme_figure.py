"""The README's figure: train loss against seconds, EMAIS and uniform sampling at their best rates.

Reads the rows of the experiment ``wall_clock`` and nothing else; to measure them anew:

    python bench/reproduce.py wall_clock --data fashion_mnist.npz --jobs 2 --again
    python bench/readme_figure.py
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))

import matplotlib as mpl

mpl.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from bench.experiments import EXPERIMENTS
from bench.figures import save
from bench.groups import Group, Results
from bench.plot import STYLE, log_axis
from bench.reproduce import RESULTS, read_all

EXPERIMENT = "wall_clock"
# What is drawn: method, whether with options, the uniform sampling that did best, in what colour.
LINES = (
    ("scan", False, "#0072B2", "uniform (SGD-Scan)"),
    ("emais", False, "#D55E00", "EMAIS"),
    ("emais", True, "#CC79A7", "EMAIS(floor=0.1, tau_scale=0.25)"),
)


def best_of(groups: list[Group], method: str, with_options: bool) -> Group:
    """The runs of a method, at the learning rate with the lowest mean final train loss."""
    found = [
        group
        for group in groups
        if group.config.method == method and bool(group.config.options) == with_options
    ]
    return min(found, key=lambda group: sum(group.finals("train_loss")) / len(group.rows))


def draw_line(axes: Axes, group: Group, colour: str, label: str) -> None:
    """The mean over seeds, in a band of one standard deviation, named at its end."""
    found = group.curve("train_loss", "seconds")
    if found is None:
        raise ValueError(f"{label}: the rows have no seconds; run {EXPERIMENT} again")
    seconds, values = found
    mean, sd = values.mean(0), values.std(0, ddof=1)
    axes.plot(seconds, mean, color=colour, label=f"{label}, base rate {group.config.lr:g}")
    axes.fill_between(seconds, mean - sd, mean + sd, color=colour, alpha=0.15, linewidth=0)


def draw(groups: list[Group], out: Path) -> None:
    with plt.rc_context({**STYLE, "lines.linewidth": 1.6}):
        figure, axes = plt.subplots(figsize=(7.0, 3.6), layout="constrained")
        for method, with_options, colour, label in LINES:
            draw_line(axes, best_of(groups, method, with_options), colour, label)
        axes.set_title("train loss, LeNet-5 on Fashion-MNIST")
        axes.set_xlabel("training time, s (one thread of an AMD EPYC, Zen 4)")
        axes.set_ylim(0.11, 0.6)
        axes.set_xlim(left=0)
        log_axis(axes)
        axes.legend(frameon=False)
        save(figure, out)
        plt.close(figure)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the rows")
    parser.add_argument("--out", type=Path, default=RESULTS / "readme.png")
    args = parser.parse_args(argv)
    experiment = Results(EXPERIMENT, EXPERIMENTS[EXPERIMENT], read_all(args.results))
    draw(experiment.main_groups, args.out)
    print(args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
