"""Draws the best that each method reaches within a time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean

import matplotlib.pyplot as plt
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from bench.experiments.groups import Group
from bench.experiments.plot import COLOURS, STYLE

PANELS = {"test_error": "test error, %", "train_loss": "train loss"}


def draw(chosen: Mapping[str, Sequence[tuple[int, Group]]], out: Path) -> bool:
    """One panel a metric: means over seeds, and every run as a point; whether there is anything."""
    if not any(chosen.values()):
        return False
    with plt.rc_context(STYLE):
        figure, panels = plt.subplots(1, len(PANELS), figsize=(9, 3.4), layout="constrained")
        for axes, (metric, title) in zip(panels, PANELS.items(), strict=True):
            for method, points in chosen.items():
                colour = COLOURS[points[0][1].config.method] if points else None
                seconds = [second for second, _ in points]
                means = [fmean(group.finals(metric)) for _, group in points]
                axes.plot(seconds, means, "o-", color=colour, label=method)
                for second, group in points:
                    values = group.finals(metric)
                    axes.plot([second] * len(values), values, ".", color=colour, alpha=0.4)
                if metric == "test_error":
                    for (second, group), mean in zip(points, means, strict=True):
                        text = f"B {group.config.batch_size}"
                        offset = (5, 5 if method != "EMAIS" else -12)
                        axes.annotate(
                            text,
                            (second, mean),
                            offset,
                            textcoords="offset points",
                            fontsize=8,
                            color=colour,
                        )
            axes.set_title(title)
            axes.set_xscale("log")
            ticks = sorted({second for points in chosen.values() for second, _ in points})
            axes.xaxis.set_major_locator(FixedLocator(ticks))
            axes.xaxis.set_minor_locator(NullLocator())
            axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g} s"))
            axes.set_xlabel("training time, everything tuned to it")
        panels[0].legend(frameon=False)
        figure.savefig(out, dpi=110)
        plt.close(figure)
    return True
