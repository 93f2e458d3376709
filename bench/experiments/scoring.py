"""Scores from scorer processes: the variance of ideal, stale and uniform sampling along a run, and
what the staleness limit and the constant do (Alain et al. 2016, in kind).

    python bench/experiments/scoring.py [--seeds 2] [--json bench/results/scoring.jsonl]
    python bench/experiments/scoring.py --report bench/results

One trainer and two scorers on the small data set. Most runs simulate the scorers in the trainer's
process, minibatch by minibatch: a scorer finishes one every ``steps_per_minibatch`` steps, with
parameters that it took ``refresh_every`` minibatches ago or since. So a run is the same on any
machine. Runs with ``processes`` have three processes and whatever staleness there is.

At each twentieth of a run all samples are scored with the parameters of the moment. With x_i these
scores, p_i the sampler's probabilities and mu2 the squared mean gradient (at the logits), the
traces are exactly::

    ideal = mean(x)^2 - mu2;   stale = mean(x^2 / (N p)) - mu2;   uniform = mean(x^2) - mu2
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[2]))

import torch
from torch import Tensor, nn
from tqdm import tqdm

import fastis
from bench.experiments.datasets import Dataset, data_name, load_dataset
from bench.experiments.models import build_model
from bench.provenance import provenance
from bench.report import Row, append_row, make_parser, read_rows
from fastis.methods import EMAIS, Distributed, Method
from fastis.scoring import Inbox, Scorer, Traces
from fastis.scoring.message import squared_mean
from fastis.scoring.traces import weights_in_force

BENCHMARK = "scoring"
EVALUATIONS = 20
CHUNK = 1000  # samples a forward pass, when all are scored
MONITORED = ("monitored_ideal", "monitored_stale", "monitored_uniform")


@dataclass(frozen=True)
class ScoringConfig:
    """A run. ``steps_per_minibatch`` of 0: no scorers; ``max_age`` of 0: no limit."""

    method: str = "distributed"
    constant: float = 0.1
    max_age: int = 0
    scorers: int = 2
    scorer_batch: int = 128
    steps_per_minibatch: int = 4
    refresh_every: int = 8
    processes: bool = False
    model: str = "mlp"
    lr: float = 0.01
    batch_size: int = 64
    iterations: int = 1000
    seed: int = 0
    data: str = "embedded"

    def build(self) -> str | Method:
        if self.method == "distributed":
            return Distributed(constant=self.constant, max_age=self.max_age or None)
        return EMAIS() if self.method == "emais" else self.method


def configs(base: ScoringConfig) -> list[ScoringConfig]:
    """All runs of one seed: the base, then one option after the other."""
    constants = [replace(base, constant=c) for c in (0.0, 0.03, 0.3, 1.0)]
    limits = [replace(base, max_age=age) for age in (40, 80, 160, 320)]
    speeds = [replace(base, steps_per_minibatch=steps) for steps in (1, 16, 0)]
    others = [
        replace(base, method="emais"),
        replace(base, method="emais", steps_per_minibatch=0),
        replace(base, method="scan", steps_per_minibatch=0),
    ]
    real = [replace(base, processes=True), replace(base, method="emais", processes=True)]
    return [base, *constants, *limits, *speeds, *others, *real]


class SimulatedScorers:
    """Scorers that take turns with the trainer."""

    def __init__(self, config: ScoringConfig, dataset: Dataset, sampler: fastis.Sampler) -> None:
        self.config, self.dataset, self.sampler = config, dataset, sampler
        self.models = [new_model(config, dataset) for _ in range(config.scorers)]
        self.scored, self.iterations = [0] * config.scorers, [0] * config.scorers
        self.position = 0
        self.traces = Traces(sampler.num_samples, sampler.device)

    def before_step(self, step: int, model: nn.Module) -> None:
        """Folds what was finished since the last step; scorers finish one after the other."""
        every = self.config.steps_per_minibatch
        for number in range(self.config.scorers):
            if every and step % every == number * every // self.config.scorers:
                if self.scored[number] % self.config.refresh_every == 0:
                    self.models[number].load_state_dict(model.state_dict())
                    self.iterations[number] = step
                self.score(number)

    def score(self, number: int) -> None:
        n, size = self.sampler.num_samples, self.config.scorer_batch
        indices = (self.position + torch.arange(size)) % n
        self.position += size
        self.scored[number] += 1
        out = scored(self.models[number], self.dataset, indices)
        weights = weights_in_force(self.sampler._table, self.sampler.method, indices)
        self.traces.add(out.score, weights, squared_mean(out.mean_grad, out.score))
        self.sampler.fold(indices, out.score, self.iterations[number])

    def close(self) -> Row:
        return {}


def scorer_process(config: ScoringConfig, dataset: Dataset, address: str) -> None:
    torch.set_num_threads(1)
    model = new_model(config, dataset)
    Scorer(
        model,
        lambda indices: scored(model, dataset, indices),
        len(dataset.y_train),
        store=address,
        batch_size=config.scorer_batch,
        refresh_every=config.refresh_every,
    ).run()


class RealScorers:
    """Scorers that are processes of their own."""

    def __init__(self, config: ScoringConfig, dataset: Dataset, sampler: fastis.Sampler) -> None:
        self.inbox, self.sampler, self.ages = Inbox(sampler), sampler, []
        self.traces, self.seconds = self.inbox.traces, 0.0
        context = multiprocessing.get_context("spawn")
        self.processes = [
            context.Process(target=scorer_process, args=(config, dataset, self.inbox.address))
            for _ in range(config.scorers)
        ]
        for process in self.processes:
            process.start()
        model = new_model(config, dataset)
        self.inbox.publish(model)
        while self.inbox.stats()["scorers"] < config.scorers:
            self.inbox.fold()
            time.sleep(0.01)

    def before_step(self, step: int, model: nn.Module) -> None:
        before = time.perf_counter()
        self.inbox.publish(model, step)
        if self.inbox.fold():
            self.ages.append(self.inbox.stats()["age"])
        self.seconds += time.perf_counter() - before

    def close(self) -> Row:
        self.inbox.close()
        for process in self.processes:
            process.join()
        stats = self.inbox.stats()
        return {
            "folded": stats["folded"],
            "mean_age_of_parameters": sum(self.ages) / len(self.ages),
            "seconds_of_publish_and_fold": self.seconds,
        }


def new_model(config: ScoringConfig, dataset: Dataset) -> nn.Module:
    torch.manual_seed(config.seed)
    return build_model(config.model, dataset.image_shape, dataset.num_classes)


@torch.no_grad()
def scored(model: nn.Module, dataset: Dataset, indices: Tensor) -> fastis.ScoredLoss:
    return fastis.cross_entropy(model(dataset.x_train[indices]), dataset.y_train[indices])


def exact(model: nn.Module, dataset: Dataset, sampler: fastis.Sampler) -> dict[str, float]:
    """The three traces over the data."""
    n = len(dataset.y_train)
    parts = torch.arange(n).split(CHUNK)
    outs = [scored(model, dataset, part) for part in parts]
    x = torch.cat([out.score for out in outs]).double()
    mean = sum(len(p) * o.mean_grad.double() for p, o in zip(parts, outs, strict=True)) / n
    mu2 = mean.square().sum()
    drawn = (x.square() / (n * sampler.probabilities())).mean()
    traces = {"ideal": x.mean().square(), "stale": drawn, "uniform": x.square().mean()}
    return {name: float(value - mu2) for name, value in traces.items()}


@torch.no_grad()
def final(model: nn.Module, dataset: Dataset) -> dict[str, float]:
    n = len(dataset.y_train)
    losses = [scored(model, dataset, part).losses for part in torch.arange(n).split(CHUNK)]
    wrong = torch.cat([model(x).argmax(1) for x in dataset.x_test.split(CHUNK)]) != dataset.y_test
    loss, error = torch.cat(losses).mean(), 100 * wrong.float().mean()
    return {"train_loss": float(loss), "test_error": float(error)}


def steps(config: ScoringConfig, dataset: Dataset, scorers, sampler, model) -> Iterator[int]:
    """Trains; yields after each step how many have been taken."""
    optimizer = torch.optim.SGD(model.parameters(), config.lr, momentum=0.9)
    for step in range(config.iterations):
        scorers.before_step(step, model)
        batch = sampler.sample()
        x, y = dataset.x_train[batch.indices], dataset.y_train[batch.indices]
        out = fastis.cross_entropy(model(x), y, batch.weights)
        sampler.update(batch, out)
        optimizer.zero_grad()
        out.backward()
        optimizer.step()
        yield step + 1


def measure(config: ScoringConfig, dataset: Dataset) -> Row:
    """The row of one run."""
    model, n = new_model(config, dataset), len(dataset.y_train)
    sampler = fastis.Sampler(n, config.batch_size, method=config.build(), seed=config.seed)
    scorers = (RealScorers if config.processes else SimulatedScorers)(config, dataset, sampler)
    curves: dict[str, list[float]] = {}
    before, evaluating = time.perf_counter(), 0.0
    for step in tqdm(steps(config, dataset, scorers, sampler, model), leave=False, disable=None):
        if step % (config.iterations // EVALUATIONS) == 0:
            start = time.perf_counter()
            traces = scorers.traces
            monitored = map(float, (traces.ideal, traces.stale, traces.uniform))
            point = {"step": step, **exact(model, dataset, sampler)}
            for name, value in {**point, **dict(zip(MONITORED, monitored, strict=True))}.items():
                curves.setdefault(name, []).append(value if value == value else None)
            evaluating += time.perf_counter() - start
    seconds = time.perf_counter() - before - evaluating
    return {
        "benchmark": BENCHMARK,
        "config": asdict(config),
        "curves": curves,
        "final": {**final(model, dataset), "seconds": seconds, **scorers.close()},
        **provenance(torch.device("cpu")),
    }


def main(argv: list[str] | None = None) -> int:
    parser = make_parser(__doc__, "a run")
    add = parser.add_argument
    add("--data", help="the data set's .npz (default: FASTIS_DATA, else the subset)")
    add("--seeds", type=int, default=2, help="how many: 0, 1, ...")
    add("--iterations", type=int, default=ScoringConfig.iterations)
    add("--report", type=Path, metavar="FOLDER", help="no runs: write the page from its rows")
    args: argparse.Namespace = parser.parse_args(argv)
    if args.report:
        from bench.experiments import scoring_page

        print(scoring_page.write(args.report))
        return 0
    torch.set_num_threads(1)
    dataset = load_dataset("fashion_mnist", args.data)
    done = read_rows(args.json) if args.json else []
    for seed in range(args.seeds):
        base = ScoringConfig(seed=seed, iterations=args.iterations, data=data_name(args.data))
        for config in configs(base):
            if any(row["config"] == asdict(config) for row in done):
                continue
            row = measure(config, dataset)
            if args.json:
                append_row(args.json, row)
            print(config, row["final"], flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
