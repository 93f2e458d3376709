"""Result rows of the main job: reading them and the table of their means. Knows no torch."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from pathlib import Path
from statistics import fmean, stdev

Row = dict
# What a (method, learning rate, seed) is compared within.
WITHIN_SETTING = ("method", "lr", "seed")


def read_rows(path: Path) -> list[Row]:
    """The rows of a results file, one JSON object a line; none when there is no such file."""
    if not path.exists():
        return []
    rows = []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise ValueError(f"{path.name}, line {number}: not a result row ({error})") from error
    return rows


def append_row(path: Path, row: Row) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write(json.dumps(row) + "\n")


def config_key(config: dict) -> str:
    """One string per configuration, for finding a run again."""
    return json.dumps(config, sort_keys=True)


def latest(rows: Iterable[Row]) -> list[Row]:
    """The last row of each configuration, in the order in which the configurations appeared."""
    return list({config_key(row["config"]): row for row in rows}.values())


def setting_of(row: Row) -> dict:
    return {name: v for name, v in row["config"].items() if name not in WITHIN_SETTING}


def setting_name(setting: dict) -> str:
    """A file name's stem for a setting."""
    parts = ("dataset", "model", "optimizer", "iterations", "batch_size")
    return "-".join(str(setting[part]) for part in parts)


def by_method_and_lr(rows: Iterable[Row]) -> dict[tuple[str, float], list[Row]]:
    """Rows of one setting as groups over seeds, methods in order of appearance, lr ascending."""
    groups: dict[tuple[str, float], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["config"]["method"], row["config"]["lr"]), []).append(row)
    methods = list(dict.fromkeys(method for method, _ in groups))
    return {key: groups[key] for key in sorted(groups, key=lambda k: (methods.index(k[0]), k[1]))}


def finals(rows: Iterable[Row], name: str) -> list[float]:
    values = (row["final"][name] for row in rows)
    return [math.nan if value is None else value for value in values]


def mean_sd(values: list[float], digits: int) -> str:
    if not all(map(math.isfinite, values)):
        return "nan"  # one run diverged: the others' mean would hide it
    text = f"{fmean(values):.{digits}f}"
    return f"{text} ± {stdev(values):.{digits}f}" if len(values) > 1 else text


def table(rows: Iterable[Row]) -> str:
    """Mean and standard deviation over seeds for each method and learning rate of one setting.

    S, N_ems/B and the factor of the learning rate are averages over the second half of training;
    the overhead is that of the time per step against uniform's. Runs follow each other, so other
    load on the machine shows in it: ``bench_step.py`` measures it properly, interleaved.
    """
    groups = by_method_and_lr(rows)
    uniform = [row for (method, _), group in groups.items() if method == "uniform" for row in group]
    uniform_ms = fmean(finals(uniform, "ms_per_step")) if uniform else math.nan
    lines = [("method", "lr", "seeds", "test error %", "train loss", "S", "N_ems/B", "lr factor")]
    lines[0] += ("ms/step", "overhead")
    for (method, lr), group in groups.items():
        ms = fmean(finals(group, "ms_per_step"))
        overhead = "-" if math.isnan(uniform_ms) else f"{100 * (ms / uniform_ms - 1):+.1f} %"
        lines.append(
            (
                method,
                f"{lr:g}",
                str(len(group)),
                mean_sd(finals(group, "test_error"), 2),
                mean_sd(finals(group, "train_loss"), 4),
                mean_sd(finals(group, "efficiency"), 3),
                mean_sd(finals(group, "relative_batch_size"), 2),
                mean_sd(finals(group, "lr_factor"), 2),
                mean_sd(finals(group, "ms_per_step"), 3),
                overhead,
            )
        )
    return aligned(lines)


def aligned(lines: list[tuple[str, ...]]) -> str:
    """Columns under each other: the first flush left, the others flush right."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = []
    for line in lines:
        cells = [line[0].ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True)]
        text.append("  ".join(cells))
    text.insert(1, "-" * len(text[0]))
    return "\n".join(text)
