"""Two equations that networks are trained on by their residual, with solutions to compare with.

On t in [0, 1], x in [-1, 1], as in the comparison of Wu et al. 2023 (arXiv 2207.10289)::

    Burgers      u_t + u u_x = (0.01 / pi) u_xx     u = -sin(pi x)     at t = 0,  0 at x = +-1
    Allen-Cahn   u_t = 0.001 u_xx + 5 u - 5 u^3     u = x^2 cos(pi x)  at t = 0, -1 at x = +-1

The network N enters as u = start + t (1 - x^2) N(t, x), which has these values whatever N is, so
that the mean square of the residual is all of the loss. Solutions are computed in float64: Burgers'
by the transform of Cole and Hopf, Allen-Cahn's by sines.
"""

from __future__ import annotations

from collections.abc import Callable
from math import exp, pi
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

NU = 0.01 / pi
DIFFUSION, REACTION = 1e-3, 5.0


class Form(NamedTuple):
    """What turns the network's jets at some points into those of u = start + factor N.

    Attributes
    ----------
    inputs : Tensor
        ``[4, n, I]``: jets of the network's inputs.
    start, factor : Tensor
        ``[4, n]``: their jets (value, d/dt, d/dx, d2/dx2).
    """

    inputs: Tensor
    start: Tensor
    factor: Tensor

    def at(self, indices: Tensor) -> Form:
        return Form(*(part.index_select(1, indices) for part in self))

    def jets(self, n: Tensor) -> Tensor:
        """``[4, B]`` of u, from ``[4, B]`` of N."""
        f = self.factor
        u = torch.addcmul(self.start, f[0], n)
        u[1:].addcmul_(f[1:], n[0])
        u[3].addcmul_(f[2], n[2], value=2)
        return u

    def slopes(self, by_u: Tensor) -> Tensor:
        """``[4, B]``: derivatives by the jets of N, from those by the jets of u."""
        f = self.factor
        by_n = f[0] * by_u
        by_n[0].add_((f[1:] * by_u[1:]).sum(0))
        by_n[2].addcmul_(f[2], by_u[3], value=2)
        return by_n


class Equation(NamedTuple):
    """A form; the residual ``[B]`` of jets ``[4, B]`` with its derivatives by them, ``[4, B]``; and
    the solution on a grid of t and x."""

    name: str
    form: Callable[[Tensor, Tensor], Form]  # float64 [n] t, x
    residual: Callable[[Tensor], tuple[Tensor, Tensor]]
    solution: Callable[[Tensor, Tensor], Tensor]  # [T] t, [X] x -> [T, X]


def form(start: tuple[Tensor, ...], t: Tensor, x: Tensor) -> Form:
    """Of u = start + t (1 - x^2) N(t, x)."""
    zero, one = torch.zeros_like(t), torch.ones_like(t)
    inputs = torch.stack([torch.stack([t, one, zero, zero]), torch.stack([x, zero, one, zero])], -1)
    factor = torch.stack([t * (1 - x**2), 1 - x**2, -2 * t * x, -2 * t])
    return Form(inputs.float(), torch.stack(start).float(), factor.float())


def burgers_form(t: Tensor, x: Tensor) -> Form:
    s, c = torch.sin(pi * x), torch.cos(pi * x)
    return form((-s, torch.zeros_like(s), -pi * c, pi**2 * s), t, x)


def burgers_residual(u: Tensor) -> tuple[Tensor, Tensor]:
    r = torch.addcmul(u[1], u[0], u[2]).sub_(u[3], alpha=NU)
    one = torch.ones_like(r)
    return r, torch.stack([u[2], one, u[0], one.mul(-NU)])


def burgers_solution(t: Tensor, x: Tensor, nodes: int = 150) -> Tensor:
    """By Cole and Hopf: with y = x - sqrt(4 nu t) q and f(y) = exp(-cos(pi y) / (2 pi nu))::

        u = -integral sin(pi y) f(y) exp(-q^2) dq / integral f(y) exp(-q^2) dq

    Each integral by Gauss and Hermite (Basdevant et al. 1986).
    """
    q, w = (torch.from_numpy(part) for part in np.polynomial.hermite.hermgauss(nodes))
    y = x.double()[:, None] - (4 * NU * t.double()).sqrt()[:, None, None] * q
    log_f = w.log() - torch.cos(pi * y) / (2 * pi * NU)
    return -(log_f.softmax(-1) * torch.sin(pi * y)).sum(-1)


def allen_cahn_form(t: Tensor, x: Tensor) -> Form:
    s, c = torch.sin(pi * x), torch.cos(pi * x)
    slope = 2 * x * c - pi * x**2 * s
    curvature = 2 * c - 4 * pi * x * s - pi**2 * x**2 * c
    return form((x**2 * c, torch.zeros_like(c), slope, curvature), t, x)


def allen_cahn_residual(u: Tensor) -> tuple[Tensor, Tensor]:
    square, one = u[0] * u[0], torch.ones_like(u[0])
    r = u[1] - DIFFUSION * u[3] - REACTION * u[0] * (1 - square)
    return r, torch.stack([REACTION * (3 * square - 1), one, one * 0, -DIFFUSION * one])


def allen_cahn_flow(u: Tensor, seconds: float, steps: int) -> Tensor:
    """u some time later, float64 ``[M + 1]`` on -1 + 2 k / M, with -1 at both ends.

    Strang's splitting of two flows that are exact on their own: half a step of diffusion, by sines
    of u + 1 (the Fourier modes of its odd extension); a step of the reaction, u e^{5h} / sqrt(1 +
    u^2 (e^{10h} - 1)), which leaves -1 as it is; half a step of diffusion.
    """
    h, size = seconds / steps, 2 * (len(u) - 1)
    waves = pi / 2 * torch.arange(size // 2 + 1, dtype=torch.float64)
    half, growth = torch.exp(-DIFFUSION * waves**2 * h / 2), exp(REACTION * h)

    def diffused(u: Tensor, decay: Tensor) -> Tensor:
        v = u + 1
        odd = torch.cat([v[:-1], -v[1:].flip(0)])
        return torch.fft.irfft(decay * torch.fft.rfft(odd), n=size)[: len(u)] - 1

    for step in range(steps):
        u = diffused(u, half if step == 0 else half * half)
        u = growth * u / (1 + u**2 * (growth**2 - 1)).sqrt()
    return diffused(u, half)


def allen_cahn_solution(
    t: Tensor, x: Tensor, size: int = 512, steps_per_second: int = 2000
) -> Tensor:
    """By :func:`allen_cahn_flow` from one time to the next; x has to lie on the grid."""
    at = (x.double() + 1) * size / 2
    if (at - at.round()).abs().max() > 1e-6:
        raise ValueError(f"x must lie on the grid -1 + 2 k / {size}, got other points")
    grid = torch.linspace(-1, 1, size + 1, dtype=torch.float64)
    u, now, rows = grid**2 * torch.cos(pi * grid), 0.0, []
    for then in t.double().tolist():
        if then > now:
            u = allen_cahn_flow(u, then - now, max(1, round((then - now) * steps_per_second)))
            now = then
        rows.append(u[at.round().long()])
    return torch.stack(rows)


EQUATIONS = {
    equation.name: equation
    for equation in (
        Equation("burgers", burgers_form, burgers_residual, burgers_solution),
        Equation("allen_cahn", allen_cahn_form, allen_cahn_residual, allen_cahn_solution),
    )
}
