"""Draws the figures of assess.py from its rows; reads nothing else."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image

# plot.py chooses the backend that needs no screen.
from bench.experiments.plot import STYLE, plt, reference_line
from bench.report import Row

LABELS = {
    "trace_is": "tr V_is",
    "trace_uniform": "tr V_uni",
    "trace_optimal": "tr V_opt",
    "effective_batch_size": "N_ems",
    "efficiency": "S",
    "loss": "loss",
    "upper_bound": "upper bound",
    "gradient_norm": "gradient norm",
    "sampler": "the run's own table",
}
COLOURS = {
    "loss": "#CC79A7",
    "upper_bound": "#0072B2",
    "gradient_norm": "#222222",
    "sampler": "#D55E00",
}
POINTS = {"s": 9, "linewidths": 0}
DPI = 90


def numbers(values: list[float | None]) -> np.ndarray:
    """Missing values as NaN."""
    return np.array([np.nan if v is None else v for v in values], dtype=float)


def draw_norms(figure: plt.Figure, rows: list[Row]) -> None:
    """fig3: a panel a stage."""
    for axes, row in zip(figure.subplots(1, len(rows), squeeze=False)[0], rows, strict=True):
        x, y, fit = numbers(row["logits"]), numbers(row["parameters"]), row["fit"]
        axes.scatter(x, y, color=COLOURS["upper_bound"], alpha=0.5, **POINTS)
        ends = np.array([0, x.max()])
        axes.plot(ends, fit["slope"] * ends, color="#C00000", linewidth=1.3)
        axes.set_title(f"iteration {row['iteration']}")
        axes.set_xlabel("norm of the gradient at the logits")
        note(axes, f"slope {fit['slope']:.3g}\ncorrelation {fit['correlation']:.3f}")
    figure.axes[0].set_ylabel("norm of the gradient of all parameters")


def draw_estimates(figure: plt.Figure, rows: list[Row]) -> None:
    """fig4 and fig5: a row of panels a stage, a panel a quantity."""
    names = list(rows[0]["fit_of_estimates"])
    grid = figure.subplots(len(rows), len(names), squeeze=False)
    for line, row in zip(grid, rows, strict=True):
        for axes, name in zip(line, names, strict=True):
            draw_pairs(axes, row, name)
            axes.set_title(f"{LABELS[name]}; iteration {row['iteration']}")
            axes.set_xlabel("from gradients at the logits")
        line[0].set_ylabel("from gradients of all parameters")
    handles, labels = grid[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)


def draw_pairs(axes: plt.Axes, row: Row, name: str) -> None:
    """One quantity in both spaces: estimates with their line, and the exact values on top."""
    x, y = (numbers(row["estimates"][space][name]) for space in ("logits", "parameters"))
    colour = COLOURS["upper_bound"]
    axes.scatter(x, y, color=colour, alpha=0.5, label="estimated from a minibatch", **POINTS)
    fit = row["fit_of_estimates"][name]
    view = (np.nanquantile(x, 0.01), np.nanquantile(x, 0.99))
    line = [fit["slope"] * v + fit["intercept"] for v in view]
    axes.plot(view, line, color="#C00000", linewidth=1.3, label="regression line")
    exact = [numbers(row["exact"][space][name]) for space in ("logits", "parameters")]
    axes.scatter(*exact, color="#E69F00", label="exact, for the same weights", **POINTS, zorder=3)
    # A few minibatches of one rare sample would squeeze all others into a corner.
    for set_limits, estimated, true in ((axes.set_xlim, x, exact[0]), (axes.set_ylim, y, exact[1])):
        low = min(np.nanquantile(estimated, 0.01), true.min())
        high = max(np.nanquantile(estimated, 0.99), true.max())
        set_limits(low - 0.05 * (high - low), high + 0.05 * (high - low))
    if row["figure"] == "fig5":  # the same quantity, not just proportional
        axes.axline((0, 0), slope=1, color="#999999", linewidth=1, zorder=1, label="equal")
    note(axes, f"slope {fit['slope']:.3g}\n$R^2$ {fit['r2']:.3f}")


def draw_distances(figure: plt.Figure, rows: list[Row]) -> None:
    """kf1: a line a way of sampling."""
    axes = figure.subplots()
    steps = [row["iteration"] for row in rows]
    for name, colour in COLOURS.items():
        ratio = numbers([row["variance_ratio"][name] for row in rows])
        dashes = (0, (4, 2)) if name == "gradient_norm" else "-"
        line = {"linestyle": dashes, "marker": "o", "ms": 3.5, "color": colour}
        axes.plot(steps, np.sqrt(ratio), **line, label=LABELS[name])
    reference_line(axes, 1.0, "uniform sampling")
    axes.set_ylim(0, min(axes.get_ylim()[1], 2.0))
    axes.set_xlabel("iteration")
    axes.set_title("distance to the full gradient, relative to uniform sampling (root mean square)")
    axes.legend(frameon=False, title="sampled by")


def draw_probabilities(figure: plt.Figure, rows: list[Row]) -> None:
    """kf2: a row of panels a stage, a panel a way of sampling."""
    names = ("loss", "upper_bound")
    grid = figure.subplots(len(rows), len(names), squeeze=False)
    for line, row in zip(grid, rows, strict=True):
        p = {name: numbers(v) for name, v in row["relative_probabilities"].items()}
        positive = np.concatenate(list(p.values()))
        positive = positive[positive > 0]
        ends = [max(positive.min(), 1e-6 * positive.max()), positive.max() * 1.3]
        for axes, name in zip(line, names, strict=True):
            axes.plot(ends, ends, color="black", linewidth=1)
            axes.scatter(p["gradient_norm"], p[name], color=COLOURS[name], alpha=0.5, **POINTS)
            axes.set(xscale="log", yscale="log", xlim=ends, ylim=ends)
            axes.set_title(f"{LABELS[name]}; iteration {row['iteration']}")
            axes.set_xlabel("N p by gradient norm")
            error, correlation = row["sum_of_squared_errors"][name], row["correlation"][name]
            note(axes, f"sum of squared errors {error:.3g}\ncorrelation {correlation:.3f}")
        line[0].set_ylabel("N p")


def note(axes: plt.Axes, text: str) -> None:
    place = {"xycoords": "axes fraction", "ha": "left", "va": "top"}
    axes.annotate(text, (0.03, 0.97), fontsize=9, color="#333333", **place)


# Figure: what draws it, its title, and its size in inches for the number of stages.
FIGURES = {
    "fig3": (draw_norms, "gradient norms of single samples", lambda n: (4.6 * n, 4.2)),
    "fig4": (draw_estimates, "variance traces from minibatches", lambda n: (12, 3.6 * n + 0.7)),
    "fig5": (draw_estimates, "N_ems and S from minibatches", lambda n: (8.6, 3.6 * n + 0.7)),
    "kf1": (draw_distances, "variance reduction over the training", lambda n: (8, 4.6)),
    "kf2": (draw_probabilities, "sampling probabilities", lambda n: (8.6, 3.9 * n)),
}


def save(figure: plt.Figure, png: Path) -> None:
    """In 64 colours: a third of the bytes."""
    buffer = BytesIO()
    figure.savefig(buffer, dpi=DPI, facecolor="white")
    Image.open(buffer).convert("RGB").quantize(64).save(png, optimize=True)


def draw(rows: list[Row], out: Path) -> list[Path]:
    """Writes a PNG beside ``out`` for every figure that ``rows`` has; returns their paths."""
    written = []
    for name, (function, title, size) in FIGURES.items():
        some = [row for row in rows if row["figure"] == name]
        if not some:
            continue
        config = some[0]["config"]
        with plt.rc_context(STYLE | {"axes.titlesize": 10}):
            figure = plt.figure(figsize=size(len(some)), layout="constrained")
            function(figure, some)
            heading = f"{title}\n{config['model']}, {config['dataset']}, {config['method']}\n"
            figure.suptitle(heading, x=0.01, ha="left", fontsize=11, color="#333333")
            png = out.with_name(f"{out.stem}_{name}.png")
            save(figure, png)
            plt.close(figure)
        written.append(png)
    return written
