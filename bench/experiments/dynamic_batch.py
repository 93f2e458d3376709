"""Uniform minibatches as large as another run's effective minibatch size (Kutsuna 2025, 9.4.1).

The run that is followed trains alongside, one block of steps ahead: its N_ems after each step is
the size of the follower's next minibatch, and the learning rate goes with the size (eq. 8). Nothing
has to be stored, and both runs start from the same network.
"""

from __future__ import annotations

from collections import deque

import torch

import fastis


class FollowingSampler:
    """Independent uniform draws of ``round(batch_size * factor)`` samples, at least 1.

    It stands where a :class:`fastis.Sampler` does in a run: the factor of the first minibatch is 1,
    and every :meth:`update` moves on to the next one.
    """

    def __init__(self, num_samples: int, batch_size: int, seed: int, device: torch.device) -> None:
        self.num_samples, self.batch_size, self.device = num_samples, batch_size, device
        self.generator = torch.Generator(device).manual_seed(seed)
        self.factor = 1.0
        self._ahead: deque[float] = deque()

    def follow(self, factors: list[float]) -> None:
        """Takes the factors after each of the next steps."""
        self._ahead.extend(factors)

    @property
    def size(self) -> int:
        """Of the next minibatch."""
        return min(max(1, round(self.batch_size * self.factor)), self.num_samples)

    def sample(self) -> fastis.Batch:
        indices = torch.randint(
            self.num_samples, (self.size,), generator=self.generator, device=self.device
        )
        return fastis.Batch(indices, torch.ones(self.size, device=self.device))

    def update(self, batch: fastis.Batch, out: object) -> None:
        self.factor = self._ahead.popleft()

    def lr_factor(self, optimizer: str = "sgd", rule: str = "linear") -> torch.Tensor:
        factor = self.size / self.batch_size
        value = factor if optimizer == "sgd" else factor**0.5
        return torch.full((), value, dtype=torch.float64, device=self.device)

    def reading(self) -> dict[str, float]:
        """What is read of a sampler's variance: the size in force, and uniform's efficiency."""
        return {"effective_batch_size": float(self.size), "efficiency": 1.0}
