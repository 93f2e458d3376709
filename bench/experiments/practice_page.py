"""The page for practitioners, from result rows alone: tables, figures, what is not yet measured."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean

from bench.experiments import practice
from bench.experiments.config import RunConfig
from bench.experiments.experiment import Once, Rows, Settings
from bench.experiments.groups import Group, grouped
from bench.experiments.practice import Budgets
from bench.experiments.tables import NOT_YET, difference_cell, mean_sd
from bench.experiments.tasks import TASKS
from bench.provenance import provenance_line
from bench.report import Row, markdown_table, read_rows

PAGE = "PRACTICE.md"
MOST_SEEDS = 5
INTRODUCTION = f"""# Does it pay?

Written by `python bench/experiments/reproduce.py --report` from the rows in this folder; nothing is
typed in. Runs of equal seed start from the same network, whatever the method. ± after a mean is the
standard deviation over seeds; a difference is paired by seed, with Student's 95 % interval. Of
{MOST_SEEDS} seeds at most, those that are there. Test errors choose rates and minibatch sizes here,
for all methods alike: read differences, not levels.
"""


def data_of(dataset: str, rows: Rows) -> str:
    """The file that most rows of a task have, before the embedded subset."""
    files = Counter(
        row["config"]["data"] for row in rows.values() if row["config"]["dataset"] == dataset
    )
    files.pop("embedded", None)
    return files.most_common(1)[0][0] if files else "embedded"


def settings_for(dataset: str, rows: Rows) -> Settings:
    return Settings(data_of(dataset, rows), seeds=MOST_SEEDS)


def group_of(config: RunConfig, rows: Rows) -> Group:
    """Its runs of all seeds that are there."""
    runs = [replace(config, seed=seed) for seed in range(MOST_SEEDS)]
    return grouped(runs, lambda run: rows.get(run.key))[0]


def cell(group: Group, name: str, digits: int) -> str:
    return mean_sd(group.finals(name), digits) if group.rows else "-"


def command(name: str, groups: Sequence[Group]) -> str:
    files = dict.fromkeys(f"{TASKS[group.config.dataset].source}.npz" for group in groups)
    seeds = max((len(group.rows) for group in groups), default=1)
    lines = [
        f"python bench/experiments/reproduce.py {name} --data {file} --seeds {seeds}"
        for file in files
    ]
    return "```sh\n" + "\n".join(lines) + "\n```"


def section(name: str, groups: Sequence[Group], *parts: str) -> str:
    experiment = practice.EXPERIMENTS[name]
    found = [group for group in groups if group.rows]
    there = [row for group in found for row in group.rows]
    text = [f"## {name}: {experiment.title}", experiment.note, *(parts if there else (NOT_YET,))]
    text += [command(name, found or groups)] if groups else []
    text += [provenance_line(there)] if there else []
    return "\n\n".join(part for part in text if part)


# ---- options at uniform sampling's best rate


def defaults_section(rows: Rows, folder: Path) -> str:
    tables = {
        "Test error, %, and its difference to SGD-Scan": ("test_error", 2),
        "Final train loss, and its difference to SGD-Scan": ("train_loss", 4),
    }
    candidates = practice.CANDIDATES | practice.TRIED
    found: list[Group] = []
    compared: dict[str, dict[str, Group]] = {}
    for task, setting in practice.SETTINGS.items():
        settings = settings_for(setting.dataset, rows)
        grid = [setting.config(settings, "scan", lr) for lr in setting.rates]
        best = practice.best_of(grid, rows)
        found += [group_of(config, rows) for config in grid]
        if best is None:
            continue
        compared[task] = {"SGD-Scan": group_of(best, rows)}
        for name, (method, changes) in candidates.items():
            config = setting.config(settings, method, best.lr, **changes)
            compared[task][name] = group_of(config, rows)
        found += compared[task].values()
    parts = []
    for title, (metric, digits) in tables.items():
        lines = [["task", "best rate", "SGD-Scan", *candidates]]
        for task, groups in compared.items():
            uniform, *others = groups.values()
            line = [task, f"{uniform.config.lr:g}"]
            line.append(f"{cell(uniform, metric, digits)} ({len(uniform.rows)})")
            lines.append([*line, *(against(group, uniform, metric, digits) for group in others)])
        parts.append(f"{title} (number of seeds):\n\n" + markdown_table(lines, aligned=False))
    parts += [worst_table(compared)] if compared else []
    waiting = [task for task in practice.SETTINGS if task not in compared]
    parts += [f"Not yet measured: {', '.join(waiting)}."] if waiting else []
    return section("defaults", found, *parts)


def worst_table(compared: dict[str, dict[str, Group]]) -> str:
    """Of each option with several seeds: the task where it does worst, as a ratio of means."""
    lines = [["option", "test error over SGD-Scan's: worst, best", "train loss: worst, best"]]
    for name in practice.CANDIDATES:
        line = [name]
        for metric in ("test_error", "train_loss"):
            found = {
                task: mean_ratio(of[name], of["SGD-Scan"], metric) for task, of in compared.items()
            }
            ratios = {task: ratio for task, ratio in found.items() if ratio is not None}
            if ratios:
                ends = max(ratios, key=ratios.__getitem__), min(ratios, key=ratios.__getitem__)
                line.append("; ".join(f"{ratios[task]:.3f} ({task})" for task in ends))
        if len(line) == 3:
            lines.append(line)
    return markdown_table(lines, aligned=False)


def mean_ratio(group: Group, reference: Group, metric: str) -> float | None:
    """Of the means over the seeds that both have."""
    ours, theirs = group.by_seed(metric), reference.by_seed(metric)
    seeds = ours.keys() & theirs.keys()
    if len(seeds) < 2:
        return None
    return fmean(ours[seed] for seed in seeds) / fmean(theirs[seed] for seed in seeds)


def against(group: Group, reference: Group, metric: str, digits: int) -> str:
    """The difference where two seeds give one, else the value."""
    if not group.rows:
        return "-"
    difference = difference_cell(group, reference, metric, digits)
    value = cell(group, metric, digits)
    return f"{value} (1)" if difference == "-" else f"{difference} ({len(group.rows)})"


# ---- each way at its own best rate

WAYS = {"imbalance": practice.BALANCING, "peers": practice.PEERS, "batch_norm": practice.NORMALISED}


def own_rates_section(name: str, dataset: str, rows: Rows, *parts: str) -> str:
    planned = practice.EXPERIMENTS[name].plan(settings_for(dataset, rows), rows)
    everything = [run.config if isinstance(run, Once) else run for run in planned]
    chosen = [group_of(run, rows) for run in planned if not isinstance(run, Once)]
    several = len({group.config.iterations for group in chosen}) > 1
    lines = [["way", "rate", "steps", "seeds", "test error, %", "train loss", "N_ems/B"]]
    lines[0].append("test error minus SGD-Scan's")
    uniform = {g.config.iterations: g for g in chosen if name_of(name, g) == "SGD-Scan"}
    for group in sorted(chosen, key=lambda g: g.config.iterations) if several else chosen:
        config = group.config
        line = [name_of(name, group), f"{config.lr:g}", str(config.iterations)]
        line += [str(len(group.rows)), cell(group, "test_error", 2), cell(group, "train_loss", 4)]
        line.append(cell(group, "relative_batch_size", 2) if config.method == "emais" else "-")
        line.append(difference_cell(group, uniform.get(config.iterations), "test_error", 2))
        lines.append(line)
    groups = [group_of(config, rows) for config in everything]
    return section(name, groups, markdown_table(lines, aligned=False), *parts)


VARIANCES = "balanced_variance.jsonl"


def variance_part(rows: Sequence[Row]) -> str:
    """What ``balanced_variance.py`` has measured: variances relative to uniform draws."""
    if not rows:
        return NOT_YET
    lines = [["iteration", "gradient of", *rows[0]["ratio"]]]
    for row in rows:
        ratios = (f"{ratio:.2f}" for ratio in row["ratio"].values())
        lines.append([str(row["iteration"]), row["space"], *ratios])
    text = (
        "Variance of the gradient of the loss with class weights, over that under uniform draws, "
        "at iterations of one run of EMAIS with class weights at a rate of 0.1 (exact: over the "
        "whole training set):"
    )
    command = "```sh\npython bench/experiments/balanced_variance.py --data fashion_mnist.npz\n```"
    return "\n\n".join([text, markdown_table(lines, aligned=False), command])


def name_of(experiment: str, group: Group) -> str:
    """The way that a group's runs went."""
    config = group.config
    for name, (method, changes) in WAYS[experiment].items():
        if method == config.method and changes.items() <= vars(config).items():
            found = name  # the last that fits has the most changes
    return found


# ---- wrong labels


def wrong_labels_section(rows: Rows) -> str:
    found: list[Group] = []
    lines = [["task", "steps", "method", "seeds", "test error, %", "train loss"]]
    lines[0].append("test error minus SGD-Scan's")
    for task in practice.WRONGLY_LABELLED:
        settings = settings_for(practice.SETTINGS[task].dataset, rows)
        for runs in practice.by_length(task, settings, rows):
            groups = [group_of(config, rows) for config in runs]
            for method, group in zip(practice.COMPARED, groups, strict=True):
                line = [task, str(group.config.iterations), method, str(len(group.rows))]
                line += [cell(group, "test_error", 2), cell(group, "train_loss", 4)]
                lines.append([*line, difference_cell(group, groups[0], "test_error", 2)])
            found += groups
    return section("wrong_labels", found, markdown_table(lines, aligned=False))


# ---- the best within a time


def budget_table(budgets: Budgets, rows: Rows) -> tuple[str, list[Group], dict]:
    """The table, every run's group, and method -> [(seconds, chosen group)]."""
    settings = settings_for(budgets.dataset, rows)
    lines = [["seconds", "method", "minibatch", "rate", "steps", "seeds"]]
    lines[0] += ["test error, %", "train loss", "test error minus SGD-Scan's"]
    lines[0].append("least train loss of seed 0, at")
    everything: list[Group] = []
    chosen: dict[str, list[tuple[int, Group]]] = {name: [] for name in budgets.compared}
    for seconds in budgets.seconds:
        uniform: Group | None = None
        for method in budgets.compared:
            visited, best = budgets.search(settings, rows, method, seconds)
            everything += [group_of(config, rows) for config in visited]
            if best is None:
                continue
            group = group_of(best, rows)
            chosen[method].append((seconds, group))
            line = [str(seconds), method, str(best.batch_size), f"{best.lr:g}"]
            line += [str(best.iterations), str(len(group.rows)), cell(group, "test_error", 2)]
            line.append(cell(group, "train_loss", 4))
            line.append("-" if uniform is None else unpaired(group, uniform))
            lines.append([*line, least_loss(visited, rows)])
            uniform = uniform or group
    return markdown_table(lines, aligned=False), everything, chosen


def least_loss(visited: Sequence[RunConfig], rows: Rows) -> str:
    """Of all cells of a search, with its minibatch size and rate."""
    losses = {c: rows[c.key]["final"]["train_loss"] for c in visited}
    there = {c: loss for c, loss in losses.items() if loss is not None}
    least = min(there, key=there.__getitem__)
    return f"{there[least]:.4f} ({least.batch_size}, {least.lr:g})"


def time_to(points: Sequence[tuple[int, Group]], metric: str, target: float) -> str:
    """Seconds until the means over seeds reach ``target``, between two budgets by the logarithm of
    the time."""
    before: tuple[int, float] | None = None
    for seconds, group in points:
        value = fmean(group.finals(metric))
        if value <= target:
            if before is None:
                return f"at most {seconds}"
            share = (before[1] - target) / (before[1] - value)
            return f"{before[0] * (seconds / before[0]) ** share:.0f}"
        before = seconds, value
    return "not reached"


def time_table(chosen: dict[str, list[tuple[int, Group]]]) -> str:
    """How soon each method reaches what SGD-Scan reaches in its longest budget."""
    reference = chosen["SGD-Scan"]
    if len(reference) < 2:
        return ""
    lines = [["to SGD-Scan's of the longest budget", "value", *(f"{name}, s" for name in chosen)]]
    for title, metric, digits in (
        ("test error, %", "test_error", 2),
        ("train loss", "train_loss", 4),
    ):
        target = fmean(reference[-1][1].finals(metric))
        times = [time_to(points, metric, target) for points in chosen.values()]
        lines.append([title, f"{target:.{digits}f}", *times])
    return markdown_table(lines, aligned=False)


def unpaired(group: Group, reference: Group) -> str:
    ours, theirs = group.finals("test_error"), reference.finals("test_error")
    difference = f"{fmean(ours) - fmean(theirs):+.2f}"
    paired = difference_cell(group, reference, "test_error", 2)
    return difference if paired == "-" else paired


def budget_section(name: str, budgets: Budgets, rows: Rows, folder: Path) -> str:
    from bench.experiments import practice_plot  # matplotlib: for this alone

    table, everything, chosen = budget_table(budgets, rows)
    out = folder / f"{name}.png"
    drawn = practice_plot.draw(chosen, out)
    figure = f"![{name}]({out.name})" if drawn else ""
    return section(name, everything, table, time_table(chosen), figure)


def write(folder: Path, rows: Rows) -> Path:
    """Writes the page and its figures into ``folder``."""
    parts = [INTRODUCTION.rstrip()]
    for name, budgets in practice.BUDGETS.items():
        parts.append(budget_section(name, budgets, rows, folder))
    parts.append(defaults_section(rows, folder))
    for name, dataset in (
        ("peers", "fashion_mnist"),
        ("imbalance", "fashion_long_tail"),
        ("batch_norm", "cifar10_plain"),
    ):
        more = (variance_part(read_rows(folder / VARIANCES)),) if name == "imbalance" else ()
        parts.append(own_rates_section(name, dataset, rows, *more))
    parts.append(wrong_labels_section(rows))
    out = folder / PAGE
    out.write_text("\n\n".join(parts) + "\n")
    return out
