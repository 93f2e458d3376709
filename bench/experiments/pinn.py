"""PINN."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[2]))

import torch
from torch import Tensor

import fastis
from bench.experiments.collocation import Fresh, Resampled, Sampled, uniform_points
from bench.experiments.equations import EQUATIONS, Form
from bench.experiments.jets import JetMLP, Tape, squared_norms

GRID = (101, 256)  # of t and x, for the error


@dataclass(frozen=True)
class PinnConfig:
    equation: str
    method: str
    lr: float
    steps: int
    seed: int = 0
    options: Mapping[str, Any] = field(default_factory=dict)
    score: str = ""
    lr_factor: bool = False
    batch_size: int = 256
    points: int = 20_000
    width: int = 32


@cache
def truth(name: str) -> tuple[Form, Tensor]:
    """The form on the grid of the error, and the solution there, ``[T, X]``."""
    equation = EQUATIONS[name]
    t = torch.linspace(0, 1, GRID[0], dtype=torch.float64)
    x = -1 + 2 * torch.arange(GRID[1], dtype=torch.float64) / GRID[1]
    form = equation.form(*(part.flatten() for part in torch.meshgrid(t, x, indexing="ij")))
    return form, equation.solution(t, x)


class Run:
    """A network in training."""

    def __init__(self, config: PinnConfig) -> None:
        self.config, self.equation = config, EQUATIONS[config.equation]
        torch.manual_seed(config.seed)
        self.model = JetMLP([self.equation.num_inputs, *[config.width] * 4, 1])
        self.optimizer = torch.optim.Adam([self.model.theta], lr=config.lr, fused=True)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, config.steps)
        generator = torch.Generator().manual_seed(1000 + config.seed)
        t, x = uniform_points(config.points, generator)
        self.pool = self.equation.form(t, x)
        self.points = self._way(torch.stack([t, x], 1).float(), generator)
        self.schedule: Any = schedule
        if config.lr_factor:
            self.schedule = fastis.EffectiveBatchLR(schedule, self.points.sampler)

    def _way(self, coordinates: Tensor, generator: torch.Generator) -> Any:
        config, size = self.config, self.config.batch_size
        if config.method == "fresh":
            return Fresh(self.equation, size, generator, **config.options)
        if config.method in ("rad", "rescored"):
            return Resampled(
                self.pool,
                coordinates,
                size,
                generator,
                self.residuals,
                corrected=config.method == "rescored",
                **config.options,
            )
        if config.method == "scan":
            return Sampled(self.pool, size, config.seed, method="scan")
        options = dict(config.options)
        own = {k: options.pop(k) for k in ("correction", "max_duplicates", "scheme") if k in options}
        if "refresh_every" in options:
            options["score_fn"] = self.scores
        method = fastis.methods.EMAIS(**options)
        return Sampled(self.pool, size, config.seed, method=method, **own)

    def residuals(self, form: Form) -> Tensor:
        """``[n]``."""
        return torch.cat([self._forward(part)[0] for part in parts_of(form)])

    def scores(self, indices: Tensor) -> Tensor:
        """``[n]``, of points of the pool."""
        found = []
        for part in parts_of(self.pool.at(indices)):
            r, slopes, tapes = self._forward(part)
            found.append(cheap(self.config.score, r, slopes, tapes))
        return torch.cat(found)

    def _forward(self, form: Form) -> tuple[Tensor, Tensor, list[Tape]]:
        """Residuals ``[B]``, their derivatives by the network's output ``[4, B]``, and the tapes."""
        n, tapes = self.model.forward(form.inputs)
        r, by_u = self.equation.residual(form.jets(n))
        return r, form.slopes(by_u), tapes

    def step(self) -> None:
        points, score = self.points.next(), self.config.score
        r, slopes, tapes = self._forward(points.form)
        delta = r if points.weights is None else points.weights * r
        delta = delta * slopes * (2 / len(r))
        norms = self.model.backward(tapes, delta, score == "norm")
        if score:
            if norms is not None and points.weights is not None:
                norms *= len(r) / points.weights
            self.points.learn(points, norms if score == "norm" else cheap(score, r, slopes, tapes))
        self.optimizer.step()
        self.schedule.step()

    def error(self) -> float:
        """Relative L2 error on the grid."""
        form, solution = truth(self.config.equation)
        n = torch.cat([self.model.forward(part.inputs)[0][0] for part in parts_of(form)])
        u = (form.start[0] + form.factor[0] * n).double().view(GRID)
        return float((u - solution).norm() / solution.norm())


def parts_of(form: Form, size: int = 512) -> list[Form]:
    """Small enough for the caches."""
    return [Form(*part) for part in zip(*(f.split(size, dim=1) for f in form), strict=True)]


SCORES = ("norm", "last", "output", "residual", "loss")


def cheap(score: str, r: Tensor, slopes: Tensor, tapes: list[Tape]) -> Tensor:
    """``[B]``: of each point's own loss, from the forward pass."""
    if score == "residual":
        return r.abs()
    if score == "loss":
        return r * r
    if score == "output":
        return 2 * r.abs() * torch.linalg.vector_norm(slopes, dim=0)
    return 2 * r.abs() * squared_norms(tapes[-1].h, slopes[..., None]).sqrt()
