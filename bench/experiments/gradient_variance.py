"""Variance of the minibatch gradient under the drawing schemes, at fixed networks on the way.

    python bench/experiments/gradient_variance.py --data fashion_mnist.npz [--order label]

Trains LeNet-5 with EMAIS as train.py does, stops at some iterations, and there computes the trace
of the covariance of the estimate (1/B) sum r g exactly, from the integer weights of the next draw
(no random draws: rare large coefficients would make them too noisy to compare):

- independent ("multinomial") and uniform draws: (sum |g_i|^2 / (N^2 p_i) - |G|^2) / B;
- "stratified": draw b falls into slice b of the cumulative distribution, so the mean gradient of
  every slice is taken off instead of G;
- "systematic": all points share one offset; between two offsets where some draw moves on to its
  next item nothing changes, and the integral over them is a sum.

g is the gradient at the logits, or that of all parameters (by torch.func; "systematic" is left out
there, as it would take a gradient per pair of samples). Figures are relative to independent draws;
"gain" is (|G|^2 + uniform) / (|G|^2 + independent), what the learning rate's rule of that name
estimates from minibatches.
Slices follow the order of the data: ``--order label`` sorts the training set by its labels first.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[2]))

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

import fastis
from bench.experiments.config import OURS, RunConfig
from bench.experiments.datasets import Dataset, data_name, load_dataset
from bench.experiments.loop import Run
from bench.experiments.tasks import sort_by_class
from bench.report import Report, make_parser
from fastis.estimators import gradient_norms
from fastis.kernels.flatten import distribution
from fastis.methods.base import RULES

SCHEMES = ("multinomial", "stratified", "systematic", "uniform")


class Layout:
    """Where each item lies in the cumulative distribution of the next draw, in units of slices."""

    def __init__(self, sampler: fastis.Sampler) -> None:
        drawn = distribution(sampler._table)
        others = torch.ones(len(drawn.weights), dtype=torch.bool)
        others[drawn.capped] = False
        self.order = torch.cat([drawn.capped, others.nonzero().flatten()])
        self.p = drawn.weights.double()[self.order] / drawn.total
        self.num_slices = sampler.batch_size
        ends = torch.cumsum(drawn.weights[self.order], 0).double() / drawn.total
        self.ends = ends * self.num_slices
        self.starts = torch.cat([self.ends.new_zeros(1), self.ends[:-1]])

    def pieces(self) -> tuple[Tensor, Tensor, Tensor]:
        """The items cut at the slices' borders: position in the order, slice, part of the slice."""
        borders = torch.arange(1, self.num_slices, dtype=torch.float64)
        cuts = torch.cat([self.ends, borders]).sort().values
        lengths = torch.diff(cuts, prepend=cuts.new_zeros(1))
        middles = cuts - lengths / 2
        position = torch.searchsorted(self.ends, middles, right=True).clamp(max=len(self.p) - 1)
        return position, middles.long().clamp(max=self.num_slices - 1), lengths


def scheme_traces(layout: Layout, g: Tensor) -> dict[str, float]:
    """Exact traces for gradients ``g`` [N, C]: all four schemes, and |G|^2 as "mean"."""
    batch_size, n = layout.num_slices, len(g)
    rg = g[layout.order] / (n * layout.p)[:, None]
    mean = g.mean(0).square().sum()
    second = (layout.p * rg.square().sum(1)).sum()
    position, slices, lengths = layout.pieces()
    slice_means = torch.zeros(batch_size, g.shape[1], dtype=g.dtype)
    slice_means.index_add_(0, slices, lengths[:, None] * rg[position])
    # Systematic: as the offset grows from 0 to 1, pieces replace each other within their slices.
    starts = (torch.cumsum(lengths, 0) - lengths - slices).clamp(min=0.0)
    at_zero = torch.searchsorted(slices, torch.arange(batch_size))
    first = torch.zeros(len(slices), dtype=torch.bool)
    first[at_zero] = True
    step = rg[position]
    step[1:] = step[1:] - rg[position[:-1]]
    events = (~first).nonzero().flatten()
    events = events[starts[events].argsort(stable=True)]
    sums = torch.cat([rg[position[at_zero]].sum(0)[None], step[events]]).cumsum(0)
    offsets = torch.cat([starts.new_zeros(1), starts[events], starts.new_ones(1)])
    shared = (torch.diff(offsets) * (sums / batch_size).square().sum(1)).sum()
    return {
        "multinomial": float((second - mean) / batch_size),
        "stratified": float((second - slice_means.square().sum(1).mean()) / batch_size),
        "systematic": float(shared - mean),
        "uniform": float((g.square().sum(1).mean() - mean) / batch_size),
        "mean": float(mean),
    }


@torch.no_grad()
def logit_gradients(model: torch.nn.Module, dataset: Dataset) -> Tensor:
    """d loss_i / d z_i of every training sample, float64 [N, C]."""
    rows = []
    for x, y in zip(dataset.x_train.split(500), dataset.y_train.split(500), strict=True):
        p = model(x).softmax(1).double()
        rows.append(p - torch.nn.functional.one_hot(y, p.shape[1]))
    return torch.cat(rows)


def weighted_gradient(
    model: torch.nn.Module, dataset: Dataset, indices: Tensor, weights: Tensor
) -> Tensor:
    """sum_i weights_i g_i over ``indices [n]``, g with respect to all parameters: float64 [P]."""
    losses = F.cross_entropy(
        model(dataset.x_train[indices]), dataset.y_train[indices], reduction="none"
    )
    grads = torch.autograd.grad((weights.float() * losses).sum(), list(model.parameters()))
    return torch.cat([g.flatten() for g in grads]).double()


def parameter_norms(model: torch.nn.Module, dataset: Dataset) -> Tensor:
    """|g_i| of every training sample, g with respect to all parameters: float64 [N]."""
    parts = list(zip(dataset.x_train.split(1000), dataset.y_train.split(1000), strict=True))
    parts = tqdm(parts, desc="norms", leave=False, disable=not sys.stderr.isatty())
    return torch.cat([gradient_norms(model, F.cross_entropy, x, y) for x, y in parts]).double()


def parameter_traces(run: Run, layout: Layout) -> dict[str, float]:
    """Exact traces for the gradients of all parameters; nothing of size N x parameters is kept."""
    model, dataset, batch_size = run.model, run.dataset, layout.num_slices
    n = len(dataset.y_train)
    squares = parameter_norms(model, dataset).square()
    position, slices, lengths = layout.pieces()
    weights = lengths / (n * layout.p[position])
    total, slice_squares = 0.0, 0.0
    for b in range(batch_size):
        inside = slices == b
        part = layout.order[position[inside]]
        mean = weighted_gradient(model, dataset, part, weights[inside])
        slice_squares += float(mean.square().sum()) / batch_size
        total = total + mean / batch_size
    squared_mean = float(total.square().sum())
    second = float((squares[layout.order] / (n * n * layout.p)).sum())
    return {
        "multinomial": (second - squared_mean) / batch_size,
        "stratified": (second - slice_squares) / batch_size,
        "uniform": (float(squares.mean()) - squared_mean) / batch_size,
        "mean": squared_mean,
    }


def main(argv: list[str] | None = None) -> int:
    parser = make_parser(__doc__, "an iteration")
    parser.add_argument(
        "--data", help="the data set's .npz (default: FASTIS_DATA, else the subset)"
    )
    parser.add_argument("--order", choices=["file", "label"], default="file")
    parser.add_argument("--lr", type=float, default=0.03)
    parser.add_argument("--rule", choices=RULES, default="linear", help="how the rate follows")
    parser.add_argument(
        "--published", action="store_true", help="with the paper's time constant and floor"
    )
    parser.add_argument("--at", type=int, nargs="+", default=[1000, 3000, 6250])
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    dataset = load_dataset("fashion_mnist", args.data)
    if args.order == "label":
        dataset = sort_by_class(dataset)
    options = {} if args.published else OURS
    config = RunConfig(
        "emais", args.lr, 0, iterations=max(args.at), options=options, lr_rule=args.rule
    )
    run = Run(config, dataset)
    head = ("iteration", "gradient of", *SCHEMES, "gain", "sampler's")
    report = Report("gradient_variance", head, args.json)
    for iteration in sorted(args.at):
        run.train(iteration - run.sampler.step)
        layout = Layout(run.sampler)
        estimate = float(run.sampler.lr_factor(rule="gain"))
        spaces = {
            "logits": scheme_traces(layout, logit_gradients(run.model, run.dataset)),
            "parameters": parameter_traces(run, layout),
        }
        for space, traces in spaces.items():
            mean = traces.pop("mean")
            ratios = {name: value / traces["multinomial"] for name, value in traces.items()}
            gain = (mean + traces["uniform"]) / (mean + traces["multinomial"])
            shown = (f"{ratios[name]:.3f}" if name in ratios else None for name in SCHEMES)
            report.line(iteration, space, *shown, f"{gain:.3f}", f"{estimate:.3f}")
            row = {"order": args.order, "lr": args.lr, "iteration": iteration, "space": space}
            row |= {"data": data_name(args.data), "options": options, "rule": args.rule}
            row |= {"gain": gain, "estimated_gain": estimate}
            report.store({**row, "trace": traces, "ratio": ratios})
    report.show()
    return 0


if __name__ == "__main__":
    sys.exit(main())
