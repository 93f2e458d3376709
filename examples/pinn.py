"""Collocation points by importance: a PINN of Burgers' equation, against the exact solution.

    python examples/pinn.py [--steps 10000] [--points 10000] [--method scan]

u_t + u u_x = (0.01 / pi) u_xx for t in [0, 1], x in [-1, 1], from u = -sin(pi x): a front grows at
x = 0, and soon a few points have almost all of the gradient. The network carries derivatives
through its layers (Taylor mode), so one forward pass has the residual r, and each point's score:
the norm of the gradient of r^2 by the weights of the last layer. Since scores change fast, those of
all points are renewed every 200 steps. With --method scan the same script draws uniformly, for a
comparison. Half a minute on one core; runs on a GPU if there is one.
"""

from __future__ import annotations

import argparse
from math import pi

import numpy as np
import torch
from torch import Tensor, nn

import fastis

NU = 0.01 / pi


def solution(t: Tensor, x: Tensor) -> Tensor:
    """float64 [T, X] at the times t [T] and places x [X], by Cole and Hopf::

    u = -E[sin(pi y) f(y)] / E[f(y)],   f(y) = exp(-cos(pi y) / (2 pi nu)),   y ~ Normal(x, 2 nu t)

    with both expectations by Gauss-Hermite quadrature.
    """
    nodes, weights = (torch.from_numpy(part) for part in np.polynomial.hermite.hermgauss(100))
    y = x.double()[:, None] - (4 * NU * t.double()).sqrt()[:, None, None] * nodes
    log_f = weights.log() - torch.cos(pi * y) / (2 * pi * NU)
    return -(log_f.softmax(-1) * torch.sin(pi * y)).sum(-1)


class JetNetwork(nn.Module):
    """tanh layers on a value with its derivatives by t, by x and twice by x: ``[4, B, H]``."""

    def __init__(self, width: int = 32, hidden: int = 4) -> None:
        super().__init__()
        sizes = [2] + [width] * hidden
        self.hidden = nn.ModuleList(map(nn.Linear, sizes[:-1], sizes[1:]))
        self.last = nn.Linear(width, 1, bias=False)
        for layer in (*self.hidden, self.last):
            nn.init.xavier_normal_(layer.weight)
        with torch.no_grad():
            self.hidden[0].weight.mul_(3)  # fronts are found sooner

    def forward(self, t: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """At the points t, x ``[B]``: the output's jet, ``[4, B]``, and the last layer's input."""
        one, zero = torch.ones_like(t), torch.zeros_like(t)
        h = torch.stack([torch.stack([t, one, zero, zero]), torch.stack([x, zero, one, zero])], -1)
        for layer in self.hidden:
            z, z_t, z_x, z_xx = h @ layer.weight.T
            a = torch.tanh(z + layer.bias)
            s = 1 - a**2
            h = torch.stack([a, s * z_t, s * z_x, s * (z_xx - 2 * a * z_x**2)])
        return self.last(h)[..., 0], h


def burgers(t: Tensor, x: Tensor, jet: Tensor) -> tuple[Tensor, Tensor]:
    """u and the residual, ``[B]``, where u = -sin(pi x) + t (1 - x^2) n is right at the edges."""
    n, n_t, n_x, n_xx = jet
    s, c = torch.sin(pi * x), torch.cos(pi * x)
    u = -s + t * (1 - x**2) * n
    u_t = (1 - x**2) * (n + t * n_t)
    u_x = -pi * c + t * ((1 - x**2) * n_x - 2 * x * n)
    u_xx = pi**2 * s + t * ((1 - x**2) * n_xx - 4 * x * n_x - 2 * n)
    return u, u_t + u * u_x - NU * u_xx


def score(t: Tensor, x: Tensor, jet: Tensor, h: Tensor) -> Tensor:
    """``[B]``: the norm of each point's d r^2 / d w, w the last layer's weights; no backward pass.

    r depends on w through the jet alone, which is h w: d r^2 / d w = 2 r sum_c (d r / d jet_c) h_c.
    """
    with torch.enable_grad():
        jet = jet.detach().requires_grad_()
        residual = burgers(t, x, jet)[1]
        (slopes,) = torch.autograd.grad(residual.sum(), jet)
    by_weights = 2 * residual.detach()[:, None] * (slopes[..., None] * h.detach()).sum(0)
    return by_weights.norm(dim=1)


@torch.no_grad()
def relative_error(model: JetNetwork, device: str) -> float:
    t, x = torch.linspace(0, 1, 101), torch.linspace(-1, 1, 257)
    grid = [part.flatten().to(device) for part in torch.meshgrid(t, x, indexing="ij")]
    u = burgers(*grid, model(*grid)[0])[0].double().cpu()
    exact = solution(t, x).flatten()
    return float((u - exact).norm() / exact.norm())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--points", type=int, default=10_000)
    parser.add_argument("--method", default="emais", help="scan: uniform draws")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(args.seed)

    t, x = torch.rand(args.points, device=device), 2 * torch.rand(args.points, device=device) - 1
    model = JetNetwork().to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.steps)

    def scores(indices: Tensor) -> Tensor:
        points = t[indices], x[indices]
        return score(*points, *model(*points))

    method: str | fastis.methods.Method = args.method
    if method == "emais":
        method = fastis.methods.EMAIS(refresh_every=200, score_fn=scores, tau=200)
    sampler = fastis.Sampler(args.points, batch_size=128, method=method, device=device)
    scheduler = fastis.EffectiveBatchLR(schedule, sampler, max_factor=2.0)
    for step in range(1, args.steps + 1):
        batch = sampler.sample()
        points = t[batch.indices], x[batch.indices]
        jet, h = model(*points)
        sampler.update(batch, score(*points, jet, h))
        loss = (batch.weights * burgers(*points, jet)[1] ** 2).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
        if step % max(1, args.steps // 10) == 0:
            print(f"step {step}: loss {loss.item():.1e}; {sampler.prediction()}")
    print(f"relative L2 error {relative_error(model, device):.4f}")


if __name__ == "__main__":
    main()
