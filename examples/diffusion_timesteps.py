"""A small diffusion model, its timesteps drawn by importance.

    python examples/diffusion_timesteps.py [--steps 3000] [--sampler uniform]

Images of clothes, 16 x 16 (the subset of Fashion-MNIST in bench/data), a network that predicts the
noise and the variance of each step, and the variational bound for a loss: of its 1,000 terms the
first few have far larger gradients than the rest. With --sampler uniform or loss the same script
draws timesteps uniformly, or by their losses, for a comparison. A minute on one core.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastis.integrations.diffusion import TimestepSampler

IMAGES = Path(__file__).resolve().parents[1] / "bench" / "data" / "fashion_mnist_subset.npz"


def images(name: str) -> Tensor:
    """Float32 ``[N, 256]`` in [-1, 1]: 28 x 28 with a border of black, averaged over 2 x 2."""
    x = torch.from_numpy(np.load(IMAGES)[name]).float()[:, None]
    return F.avg_pool2d(F.pad(x, (2, 2, 2, 2)), 2).round().div(127.5).sub(1).flatten(1)


class Diffusion:
    """The forward process of Ho et al. 2020; the bound's terms as in Nichol & Dhariwal 2021."""

    def __init__(self, num_timesteps: int = 1000) -> None:
        self.num_timesteps = num_timesteps
        beta = torch.linspace(0.1, 20, num_timesteps, dtype=torch.float64) / num_timesteps
        kept = torch.cumprod(1 - beta, 0)
        before = torch.cat([kept.new_ones(1), kept[:-1]])
        variance = beta * (1 - before) / (1 - kept)
        variance[0] = variance[1]
        self.signal, self.noise = kept.sqrt().float()[:, None], (1 - kept).sqrt().float()[:, None]
        self.of_start = (beta * before.sqrt() / (1 - kept)).float()[:, None]
        self.of_noisy = ((1 - before) * (1 - beta).sqrt() / (1 - kept)).float()[:, None]
        self.least, self.most = variance.log().float()[:, None], beta.log().float()[:, None]

    def training_losses(self, model: nn.Module, start: Tensor, t: Tensor) -> Tensor:
        """``[B]``: T times the bound's term of step t, in bits per pixel."""
        noise = torch.randn_like(start)
        noisy = self.signal[t] * start + self.noise[t] * noise
        predicted, part = model(noisy, t).chunk(2, 1)
        part = (part + 1) / 2
        log_variance = part * self.most[t] + (1 - part) * self.least[t]
        found = (noisy - self.noise[t] * predicted) / self.signal[t]
        mean = self.of_start[t] * found + self.of_noisy[t] * noisy
        error = self.of_start[t] * (start - found)
        ratio = (self.least[t] - log_variance).exp() + error.square() * (-log_variance).exp()
        kl = 0.5 * (log_variance - self.least[t] - 1 + ratio)
        scale = (-0.5 * log_variance).exp()  # at t = 0: the likelihood of the 256 levels
        above = torch.special.ndtr(scale * (start - mean + 1 / 255)).where(start < 0.999, 1.0)
        below = torch.special.ndtr(scale * (start - mean - 1 / 255)).where(start > -0.999, 0.0)
        nats = torch.where(t[:, None] == 0, -(above - below).clamp(min=1e-12).log(), kl)
        return self.num_timesteps * nats.mean(1) / math.log(2)


class Network(nn.Module):
    """An MLP with residual blocks, told the time by sines and cosines."""

    def __init__(self, num_timesteps: int, width: int = 192) -> None:
        super().__init__()
        self.rates = (-math.log(10_000) * torch.arange(32) / 32).exp() * (1000 / num_timesteps)
        self.enter, self.time = nn.Linear(256, width), nn.Linear(64, width)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.SiLU()) for _ in range(3)
        )
        self.leave = nn.Linear(width, 512)
        nn.init.zeros_(self.leave.weight)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        angles = t[:, None] * self.rates
        hidden = self.enter(x) + self.time(torch.cat([angles.cos(), angles.sin()], 1))
        for block in self.blocks:
            hidden = hidden + block(hidden)
        return self.leave(hidden)


def bound(model: nn.Module, diffusion: Diffusion, x: Tensor) -> float:
    """Over all timesteps, each with some images: bits per pixel."""
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        t = torch.arange(diffusion.num_timesteps).repeat(4)
        chosen = x[torch.randint(len(x), t.shape)]
        return float(diffusion.training_losses(model, chosen, t).mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--sampler", choices=["gradient", "loss", "uniform"], default="gradient")
    args = parser.parse_args()
    torch.manual_seed(0)

    train, test = images("x_train"), images("x_test")
    diffusion = Diffusion()
    model = Network(diffusion.num_timesteps)
    optimizer = torch.optim.Adam(model.parameters(), lr=args.lr)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=args.steps)
    by_gradient = args.sampler == "gradient"
    schedule_sampler = TimestepSampler(diffusion, model=model if by_gradient else None)

    for step in range(1, args.steps + 1):
        x = train[torch.randint(len(train), (args.batch_size,))]
        if args.sampler == "uniform":
            t, weights = torch.randint(diffusion.num_timesteps, (len(x),)), torch.ones(len(x))
        else:
            t, weights = schedule_sampler.sample(len(x), "cpu")
        losses = diffusion.training_losses(model, x, t)
        if args.sampler == "loss":
            schedule_sampler.update_with_local_losses(t, losses.detach())
        optimizer.zero_grad()
        (losses * weights).mean().backward()
        optimizer.step()
        schedule.step()
        if step % max(1, args.steps // 5) == 0:
            print(f"step {step}: {bound(model, diffusion, test):.3f} bits per pixel")
    if schedule_sampler.sampler is not None:
        first = 100 * schedule_sampler.weights()[:10].sum() / diffusion.num_timesteps
        print(f"the first 10 timesteps get {first:.0f} % of the draws")
        print(schedule_sampler.sampler.prediction())


if __name__ == "__main__":
    main()
