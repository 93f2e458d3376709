"""Ways to choose the collocation points of every step, behind one interface.

``next()`` gives B points and their coefficients; ``learn(points, scores)`` hands back what the step
has shown. All share one pool of points, but for :class:`Fresh`, which makes new ones.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

import fastis
from bench.experiments.equations import Equation, Form

Residuals = Callable[[Form], Tensor]  # [n] of any points, with the present parameters


def uniform_points(num_points: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """float64 [n] t and x, independent and uniform."""
    t, x = torch.rand(2, num_points, generator=generator, dtype=torch.float64)
    return t, 2 * x - 1


class Points(NamedTuple):
    """A minibatch: its form, its coefficients 1/(N p) (None: all 1), and where it came from."""

    form: Form
    weights: Tensor | None
    batch: fastis.Batch | None = None


class Fresh:
    """New uniform points all the time, made ``every`` steps for as many steps, each used once."""

    def __init__(
        self, equation: Equation, batch_size: int, generator: torch.Generator, every: int = 100
    ) -> None:
        self._equation, self._generator = equation, generator
        self._size, self._every, self._step = batch_size, every, 0

    def next(self) -> Points:
        at = self._step % self._every
        if at == 0:
            made = uniform_points(self._size * self._every, self._generator)
            self._made = self._equation.form(*made)
        self._step += 1
        part = slice(at * self._size, (at + 1) * self._size)
        return Points(Form(*(part_of[:, part] for part_of in self._made)), None)

    def learn(self, points: Points, scores: Tensor | fastis.ScoredLoss) -> None:
        pass


class Resampled:
    """Draws from probabilities that are computed anew, from all residuals, ``every`` steps.

    ``corrected=False``: RAD (Wu et al. 2023, arXiv 2207.10289)::

        p ~ |r|^k / mean(|r|^k) + c,   all weights 1

    There a set of points is drawn, and trained on whole; here, where steps are minibatches, each is
    drawn from p itself. ``corrected=True``: Nabian et al. 2021 (arXiv 2104.12325) with k = 2::

        p ~ estimate of r^2,   weights 1/(N p)

    They score ``seeds`` points, and every other one has the value of the nearest of these. c is
    ours then: without it, points whose residual has grown since have coefficients without bound.
    """

    def __init__(
        self,
        pool: Form,
        coordinates: Tensor,
        batch_size: int,
        generator: torch.Generator,
        residuals: Residuals,
        *,
        power: float,
        constant: float,
        every: int = 1000,
        corrected: bool = False,
        seeds: int = 0,
    ) -> None:
        self._pool, self._residuals, self._generator = pool, residuals, generator
        self._size, self._every, self._step = batch_size, every, 0
        self._power, self._constant, self._corrected = power, constant, corrected
        self._seeds = None
        if seeds:
            chosen = torch.randperm(len(coordinates), generator=generator)[:seeds]
            self._seeds = pool.at(chosen)
            self._nearest = torch.cdist(coordinates, coordinates[chosen]).argmin(1)

    def _weights(self) -> Tensor:
        """float64 ``[N]``, of mean 1 + c."""
        r = self._residuals(self._pool if self._seeds is None else self._seeds)
        w = r.double().abs().pow(self._power)
        if self._seeds is not None:
            w = w[self._nearest]
        return w / w.mean() + self._constant

    def next(self) -> Points:
        at = self._step % self._every
        if at == 0:
            w = self._weights()
            drawn = torch.multinomial(
                w, self._size * self._every, replacement=True, generator=self._generator
            )
            self._drawn = drawn.view(self._every, self._size)
            self._coefficients = (w.mean() / w).float()
        self._step += 1
        i = self._drawn[at]
        return Points(self._pool.at(i), self._coefficients[i] if self._corrected else None)

    def learn(self, points: Points, scores: Tensor | fastis.ScoredLoss) -> None:
        pass


class Sampled:
    """By a :class:`fastis.Sampler`, which learns from the scores of every step."""

    def __init__(self, pool: Form, batch_size: int, seed: int, **options: Any) -> None:
        self._pool = pool
        self.sampler = fastis.Sampler(pool.start.shape[1], batch_size, seed=seed, **options)
        self._is_uniform = self.sampler.method.name == "scan"

    def next(self) -> Points:
        batch = self.sampler.sample()
        form = self._pool.at(batch.indices)
        return Points(form, None if self._is_uniform else batch.weights, batch)

    def learn(self, points: Points, scores: Tensor | fastis.ScoredLoss) -> None:
        if not self._is_uniform:
            self.sampler.update(points.batch, scores)
