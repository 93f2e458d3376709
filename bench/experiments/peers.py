"""What others use in place of a sampler, with what a run asks of a :class:`fastis.Sampler`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

import fastis
from bench.experiments.config import RunConfig


class Peer(Protocol):
    """What a run asks of it."""

    def sample(self) -> fastis.Batch: ...

    def update(self, batch: fastis.Batch, out: fastis.ScoredLoss) -> None: ...

    def lr_factor(self, optimizer: str = "sgd", rule: str = "linear") -> Tensor: ...

    def reading(self) -> dict[str, float]: ...


class Plain:
    """A peer without coefficients or a factor of the learning rate."""

    def update(self, batch: fastis.Batch, out: fastis.ScoredLoss) -> None:
        pass

    def lr_factor(self, optimizer: str = "sgd", rule: str = "linear") -> Tensor:
        return torch.ones((), dtype=torch.float64)

    def reading(self) -> dict[str, float]:
        return {"effective_batch_size": float("nan"), "efficiency": float("nan")}


class ClassBalanced(Plain):
    """torch's WeightedRandomSampler with weights 1 / n_c: every class is drawn equally often, each
    loss counts alike."""

    def __init__(self, config: RunConfig, labels: Tensor) -> None:
        weights = 1.0 / labels.bincount()[labels].double()
        self.batch_size, self.device = config.batch_size, labels.device
        self.generator = torch.Generator().manual_seed(config.seed)
        self.weights = weights
        self._drawn = iter(())

    def sample(self) -> fastis.Batch:
        batch = next(self._drawn, None)
        if batch is None:  # an epoch's indices at once, as its DataLoader would
            number = len(self.weights) // self.batch_size * self.batch_size
            sampler = torch.utils.data.WeightedRandomSampler(
                self.weights, number, generator=self.generator
            )
            indices = torch.tensor(list(sampler), device=self.device)
            self._drawn = iter(indices.split(self.batch_size))
            batch = next(self._drawn)
        return fastis.Batch(batch, torch.ones(len(batch), device=self.device))


SAMPLERS: dict[str, Callable[[RunConfig, Tensor], Peer]] = {"class_balanced": ClassBalanced}
