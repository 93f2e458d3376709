"""Draws curves of groups of runs: for the page, the main job and the README, from rows alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from bench.experiments.groups import Group
from bench.experiments.loop import CURVE_SAMPLES

# Okabe and Ito's palette, told apart by colour-blind readers too; a method keeps its colour.
COLOURS = {
    "emais": "#D55E00",
    "scan": "#0072B2",
    "uniform": "#6B6B6B",
    "rais": "#009E73",
    "presampling": "#000000",
    "loss": "#CC79A7",
    "confidence": "#E69F00",
    "confvar": "#56B4E9",
    "self_paced": "#8C6D31",
    "online_batch": "#7B4EA3",
    "prioritized": "#B8A800",
}
STYLE = {
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#888888",
    "axes.grid": True,
    "grid.color": "#E4E4E4",
    "grid.linewidth": 0.7,
    "lines.linewidth": 1.8,
    "xtick.color": "#444444",
    "ytick.color": "#444444",
}


LARGEST_FILE = 100_000
TITLES = {
    "train_loss": f"training loss ({CURVE_SAMPLES} fixed samples)",
    "test_error": "test error (%)",
    "efficiency": "efficiency S",
    "effective_batch_size": "effective minibatch size N_ems",
    "lr": "learning rate in use",
    "trace_is": "trace, importance sampling",
    "trace_uniform": "trace, uniform sampling",
    "trace_optimal": "trace, optimal sampling",
}
X_LABELS = {"step": "iteration", "seconds": "training time, s"}
# For several variants of one method: Okabe and Ito's palette.
PALETTE = ("#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#6B6B6B", "#000000")
LOG_SCALED = ("train_loss", "test_error", "trace_is", "trace_uniform", "trace_optimal")


def log_axis(axes: Axes) -> None:
    """A log axis labelled in plain numbers: the fewer decades it spans, the more of them."""
    low, high = axes.get_ylim()
    ticks = (1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 8) if high < 6 * low else (1, 2, 5)
    axes.set_yscale("log")
    axes.set_ylim(low, high)
    axes.yaxis.set_major_locator(LogLocator(subs=ticks, numticks=20))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def reference_line(axes: Axes, value: float, text: str) -> None:
    axes.axhline(value, color="#999999", linewidth=1, linestyle=(0, (4, 3)), zorder=1)
    axes.annotate(
        text,
        (1, value),
        (-2, 3),
        xycoords=("axes fraction", "data"),
        textcoords="offset points",
        ha="right",
        va="bottom",
        fontsize=8.5,
        color="#777777",
    )


def colours(groups: Sequence[Group]) -> list[str]:
    """A method's own colour where each method comes once, else one a line."""
    methods = [group.config.method for group in groups]
    if len(set(methods)) == len(methods):
        return [COLOURS.get(method, "black") for method in methods]
    return [PALETTE[i % len(PALETTE)] for i in range(len(groups))]


def labels(groups: Sequence[Group], with_lr: bool = False) -> list[str]:
    """What tells the groups apart: the variant, and learning rate and data where they differ."""
    several_lrs = with_lr or len({group.config.lr for group in groups}) > 1
    several_tasks = len({group.config.dataset for group in groups}) > 1
    return [
        group.label
        + (f", lr {group.config.lr:g}" if several_lrs else "")
        + (f", {group.config.dataset}" if several_tasks else "")
        for group in groups
    ]


def draw_curve(
    axes: Axes, group: Group, name: str, x: str, colour: str, label: str = ""
) -> np.ndarray | None:
    """The mean over seeds, which it returns, in a band of one standard deviation."""
    found = group.curve(name, x)
    if found is None:
        return None
    points, values = found
    mean = values.mean(0)
    axes.plot(points, mean, color=colour, label=label)
    if len(values) > 1:
        sd = values.std(0, ddof=1)
        low = np.maximum(mean - sd, 0.5 * mean)  # stays above zero on a log axis
        axes.fill_between(points, low, mean + sd, color=colour, alpha=0.15, linewidth=0)
    return mean


def draw_panel(axes: Axes, groups: Sequence[Group], name: str, x: str) -> bool:
    """Whether there was anything to draw."""
    # The first is the one to look at: drawn last, so that it lies on top.
    lines = reversed(list(zip(groups, colours(groups), strict=True)))
    means = [draw_curve(axes, group, name, x, colour) for group, colour in lines]
    drawn = [mean for mean in means if mean is not None]
    axes.set_title(TITLES.get(name, name))
    axes.set_xlabel(X_LABELS[x])
    if drawn:
        scale(axes, name, np.concatenate(drawn))
    return bool(drawn)


def scale(axes: Axes, name: str, values: np.ndarray) -> None:
    """Where the part that matters lies: an untrained network's first values may flatten it."""
    values = values[np.isfinite(values)]
    if name == "efficiency":
        axes.set_ylim(0, 1.25)
        reference_line(axes, 1.0, "uniform sampling")
    elif name in LOG_SCALED and len(values) and values.min() > 0:
        span = 4 if name == "test_error" else 300
        axes.set_ylim(values.min() / 1.08, min(values.max() * 1.08, values.min() * span))
        log_axis(axes)
    else:
        axes.set_ylim(bottom=0)


def draw(
    groups: Sequence[Group], panels: Sequence[str], x: str, out: Path, heading: str = ""
) -> bool:
    """Writes the PNG, of at most 100 kB; whether there was a curve to draw. Under a heading every
    line is named with its learning rate."""
    groups = [group for group in groups if group.rows]
    if not groups:
        return False
    with plt.rc_context({**STYLE, "lines.linewidth": 1.4}):
        size = (max(5.0, 4.3 * len(panels)), 4.2)
        figure, grid = plt.subplots(
            1, len(panels), figsize=size, squeeze=False, layout="constrained"
        )
        drawn = [
            draw_panel(axes, groups, name, x) for axes, name in zip(grid[0], panels, strict=True)
        ]
        lines = [plt.Line2D([], [], color=colour, linewidth=2.5) for colour in colours(groups)]
        columns = min(len(groups), 2 * len(panels))
        figure.legend(
            lines,
            labels(groups, bool(heading)),
            loc="outside lower center",
            ncols=columns,
            frameon=False,
        )
        if heading:
            figure.suptitle(heading, x=0.01, ha="left", fontsize=11, color="#333333")
        if any(drawn):
            save(figure, out)
        plt.close(figure)
    return any(drawn)


def save(figure: plt.Figure, out: Path) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    for dpi in (110, 90, 75, 60):
        figure.savefig(out, dpi=dpi, facecolor="white", pil_kwargs={"optimize": True})
        if out.stat().st_size < LARGEST_FILE:
            return
