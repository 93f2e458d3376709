"""The experiments of the papers: runs what is missing of the named ones.

    python bench/experiments/reproduce.py table2 best_lr --data fashion_mnist.npz --jobs 2
    python bench/experiments/reproduce.py --list
    python bench/experiments/reproduce.py --report

Every run appends one row to ``bench/results/reproduce_<data set>.jsonl`` when it ends; runs that
have a row are not repeated, so an interrupted invocation goes on where it stopped. Seed 0 of all
experiments comes first: partial results compare.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[2]))

import torch

from bench.experiments import papers, practice, step_times
from bench.experiments.config import RunConfig, latest
from bench.experiments.datasets import data_name
from bench.experiments.experiment import Experiment, Settings
from bench.experiments.methods import check_config
from bench.experiments.workers import cached_dataset, run_all
from bench.report import Row, append_row, make_parser, markdown_table, positive, read_rows

RESULTS = Path(__file__).parents[1] / "results"
EXPERIMENTS = papers.EXPERIMENTS | practice.EXPERIMENTS
# Rows of before this script that are runs of its experiments too.
EARLIER = "fashion_mnist_lenet5.jsonl"
# No list of runs: all methods take turns in one process.
STEP_TIMES = "table5"
STEP_TIMES_FILE = "reproduce_step_times.jsonl"
# Written by stale_scores.py, for the page.
STALE_SCORES = "stale_scores.jsonl"
NAMES = (*EXPERIMENTS, STEP_TIMES)


def rows_file(folder: Path, config: RunConfig) -> Path:
    """Where a run's row goes."""
    return folder / f"reproduce_{config.dataset}.jsonl"


def read_all(folder: Path) -> dict[str, Row]:
    """The last row of every configuration that has one."""
    files = [folder / EARLIER, *sorted(folder.glob("reproduce_*.jsonl"))]
    return latest(row for file in files for row in read_rows(file) if "config" in row)


def read_step_times(folder: Path) -> list[Row]:
    return read_rows(folder / STEP_TIMES_FILE)


def measure_step_times(args: argparse.Namespace, settings: Settings) -> None:
    """Appends the row of ``table5`` unless there is one of these data and this device."""
    wanted = step_times.setting(settings).items()
    if any(wanted <= row.items() for row in read_step_times(args.out)):
        print(f"{STEP_TIMES} is there")
        return
    torch.set_num_threads(args.threads)
    dataset = cached_dataset("fashion_mnist", args.data)
    append_row(args.out / STEP_TIMES_FILE, step_times.measure(settings, dataset))


class Plan:
    """The missing runs of some experiments, in the order in which they shall run."""

    def __init__(
        self,
        names: Iterable[str],
        settings: Settings,
        only: Iterable[str] | None,
        rows: dict[str, Row],
        again: bool = False,
    ) -> None:
        self.names = [name for name in names if name != STEP_TIMES]
        self.settings, self.rows = settings, rows
        self.only = set(only) if only else None
        self.outdated = dict(rows) if again else {}

    def wanted(self, name: str) -> list[RunConfig]:
        configs = EXPERIMENTS[name].configs(self.settings, self.rows)
        return [c for c in configs if self.only is None or c.method in self.only]

    def missing(self, name: str) -> list[RunConfig]:
        return [c for c in self.wanted(name) if not self.is_there(c, EXPERIMENTS[name])]

    def is_there(self, config: RunConfig, experiment: Experiment) -> bool:
        outdated = self.outdated.get(config.key)
        is_new = outdated is None or self.rows[config.key] is not outdated
        return is_new and experiment.has(config, self.rows)

    def __call__(self) -> list[RunConfig]:
        """Seed 0 of all experiments, then seed 1, ..."""
        pending = {c.key: c for name in self.names for c in self.missing(name)}
        return sorted(pending.values(), key=lambda config: config.seed)


def arguments() -> argparse.ArgumentParser:
    parser = make_parser(__doc__)
    add, count, number = parser.add_argument, positive(int), positive(float)
    add("names", nargs="*", metavar="NAME", help=f"one or more of {', '.join(NAMES)}")
    add("--list", action="store_true", help="the experiments, and how much of each is there")
    add("--report", action="store_true", help="writes the page of what is there; runs nothing")
    add("--data", help="the data set's .npz (default: FASTIS_DATA, else the subset)")
    add("--seeds", type=count, help="how many: 0, 1, ...; default 3, on CUDA 5")
    add("--iterations", type=count, nargs="+", help="lengths; default: the experiment's")
    add("--seconds", type=number, default=Settings.seconds, help="training time of kf's runs")
    add("--again", action="store_true", help="measures runs that have a row once more")
    add("--only", nargs="+", metavar="METHOD", help="leave the other methods out")
    add("--device", default="cpu")
    add("--jobs", type=count, default=1, help="runs at the same time, each in its own process")
    add("--threads", type=count, default=1, help="CPU threads of each run")
    add("--out", type=Path, default=RESULTS, help="folder of the rows")
    return parser


def make_settings(args: argparse.Namespace) -> Settings:
    return Settings(
        data=data_name(args.data),
        seeds=args.seeds or (5 if args.device.startswith("cuda") else 3),
        iterations=tuple(args.iterations) if args.iterations else None,
        seconds=args.seconds,
        device=args.device,
    )


def check(args: argparse.Namespace, pending: list[RunConfig]) -> None:
    """Raises on the first run that could not start, before any does."""
    torch.empty(0, device=args.device)
    for config in {(c.dataset, c.method, str(c.options)): c for c in pending}.values():
        check_config(config, len(cached_dataset(config.dataset, args.data).y_train))


def overview(settings: Settings, rows: dict[str, Row]) -> str:
    lines = [("experiment", "runs", "there")]
    for name, experiment in EXPERIMENTS.items():
        configs = experiment.configs(settings, rows)
        there = sum(experiment.has(c, rows) for c in configs)
        lines.append((f"{name} - {experiment.title}", str(len(configs)), str(there)))
    lines.append((f"{STEP_TIMES} - Time per step of each method ([K] Table 5)", "-", "-"))
    return markdown_table(lines)


def main(argv: list[str] | None = None) -> int:
    parser = arguments()
    args = parser.parse_args(argv)
    try:
        settings = make_settings(args)
        rows = read_all(args.out)
        if args.list:
            print(overview(settings, rows))
            return 0
        if args.report:
            from bench.experiments import page, practice_page  # matplotlib: for this alone

            others = (read_rows(args.out / name) for name in (STEP_TIMES_FILE, STALE_SCORES))
            print(page.write(args.out, rows, *others), practice_page.write(args.out, rows))
            return 0
        unknown = [name for name in args.names if name not in NAMES]
        if unknown or not args.names:
            known = ", ".join(NAMES)
            raise ValueError(
                f"NAME must be one or more of {known}, got {', '.join(unknown) or 'none'}"
            )
        plan = Plan(args.names, settings, args.only, rows, args.again)
        pending = plan()
        check(args, pending)
    except (ValueError, TypeError, OSError, RuntimeError) as error:
        parser.error(str(error))
    if STEP_TIMES in args.names:
        measure_step_times(args, settings)
    print(f"{len(pending)} runs to do", flush=True)
    try:
        for row in run_all(plan, args.data, args.jobs, args.threads):
            config = RunConfig(**row["config"])
            append_row(rows_file(args.out, config), row)
            rows[config.key] = row
    except RuntimeError as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted: finished runs are kept, the same command goes on", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
