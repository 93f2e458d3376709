"""Do gradients at the logits tell what those of all parameters would? Figures of the papers.

    python bench/experiments/assess.py --data fashion_mnist.npz --iterations 25000 [--out FILE]

Trains LeNet-5 with EMAIS as train.py does, stops at checkpoints, takes the exact norm of every
training sample's gradient there (fastis.estimators), and compares:

fig3  |g_i| at the logits and of all parameters for some random samples (Kutsuna 2025, Fig. 3)
fig4  variance traces estimated in both spaces from minibatches drawn with the optimal weights times
      lognormal noise of growing size, and their regression lines (Fig. 4)
fig5  N_ems and S of the same minibatches (Fig. 5)
kf1   the distance of a minibatch gradient to the full one, relative to uniform sampling, when
      sampled by loss, upper bound (|g_i| at the logits), gradient norm, or as the training run does
      (Katharopoulos and Fleuret 2018, Fig. 1), by exact traces instead of repeated draws
kf2   the probabilities by loss and upper bound against those by gradient norm (Fig. 2)

Rows go to ``--out``, and the figures, drawn from its rows alone, beside it (``--plot-only`` draws
them anew).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[2]))

import torch
from torch import Tensor
from tqdm import tqdm

import fastis
from bench.experiments.config import RunConfig
from bench.experiments.datasets import data_name, load_dataset
from bench.experiments.gradient_variance import parameter_norms, weighted_gradient
from bench.experiments.loop import Run
from bench.experiments.tasks import EVALUATION_BATCH
from bench.provenance import provenance
from bench.report import Row, append_row, make_parser, markdown_table, positive, read_rows
from fastis.estimators import Traces, estimate_traces, population_traces

TRACES = ("trace_is", "trace_uniform", "trace_optimal")
WITHOUT_WEIGHTS = ("trace_uniform", "trace_optimal")  # their exact values are one point
SPACES = ("logits", "parameters")
RATIOS = ("effective_batch_size", "efficiency")
AT_STAGES = ("fig3", "fig4", "fig5", "kf2")
FIGURES = (*AT_STAGES, "kf1")


@dataclass(frozen=True)
class Checkpoint:
    """What is known of every training sample at one point of the training; all float64."""

    iteration: int
    losses: Tensor  # [N]
    score: Tensor  # [N], |g_i| at the logits
    logit_mean: Tensor  # [C], mean of g_i
    norms: Tensor  # [N], |g_i| of all parameters
    parameter_mean: Tensor  # [P]
    sampler: Tensor  # [N], the training run's own probabilities

    def traces(self, space: str, p: Tensor) -> Traces:
        """Exact traces [...] of the gradients in ``space`` for draws by p [..., N]."""
        if space == "logits":
            return population_traces(self.score, p, self.logit_mean)
        return population_traces(self.norms, p, self.parameter_mean)

    def probabilities(self) -> dict[str, Tensor]:
        """[N] each: what one could sample by."""
        weights = {"loss": self.losses, "upper_bound": self.score, "gradient_norm": self.norms}
        return {name: w / w.sum() for name, w in weights.items()} | {"sampler": self.sampler}


def look_at(run: Run) -> Checkpoint:
    """Two passes over the training set, with the model in the mode that it is in."""
    model, dataset = run.model, run.dataset
    with torch.no_grad():
        logits = torch.cat([model(x) for x in dataset.x_train.split(EVALUATION_BATCH)]).double()
    out = fastis.cross_entropy(logits, dataset.y_train)
    n = len(dataset.y_train)
    mean = sum(
        weighted_gradient(model, dataset, indices, torch.full((len(indices),), 1 / n))
        for indices in torch.arange(n).split(EVALUATION_BATCH)
    )
    return Checkpoint(
        iteration=run.sampler.step,
        losses=out.losses,
        score=out.score,
        logit_mean=out.mean_grad,
        norms=parameter_norms(model, dataset),
        parameter_mean=mean,
        sampler=run.sampler.probabilities(),
    )


# ---- the figures' rows


def rounded(values: Tensor) -> list[float | None]:
    """Four significant digits, enough for a figure; None where not finite."""
    pairs = zip(values.tolist(), values.isfinite().tolist(), strict=True)
    return [float(f"{value:.4g}") if finite else None for value, finite in pairs]


def dict_of(numbers: dict[str, Tensor]) -> dict[str, float | None]:
    """The same for 0-d tensors by name."""
    return dict(zip(numbers, rounded(torch.stack(list(numbers.values()))), strict=True))


def regression(x: Tensor, y: Tensor) -> dict[str, float | None]:
    """Least squares y = slope x + intercept over pairs that are finite, R^2, and median x / y."""
    finite = x.isfinite() & y.isfinite()
    x, y = x[finite], y[finite]
    dx, dy = x - x.mean(), y - y.mean()
    slope = (dx @ dy) / (dx @ dx)
    numbers = {
        "slope": slope,
        "intercept": y.mean() - slope * x.mean(),
        "r2": (dx @ dy).square() / ((dx @ dx) * (dy @ dy)),
        "median_ratio": (x / y).median(),
    }
    return {**dict_of(numbers), "pairs": len(x)}


def correlation(x: Tensor, y: Tensor) -> Tensor:
    return torch.corrcoef(torch.stack([x, y]))[0, 1]


def norms_row(at: Checkpoint, some: Tensor) -> Row:
    """fig3: the norms of ``some`` samples, and y = slope x through 0 fitted to them."""
    x, y = at.score[some], at.norms[some]
    numbers = {
        "slope": (x @ y) / (x @ x),
        "correlation": correlation(x, y),
        "correlation_of_all": correlation(at.score, at.norms),
    }
    pairs = {"logits": rounded(x), "parameters": rounded(y)}
    return {"figure": "fig3", **pairs, "fit": dict_of(numbers)}


def minibatch_traces(
    run: Run, at: Checkpoint, weights: Tensor, estimator: str, generator: torch.Generator
) -> dict[str, Traces]:
    """Estimates in both spaces from one minibatch drawn with ``weights [N]``."""
    model, dataset, batch_size = run.model, run.dataset, run.config.batch_size
    batch = fastis.sample(weights, batch_size, generator=generator)
    with torch.no_grad():
        logits = model(dataset.x_train[batch.indices])
    out = fastis.cross_entropy(logits, dataset.y_train[batch.indices], batch.weights)
    mean = weighted_gradient(model, dataset, batch.indices, batch.weights / batch_size)
    norms = at.norms[batch.indices]
    return {
        "logits": estimate_traces(out.score, batch.weights, out.mean_grad, estimator=estimator),
        "parameters": estimate_traces(norms, batch.weights, mean, estimator=estimator),
    }


def trace_rows(run: Run, at: Checkpoint, args: argparse.Namespace) -> list[Row]:
    """fig4 and fig5: estimates from a minibatch a noise, and the exact values for its weights."""
    generator = torch.Generator().manual_seed(run.config.seed)
    noise = torch.linspace(0, args.noise, args.minibatches)
    found: dict[str, dict[str, list[Traces]]] = {
        source: {space: [] for space in SPACES} for source in ("estimates", "exact")
    }
    bar = tqdm(noise.tolist(), desc="minibatches", leave=False, disable=not sys.stderr.isatty())
    for size in bar:
        z = torch.randn(at.norms.shape, generator=generator, dtype=torch.float64)
        weights = at.norms * (size * z).exp()
        traces = minibatch_traces(run, at, weights, args.estimator, generator)
        p = weights / weights.sum()
        for space in SPACES:
            found["estimates"][space].append(traces[space])
            exact = at.traces(space, p)._replace(batch_size=run.config.batch_size)
            found["exact"][space].append(exact)
    about = {"estimator": args.estimator, "noise": rounded(noise)}
    return [
        {"figure": "fig4", **about, **compared(found, TRACES)},
        {"figure": "fig5", **about, **compared(found, RATIOS)},
    ]


def compared(found: dict[str, dict[str, list[Traces]]], names: tuple[str, ...]) -> Row:
    """Values of ``names`` by source and space, and what links the spaces."""
    row: Row = {}
    for source, spaces in found.items():
        values = {
            space: {name: torch.stack([getattr(t, name) for t in traces]) for name in names}
            for space, traces in spaces.items()
        }
        row[source] = {
            space: {name: rounded(v) for name, v in named.items()}
            for space, named in values.items()
        }
        row[f"fit_of_{source}"] = {
            name: regression(values["logits"][name], values["parameters"][name])
            for name in names
            if source == "estimates" or name not in WITHOUT_WEIGHTS
        }
    return row


def distance_row(at: Checkpoint) -> Row:
    """kf1: E |minibatch gradient - full gradient|^2, of all parameters, relative to uniform draws
    (any minibatch size: it cancels), and the efficiency S."""
    traces = {name: at.traces("parameters", p) for name, p in at.probabilities().items()}
    ratios = {name: t.trace_is / t.trace_uniform for name, t in traces.items()}
    efficiencies = {name: t.efficiency for name, t in traces.items()}
    return {
        "figure": "kf1",
        "variance_ratio": dict_of(ratios),
        "efficiency": dict_of(efficiencies),
    }


def probability_row(at: Checkpoint, some: Tensor) -> Row:
    """kf2: N p of ``some`` samples; over all samples the sum of (p - p by gradient norm)^2 and the
    correlation with it."""
    n = len(at.norms)
    p = at.probabilities()
    best = p["gradient_norm"]
    errors = {name: (v - best).square().sum() for name, v in p.items()}
    errors["uniform"] = (1 / n - best).square().sum()
    correlations = {name: correlation(p[name], best) for name in ("loss", "upper_bound")}
    return {
        "figure": "kf2",
        "relative_probabilities": {
            name: rounded(n * p[name][some]) for name in ("loss", "upper_bound", "gradient_norm")
        },
        "sum_of_squared_errors": dict_of(errors),
        "correlation": dict_of(correlations),
    }


# ---- the job


def visits(args: argparse.Namespace) -> dict[int, list[str]]:
    """Iterations to stop at, ascending, with the figures that are measured there."""
    places: dict[int, list[str]] = {}
    for stage in args.stages:
        places[round(stage * args.iterations)] = [f for f in args.figures if f in AT_STAGES]
    if "kf1" in args.figures:
        steps = [round(i * args.iterations / args.checkpoints) for i in range(args.checkpoints + 1)]
        for iteration in (*steps, *places):
            places[iteration] = [*places.get(iteration, []), "kf1"]
    return {i: list(dict.fromkeys(places[i])) for i in sorted(places) if places[i]}


def train_to(run: Run, iteration: int, bar: tqdm) -> None:
    while run.sampler.step < iteration:
        steps = min(50, iteration - run.sampler.step)
        run.train(steps)
        bar.update(steps)


def measure(run: Run, args: argparse.Namespace) -> Iterator[Row]:
    """The rows of all figures asked for, without provenance, as they get done."""
    n = len(run.dataset.y_train)
    some = torch.randperm(n, generator=torch.Generator().manual_seed(run.config.seed))
    some = some[: args.samples]
    places = visits(args)
    interval = 0.1 if sys.stderr.isatty() else 20
    with tqdm(total=max(places), desc=run.config.label, mininterval=interval) as bar:
        for iteration, figures in places.items():
            train_to(run, iteration, bar)
            run.model.eval()  # the gradients that a sample has by itself
            at = look_at(run)
            rows = []
            if "kf1" in figures:
                rows.append(distance_row(at))
            if "fig3" in figures:
                rows.append(norms_row(at, some))
            if "kf2" in figures:
                rows.append(probability_row(at, some))
            if "fig4" in figures or "fig5" in figures:
                rows += [row for row in trace_rows(run, at, args) if row["figure"] in figures]
            run.model.train()
            yield from ({**row, "iteration": iteration} for row in rows)


def summary(rows: list[Row]) -> str:
    """The numbers behind the figures, as a table."""
    lines = [("figure", "iteration", "what", "value")]
    for row in rows:
        start = row["figure"], str(row["iteration"])
        if row["figure"] == "fig3":
            lines += [(*start, name, f"{v:g}") for name, v in row["fit"].items()]
        elif row["figure"] == "kf1":
            lines += [(*start, name, f"{v:.3f}") for name, v in row["variance_ratio"].items()]
        elif row["figure"] == "kf2":
            for key in ("sum_of_squared_errors", "correlation"):
                lines += [(*start, f"{key}, {name}", f"{v:g}") for name, v in row[key].items()]
        else:
            for key in ("estimates", "exact"):
                for name, fit in row[f"fit_of_{key}"].items():
                    text = ", ".join(f"{k} {v}" for k, v in fit.items())
                    lines.append((*start, f"{name}, {key}", text))
    return markdown_table(lines)


def latest(rows: list[Row]) -> list[Row]:
    """The last row of each figure and iteration within the setting of the file's last row."""
    rows = [row for row in rows if row["config"] == rows[-1]["config"]]
    rows = list({(row["figure"], row["iteration"]): row for row in rows}.values())
    return sorted(rows, key=lambda row: (row["figure"], row["iteration"]))


def fraction(text: str) -> float:
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"expected a part of the training in [0, 1], got {text}")
    return value


def arguments() -> argparse.ArgumentParser:
    parser = make_parser(__doc__)
    add, count, number = parser.add_argument, positive(int), positive(float)
    add("--data", help="the data set's .npz (default: FASTIS_DATA, else the subset)")
    add("--figures", nargs="+", choices=FIGURES, default=list(FIGURES))
    add("--method", default="emais", help="of the training run")
    add("--lr", type=number, default=0.01, help="of the training run")
    add("--iterations", type=count, default=6250, help="of the training run")
    add("--batch-size", type=count, default=128)
    add("--seed", type=int, default=0)
    add("--stages", type=fraction, nargs="+", default=[0.2, 1.0], help="of fig3, fig4, fig5, kf2")
    add("--checkpoints", type=count, default=10, help="of kf1, besides the start")
    add("--samples", type=count, default=500, help="points of fig3 and kf2")
    add("--minibatches", type=count, default=200, help="points of fig4 and fig5")
    add("--noise", type=number, default=1.5, help="largest sd of the weights' logarithm in fig4")
    add("--estimator", choices=["unbiased", "plugin"], default="unbiased", help="of fig4 and fig5")
    add("--threads", type=count, default=1)
    add("--out", type=Path, default=Path("runs/assessment.jsonl"), help="file to append rows to")
    add("--plot-only", action="store_true", help="draw the rows of --out, train nothing")
    return parser


def main(argv: list[str] | None = None) -> int:
    parser = arguments()
    args = parser.parse_args(argv)
    if not args.plot_only:
        torch.set_num_threads(args.threads)
        try:
            dataset = load_dataset("fashion_mnist", args.data)
            config = RunConfig(
                args.method, args.lr, args.seed, data=data_name(args.data),
                iterations=args.iterations, batch_size=args.batch_size,
            )  # fmt: skip
            if config.method == "presampling":
                raise ValueError(
                    "--method must have probabilities that are known before a draw, got presampling"
                )
            run = Run(config, dataset)
        except (ValueError, OSError) as error:
            parser.error(str(error))
        for row in measure(run, args):
            about = {"config": config.to_json(), **provenance(run.device)}
            append_row(args.out, {"benchmark": "assessment", **row, **about})
    rows = read_rows(args.out)
    if not rows:
        parser.error(f"--out must hold rows to draw, got none in {args.out}")
    rows = latest(rows)
    print(summary(rows))
    from bench.experiments.assess_plot import draw

    for png in draw(rows, args.out):
        print(png)
    return 0


if __name__ == "__main__":
    sys.exit(main())
