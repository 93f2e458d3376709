"""The results page, from result rows alone: tables, figures, and what is not yet measured."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean

from bench import figures, stale_scores, step_times
from bench.compare import paired_interval
from bench.config import RunConfig
from bench.experiments import EXPERIMENTS
from bench.groups import Group, Results
from bench.loop import CURVE_SAMPLES
from bench.markdown import NOT_YET, markdown_table, provenance_line
from bench.plans import GRID, Rows, best_of_grid, matched_lr
from bench.report import Row, mean_sd
from bench.tasks import TASKS

PAGE = "REPRODUCE.md"
INTRODUCTION = """# Experiments of the papers

Written by `python bench/reproduce.py --report` from the result rows in this folder; nothing here is
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
Column = tuple[str, str, int]
ALWAYS: tuple[Column, ...] = (
    ("test error, %", "test_error", 2),
    ("train loss", "train_loss", 4),
)
# Shown where some run has them, or where they differ from what goes without saying.
SOMETIMES: tuple[tuple[Column, float | None], ...] = (
    (("mAP, %", "test_map", 2), None),
    (("macro AUC, %", "test_auc", 2), None),
    (("N_ems/B", "relative_batch_size", 2), 1.0),
    (("S", "efficiency", 2), 1.0),
    (("lr factor", "lr_factor", 2), 1.0),
    (("seconds", "seconds", 0), None),
)


def mean_cell(group: Group, name: str, digits: int) -> str:
    if not group.rows:
        return "not yet measured" if name == ALWAYS[0][1] else "-"
    if name in ("test_error", "train_loss") and not all(map(math.isfinite, group.finals(name))):
        return "diverged"
    if not group.defines(name):
        return "-"
    if name == "efficiency":
        return mean_sd(group.late_medians(name), digits)
    values = [row["final"].get(name) for row in group.rows]
    return "-" if None in values else mean_sd(values, digits)


def shown_columns(groups: Sequence[Group]) -> list[Column]:
    def varies(name: str, usual: float | None) -> bool:
        return any(
            row["final"].get(name) not in (None, usual)
            for group in groups
            if group.defines(name)
            for row in group.rows
        )

    return [*ALWAYS, *(column for column, usual in SOMETIMES if varies(column[1], usual))]


def difference_cell(group: Group, reference: Group | None, name: str, digits: int) -> str:
    if reference is None or replace(group.config, seed=0) == replace(reference.config, seed=0):
        return "-"
    try:
        mean, half, _ = paired_interval(group.by_seed(name), reference.by_seed(name))
    except ValueError:
        return "-"
    return f"{mean:+.{digits}f} ± {half:.{digits}f}"


def group_name(group: Group, groups: Sequence[Group]) -> str:
    several = len({g.config.dataset for g in groups}) > 1
    return group.label + (f", {group.config.dataset}" if several else "")


def reference_of(group: Group, groups: Sequence[Group], label: str = "scan") -> Group | None:
    """What a group is compared with: the method of that label on the same data, or the first."""
    same = [g for g in groups if g.rows and g.config.dataset == group.config.dataset]
    return next(iter([g for g in same if g.label == label] or same), None)


def results_table(
    groups: Sequence[Group], reference: Group | None = None, compared_with: str = "scan"
) -> str:
    """Means over seeds, and paired differences to ``reference`` (None: :func:`reference_of`)."""
    columns = shown_columns(groups)
    references = [reference or reference_of(group, groups, compared_with) for group in groups]
    names = dict.fromkeys(f"{r.label} {r.config.lr:g}" for r in references if r is not None)
    versus = " or ".join(names) or "-"
    head = ["method", "lr", "seeds", *(title for title, _, _ in columns)]
    head += ["steps", "extra", f"test error minus {versus}", f"train loss minus {versus}"]
    lines = []
    for group, other in zip(groups, references, strict=True):
        steps = [row["final"].get("steps", row["config"]["iterations"]) for row in group.rows]
        extra = [row["final"].get("extra_forward_samples", 0) for row in group.rows]
        line = [group_name(group, groups), f"{group.config.lr:g}"]
        line.append(f"{len(group.rows)} of {len(group.rows) + len(group.missing_seeds)}")
        line += [mean_cell(group, name, digits) for _, name, digits in columns]
        line.append(f"{fmean(steps):.0f}" if steps else "-")
        line.append(f"{sum(extra) / sum(steps):.0f}" if steps else "-")
        line.append(difference_cell(group, other, "test_error", 2))
        line.append(difference_cell(group, other, "train_loss", 4))
        lines.append(line)
    return markdown_table(head, lines)


def missing_line(groups: Sequence[Group]) -> str:
    missing = [
        f"{group_name(group, groups)} lr {group.config.lr:g} "
        f"(seed {', '.join(map(str, group.missing_seeds))})"
        for group in groups
        if group.missing_seeds
    ]
    return f"Not yet measured: {'; '.join(missing)}." if missing else ""


def command(results: Results) -> str:
    settings = results.settings
    parts = [f"python bench/reproduce.py {results.name}"]
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
    if not figures.draw(groups, experiment.panels, experiment.x, out):
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
    groups = [g for g in results.main_groups if g.config.lr in GRID]
    lines = []
    for method in dict.fromkeys(group.label for group in groups):
        of_method = {g.config.lr: g.by_seed("train_loss") for g in groups if g.label == method}
        losses = {lr: of_method.get(lr, {}).get(0, math.nan) for lr in GRID}
        line = [method, *("-" if math.isnan(loss) else f"{loss:.4f}" for loss in losses.values())]
        best = best_group(results, method)
        chosen = "not yet known" if best is None else f"{best.config.lr:g}"
        if best is not None and best.config.lr in (GRID[0], GRID[-1]):
            chosen += " (edge of the grid)"
        lines.append([*line, chosen])
    head = ["method", *(f"lr {lr:g}" for lr in GRID), "best"]
    return "Final train loss of seed 0:\n\n" + markdown_table(head, lines)


def best_group(results: Results, label: str) -> Group | None:
    """The group of a method's best learning rate; None until its grid is complete."""
    groups = {g.config.lr: g for g in results.main_groups if g.label == label}
    by_lr = [groups[lr].config for lr in GRID if lr in groups]
    best = best_of_grid(by_lr, results.rows) if len(by_lr) == len(GRID) else None
    return None if best is None else groups[best.lr]


def best_lr_section(results: Results, folder: Path, step_times: Sequence[Row]) -> str:
    """Instead of the whole grid: the choice, the chosen, and the time to SGD-Scan's loss."""
    experiment = results.experiment
    labels = dict.fromkeys(g.label for g in results.main_groups)
    best = {label: best_group(results, label) for label in labels}
    chosen = [group for group in best.values() if group is not None]
    parts = [f"## best_lr: {experiment.title}", experiment.note, grid_table(results)]
    if best.get("emais"):
        lr = matched_lr(best["emais"].config, results.rows)
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
    if chosen and figures.draw(chosen, experiment.panels, experiment.x, out):
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


def first_reached(row: Row, target: float) -> int | None:
    """The position of the first evaluation at or below the target."""
    losses = row["curves"]["train_loss"]
    return next((i for i, v in enumerate(losses) if v is not None and v <= target), None)


def time_to_loss(groups: Sequence[Group], scan: Group, step_times: Sequence[Row]) -> str:
    """Steps and seconds until the train loss that SGD-Scan ends with."""
    target = fmean(row["curves"]["train_loss"][-1] for row in scan.rows)
    usual = step_times[-1]["methods"] if step_times else {}
    lines = []
    for group in groups:
        reached = [(row, first_reached(row, target)) for row in group.rows]
        there = [(row, i) for row, i in reached if i is not None]
        steps = [row["curves"]["step"][i] for row, i in there]
        seconds = [row["curves"]["seconds"][i] for row, i in there if "seconds" in row["curves"]]
        ms = usual.get(group.label, {}).get("ms")
        lines.append(
            [
                group.label,
                f"{group.config.lr:g}",
                f"{len(there)} of {len(group.rows)}",
                mean_sd(steps, 0) if steps else "-",
                f"{fmean(steps) * ms / 1e3:.1f}" if steps and ms else "-",
                mean_sd(seconds, 1) if seconds and len(seconds) == len(there) else "-",
            ]
        )
    head = ["method", "lr", "seeds that reach it", "steps", "s, at table5's ms/step", "s, measured"]
    return (
        f"Until the train loss that SGD-Scan ends with at {scan.config.lr:g} ({target:.4f}, mean "
        f"over seeds, on the curves' {CURVE_SAMPLES} fixed images): the first evaluation at or "
        "below it, over the seeds that reach it. Every schedule is as long as the run.\n\n"
        + markdown_table(head, lines)
    )


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
    for name, experiment in EXPERIMENTS.items():
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
