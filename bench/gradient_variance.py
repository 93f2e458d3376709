"""Variance of the minibatch gradient under the drawing schemes, at fixed networks on the way.

    python bench/gradient_variance.py --data fashion_mnist.npz [--json FILE]

Trains LeNet-5 with EMAIS (bench/train.py's job), stops at some iterations, and there draws many
minibatches from the same state of the sampler under each scheme, measuring the trace of the
covariance of the estimate (1/B) sum r g around its mean:

- ``logits``: g is the gradient at the logits, of all samples known exactly, over many draws;
- ``parameters``: the gradient of all parameters by backward, over fewer draws.

Figures are relative to independent (multinomial) draws from the same probabilities, with a 95 %
interval; ``uniform`` is independent uniform draws, for scale. Stratified and systematic draws
divide the cumulative distribution into equal slices in the order of the data, so that order
matters: ``--order label`` sorts the training set by its labels first.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor
from tqdm import tqdm

import fastis
from bench.datasets import Dataset, load_dataset
from bench.loop import Run, RunConfig
from bench.provenance import provenance
from bench.report import aligned, append_row

SCHEMES = ("multinomial", "stratified", "systematic", "uniform")


def sampler_like(sampler: fastis.Sampler, scheme: str, seed: int) -> fastis.Sampler:
    """One that draws from the same state by another scheme, or uniformly."""
    n, batch_size = sampler.num_samples, sampler.batch_size
    if scheme == "uniform":
        return fastis.Sampler(n, batch_size, method="uniform", seed=seed)
    twin = fastis.Sampler(n, batch_size, method=sampler.method, scheme=scheme)
    state = sampler.state_dict()
    state["settings"] = {**state["settings"], "scheme": scheme, "seed": seed}
    twin.load_state_dict(state)
    return twin


@torch.no_grad()
def logit_gradients(model: torch.nn.Module, dataset: Dataset) -> Tensor:
    """d loss_i / d z_i of every training sample, float64 [N, C]."""
    rows = []
    for x, y in zip(dataset.x_train.split(500), dataset.y_train.split(500), strict=True):
        p = model(x).softmax(1).double()
        rows.append(p - torch.nn.functional.one_hot(y, p.shape[1]))
    return torch.cat(rows)


class Trace:
    """The trace of a covariance from draws around a mean that may be estimated, and its error."""

    def __init__(self, mean: Tensor | None) -> None:
        self.mean, self.sum, self.squares = mean, 0.0, []

    def add(self, gradient: Tensor) -> None:
        self.sum = self.sum + gradient
        centred = gradient if self.mean is None else gradient - self.mean
        self.squares.append(float(centred.square().sum()))

    def result(self) -> tuple[float, float]:
        """Estimate and standard error."""
        squares = torch.tensor(self.squares, dtype=torch.float64)
        n = len(squares)
        mean = 0.0 if self.mean is not None else float((self.sum / n).square().sum())
        bessel = 1.0 if self.mean is not None else n / (n - 1)
        trace = bessel * (float(squares.mean()) - mean)
        return trace, float(squares.std()) / n**0.5


def parameter_gradient(run: Run, batch: fastis.Batch) -> Tensor:
    x, y = run.dataset.x_train[batch.indices], run.dataset.y_train[batch.indices]
    loss = fastis.cross_entropy(run.model(x), y, batch.weights).loss
    grads = torch.autograd.grad(loss, list(run.model.parameters()))
    return torch.cat([g.flatten() for g in grads])


def measure(run: Run, draws: int, backwards: int) -> dict[str, dict[str, tuple[float, float]]]:
    """Trace and standard error by space and scheme."""
    g = logit_gradients(run.model, run.dataset)
    traces: dict[str, dict[str, tuple[float, float]]] = {"logits": {}, "parameters": {}}
    for scheme in SCHEMES:
        sampler = sampler_like(run.sampler, scheme, seed=1)
        logits, parameters = Trace(g.mean(0)), Trace(None)
        for k in tqdm(range(draws), desc=scheme, leave=False, disable=not sys.stderr.isatty()):
            batch = sampler.sample()
            logits.add((batch.weights.double()[:, None] * g[batch.indices]).mean(0))
            if k < backwards:
                parameters.add(parameter_gradient(run, batch).double())
        traces["logits"][scheme] = logits.result()
        traces["parameters"][scheme] = parameters.result()
    return traces


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--data", help="the data set's .npz (default: FASTIS_DATA, else the subset)"
    )
    parser.add_argument("--order", choices=["file", "label"], default="file")
    parser.add_argument("--lr", type=float, default=0.03)
    parser.add_argument("--at", type=int, nargs="+", default=[1000, 3000, 6250])
    parser.add_argument("--draws", type=int, default=20_000)
    parser.add_argument("--backwards", type=int, default=1500)
    parser.add_argument("--json", type=Path, help="file to append a row an iteration to")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    dataset = load_dataset("fashion_mnist", args.data)
    if args.order == "label":
        order = dataset.y_train.argsort(stable=True)
        x, y = dataset.x_train[order], dataset.y_train[order]
        dataset = replace(dataset, x_train=x, y_train=y)
    config = RunConfig("emais", args.lr, seed=0, iterations=max(args.at))
    run = Run(config, dataset)
    lines = [("iteration", "gradient of", *SCHEMES)]
    for iteration in sorted(args.at):
        run.train(iteration - run.sampler.step)
        for space, traces in measure(run, args.draws, args.backwards).items():
            base, base_error = traces["multinomial"]
            ratios = {}
            for scheme, (trace, error) in traces.items():
                ratio = trace / base
                relative = ((error / trace) ** 2 + (base_error / base) ** 2) ** 0.5
                interval = 0.0 if scheme == "multinomial" else 1.96 * ratio * relative
                ratios[scheme] = (ratio, interval)
            cells = [f"{ratio:.3f} ± {half:.3f}" for ratio, half in ratios.values()]
            lines.append((str(iteration), space, "1", *cells[1:]))
            if args.json:
                row = {"benchmark": "gradient_variance", "order": args.order, "lr": args.lr}
                row.update(iteration=iteration, space=space, draws=args.draws)
                row["data"] = Path(args.data).name if args.data else "default"
                if space == "parameters":
                    row["draws"] = args.backwards
                row.update(trace=dict(traces), ratio=ratios, **provenance(torch.device("cpu")))
                append_row(args.json, row)
    print(aligned(lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())
