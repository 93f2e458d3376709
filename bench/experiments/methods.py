"""A run's sampling method: its options from the configuration, the rest from the run.

Plain JSON values can't hold a function, so ``"score_fn": true`` in a configuration's options stands
for the run's own forward pass; methods that can't do without get it anyway.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Protocol

import torch
from torch import Tensor

import fastis
from bench.experiments import peers
from bench.experiments.config import RunConfig
from bench.experiments.datasets import Dataset
from bench.experiments.tasks import EVALUATION_BATCH, Task
from fastis.estimators import gradient_norms


class HasModel(Protocol):
    """What scoring needs of a run."""

    model: torch.nn.Module
    dataset: Dataset
    task: Task


class Scorer:
    """``score_fn`` of a run: training samples by their indices, and how many it has scored.

    Without augmentation, and in eval mode where the network has one: scoring must not move batch
    normalisation's statistics.
    """

    def __init__(self, run: HasModel | None, exact: bool = False) -> None:
        self.run, self.exact, self.num_scored = run, exact, 0
        self._has_eval_mode: bool | None = None

    def __call__(self, indices: Tensor) -> fastis.ScoredLoss | Tensor:
        """Losses and scores, or, if exact, the gradient norms of all parameters, float ``[n]``."""
        self.num_scored += len(indices)
        model = self.run.model
        if self._has_eval_mode is None:  # the network comes after the sampler's method
            self._has_eval_mode = any(
                isinstance(module, torch.nn.modules.batchnorm._BatchNorm | torch.nn.Dropout)
                for module in model.modules()
            )
        if self._has_eval_mode:
            model.eval()
        scored = self._gradient_norms(indices) if self.exact else self._scored(indices)
        if self._has_eval_mode:
            model.train()
        return scored

    def _scored(self, indices: Tensor) -> fastis.ScoredLoss:
        data, loss = self.run.dataset, self.run.task.loss
        parts = [
            loss(self.run.model(data.x_train[i]), data.y_train[i])
            for i in indices.split(EVALUATION_BATCH)
        ]
        if len(parts) == 1:
            return parts[0]
        losses = torch.cat([part.losses for part in parts])
        return fastis.ScoredLoss(
            losses.mean(), losses, torch.cat([part.score for part in parts]), None
        )

    def _gradient_norms(self, indices: Tensor) -> Tensor:
        run, data = self.run, self.run.dataset
        return gradient_norms(
            run.model, run.task.loss, data.x_train[indices], data.y_train[indices]
        )


def build_method(config: RunConfig, num_samples: int, scorer: Scorer) -> fastis.methods.Method:
    """The method of a configuration; its options change the published settings.

    Raises
    ------
    ValueError
        for an unknown method or option.
    """
    if config.method not in fastis.methods.BY_NAME:
        names = ", ".join(fastis.methods.BY_NAME)
        raise ValueError(f"method must be one of {names}, got {config.method!r}")
    kind = fastis.methods.BY_NAME[config.method]
    fields = {f.name: f for f in dataclasses.fields(kind) if f.init}
    config.check_options(fields)
    epochs = math.ceil(config.iterations / max(1, num_samples // config.batch_size))
    of_the_run = {
        "total_epochs": max(2, epochs),  # at least one beyond the warm-up
        "total_steps": config.iterations,
    }
    options = {name: value for name, value in of_the_run.items() if name in fields}
    options.update(config.options)
    if _wants_scores(options, fields):
        scorer.exact = options.get("score") == "gradient_norm"
        options["score_fn"] = scorer
    return getattr(kind, "published", kind)(**options)


def check_config(config: RunConfig, num_samples: int) -> None:
    """Raises ValueError or TypeError on a configuration that no sampler could be built for."""
    if config.method in peers.SAMPLERS:
        peers.build_peer(config, torch.zeros(num_samples, dtype=torch.int64))
        return
    nothing = Scorer(run=None)
    fastis.Sampler(
        num_samples,
        config.batch_size,
        method=build_method(config, num_samples, nothing),
        scheme=config.scheme,
        seed=0,
    )


def _wants_scores(options: dict[str, Any], fields: dict[str, dataclasses.Field]) -> bool:
    """Whether the method must have a ``score_fn``, or the configuration asks for one."""
    if "score_fn" not in fields:
        return False
    is_required = fields["score_fn"].default is dataclasses.MISSING
    return bool(is_required or options.get("score_fn") or options.get("refresh_every"))
