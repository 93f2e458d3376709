"""Runs what a results file does not have yet, so that an interrupted experiment goes on."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from bench.provenance import provenance
from bench.report import Row, append_row, read_rows


def row_of(rows: Iterable[Row], config: Any) -> Row | None:
    """The row of a configuration (a dataclass of plain values), if there is one."""
    wanted = asdict(config)
    return next((row for row in rows if row["config"] == wanted), None)


def run_missing(
    benchmark: str, path: Path, configs: Iterable[Any], measure: Callable[[Any], dict[str, Any]]
) -> list[Row]:
    """The rows of all ``configs``; those that the file lacks are measured, and stored at once.

    ``measure(config)`` returns the row's "final", plain JSON values. The configurations may come
    from a generator, which sees the rows of those before by reading the file.
    """
    found = []
    for config in configs:
        row = row_of(read_rows(path), config)
        if row is None:
            row = {"benchmark": benchmark, "config": asdict(config), "final": measure(config)}
            row |= provenance(torch.device("cpu"))
            append_row(path, row)
            print(row["config"], row["final"], flush=True)
        found.append(row)
    return found
