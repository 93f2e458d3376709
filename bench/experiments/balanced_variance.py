"""Variance of the gradient of a class-balanced loss, by who draws the minibatch.

    python bench/experiments/balanced_variance.py --data fashion_mnist.npz

Trains LeNet-5 on long-tailed Fashion-MNIST with class weights and EMAIS, stops at some iterations,
and computes there exactly, for the same network and the same weighted loss, the trace of the
covariance of one draw's r g: under uniform draws, under draws in proportion to the class weights
(torch's WeightedRandomSampler), under EMAIS' probabilities of the moment, and the least there is.
A minibatch of B has a B-th of it. Gradients are those at the logits and of all parameters; figures
are relative to uniform draws.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[2]))

import torch
from torch import Tensor

from bench.experiments import practice
from bench.experiments.config import OURS_WITH_GAIN
from bench.experiments.datasets import data_name
from bench.experiments.experiment import Settings
from bench.experiments.gradient_variance import (
    logit_gradients,
    parameter_norms,
    weighted_gradient,
)
from bench.experiments.loop import Run, class_weights_of
from bench.experiments.tasks import load_task_data
from bench.report import Report, make_parser
from fastis.estimators import population_traces

WAYS = ("uniform", "class-balanced", "EMAIS", "least")
LR = 0.1


def relative_traces(norms: Tensor, mean_grad: Tensor, ways: dict[str, Tensor]) -> dict[str, float]:
    """tr V of each way's probabilities over that of uniform draws."""
    traces = {way: population_traces(norms, p, mean_grad) for way, p in ways.items()}
    found = {way: float(trace.trace_is) for way, trace in traces.items()}
    found["least"] = float(traces["uniform"].trace_optimal)
    return {way: trace / found["uniform"] for way, trace in found.items()}


def main(argv: list[str] | None = None) -> int:
    parser = make_parser(__doc__, "an iteration")
    parser.add_argument("--data", help="Fashion-MNIST's .npz (default: the subset)")
    parser.add_argument("--at", type=int, nargs="+", default=[500, 1500, 3000])
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    setting = practice.SETTINGS["long-tailed"]
    config = setting.config(
        Settings(data_name(args.data)), "emais", LR, **OURS_WITH_GAIN, class_weights=True
    )
    dataset = load_task_data(setting.dataset, args.data)
    run = Run(config, dataset)
    weights = class_weights_of(dataset)[dataset.y_train].double()
    n = len(weights)
    every = torch.arange(n)
    report = Report("balanced_variance", ("iteration", "gradient of", *WAYS), args.json)
    for iteration in sorted(args.at):
        run.train(iteration - run.sampler.step)
        ways = {
            "uniform": torch.full((n,), 1 / n, dtype=torch.float64),
            "class-balanced": weights / weights.sum(),
            "EMAIS": run.sampler.probabilities(),
        }
        logits = weights[:, None] * logit_gradients(run.model, dataset)
        mean = weighted_gradient(run.model, dataset, every, weights) / n
        found = {
            "logits": (logits.norm(dim=1), logits.mean(0)),
            "parameters": (weights * parameter_norms(run.model, dataset), mean),
        }
        for space, (norms, mean_grad) in found.items():
            ratios = relative_traces(norms, mean_grad, ways)
            report.line(iteration, space, *(f"{ratios[way]:.3f}" for way in WAYS))
            report.store({"iteration": iteration, "space": space, "lr": LR, "ratio": ratios})
    report.show()
    return 0


if __name__ == "__main__":
    sys.exit(main())
