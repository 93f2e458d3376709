"""Tables of results: means and deviations over seeds, and differences paired by seed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from statistics import fmean, stdev

from bench.experiments.groups import Group
from bench.experiments.loop import CURVE_SAMPLES
from bench.report import Row, markdown_table

NOT_YET = "*Not yet measured.*"
# Student's t at 97.5 % for 1, 2, ... degrees of freedom.
STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
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


def mean_sd(values: list[float], digits: int) -> str:
    if not all(map(math.isfinite, values)):
        return "nan"  # one run diverged: the others' mean would hide it
    text = f"{fmean(values):.{digits}f}"
    return f"{text} ± {stdev(values):.{digits}f}" if len(values) > 1 else text


def paired_interval(first: dict[int, float], second: dict[int, float]) -> tuple[float, float, int]:
    """Mean difference first - second over the seeds that both have, the half width of its 95 %
    interval, and the number of seeds.

    Raises
    ------
    ValueError
        for fewer than 2 common seeds, or more than Student's table holds.
    """
    seeds = first.keys() & second.keys()
    differences = [first[seed] - second[seed] for seed in seeds]
    if not 2 <= len(differences) <= len(STUDENT) + 1:
        raise ValueError(f"needs 2 to {len(STUDENT) + 1} common seeds, got {len(seeds)}")
    half = STUDENT[len(differences) - 2] * stdev(differences) / len(differences) ** 0.5
    return fmean(differences), half, len(differences)


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
    groups: Sequence[Group],
    reference: Group | None = None,
    compared_with: str = "scan",
    brief: bool = False,
) -> str:
    """Means over seeds, and paired differences to ``reference`` (None: :func:`reference_of`);
    ``brief`` for a terminal: aligned, and without the work that was done."""
    columns = shown_columns(groups)
    references = [reference or reference_of(group, groups, compared_with) for group in groups]
    names = dict.fromkeys(f"{r.label} {r.config.lr:g}" for r in references if r is not None)
    versus = " or ".join(names) or "-"
    head = ["method", "lr", "seeds", *(title for title, _, _ in columns)]
    head += [] if brief else ["steps", "extra"]
    head += [f"test error minus {versus}", f"train loss minus {versus}"]
    lines = [head]
    for group, other in zip(groups, references, strict=True):
        line = [group_name(group, groups), f"{group.config.lr:g}"]
        line.append(f"{len(group.rows)} of {len(group.rows) + len(group.missing_seeds)}")
        line += [mean_cell(group, name, digits) for _, name, digits in columns]
        line += [] if brief else work_cells(group)
        line.append(difference_cell(group, other, "test_error", 2))
        line.append(difference_cell(group, other, "train_loss", 4))
        lines.append(line)
    return markdown_table(lines, aligned=brief)


def work_cells(group: Group) -> list[str]:
    """Steps of a run, and samples beyond the minibatches that it scored for each."""
    steps = [row["final"].get("steps", row["config"]["iterations"]) for row in group.rows]
    extra = [row["final"].get("extra_forward_samples", 0) for row in group.rows]
    return [f"{fmean(steps):.0f}", f"{sum(extra) / sum(steps):.0f}"] if steps else ["-", "-"]


def missing_line(groups: Sequence[Group]) -> str:
    missing = [
        f"{group_name(group, groups)} lr {group.config.lr:g} "
        f"(seed {', '.join(map(str, group.missing_seeds))})"
        for group in groups
        if group.missing_seeds
    ]
    return f"Not yet measured: {'; '.join(missing)}." if missing else ""


# ---- time to a loss


def first_reached(row: Row, target: float) -> int | None:
    """The position of the first evaluation at or below the target."""
    losses = row["curves"]["train_loss"]
    return next((i for i, v in enumerate(losses) if v is not None and v <= target), None)


def time_to_loss(
    groups: Sequence[Group],
    reference: Group,
    step_times: Sequence[Row] | None = None,
    aligned: bool = False,
) -> str:
    """Steps and seconds until the train loss that ``reference`` ends with; ``step_times`` of None
    leaves their column out."""
    target = fmean(row["curves"]["train_loss"][-1] for row in reference.rows)
    name = "SGD-Scan" if reference.label == "scan" else reference.label
    usual = step_times[-1]["methods"] if step_times else {}
    lines = [["method", "lr", "seeds that reach it", "steps"]]
    lines[0] += ["s, at table5's ms/step", "s, measured"]
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
    if step_times is None:
        lines = [[*line[:4], line[5]] for line in lines]
    return (
        f"Until the train loss that {name} ends with at {reference.config.lr:g} ({target:.4f}, "
        f"mean over seeds, on the curves' {CURVE_SAMPLES} fixed images): the first evaluation "
        "at or below it, over the seeds that reach it. Every schedule is as long as the run.\n\n"
        + markdown_table(lines, aligned)
    )
