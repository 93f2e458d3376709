"""The main job: trains a network with several ways of drawing the minibatch and compares them.

    python bench/experiments/train.py

trains LeNet-5 on the embedded subset of Fashion-MNIST with EMAIS, scan and uniform sampling, each
at its own best learning rate, prints a table, and writes one JSON line a run and a PNG of the
curves into ``runs/``. Runs that are there already are not repeated (``--force`` repeats them), so
an interrupted comparison goes on where it stopped and more seeds, methods or learning rates only
add to it.

EMAIS multiplies its rate by N_ems/B: at one base rate for all, the comparison would be of learning
rates. The rates were searched by

    python bench/experiments/train.py --rates

into bench/results/main_job.jsonl. A method's best rate is that of least final train loss, the mean
over seeds: the loss is what is minimised, and tells runs apart that 2,000 test images do not.
"""

from __future__ import annotations

import argparse
import sys
from itertools import product
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[2]))

import torch

from bench.experiments.config import DEFAULTS, RunConfig, latest
from bench.experiments.datasets import data_name
from bench.experiments.methods import check_config
from bench.experiments.models import MODELS
from bench.experiments.show import picture_name, show
from bench.experiments.tasks import TASKS
from bench.experiments.workers import cached_dataset, run_all
from bench.report import append_row, make_parser, positive, read_rows

RATES = (0.01, 0.02, 0.03, 0.05, 0.07, 0.1, 0.2)
# Found among them, with SGD; for what was not searched there is a rate that trains.
BEST_RATE = {"emais": 0.07, "scan": 0.07, "uniform": 0.07}
OTHERS_RATE = {"sgd": 0.01, "adam": 0.001}
SEARCHED = Path(__file__).parents[1] / "results" / "main_job.jsonl"
OWN_SETTINGS = {"emais": DEFAULTS, "loss": DEFAULTS}
WITHOUT_COEFFICIENTS = ("scan", "uniform")
RESULTS = "results.jsonl"


def arguments() -> argparse.ArgumentParser:
    parser = make_parser(__doc__)
    add, count, number = parser.add_argument, positive(int), positive(float)
    what = parser.add_argument_group("what is trained")
    what.add_argument("--dataset", choices=TASKS, default="fashion_mnist")
    what.add_argument("--data", help="the data set's .npz (default: FASTIS_DATA, else the subset)")
    what.add_argument("--model", choices=MODELS, help="default: the data set's own")
    how = parser.add_argument_group("how")
    how.add_argument("--method", nargs="+", default=["emais", "scan", "uniform"], metavar="NAME")
    how.add_argument("--optimizer", choices=OTHERS_RATE, default="sgd")
    how.add_argument(
        "--lr",
        nargs="+",
        type=number,
        help="one or more, for all methods; default: each one's best",
    )
    how.add_argument(
        "--rates", action="store_true", help=f"search: --lr {' '.join(map(str, RATES))}"
    )
    how.add_argument(
        "--lr-factor", type=number, default=1.0, help="multiplies lr for scan and uniform"
    )
    how.add_argument("--iterations", type=count, default=RunConfig.iterations)
    how.add_argument("--batch-size", type=count, default=RunConfig.batch_size)
    how.add_argument("--momentum", type=float, default=RunConfig.momentum, help="sgd only")
    how.add_argument("--weight-decay", type=float, default=RunConfig.weight_decay)
    how.add_argument("--seeds", type=count, default=3, help="how many: 0, 1, ...")
    add("--device", default="cpu")
    add("--threads", type=count, default=1, help="CPU threads of each run")
    add("--jobs", type=count, default=1, help="runs at the same time, each in its own process")
    add("--out", type=Path, help="folder of the results (default: runs; bench/results for --rates)")
    add("--force", action="store_true", help="repeat runs that are in the results already")
    add("--no-plot", action="store_true")
    return parser


def rates_of(method: str, args: argparse.Namespace) -> list[float]:
    """The learning rates asked for, or the method's own."""
    other = OTHERS_RATE[args.optimizer]
    own = BEST_RATE.get(method, other) if args.optimizer == "sgd" else other
    factor = args.lr_factor if method in WITHOUT_COEFFICIENTS else 1.0
    rates = args.lr or (RATES if args.rates else [own])
    return [float(f"{lr * factor:.6g}") for lr in rates]


def configurations(args: argparse.Namespace, dataset_file: str) -> dict[str, RunConfig]:
    """Every (seed, lr, method) asked for, by key; seeds outermost: early results compare."""
    shared = {name: vars(args)[name] for name in ("dataset", "optimizer", "iterations")}
    shared |= {name: vars(args)[name] for name in ("batch_size", "weight_decay", "device")}
    shared["model"] = args.model or TASKS[args.dataset].model
    shared["momentum"] = args.momentum if args.optimizer == "sgd" else 0.0
    lrs = {method: rates_of(method, args) for method in args.method}
    runs = product(range(args.seeds), range(len(lrs[args.method[0]])), args.method)
    configs = (
        RunConfig(m, lrs[m][i], seed, data=dataset_file, **shared, **OWN_SETTINGS.get(m, {}))
        for seed, i, m in runs
    )
    return {config.key: config for config in configs}


def check(args: argparse.Namespace) -> None:
    """Raises on the first argument that no run could use, before any run starts."""
    torch.empty(0, device=args.device)
    dataset = cached_dataset(args.dataset, args.data)
    for method in args.method:
        config = RunConfig(method=method, lr=0.0, seed=0, batch_size=args.batch_size)
        check_config(config, len(dataset.y_train))


def main(argv: list[str] | None = None) -> int:
    parser = arguments()
    args = parser.parse_args(argv)
    out = args.out or Path("runs")
    results = SEARCHED if args.rates and not args.out else out / RESULTS
    try:
        check(args)
        done = latest(read_rows(results))
    except (ValueError, TypeError, OSError, RuntimeError) as error:
        parser.error(str(error))
    wanted = configurations(args, data_name(args.data))
    left = {key: c for key, c in wanted.items() if args.force or key not in done}
    if len(left) < len(wanted):
        print(f"{len(wanted) - len(left)} of {len(wanted)} runs are in {results} already")
    for row in run_all(lambda: list(left.values()), args.data, args.jobs, args.threads):
        append_row(results, row)
        key = RunConfig(**row["config"]).key
        done[key] = row
        del left[key]

    rows = [done[key] for key in wanted]
    picture = out / picture_name(next(iter(wanted.values())))
    show(rows, None if args.no_plot else picture)
    print(f"rows: {results}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
