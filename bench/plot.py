"""Draws the curves of one setting from its result rows; reads nothing else.

python bench/plot.py runs/results.jsonl --out curves.png
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))

import matplotlib as mpl

mpl.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from bench import report
from bench.curves import curve

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
# Methods without coefficients share N_ems, S and lr: dashes on top let the other show through.
DASHED = ("uniform",)
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


def colour_of(method: str) -> str:
    return COLOURS.get(method, "black")


def dashes_of(method: str) -> object:
    return (0, (4, 2)) if method in DASHED else "-"


def best_lr(rows: list[report.Row]) -> dict[str, list[report.Row]]:
    """For each method the rows of the learning rate with the lowest mean test error."""
    best: dict[str, list[report.Row]] = {}
    for (method, _), group in report.by_method_and_lr(rows).items():
        error = np.nanmean(report.finals(group, "test_error"))
        if method not in best or error < np.nanmean(report.finals(best[method], "test_error")):
            best[method] = group
    return best


def draw_curves(axes: Axes, groups: dict[str, list[report.Row]], name: str) -> None:
    """The mean over seeds of each method, in a band of one standard deviation."""
    # The first method is the one to look at: drawn last, so that it lies on top.
    for height, (method, group) in enumerate(reversed(groups.items())):
        steps, values = curve(group, name)
        mean = values.mean(0)
        on_top = len(groups) if method in DASHED and height + 1 < len(groups) else 0
        line = {"color": colour_of(method), "linestyle": dashes_of(method)}
        axes.plot(steps, mean, **line, zorder=3 + height + on_top)
        if len(values) > 1:
            sd = values.std(0, ddof=1)
            low = np.maximum(mean - sd, 0.5 * mean)  # stays above zero on a log axis
            colour = colour_of(method)
            axes.fill_between(steps, low, mean + sd, color=colour, alpha=0.18, linewidth=0)
    axes.set_xlim(0, steps[-1])
    axes.set_xlabel("iteration")


def log_axis(axes: Axes) -> None:
    """A log axis labelled in plain numbers: the fewer decades it spans, the more of them."""
    low, high = axes.get_ylim()
    ticks = (1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 8) if high < 6 * low else (1, 2, 5)
    axes.set_yscale("log")
    axes.set_ylim(low, high)
    axes.yaxis.set_major_locator(LogLocator(subs=ticks, numticks=20))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def fit_log_axis(axes: Axes, groups: dict[str, list[report.Row]], name: str, span: float) -> None:
    """A log axis from just under the lowest value to ``span`` times it at most, so that the first
    evaluations of an untrained network don't flatten the part that matters."""
    values = np.concatenate([curve(group, name)[1].ravel() for group in groups.values()])
    values = values[np.isfinite(values) & (values > 0)]
    if len(values):
        axes.set_ylim(values.min() / 1.08, min(values.max() * 1.08, values.min() * span))
        log_axis(axes)


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


def draw_finals(axes: Axes, best: dict[str, list[report.Row]]) -> None:
    """The final test error: a dot for each seed and a bar at each method's mean."""
    for x, (method, group) in enumerate(best.items()):
        errors = report.finals(group, "test_error")
        offsets = np.linspace(-0.12, 0.12, len(errors)) if len(errors) > 1 else [0.0]
        axes.plot(x + np.array(offsets), errors, "o", color=colour_of(method), alpha=0.75, ms=6)
        mean = float(np.mean(errors))
        axes.plot([x - 0.28, x + 0.28], [mean, mean], color=colour_of(method), linewidth=2.2)
        axes.annotate(f"{mean:.2f}", (x + 0.32, mean), va="center", fontsize=9, color="#333333")
    axes.set_xlim(-0.5, len(best) - 0.2)
    axes.margins(y=0.2)
    axes.set_xticks(range(len(best)), best, rotation=0 if len(best) <= 4 else 35)
    axes.grid(axis="x", visible=False)
    axes.set_title("final test error, each seed (%)")


def draw_grid(axes: Axes, rows: list[report.Row]) -> None:
    """The final test error against the learning rate, with the standard deviation over seeds."""
    points: dict[str, list[tuple[float, float, float]]] = {}
    for (method, lr), group in report.by_method_and_lr(rows).items():
        errors = np.array(report.finals(group, "test_error"))
        sd = errors.std(ddof=1) if len(errors) > 1 else 0.0
        points.setdefault(method, []).append((lr, errors.mean(), sd))
    for method, triples in points.items():
        lr, mean, sd = zip(*triples, strict=True)
        axes.errorbar(lr, mean, sd, marker="o", ms=5, capsize=3, color=colour_of(method))
    axes.set_xscale("log")
    ticks = sorted({row["config"]["lr"] for row in rows})
    axes.set_xticks(ticks, [f"{lr:g}" for lr in ticks])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("learning rate")
    axes.set_title("final test error against learning rate (%)")


def heading(rows: list[report.Row]) -> str:
    setting = report.setting_of(rows[0])
    seeds = len({row["config"]["seed"] for row in rows})
    return (
        f"{setting['model']} on {setting['dataset']} ({setting['data']}), {setting['optimizer']}, "
        f"{setting['iterations']} iterations of {setting['batch_size']}, "
        f"{seeds} seed{'s: mean and standard deviation' if seeds > 1 else ''}"
    )


def draw(rows: list[report.Row], out: Path) -> None:
    """Writes the PNG of one setting's rows. Where a method has several learning rates, the curves
    are those of its best one."""
    best = best_lr(rows)
    batch_size = rows[0]["config"]["batch_size"]
    is_grid = len(report.by_method_and_lr(rows)) > len(best)
    with plt.rc_context(STYLE):
        figure, grid = plt.subplots(2, 3, figsize=(13, 7.4), layout="constrained")
        (loss, error, last), (effective, efficiency, lr) = grid
        panels = {
            "train_loss": (loss, "training loss"),
            "test_error": (error, "test error (%)"),
            "effective_batch_size": (effective, "effective batch size N_ems"),
            "efficiency": (efficiency, "efficiency score S (0: optimal sampling)"),
            "lr": (lr, "learning rate in use"),
        }
        for name, (axes, title) in panels.items():
            draw_curves(axes, best, name)
            axes.set_title(title)
        fit_log_axis(loss, best, "train_loss", span=300)
        fit_log_axis(error, best, "test_error", span=3)
        reference_line(effective, batch_size, f"minibatch of {batch_size}")
        reference_line(efficiency, 1.0, "uniform sampling")
        for axes in (effective, efficiency, lr):
            axes.set_ylim(bottom=0)
        efficiency.set_ylim(top=clipped_top(best))
        draw_grid(last, rows) if is_grid else draw_finals(last, best)
        add_legend(figure, best)
        # A second, empty line: air between the heading and the panels' titles.
        heading_style = {"fontsize": 12, "color": "#333333"}
        figure.suptitle(heading(rows) + "\n", x=0.01, ha="left", **heading_style)
        out.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(out, dpi=130, facecolor="white")
        plt.close(figure)


def clipped_top(groups: dict[str, list[report.Row]]) -> float:
    """The upper end of the axis of S: first estimates may be far off and would flatten the rest."""
    settled = [
        np.nanmax(curve(group, "efficiency")[1][:, 2:], initial=0) for group in groups.values()
    ]
    return 1.1 * min(max(1.0, *settled), 3.0)


def add_legend(figure: plt.Figure, best: dict[str, list[report.Row]]) -> None:
    lines = [
        plt.Line2D([], [], color=colour_of(method), linestyle=dashes_of(method), linewidth=2.5)
        for method in best
    ]
    labels = [f"{method}, lr {group[0]['config']['lr']:g}" for method, group in best.items()]
    figure.legend(lines, labels, loc="outside lower center", ncols=min(len(best), 5), frameon=False)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", type=Path, help="results.jsonl of bench/train.py")
    parser.add_argument("--out", type=Path, default=Path("curves.png"), help="the PNG")
    args = parser.parse_args(argv)
    rows = report.latest(report.read_rows(args.file))
    if not rows:
        parser.error(f"file must hold result rows, got none in {args.file}")
    setting = report.setting_of(rows[-1])
    drawn = [row for row in rows if report.setting_of(row) == setting]
    if len(drawn) < len(rows):
        print(f"{args.file} holds several settings; drawn is the last: {setting}", file=sys.stderr)
    draw(drawn, args.out)
    print(args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
