"""What benchmarks share: rows in a file, one JSON object a line, and the one writer of tables."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from bench.provenance import provenance

Row = dict[str, Any]


def read_rows(path: Path) -> list[Row]:
    """The rows of a results file; none when there is no such file."""
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


def markdown_table(lines: Sequence[Sequence[str]], aligned: bool = True) -> str:
    """The first line is the head. The first column is flush left, the others flush right, also in
    the text itself if ``aligned``, for a terminal."""
    widths = [max(4, *map(len, column)) for column in zip(*lines, strict=True)]
    if not aligned:
        widths = [0] * len(widths)
    rule = [f"{'':-<{max(3, widths[0])}}", *(f"{'':-<{max(3, w - 1)}}:" for w in widths[1:])]
    text = []
    for cells in (lines[0], rule, *lines[1:]):
        first, *others = zip(cells, widths, strict=True)
        padded = [f"{first[0]:<{first[1]}}", *(f"{cell:>{width}}" for cell, width in others)]
        text.append("| " + " | ".join(padded) + " |")
    return "\n".join(text)


class Report:
    """The rows and the table of one benchmark: stores each row as soon as it is there."""

    def __init__(self, benchmark: str, head: Sequence[str], path: Path | None = None) -> None:
        self.benchmark, self.path, self.lines = benchmark, path, [tuple(head)]

    def store(self, row: Row, device: str | torch.device = "cpu") -> None:
        if self.path:
            where = provenance(torch.device(device))
            append_row(self.path, {"benchmark": self.benchmark, **row, **where})

    def line(self, *cells: object) -> None:
        """One line of the table; None is shown as "-"."""
        self.lines.append(tuple("-" if cell is None else str(cell) for cell in cells))

    def show(self) -> None:
        print(markdown_table(self.lines))


def make_parser(doc: str | None, rows: str = "") -> argparse.ArgumentParser:
    """A parser that shows a module's docstring; with ``--json`` if ``rows`` says what is stored."""
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    if rows:
        parser.add_argument("--json", type=Path, help=f"file to append a row {rows} to")
    return parser


def positive(kind: type) -> Callable[[str], Any]:
    """A type of argument: a finite number above 0."""

    def parse(text: str) -> Any:
        value = kind(text)
        if not 0 < value < math.inf:
            raise argparse.ArgumentTypeError(f"expected a number above 0, got {text}")
        return value

    parse.__name__ = f"positive {kind.__name__}"
    return parse
