"""The main job: trains a network with several ways of drawing the minibatch and compares them.

    python bench/train.py

trains LeNet-5 on the embedded subset of Fashion-MNIST with EMAIS, scan and uniform sampling, prints
a table, and writes one JSON line a run and a PNG of the curves into ``runs/``. Runs that are there
already are not repeated (``--force`` repeats them), so an interrupted comparison goes on where it
stopped and more seeds, methods or learning rates only add to it.
"""

from __future__ import annotations

import argparse
import math
import sys
from itertools import product
from pathlib import Path

# As a script, from any folder: an installed fastis comes first, else the one of this source tree.
sys.path.append(str(Path(__file__).resolve().parents[1]))

import torch

from bench import report
from bench.config import RunConfig
from bench.datasets import data_name
from bench.methods import check_config
from bench.models import MODELS
from bench.tasks import TASKS
from bench.workers import cached_dataset, run_all

DEFAULT_LR = {"sgd": 0.01, "adam": 0.001}
WITHOUT_COEFFICIENTS = ("scan", "uniform")
RESULTS = "results.jsonl"


def positive(kind: type) -> object:
    """An argparse type: a finite number above zero."""

    def parse(text: str) -> float:
        value = kind(text)
        if not (value > 0 and math.isfinite(value)):
            raise argparse.ArgumentTypeError(f"expected a number above 0, got {text}")
        return value

    parse.__name__ = f"positive {kind.__name__}"
    return parse


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add, count, number = parser.add_argument, positive(int), positive(float)
    what = parser.add_argument_group("what is trained")
    what.add_argument("--dataset", choices=TASKS, default="fashion_mnist")
    what.add_argument("--data", help="the data set's .npz (default: FASTIS_DATA, else the subset)")
    what.add_argument("--model", choices=MODELS, help="default: the data set's own")
    how = parser.add_argument_group("how")
    how.add_argument("--method", nargs="+", default=["emais", "scan", "uniform"], metavar="NAME")
    how.add_argument("--optimizer", choices=DEFAULT_LR, default="sgd")
    how.add_argument("--lr", nargs="+", type=number, help="one or more; default 0.01, adam 0.001")
    how.add_argument(
        "--lr-factor", type=number, default=1.0, help="multiplies lr for scan and uniform"
    )
    how.add_argument("--iterations", type=count, default=RunConfig.iterations)
    how.add_argument("--batch-size", type=count, default=RunConfig.batch_size)
    how.add_argument("--momentum", type=float, default=RunConfig.momentum, help="sgd only")
    how.add_argument("--weight-decay", type=float, default=RunConfig.weight_decay)
    how.add_argument("--seeds", type=count, default=2, help="how many: 0, 1, ...")
    add("--device", default="cpu")
    add("--threads", type=count, default=1, help="CPU threads of each run")
    add("--jobs", type=count, default=1, help="runs at the same time, each in its own process")
    add("--out", type=Path, default=Path("runs"), help="folder of the results")
    add("--force", action="store_true", help="repeat runs that are in the results already")
    add("--no-plot", action="store_true")
    return parser


def configurations(args: argparse.Namespace, dataset_file: str) -> list[RunConfig]:
    """Every (seed, lr, method) asked for; seeds outermost, so that early results compare."""
    configs = []
    lrs = args.lr or [DEFAULT_LR[args.optimizer]]
    for seed, lr, method in product(range(args.seeds), lrs, args.method):
        factor = args.lr_factor if method in WITHOUT_COEFFICIENTS else 1.0
        configs.append(
            RunConfig(
                method=method,
                lr=float(f"{lr * factor:.6g}"),
                seed=seed,
                dataset=args.dataset,
                data=dataset_file,
                model=args.model or TASKS[args.dataset].model,
                optimizer=args.optimizer,
                iterations=args.iterations,
                batch_size=args.batch_size,
                momentum=args.momentum if args.optimizer == "sgd" else 0.0,
                weight_decay=args.weight_decay,
                device=args.device,
            )
        )
    return list(dict.fromkeys(configs))


def check(args: argparse.Namespace) -> None:
    """Raises on the first argument that no run could use, before any run starts."""
    torch.empty(0, device=args.device)
    dataset = cached_dataset(args.dataset, args.data)
    for method in args.method:
        config = RunConfig(method=method, lr=0.0, seed=0, batch_size=args.batch_size)
        check_config(config, len(dataset.y_train))


def main(argv: list[str] | None = None) -> int:
    parser = make_parser()
    args = parser.parse_args(argv)
    results = args.out / RESULTS
    try:
        check(args)
        done = {report.config_key(row["config"]) for row in report.read_rows(results)}
    except (ValueError, TypeError, OSError, RuntimeError) as error:
        parser.error(str(error))
    dataset_file = data_name(args.data)
    wanted = {c.key: c for c in configurations(args, dataset_file)}
    pending = [c for key, c in wanted.items() if args.force or key not in done]
    if len(pending) < len(wanted):
        print(f"{len(wanted) - len(pending)} of {len(wanted)} runs are in {results} already")
    left = {c.key: c for c in pending}
    for row in run_all(lambda: list(left.values()), args.data, args.jobs, args.threads):
        report.append_row(results, row)
        del left[report.config_key(row["config"])]

    rows = report.latest(report.read_rows(results))
    rows = [row for row in rows if report.config_key(row["config"]) in wanted]
    order = list(wanted)
    rows.sort(key=lambda row: order.index(report.config_key(row["config"])))
    print(report.table(rows))
    if not args.no_plot:
        from bench.plot import draw

        png = args.out / f"{report.setting_name(report.setting_of(rows[0]))}.png"
        draw(rows, png)
        print(f"\nrows: {results}\ncurves: {png}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
