"""One figure an experiment: its curves, a panel each, from result rows."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes

from bench.groups import Group
from bench.loop import CURVE_SAMPLES
from bench.plot import STYLE, colour_of, log_axis, reference_line

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


def colours(groups: Sequence[Group]) -> list[str]:
    """A method's own colour where each method comes once, else one a line."""
    methods = [group.config.method for group in groups]
    if len(set(methods)) == len(methods):
        return [colour_of(method) for method in methods]
    return [PALETTE[i % len(PALETTE)] for i in range(len(groups))]


def labels(groups: Sequence[Group]) -> list[str]:
    """What tells the groups apart: the variant, and learning rate and data where they differ."""
    several_lrs = len({group.config.lr for group in groups}) > 1
    several_tasks = len({group.config.dataset for group in groups}) > 1
    return [
        group.label
        + (f", lr {group.config.lr:g}" if several_lrs else "")
        + (f", {group.config.dataset}" if several_tasks else "")
        for group in groups
    ]


def draw_panel(axes: Axes, groups: Sequence[Group], name: str, x: str) -> bool:
    """Means over seeds in bands of one standard deviation; whether there was anything to draw."""
    drawn = []
    # The first is the one to look at: drawn last, so that it lies on top.
    for group, colour in reversed(list(zip(groups, colours(groups), strict=True))):
        found = group.curve(name, x)
        if found is None:
            continue
        points, values = found
        mean = values.mean(0)
        axes.plot(points, mean, color=colour)
        drawn.append(mean)
        if len(values) > 1:
            sd = values.std(0, ddof=1)
            low = np.maximum(mean - sd, 0.5 * mean)  # stays above zero on a log axis
            axes.fill_between(points, low, mean + sd, color=colour, alpha=0.15, linewidth=0)
    axes.set_title(TITLES.get(name, name))
    axes.set_xlabel(X_LABELS[x])
    if not drawn:
        return False
    scale(axes, name, np.concatenate(drawn))
    return True


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


def draw(groups: Sequence[Group], panels: Sequence[str], x: str, out: Path) -> bool:
    """Writes the PNG, of at most 100 kB; whether there was a curve to draw."""
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
            lines, labels(groups), loc="outside lower center", ncols=columns, frameon=False
        )
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
