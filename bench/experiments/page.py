"""The results page, from result rows alone: tables, figures, and what is not yet measured."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from bench.experiments import papers, plot, stale_scores, step_times
from bench.experiments.config import RunConfig
from bench.experiments.experiment import Rows
from bench.experiments.groups import Group, Results
from bench.experiments.tables import NOT_YET, missing_line, results_table, time_to_loss
from bench.experiments.tasks import TASKS
from bench.provenance import provenance_line
from bench.report import Row, markdown_table

PAGE = "REPRODUCE.md"
INTRODUCTION = """# Experiments of the papers

Written by `python bench/experiments/reproduce.py --report` from the rows in this folder; nothing is
typed in. [K] is Kutsuna 2025 (arXiv 2501.13296), [KF] Katharopoulos & Fleuret 2018 (1803.00942).
Runs of equal seed start from the same network, whatever the method. ± after a mean is the standard
deviation over seeds; a difference is paired by seed, with Student's 95 % interval. N_ems/B and the
factor of the learning rate are means over the second half of a run. S is 0 for optimal and 1 for
uniform sampling; shown is its median over the second half, since its estimate jumps where the
smoothed denominator is small. "-": not defined for the method (without coefficients, or with draws
that depend on each other, the variance traces have no meaning), or fewer than two common seeds.
"extra" is the samples of forward passes beyond the minibatches, for a step. Seconds are training
time without evaluation, on the machine named below each table, which was shared by as many runs as
it says.
"""


def command(results: Results) -> str:
    settings = results.settings
    parts = [f"python bench/experiments/reproduce.py {results.name}"]
    if results.all_rows:
        parts += [f"--data {settings.data}"] if settings.data != "embedded" else []
    else:
        task = results.main_groups[0].config.dataset
        parts.append(f"--data {TASKS[task].source}.npz")
    if results.lengths != (results.experiment.iterations,):
        parts.append(f"--iterations {' '.join(map(str, results.lengths))}")
    if results.experiment.x == "seconds" and settings.seconds != type(settings).seconds:
        parts.append(f"--seconds {settings.seconds:g}")
    parts.append(f"--seeds {settings.seeds}")
    if settings.device != "cpu":
        parts.append(f"--device {settings.device}")
    return f"```sh\n{' '.join(parts)}\n```"


def figure(results: Results, folder: Path) -> str:
    out = folder / f"reproduce_{results.name}.png"
    experiment, groups = results.experiment, results.main_groups
    if sum(bool(group.rows) for group in groups) < min(2, len(groups)):
        return ""  # nothing to compare yet
    if not plot.draw(groups, experiment.panels, experiment.x, out):
        return ""
    return f"![{experiment.title}]({out.name})"


def section(results: Results, folder: Path, addition: str = "") -> str:
    """``addition`` comes below the tables."""
    experiment = results.experiment
    parts = [f"## {results.name}: {experiment.title}", experiment.note]
    for length in results.lengths:
        groups = results.groups(length)
        if not any(group.rows for group in groups):
            parts.append(NOT_YET)
            continue
        first = next(row for group in groups for row in group.rows)["config"]
        parts.append(
            f"**{first['model']} on {first['dataset']} ({first['data']}), {first['optimizer']}, "
            + (f"{first['seconds']:g} s" if first.get("seconds") else f"{length} iterations")
            + f" at minibatch {first['batch_size']}**; error: {TASKS[first['dataset']].error}"
        )
        table = results_table(groups, compared_with=experiment.compared_with)
        parts += [table, missing_line(groups)]
    later = [length for length in experiment.longer if length not in results.lengths]
    if later:
        parts.append(f"The paper's lengths of {', '.join(map(str, later))}: not yet measured.")
    parts += [addition, figure(results, folder), command(results)]
    if results.all_rows:
        parts.append(provenance_line(results.all_rows))
    return "\n\n".join(part for part in parts if part)


# ---- each method at its best learning rate


def grid_table(results: Results) -> str:
    """The runs of seed 0 that the best learning rates were chosen by."""
    groups = [g for g in results.main_groups if g.config.lr in papers.GRID]
    lines = [["method", *(f"lr {lr:g}" for lr in papers.GRID), "best"]]
    for method in dict.fromkeys(group.label for group in groups):
        of_method = {g.config.lr: g.by_seed("train_loss") for g in groups if g.label == method}
        losses = {lr: of_method.get(lr, {}).get(0, math.nan) for lr in papers.GRID}
        line = [method, *("-" if math.isnan(loss) else f"{loss:.4f}" for loss in losses.values())]
        best = best_group(results, method)
        chosen = "not yet known" if best is None else f"{best.config.lr:g}"
        if best is not None and best.config.lr in (papers.GRID[0], papers.GRID[-1]):
            chosen += " (edge of the grid)"
        lines.append([*line, chosen])
    return "Final train loss of seed 0:\n\n" + markdown_table(lines, aligned=False)


def best_group(results: Results, label: str) -> Group | None:
    """The group of a method's best learning rate; None until its grid is complete."""
    groups = {g.config.lr: g for g in results.main_groups if g.label == label}
    by_lr = [groups[lr].config for lr in papers.GRID if lr in groups]
    best = papers.best_of_grid(by_lr, results.rows) if len(by_lr) == len(papers.GRID) else None
    return None if best is None else groups[best.lr]


def best_lr_section(results: Results, folder: Path, step_times: Sequence[Row]) -> str:
    """Instead of the whole grid: the choice, the chosen, and the time to SGD-Scan's loss."""
    experiment = results.experiment
    labels = dict.fromkeys(g.label for g in results.main_groups)
    best = {label: best_group(results, label) for label in labels}
    chosen = [group for group in best.values() if group is not None]
    parts = [f"## best_lr: {experiment.title}", experiment.note, grid_table(results)]
    if best.get("emais"):
        lr = papers.matched(best["emais"].config, results.rows).lr
        matched = [g for g in results.main_groups if (g.config.method, g.config.lr) == ("scan", lr)]
        shown = [*chosen, *(g for g in matched if g not in chosen)]
    else:
        shown = chosen
    if shown:
        parts += [results_table(shown), missing_line(shown)]
    rates = every_rate(results)
    if rates:
        parts += ["Every rate with at least two seeds:", results_table(rates, best.get("scan"))]
    if best.get("scan"):
        same = [row for row in step_times if row["device"] == results.settings.device]
        parts.append(time_to_loss(chosen, best["scan"], same))
    out = folder / "reproduce_best_lr.png"
    if chosen and plot.draw(chosen, experiment.panels, experiment.x, out):
        parts.append(f"![{experiment.title}]({out.name})")
    parts.append(command(results))
    if results.all_rows:
        parts.append(provenance_line(results.all_rows))
    return "\n\n".join(part for part in parts if part)


def every_rate(results: Results) -> list[Group]:
    """All rates that any experiment ran with several seeds in this setting: the choice by one
    seed can be judged by them."""
    setting = replace(results.main_groups[0].config, method="", lr=0.0, seed=0)
    methods = list(dict.fromkeys(group.config.method for group in results.main_groups))
    found: dict[tuple[str, float], list[Row]] = {}
    for row in results.rows.values():
        config = RunConfig(**row["config"])
        if config.method in methods and replace(config, method="", lr=0.0, seed=0) == setting:
            found.setdefault((config.method, config.lr), []).append(row)
    return [
        Group(replace(setting, method=method, lr=lr), tuple(rows), ())
        for (method, lr), rows in sorted(
            found.items(), key=lambda item: (methods.index(item[0][0]), item[0][1])
        )
        if len(rows) > 1
    ]


def wall_clock_times(results: Results) -> str:
    """A table for each rate of SGD-Scan: its final loss is what the others have to reach."""
    groups = [group for group in results.main_groups if group.rows]
    scans = [group for group in groups if group.label == "scan"]
    return "\n\n".join(time_to_loss(groups, scan, []) for scan in scans)


def write(
    folder: Path, rows: Rows, step_time_rows: Sequence[Row], stale_score_rows: Sequence[Row]
) -> Path:
    """Writes the page and its figures into ``folder``."""
    sections = []
    for name, experiment in papers.EXPERIMENTS.items():
        results = Results(name, experiment, rows)
        if name == "best_lr":
            sections.append(best_lr_section(results, folder, step_time_rows))
            sections.append(step_times.section(step_time_rows))
        elif name == "wall_clock":
            sections.append(section(results, folder, wall_clock_times(results)))
        else:
            sections.append(section(results, folder))
        if name == "fig1":
            sections.append(stale_scores.section(stale_score_rows))
    out = folder / PAGE
    out.write_text("\n\n".join([INTRODUCTION.rstrip(), *sections]) + "\n")
    return out
