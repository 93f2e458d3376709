"""Uniform sampling, the two baselines: without replacement ("scan") and with it ("uniform")."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from fastis.methods.base import FOREVER, Method


@dataclass(frozen=True)
class Scan(Method):
    """SGD-Scan: every epoch a new permutation; the ragged last minibatch is dropped.

    Equivalent to ``DataLoader(..., shuffle=True, drop_last=True)``; coefficients are 1.
    """

    name: ClassVar[str] = "scan"

    def warmup_draws(self, batches_per_epoch: int) -> int:
        return FOREVER


@dataclass(frozen=True)
class Uniform(Method):
    """SGD-Uni: independent uniform draws with replacement; coefficients are 1.

    Equivalent to ``torch.randint(num_samples, (batch_size,))``.
    """

    name: ClassVar[str] = "uniform"

    def warmup_draws(self, batches_per_epoch: int) -> int:
        return 0
