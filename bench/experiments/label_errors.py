"""Mislabelled samples, found by what training has learnt anyway (`fastis.suspects`) and by others.

    python bench/experiments/label_errors.py [--data fashion_mnist.npz] [--seeds 3]
    python bench/experiments/label_errors.py --report
    python bench/experiments/label_errors.py --picture

LeNet-5 on images of which about 20 % have a wrong label, in three ways (label_noise.py). Ways of
ranking:

- "emais", "loss": one training with such a sampler; by the table's mean, importance and variance,
  and by each sample's last loss; "emais, tau = t": with the paper's time constant, the average over
  all of the training;
- "uniform": one training in plain torch with shuffled epochs; by each sample's loss in the last
  epoch ("last loss"), and by the mean of its losses over all epochs ("mean loss");
- "cleanlab": out-of-sample predictions of five folds, ranked by its label quality scores. It needs
  cleanlab and scikit-learn.

All train alike: the same network, SGD with momentum, rate, schedule, and number of epochs. Times
are processor times of one thread, from the first step to the ranking.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[2]))

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastis
from bench.experiments.datasets import Dataset, data_name, load_dataset
from bench.experiments.label_noise import KINDS
from bench.experiments.metrics import area_under_roc, average_precision
from bench.experiments.missing_runs import run_missing
from bench.experiments.models import build_model
from bench.report import make_parser, positive
from fastis.methods import EMAIS, Loss

RESULTS = Path(__file__).parents[1] / "results"
ROWS = RESULTS / "label_errors.jsonl"
BENCHMARK = "label_errors"
SHARE, BATCH, FOLDS, WARM_UP = 0.2, 128, 5, 640
LEARNING_RATE, MOMENTUM, WEIGHT_DECAY = 0.05, 0.9, 1e-3
EPOCHS, LENGTHS = 10, (5, 30)  # of the comparison, and of some ways beside it
LONG = "emais, tau = t"
METHODS = {"emais": EMAIS(), "loss": Loss(), LONG: EMAIS(tau_scale=1.0)}
COMPARED = ("emais", "loss", "uniform", "cleanlab")
# cleanlab's ways to rank by the same predictions.
QUALITY = ("self_confidence", "normalized_margin", "confidence_weighted_entropy")


@dataclass(frozen=True)
class Config:
    """One ranking."""

    noise: str
    way: str
    epochs: int
    seed: int
    data: str


Ranked = tuple[dict[str, Tensor], nn.Module | None]  # scores by name: high is suspicious


def configs(data: str, seeds: int) -> Iterator[Config]:
    for seed in range(seeds):
        for noise in KINDS:
            for way in COMPARED:
                yield Config(noise, way, EPOCHS, seed, data)
    for epochs in (EPOCHS, *LENGTHS):  # one seed: what the length does is no small effect
        for noise in KINDS:
            for way in ("emais", "uniform", LONG):
                yield Config(noise, way, epochs, 0, data)


def labels_of(config: Config, dataset: Dataset) -> Tensor:
    generator = torch.Generator().manual_seed(config.seed)
    return KINDS[config.noise](dataset.x_train, dataset.y_train, SHARE, generator)


# ---- the ways


class Training:
    """Network, optimizer and schedule, the same for all ways."""

    def __init__(self, dataset: Dataset, steps: int, seed: int) -> None:
        torch.manual_seed(seed)
        self.model = build_model("lenet5", dataset.image_shape, dataset.num_classes)
        options = {"momentum": MOMENTUM, "weight_decay": WEIGHT_DECAY}
        self.optimizer = torch.optim.SGD(self.model.parameters(), LEARNING_RATE, **options)
        self.schedule = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, steps)

    def step(self, loss: Tensor, schedule: Any = None) -> None:
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        (schedule or self.schedule).step()


def with_sampler(config: Config, dataset: Dataset, y: Tensor) -> tuple[fastis.Sampler, Ranked]:
    """A training with fastis, as in its README."""
    x, n = dataset.x_train, len(y)
    steps = config.epochs * (n // BATCH)
    training = Training(dataset, steps, config.seed)
    sampler = fastis.Sampler(n, BATCH, method=METHODS[config.way], seed=config.seed)
    schedule = fastis.EffectiveBatchLR(training.schedule, sampler)
    last = torch.zeros(n)
    for _ in range(steps):
        batch = sampler.sample()
        out = fastis.cross_entropy(
            training.model(x[batch.indices]), y[batch.indices], batch.weights
        )
        sampler.update(batch, out)
        training.step(out.loss, schedule)
        last[batch.indices] = out.losses
    scores = {"importance": sampler.importance, "variance": sampler.var, "last loss": last}
    return sampler, ({"mean": sampler.mean, **scores}, training.model)


def by_table(config: Config, dataset: Dataset, y: Tensor) -> Ranked:
    return with_sampler(config, dataset, y)[1]


def by_losses(config: Config, dataset: Dataset, y: Tensor) -> Ranked:
    """Plain torch: shuffled epochs, and what each sample's loss was."""
    last, total = torch.zeros(len(y)), torch.zeros(len(y))
    everyone = torch.arange(len(y))
    model = shuffled(config, dataset, y, everyone, last, total)
    return {"last loss": last, "mean loss": total / config.epochs}, model


def shuffled(
    config: Config, dataset: Dataset, y: Tensor, part: Tensor, last: Tensor, total: Tensor
) -> nn.Module:
    """Trains on the samples ``part`` alone; writes their losses down."""
    steps = config.epochs * (len(part) // BATCH)
    training = Training(dataset, steps, config.seed)
    for _ in range(config.epochs):
        order = part[torch.randperm(len(part))]
        for indices in order.split(BATCH)[: len(part) // BATCH]:
            logits = training.model(dataset.x_train[indices])
            losses = F.cross_entropy(logits, y[indices], reduction="none")
            training.step(losses.mean())
            last[indices] = losses.detach()
            total[indices] += losses.detach()
    return training.model


def by_folds(config: Config, dataset: Dataset, y: Tensor) -> Ranked:
    """cleanlab's: each sample's class probabilities from a network that has not seen it."""
    from cleanlab.rank import get_label_quality_scores
    from sklearn.model_selection import StratifiedKFold

    probabilities = torch.empty(len(y), dataset.num_classes)
    unused = torch.zeros(len(y)), torch.zeros(len(y))
    folds = StratifiedKFold(FOLDS, shuffle=True, random_state=config.seed)
    for train, held_out in folds.split(y, y):
        model = shuffled(config, dataset, y, torch.from_numpy(train), *unused)
        held_out = torch.from_numpy(held_out)
        probabilities[held_out] = predicted(model, dataset.x_train[held_out]).softmax(1)
    p, labels = probabilities.double().numpy(), y.numpy()
    scores = {name: get_label_quality_scores(labels, p, method=name) for name in QUALITY}
    return {name: -torch.from_numpy(score) for name, score in scores.items()}, None


WAYS = {**dict.fromkeys(METHODS, by_table), "uniform": by_losses, "cleanlab": by_folds}


@torch.no_grad()
def predicted(model: nn.Module, x: Tensor) -> Tensor:
    return torch.cat([model(part) for part in x.split(500)])


# ---- a row


def quality(score: Tensor, wrong: Tensor) -> dict[str, float]:
    """How well a ranking finds the samples where ``wrong`` bool [N] is true."""
    number = int(wrong.sum())
    first = score.argsort(descending=True, stable=True)[:number]
    columns = score[:, None], wrong[:, None]
    found = {
        "auroc": float(area_under_roc(*columns)),
        "average_precision": float(average_precision(*columns)),
        "precision": float(wrong[first].double().mean()),
    }
    return {name: round(value, 5) for name, value in found.items()}


def measure(config: Config, dataset: Dataset) -> dict[str, Any]:
    y = labels_of(config, dataset)
    # A process's first steps import and allocate for seconds: not on this run's clock.
    few = replace(dataset, x_train=dataset.x_train[:WARM_UP], y_train=dataset.y_train[:WARM_UP])
    WAYS[config.way](replace(config, epochs=1), few, y[:WARM_UP])
    start = time.process_time()
    scores, model = WAYS[config.way](config, dataset, y)
    seconds = time.process_time() - start
    wrong = y != dataset.y_train
    found: dict[str, Any] = {name: quality(score, wrong) for name, score in scores.items()}
    final = {"wrong": int(wrong.sum()), "seconds": round(seconds, 2), "rankings": found}
    if config.way == "cleanlab":
        final["peer"] = f"cleanlab {version('cleanlab')}"
    if model is not None:
        error = (predicted(model, dataset.x_test).argmax(1) != dataset.y_test).double().mean()
        # Of the wrong labels, those that the network predicts by now.
        by_heart = predicted(model, dataset.x_train).argmax(1)[wrong] == y[wrong]
        final["test_error"] = round(100 * float(error), 2)
        final["known_by_heart"] = round(float(by_heart.double().mean()), 4)
    return final


def main(argv: list[str] | None = None) -> int:
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("--data", help="the data set's .npz (default: FASTIS_DATA, else the subset)")
    add("--seeds", type=positive(int), default=3, help="how many: 0, 1, ...")
    add("--json", type=Path, default=ROWS, help="file of the rows")
    add("--report", action="store_true", help="no runs: write the page from the rows")
    add("--picture", action="store_true", help="one training: draws the page's picture")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    dataset = load_dataset("fashion_mnist", args.data)
    if args.report or args.picture:
        from bench.experiments import label_errors_page as page

        folder = args.json.parent
        print(page.draw(folder, dataset) if args.picture else page.write(folder))
        return 0
    wanted = configs(data_name(args.data), args.seeds)
    run_missing(BENCHMARK, args.json, wanted, lambda config: measure(config, dataset))
    return 0


if __name__ == "__main__":
    sys.exit(main())
