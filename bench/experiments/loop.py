"""One training run: a configuration and a data set in, one result row out.

The step is the one of the README; everything else here reads figures and keeps time. Device values
are read once per block of steps, so that a step never waits for the device, and the clock runs over
the blocks only: evaluation and reading are not in the time per step.
"""

from __future__ import annotations

import math
import sys
import time
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from statistics import fmean

import torch
from tqdm import tqdm

import fastis
from bench.experiments import peers
from bench.experiments.config import RunConfig
from bench.experiments.datasets import Dataset
from bench.experiments.dynamic_batch import FollowingSampler
from bench.experiments.methods import Scorer, build_method
from bench.experiments.models import build_model
from bench.experiments.tasks import TASKS
from bench.provenance import provenance

STEPS_PER_READING = 50
CURVE_POINTS = 25
# The curves' train loss is taken on this many fixed images; the final one on the whole set.
CURVE_SAMPLES = 1000
TRACES = ("trace_is", "trace_uniform", "trace_optimal")


class Run:
    """The network, optimizer, sampler and scheduler of one configuration."""

    def __init__(self, config: RunConfig, dataset: Dataset) -> None:
        self.config, self.dataset = config, dataset
        self.task = TASKS[config.dataset]
        self.device = torch.device(config.device)
        self.steps_taken, self.train_seconds = 0, 0.0
        self._block_start: float | None = None
        self.leader = None
        if config.batch_size_like:
            followed = replace(config, method=config.batch_size_like, batch_size_like="")
            self.leader = Run(followed, dataset)
        # The seed fixes the initial network whatever the method: the methods are paired by seed.
        torch.manual_seed(config.seed)
        model = build_model(config.model, dataset.image_shape, dataset.num_classes)
        if config.weighted_norm:
            model = fastis.weighted_batch_norm(model)
        self.loss = self.task.loss
        if config.class_weights:
            self.loss = partial(self.task.loss, class_weights=class_weights_of(dataset))
        self.model = model.to(self.device)
        self.last_layer = LastLayer(self.model) if config.score == "last_layer" else None
        self.optimizer = make_optimizer(config, self.model)
        self.scorer = Scorer(self)
        self.sampler = self._make_sampler()
        self.ends_by_effective_iterations = config.lr_adjust and self._counts_iterations()
        self.scheduler = self._make_scheduler()

    def _make_sampler(self) -> fastis.Sampler | FollowingSampler | peers.Peer:
        config, num_samples = self.config, len(self.dataset.y_train)
        if self.leader is not None:
            return FollowingSampler(num_samples, config.batch_size, config.seed, self.device)
        if config.method in peers.SAMPLERS:
            return peers.build_peer(config, self.dataset.y_train)
        return fastis.Sampler(
            num_samples=num_samples,
            batch_size=config.batch_size,
            method=build_method(config, num_samples, self.scorer),
            scheme=config.scheme,
            device=self.device,
            seed=config.seed,
        )

    def _counts_iterations(self) -> bool:
        """Whether the method has its own count of iterations, as RAIS has: its gains' sum."""
        if not isinstance(self.sampler, fastis.Sampler):
            return False
        theirs = type(self.sampler.method).effective_iterations
        return theirs is not fastis.methods.Method.effective_iterations

    def _make_scheduler(self) -> object:
        """A cosine to 0 over the run, times the sampler's factor."""
        config = self.config
        if config.seconds:
            cosine = torch.optim.lr_scheduler.LambdaLR(
                self.optimizer, lambda _: (1 + math.cos(math.pi * min(1.0, self.progress()))) / 2
            )
        else:
            cosine = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, config.iterations)
        if not config.lr_adjust:
            return cosine
        optimizer, rule = config.factor_of
        if self.ends_by_effective_iterations and not config.seconds:
            return fastis.EffectiveIterationsLR(
                cosine,
                self.sampler,
                rule,
                optimizer=optimizer,
                max_lr=config.max_lr or None,
                total_iterations=config.iterations,
            )
        return fastis.EffectiveBatchLR(
            cosine,
            self.sampler,
            rule,
            optimizer=optimizer,
            max_lr=config.max_lr or None,
        )

    def progress(self) -> float:
        """How much of the run is behind: at 1 it ends."""
        if self.config.seconds:
            start = self._block_start
            in_block = 0.0 if start is None else time.perf_counter() - start
            return (self.train_seconds + in_block) / self.config.seconds
        if self.ends_by_effective_iterations:
            return float(self.sampler.effective_iterations) / self.config.iterations
        return self.steps_taken / self.config.iterations

    def steps_to_go(self, most: int) -> int:
        """The next block's length, at most ``most``: the run shall end at its end, not beyond."""
        if self.config.seconds:
            left = self.config.seconds - self.train_seconds
            per_step = self.train_seconds / self.steps_taken if self.steps_taken else math.inf
            return max(1, min(most, int(left / per_step)))
        left = self.config.iterations * (1 - self.progress())
        if self.ends_by_effective_iterations:
            # Rounded down, since the gain changes on the way: the last steps come one by one.
            return max(1, min(most, int(left / max(1.0, float(self.sampler.lr_factor("sgd"))))))
        return min(most, round(left))

    def train(self, steps: int) -> torch.Tensor:
        """Takes ``steps`` steps; the last minibatch's loss, 0-d, still on the device."""
        images, labels, augment = self.dataset.x_train, self.dataset.y_train, self.dataset.augment
        loss_of, clip_norm = self.loss, self.config.clip_norm
        weighted_norm = self.config.weighted_norm
        for _ in range(steps):
            batch = self.sampler.sample()
            x, y = images[batch.indices], labels[batch.indices]
            if augment is not None:
                x = augment(x)
            with fastis.batch_weights(batch.weights) if weighted_norm else nullcontext():
                logits = self.model(x)
            out = loss_of(logits, y, batch.weights)
            if self.last_layer is not None:
                out = self.last_layer.scored(out)
            self.sampler.update(batch, out)
            out.loss.backward()
            if clip_norm:
                torch.nn.utils.clip_grad_norm_(self.model.parameters(), clip_norm)
            self.optimizer.step()
            self.scheduler.step()
            self.optimizer.zero_grad()
        self.steps_taken += steps
        return out.loss.detach()

    def timed_train(self, steps: int) -> tuple[float, float]:
        """Takes ``steps`` steps; the last loss and the milliseconds per step."""
        if self.leader is not None:
            self.sampler.follow(self.leader.factors(steps))
        synchronize(self.device)
        self._block_start = time.perf_counter()
        loss = self.train(steps)
        synchronize(self.device)
        seconds = time.perf_counter() - self._block_start
        self._block_start = None
        self.train_seconds += seconds
        return loss.item(), 1e3 * seconds / steps

    def factors(self, steps: int) -> list[float]:
        """Takes ``steps`` steps; N_ems / B after each of them (1 in the warm-up)."""
        factors = []
        for _ in range(steps):
            self.train(1)
            factors.append(self.sampler.lr_factor("sgd", "linear"))
        return torch.stack(factors).tolist()

    def reading(self) -> dict[str, float]:
        """What the sampler and the scheduler say now, and the training time so far."""
        return {
            **self._variance_reading(),
            "lr_factor": float(self.sampler.lr_factor(*self.config.factor_of)),
            "gain": float(self.sampler.lr_factor("sgd", "gain")),  # the predicted speed-up
            "lr": float(self.optimizer.param_groups[0]["lr"]),
            "seconds": self.train_seconds,
        }

    def _variance_reading(self) -> dict[str, float]:
        if not isinstance(self.sampler, fastis.Sampler):
            return self.sampler.reading()
        names = ("effective_batch_size", "efficiency", *TRACES)
        return {name: float(getattr(self.sampler.variance, name)) for name in names}


def class_weights_of(dataset: Dataset) -> torch.Tensor:
    """float32 ``[C]``: N / (C n_c), with a mean of 1 over the training set, so that the constant
    denominator of a weighted mean is right."""
    counts = dataset.y_train.bincount(minlength=dataset.num_classes)
    return len(dataset.y_train) / (dataset.num_classes * counts.float())


class LastLayer:
    """Scores by the gradient of the network's last linear layer: exactly |g| sqrt(|h|^2 + 1), with
    h its input and g the gradient at the logits."""

    def __init__(self, model: torch.nn.Module) -> None:
        layer = [m for m in model.modules() if isinstance(m, torch.nn.Linear)][-1]
        layer.register_forward_pre_hook(self._keep)
        self.hidden = torch.empty(0)

    def _keep(self, layer: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        self.hidden = inputs[0].detach()

    def scored(self, out: fastis.ScoredLoss) -> fastis.ScoredLoss:
        """The loss with such scores; its mean gradient is that of the logits, so it is left out."""
        norm = (self.hidden.square().sum(1) + 1).sqrt()
        return out._replace(score=out.score * norm, mean_grad=None)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def make_optimizer(config: RunConfig, model: torch.nn.Module) -> torch.optim.Optimizer:
    """SGD with momentum, or Adam. On CUDA the learning rate is a tensor on the device, so that the
    factor of the effective batch size reaches the optimizer without a host synchronisation."""
    lr, options = config.lr, {"weight_decay": config.weight_decay}
    if config.device.startswith("cuda"):
        lr = torch.tensor(config.lr, device=config.device)
        options["fused"] = True
    if config.optimizer == "adam":
        return torch.optim.Adam(model.parameters(), lr, **options)
    return torch.optim.SGD(model.parameters(), lr, momentum=config.momentum, **options)


def run(config: RunConfig, dataset: Dataset, position: int = 0, leave: bool = True) -> dict:
    """Trains and returns the result row; ``position`` is the progress bar's line."""
    dataset = dataset.to(config.device)
    # A process's first steps import and allocate for seconds: not on this run's clock.
    Run(config, dataset).timed_train(2)
    state = Run(config, dataset)
    some = torch.randperm(len(dataset.y_train), generator=torch.Generator().manual_seed(0))
    some = some[:CURVE_SAMPLES].to(config.device)
    x_some, y_some = dataset.x_train[some], dataset.y_train[some]

    block = min(STEPS_PER_READING, max(1, config.iterations // CURVE_POINTS))
    # The share of the run between two evaluations: a whole number of blocks.
    share = block * max(1, round(config.iterations / block / CURVE_POINTS)) / config.iterations
    points = 0
    readings, milliseconds, curve = [], [], []
    # A log file gets a line now and then; a terminal shows every reading.
    interval = 0.1 if sys.stderr.isatty() else 20
    with tqdm(
        total=config.iterations,
        desc=config.label,
        position=position,
        leave=leave,
        mininterval=interval,
    ) as bar:
        while state.progress() < 1:
            loss, ms = state.timed_train(state.steps_to_go(block))
            milliseconds.append(ms)
            readings.append({"step": state.steps_taken, **state.reading()})
            now, progress = readings[-1], state.progress()
            bar.set_postfix_str(
                f"loss {loss:.3f}, S {now['efficiency']:.2f}, "
                f"N_ems {now['effective_batch_size']:.0f}, gain {now['gain']:.2f}",
                refresh=False,
            )
            bar.update(round(min(1.0, progress) * config.iterations) - bar.n)
            reached = int(progress / share + 1e-9)  # a share is no binary fraction
            if progress >= 1 or reached > points:
                points = reached
                train = state.task.evaluate(state.model, x_some, y_some)
                test = state.task.evaluate(state.model, dataset.x_test, dataset.y_test)
                curve.append({**now, "train_loss": train["loss"], "test_error": test["error"]})
    return result_row(state, readings, milliseconds, curve)


def result_row(
    state: Run, readings: list[dict], milliseconds: list[float], curve: list[dict]
) -> dict:
    """Configuration, provenance, final metrics and curves as plain JSON values."""
    dataset, batch_size = state.dataset, state.config.batch_size
    test = state.task.evaluate(state.model, dataset.x_test, dataset.y_test)
    train = state.task.evaluate(state.model, dataset.x_train, dataset.y_train)
    late = readings[len(readings) // 2 :]
    final = {
        **{f"test_{name}": value for name, value in test.items()},
        **{f"train_{name}": value for name, value in train.items()},
        "efficiency": mean_of(late, "efficiency"),
        "relative_batch_size": mean_of(late, "effective_batch_size") / batch_size,
        "lr_factor": mean_of(late, "lr_factor"),
        "gain": mean_of(late, "gain"),
        "ms_per_step": lower_quartile(milliseconds[len(milliseconds) // 2 :]),
        "steps": state.steps_taken,
        "seconds": state.train_seconds,
        # Beyond the minibatches themselves, by the method's score_fn.
        "extra_forward_samples": state.scorer.num_scored,
    }
    names = [name for name in curve[0] if name != "step"]
    curves = {name: [json_number(point[name]) for point in curve] for name in names}
    return {
        "config": state.config.to_json(),
        **provenance(state.device),
        "final": {name: json_number(value) for name, value in final.items()},
        "curves": {"step": [point["step"] for point in curve], **curves},
    }


def lower_quartile(times: list[float]) -> float:
    """A time that other load on the machine, which only ever adds, spoils less than the median."""
    return sorted(times)[len(times) // 4]


def mean_of(readings: list[dict], name: str) -> float:
    """The mean of the readings that are defined (S is not while its estimate has no sign)."""
    values = [reading[name] for reading in readings if math.isfinite(reading[name])]
    return fmean(values) if values else math.nan


def json_number(value: float) -> float | int | None:
    """Integers as they are, six significant digits, and None for NaN and infinities, which JSON
    does not have."""
    if isinstance(value, int):
        return value
    return float(f"{value:.6g}") if math.isfinite(value) else None
