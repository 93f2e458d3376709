"""How well tables that learn from the same minibatches predict the scores: time constants, floors,
and ways to correct for scores that are out of date.

    python bench/experiments/stale_scores.py --data fashion_mnist.npz

One network trains with EMAIS as published. Every rule below keeps a table of its own, which sees
that run's minibatches and nothing else. At each sixteenth of the run all samples are scored, and
with x_i the scores of that moment and p_i a rule's probabilities, its efficiency is exactly

    S = (mean(x^2 / (N p)) - mean(x)^2) / (mean(x^2) - mean(x)^2)

(Kutsuna 2025, eq. 12, at the logits): 0 for optimal and 1 for uniform sampling, without the noise
of an estimate from minibatches, and without each rule having trained another network.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[2]))

import torch
from torch import Tensor
from tqdm import tqdm

import fastis
from bench.experiments.config import RunConfig
from bench.experiments.datasets import Dataset, data_name, load_dataset
from bench.experiments.loop import Run
from bench.experiments.papers import PAPER_ITERATIONS, TAUS
from bench.experiments.tables import NOT_YET
from bench.provenance import provenance, provenance_line
from bench.report import Row, append_row, make_parser, markdown_table

BENCHMARK = "stale_scores"
PARTS = 16  # evaluations come at multiples of this part of the run, past the warm-up
MIDDLE_HALF = (0.25, 0.75)
LEVEL_KEEP = 0.97  # of the moving mean score that `relative` divides by


@dataclass(frozen=True)
class Rule:
    """A table and what its weights are made of.

    Attributes
    ----------
    options : dict
        of ``fastis.methods.EMAIS``.
    relative : bool
        scores are divided by their moving mean over the data before the table sees them, so that
        one that is seen rarely follows what all scores do.
    age : float
        with a the iterations since a sample was seen last and b = exp(-a / (age t)), its weight is
        b w + (1 - b) mean(w): what is out of date counts less. 0: not.
    mix : float
        this many times the mean is added to every weight: a smooth floor.
    """

    name: str
    options: dict[str, Any] = field(default_factory=dict)
    relative: bool = False
    age: float = 0.0
    mix: float = 0.0


def rules(iterations: int) -> list[Rule]:
    fixed = [tau * iterations / PAPER_ITERATIONS for tau in TAUS]
    quarter = {"tau_scale": 0.25, "floor": 0.1}
    return [
        Rule("tau t (the paper's)"),
        Rule("tau t/2", {"tau_scale": 0.5}),
        Rule("tau t/4", {"tau_scale": 0.25}),
        Rule("tau t/8", {"tau_scale": 0.125}),
        *(Rule(f"tau {tau:g}", {"tau": tau}) for tau in fixed),
        Rule("tau t, floor 0.1", {"floor": 0.1}),
        Rule("tau t/4, floor 0.1", quarter),
        Rule("tau t/4, floor 0.3", {**quarter, "floor": 0.3}),
        Rule(f"tau {fixed[0]:g}, floor 0.1", {"tau": fixed[0], "floor": 0.1}),
        Rule("last score, floor 0.1", {"tau": 1e-3, "floor": 0.1}),
        Rule("tau t, relative scores", relative=True),
        Rule("tau t/4, floor 0.1, relative scores", quarter, relative=True),
        Rule("tau t, shrunk by age / t", age=1.0),
        Rule("tau t/4, floor 0.1, shrunk by age / t", quarter, age=1.0),
        Rule("tau t/4, floor 0.1, shrunk by age / 4t", quarter, age=4.0),
        Rule("tau t/4, 0.1 of the mean added", {"tau_scale": 0.25}, mix=0.1),
    ]


class Follower:
    """A rule's table."""

    def __init__(self, rule: Rule, config: RunConfig, num_samples: int, device: str) -> None:
        self.rule = rule
        method = fastis.methods.EMAIS(warmup_epochs=0, **rule.options)
        self.sampler = fastis.Sampler(
            num_samples, config.batch_size, method=method, device=device, seed=config.seed
        )
        self._level, self._weight = 0.0, 0.0

    def update(self, batch: fastis.Batch, out: fastis.ScoredLoss) -> None:
        if self.rule.relative:
            keep, now = LEVEL_KEEP, float((batch.weights * out.score).mean())
            self._level = keep * self._level + (1 - keep) * now
            self._weight = keep * self._weight + (1 - keep)
            out = out._replace(score=out.score / (self._level / self._weight))
        self.sampler.update(batch, out)

    def probabilities(self) -> Tensor:
        """float64 [N], of the next draw."""
        rule, now = self.rule, self.sampler.step
        p = self.sampler.probabilities()
        mean = 1 / len(p)
        if rule.age:
            fresh = torch.exp((self.sampler.last_seen - now) / (rule.age * max(now, 1)))
            p = fresh * p + (1 - fresh) * mean
        p = p + rule.mix * mean
        return p / p.sum()


class Followed:
    """A run's sampler that shows its minibatches to followers."""

    def __init__(self, sampler: fastis.Sampler, followers: Iterable[Follower]) -> None:
        self._sampler, self._followers = sampler, list(followers)

    def update(self, batch: fastis.Batch, out: fastis.ScoredLoss) -> None:
        self._sampler.update(batch, out)
        for follower in self._followers:
            follower.update(batch, out)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._sampler, name)


def efficiency(scores: Tensor, probabilities: Tensor) -> float:
    """S of drawing with these probabilities, over the whole data; float64 [N] both."""
    ideal, uniform = scores.mean().square(), scores.square().mean()
    drawn = (scores.square() / probabilities).mean() / len(scores)
    return float((drawn - ideal) / (uniform - ideal))


def measure(config: RunConfig, dataset: Dataset) -> Row:
    """The row of one run: every rule's S at every evaluation."""
    dataset = dataset.to(config.device)
    run, n = Run(config, dataset), len(dataset.y_train)
    followers = [Follower(rule, config, n, config.device) for rule in rules(config.iterations)]
    run.sampler = Followed(run.sampler, followers)
    warm_up = run.sampler.method.warmup_draws(n // config.batch_size)
    part = config.iterations // PARTS
    steps = [k * part for k in range(1, PARTS + 1) if k * part > warm_up]
    found: dict[str, list[float]] = {follower.rule.name: [] for follower in followers}
    for step in tqdm(steps, desc=config.label, leave=False):
        run.train(step - run.steps_taken)
        with torch.no_grad():
            scores = run.scorer(torch.arange(n, device=run.device)).score.double()
        for follower in followers:
            value = efficiency(scores, follower.probabilities())
            found[follower.rule.name].append(float(f"{value:.4g}"))
    return {
        "benchmark": BENCHMARK,
        "config": config.to_json(),
        "steps": steps,
        "efficiency": found,
        **provenance(run.device),
    }


# ---- what the rows say


def middle(row: Row) -> list[int]:
    """Positions of the evaluations in the middle half of a run."""
    low, high = (part * row["config"]["iterations"] for part in MIDDLE_HALF)
    return [at for at, step in enumerate(row["steps"]) if low <= step <= high]


def summary(rows: Sequence[Row]) -> list[tuple[str, float, float, float]]:
    """For every rule: mean S in the middle half and in the last quarter, and by how much it is at
    most above the best of the paper's fixed tau in the middle half; over all rows."""
    lines = []
    fixed = fixed_taus(rows[0])
    for name in rows[0]["efficiency"]:
        middles, ends, excess = [], [], []
        for row in rows:
            s, inside = row["efficiency"], middle(row)
            middles += [s[name][at] for at in inside]
            ends += s[name][inside[-1] + 1 :]
            excess += [s[name][at] - min(s[tau][at] for tau in fixed) for at in inside]
        lines.append((name, fmean(middles), fmean(ends), max(excess)))
    return lines


def summary_table(rows: Sequence[Row], aligned: bool = True) -> str:
    head = ["rule", "S, middle half", "S, last quarter"]
    head.append("most above the best fixed tau, middle half")
    lines = [[name, *(f"{value:.3f}" for value in values)] for name, *values in summary(rows)]
    return markdown_table([head, *lines], aligned)


def fixed_taus(row: Row) -> list[str]:
    taus = {f"tau {tau * row['config']['iterations'] / PAPER_ITERATIONS:g}" for tau in TAUS}
    return [name for name in row["efficiency"] if name in taus]


def section(rows: Sequence[Row]) -> str:
    """The results page's section of these rows."""
    parts = ["## stale_scores: Efficiency S of time constants, floors and corrections, exactly"]
    parts.append(
        "For fig1, and not in the papers. One network trains with EMAIS; tables of other rules see "
        "its minibatches too. S is computed from the scores of all samples at each sixteenth of "
        "the run. The best fixed tau is the best of the paper's four at each evaluation. What the "
        "rules are: `bench/experiments/stale_scores.py`."
    )
    for lr in sorted({row["config"]["lr"] for row in rows}):
        group = [row for row in rows if row["config"]["lr"] == lr]
        config = group[0]["config"]
        parts.append(
            f"**{config['model']}, {config['data']}, base rate {lr:g}, {config['iterations']} "
            f"iterations, {len(group)} seed(s)**"
        )
        parts.append(summary_table(group, aligned=False))
    if rows:
        parts.append(provenance_line(rows))
    else:
        parts.append(NOT_YET)
    last = rows[-1]["config"]["data"] if rows else "fashion_mnist.npz"
    seeds = 1 + max((row["config"]["seed"] for row in rows), default=2)
    options = f" --data {last}" if last != "embedded" else ""
    options += f" --seeds {seeds} --json bench/results/stale_scores.jsonl"
    parts.append(f"```sh\npython bench/experiments/stale_scores.py{options}\n```")
    return "\n\n".join(parts)


def main(argv: list[str] | None = None) -> int:
    parser = make_parser(__doc__, "a run")
    add = parser.add_argument
    add("--data", help="the data set's .npz (default: FASTIS_DATA, else the subset)")
    add("--lr", type=float, nargs="+", default=[0.01, 0.03])
    add("--seeds", type=int, default=1, help="how many: 0, 1, ...")
    add("--iterations", type=int, default=6250)
    add("--batch-size", type=int, default=128)
    add("--device", default="cpu")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    try:
        dataset = load_dataset("fashion_mnist", args.data)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    setting = {name: vars(args)[name] for name in ("iterations", "batch_size", "device")}
    for lr in args.lr:
        rows = []
        for seed in range(args.seeds):
            config = RunConfig("emais", lr, seed, data=data_name(args.data), **setting)
            rows.append(measure(config, dataset))
            if args.json:
                append_row(args.json, rows[-1])
        print(f"lr {lr:g}\n{summary_table(rows)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
