"""What renewing BatchNorm's statistics on uniform data costs: SGD-Scan, EMAIS, and EMAIS whose
statistics are weighted by the coefficients.

    python bench/experiments/batch_norm.py [--data fashion_mnist.npz] [--seeds 3]
    python bench/experiments/batch_norm.py --report

A small convolutional network with three BatchNorm layers. Rule: of the rates 0.03, 0.1, 0.3 each
method has the one whose run of seed 0 has the least test error as trained; then the other seeds at
that rate. Each run is evaluated twice: as trained, and after `torch.optim.swa_utils.update_bn` on
the training set in order, as SWA and EMA recipes do. A run appends one row; runs that have one are
not repeated. Test errors here choose the rate too: read the change, not the level.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[2]))

import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.swa_utils import update_bn
from tqdm import tqdm

import fastis
from bench.experiments.datasets import Dataset, data_name, load_dataset
from bench.provenance import provenance
from bench.report import Row, append_row, make_parser, markdown_table, positive, read_rows

ROWS = Path(__file__).parents[1] / "results" / "batch_norm.jsonl"
METHODS = ("scan", "emais", "emais weighted")
RATES = (0.03, 0.1, 0.3)
BATCH = 128
TIMES = ("trained", "renewed")
CONFIG = ("method", "lr", "seed", "iterations", "data")


def network(image_shape: tuple[int, int, int], num_classes: int) -> nn.Module:
    """Three 3 x 3 convolutions of stride 2, each with BatchNorm, and the mean over positions."""
    layers: list[nn.Module] = []
    in_channels = image_shape[0]
    for channels in (16, 32, 64):
        layers += [nn.Conv2d(in_channels, channels, 3, 2, 1, bias=False), nn.BatchNorm2d(channels)]
        layers.append(nn.ReLU())
        in_channels = channels
    layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(in_channels, num_classes)]
    return nn.Sequential(*layers)


def train(dataset: Dataset, method: str, lr: float, seed: int, iterations: int) -> nn.Module:
    torch.manual_seed(seed)
    model = network(dataset.image_shape, dataset.num_classes)
    weighted = method.endswith("weighted")
    if weighted:
        fastis.weighted_batch_norm(model)
    x, y = dataset.x_train, dataset.y_train
    sampler = fastis.Sampler(len(y), BATCH, method=method.split()[0], seed=seed)
    optimizer = torch.optim.SGD(model.parameters(), lr, momentum=0.9, weight_decay=1e-3)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, iterations)
    scheduler = fastis.EffectiveBatchLR(cosine, sampler)
    for _ in range(iterations):
        batch = sampler.sample()
        with fastis.batch_weights(batch.weights if weighted else None):
            logits = model(x[batch.indices])
        out = fastis.cross_entropy(logits, y[batch.indices], batch.weights)
        sampler.update(batch, out)
        out.loss.backward()
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    return model


@torch.no_grad()
def evaluate(model: nn.Module, dataset: Dataset) -> dict[str, float]:
    """The train loss, and the test error in percent."""
    model.eval()
    logits = torch.cat([model(x) for x in dataset.x_train.split(1000)])
    wrong = model(dataset.x_test).argmax(1) != dataset.y_test
    train_loss = float(F.cross_entropy(logits, dataset.y_train))
    return {"train_loss": train_loss, "test_error": 100 * float(wrong.float().mean())}


def run(dataset: Dataset, config: dict[str, Any]) -> Row:
    start = time.perf_counter()
    keys = ("method", "lr", "seed", "iterations")
    model = train(dataset, *(config[key] for key in keys))
    seconds, trained = time.perf_counter() - start, evaluate(model, dataset)
    with fastis.batch_weights(None):
        update_bn(dataset.x_train.split(1000), model)
    found = {"seconds": seconds, "trained": trained, "renewed": evaluate(model, dataset)}
    return {"benchmark": "batch_norm", **config, **found, **provenance(torch.device("cpu"))}


def figure(row: Row, when: str, name: str = "test_error") -> float:
    return row[when][name]


def key_of(row: Row) -> tuple[Any, ...]:
    return tuple(row[name] for name in CONFIG)


def best_rate(rows: Iterable[Row], method: str) -> float:
    first = [row for row in rows if row["method"] == method and row["seed"] == 0]
    return min(first, key=lambda row: figure(row, "trained"))["lr"]


def report(rows: list[Row]) -> str:
    """Means over seeds at each method's rate, and the standard deviation of the changes."""
    head = ("train loss", "renewed", "test error (%)", "renewed (%)", "change")
    lines = [("method", "rate", "seeds", *head)]
    for method in METHODS:
        rate = best_rate(rows, method)
        runs = [row for row in rows if row["method"] == method and row["lr"] == rate]
        losses = [fmean(figure(row, when, "train_loss") for row in runs) for when in TIMES]
        errors = [fmean(figure(row, when) for row in runs) for when in TIMES]
        changes = [figure(row, "renewed") - figure(row, "trained") for row in runs]
        cells = [f"{rate:g}", str(len(runs)), *(f"{loss:.4f}" for loss in losses)]
        cells += [f"{error:.2f}" for error in errors]
        spread = f" ± {stdev(changes):.2f}" if len(changes) > 1 else ""
        lines.append((method, *cells, f"{fmean(changes):+.2f}{spread}"))
    return markdown_table(lines)


def arguments() -> argparse.ArgumentParser:
    parser = make_parser(__doc__)
    parser.add_argument("--data", help="Fashion-MNIST's .npz (default: the subset)")
    parser.add_argument("--seeds", type=positive(int), default=3)
    parser.add_argument("--iterations", type=positive(int), default=1500)
    parser.add_argument("--threads", type=positive(int), default=1)
    parser.add_argument("--report", action="store_true", help="only prints what is there")
    parser.add_argument("--out", type=Path, default=ROWS, help="file of the rows")
    return parser


def main(argv: list[str] | None = None) -> int:
    args = arguments().parse_args(argv)
    name = data_name(args.data)
    rows = read_rows(args.out) if args.out.exists() else []
    rows = [r for r in rows if (r["iterations"], r["data"]) == (args.iterations, name)]
    if args.report:
        print(report(rows))
        return 0
    torch.set_num_threads(args.threads)
    dataset = load_dataset(data=args.data)
    there = {key_of(row) for row in rows}

    def runs(jobs: Iterable[tuple[str, float, int]]) -> None:
        for job in tqdm(list(jobs), unit="run", disable=not sys.stderr.isatty()):
            config = dict(zip(CONFIG, (*job, args.iterations, name), strict=True))
            if key_of(config) not in there:
                rows.append(run(dataset, config))
                append_row(args.out, rows[-1])

    runs((method, lr, 0) for method in METHODS for lr in RATES)
    runs((m, best_rate(rows, m), seed) for seed in range(1, args.seeds) for m in METHODS)
    print(report(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
