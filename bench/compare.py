"""The table of a results file, and the paired difference of two of its runs; reads rows only.

    python bench/compare.py runs/results.jsonl [--pair emais:0.03 scan:0.03]

Runs of equal seeds start from the same network. The interval is Student's, 95 %, over the seeds.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from statistics import fmean, stdev

sys.path.append(str(Path(__file__).resolve().parents[1]))

from bench import report

# Student's t at 97.5 % for 1, 2, ... degrees of freedom.
STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


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


def paired(rows: list[report.Row], first: str, second: str, name: str) -> str:
    """Mean difference first - second of a final figure with its interval."""
    groups = []
    for run in (first, second):
        method, _, lr = run.partition(":")
        by_seed = {
            row["config"]["seed"]: row["final"][name]
            for row in rows
            if row["config"]["method"] == method and row["config"]["lr"] == float(lr or "nan")
        }
        if not by_seed:
            raise SystemExit(f"--pair must name runs of the file as METHOD:LR, got {run!r}")
        groups.append(by_seed)
    try:
        mean, half, seeds = paired_interval(*groups)
    except ValueError as error:
        raise SystemExit(f"--pair {error}") from None
    return f"{name}: {mean:+.4f} ± {half:.4f} over {seeds} seeds"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("file", type=Path)
    parser.add_argument("--pair", nargs=2, metavar="METHOD:LR")
    args = parser.parse_args(argv)
    rows = report.latest(report.read_rows(args.file))
    print(report.table(rows))
    if args.pair:
        print(f"{args.pair[0]} minus {args.pair[1]}")
        for name in ("test_error", "train_loss"):
            print(paired(rows, *args.pair, name))
    return 0


if __name__ == "__main__":
    sys.exit(main())
