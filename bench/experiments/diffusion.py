"""A small diffusion model: the losses of Nichol & Dhariwal 2021, a mixer, and images of 16 x 16.

The formulas are those of openai/improved-diffusion (gaussian_diffusion.py): noise prediction, the
cosine schedule, a learned variance between beta and beta-tilde, losses in bits per dimension.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.experiments.datasets import load_dataset

SIZE, PATCH = 16, 4
OBJECTIVES = ("simple", "hybrid", "vlb")


class Diffusion:
    """The forward process of T steps, and the losses of a model that predicts noise and variance.

    ``model(x [B, C, H, W], t [B]) -> [B, 2 C, H, W]``.
    """

    def __init__(self, num_timesteps: int = 1000, schedule: str = "cosine") -> None:
        self.num_timesteps = num_timesteps
        beta = SCHEDULES[schedule](num_timesteps)
        kept = torch.cumprod(1 - beta, 0)  # alpha-bar
        before = torch.cat([kept.new_ones(1), kept[:-1]])
        variance = beta * (1 - before) / (1 - kept)  # beta-tilde, of q(x_{t-1} | x_t, x_0)
        variance[0] = variance[1]  # 0 there
        self.signal, self.noise = kept.sqrt().float(), (1 - kept).sqrt().float()
        self.of_start = (beta * before.sqrt() / (1 - kept)).float()
        self.of_noisy = ((1 - before) * (1 - beta).sqrt() / (1 - kept)).float()
        self.least, self.most = variance.log().float(), beta.log().float()

    def noised(self, start: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """x_t ``[B, C, H, W]``."""
        return at_steps(self.signal, t) * start + at_steps(self.noise, t) * noise

    def losses(
        self, output: Tensor, start: Tensor, t: Tensor, noise: Tensor, objective: str
    ) -> Tensor:
        """``[B]``: "simple", "vlb" (T times the step's term), or "hybrid", simple + 0.001 vlb."""
        predicted, fraction = output.chunk(2, 1)
        simple = (predicted - noise).square().flatten(1).mean(1)
        if objective == "simple":
            return simple
        hybrid = objective == "hybrid"
        mean = predicted.detach() if hybrid else predicted
        vlb = self.num_timesteps * self.terms(mean, fraction, start, t, noise)
        return simple + 0.001 * vlb if hybrid else vlb

    def terms(
        self, predicted: Tensor, fraction: Tensor, start: Tensor, t: Tensor, noise: Tensor
    ) -> Tensor:
        """``[B]``, bits per dimension: KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t)); at t = 0 the
        negative log-likelihood of the 256 levels of x_0."""
        noisy = self.noised(start, t, noise)
        part = (fraction + 1) / 2
        log_variance = part * at_steps(self.most, t) + (1 - part) * at_steps(self.least, t)
        found = (noisy - at_steps(self.noise, t) * predicted) / at_steps(self.signal, t)
        mean = at_steps(self.of_start, t) * found + at_steps(self.of_noisy, t) * noisy
        true = at_steps(self.of_start, t) * start + at_steps(self.of_noisy, t) * noisy
        least = at_steps(self.least, t)
        ratio = (least - log_variance).exp() + (true - mean).square() * (-log_variance).exp()
        kl = 0.5 * (log_variance - least - 1 + ratio)
        nats = torch.where(t.view(-1, 1, 1, 1) == 0, _surprise(start, mean, log_variance), kl)
        return nats.flatten(1).mean(1) / math.log(2)


def linear(num_timesteps: int) -> Tensor:
    """beta, float64 ``[T]``, of Ho et al. 2020."""
    return torch.linspace(0.1, 20, num_timesteps, dtype=torch.float64) / num_timesteps


def cosine(num_timesteps: int) -> Tensor:
    """beta, float64 ``[T]``, of Nichol & Dhariwal 2021, section 3.2."""
    at = torch.arange(num_timesteps + 1, dtype=torch.float64) / num_timesteps
    level = torch.cos((at + 0.008) / 1.008 * math.pi / 2) ** 2
    return (1 - level[1:] / level[:-1]).clamp(max=0.999)


SCHEDULES = {"linear": linear, "cosine": cosine}


def at_steps(values: Tensor, t: Tensor) -> Tensor:
    """``values[t]`` as ``[B, 1, 1, 1]``."""
    return values[t].view(-1, 1, 1, 1)


def _surprise(start: Tensor, mean: Tensor, log_variance: Tensor) -> Tensor:
    """-log of what a normal distribution gives to the level of each pixel, 1/127.5 wide; the first
    and the last one reach to infinity."""
    scale = (-0.5 * log_variance).exp()
    above = torch.special.ndtr(scale * (start - mean + 1 / 255))
    below = torch.special.ndtr(scale * (start - mean - 1 / 255))
    above, below = torch.where(start > 0.999, 1.0, above), torch.where(start < -0.999, 0.0, below)
    return -(above - below).clamp(min=1e-12).log()


class Mixer(nn.Module):
    """An MLP-mixer on patches (Tolstikhin et al. 2021), told the timestep by scale and shift."""

    def __init__(self, channels: int, num_timesteps: int, width: int = 64, depth: int = 3) -> None:
        super().__init__()
        self.num_timesteps = num_timesteps
        tokens, pixels = (SIZE // PATCH) ** 2, channels * PATCH**2
        self.enter = nn.Linear(pixels, width)
        self.place = nn.Parameter(0.02 * torch.randn(tokens, width))
        self.time = nn.Sequential(nn.Linear(width, width), nn.SiLU())
        self.blocks = nn.ModuleList(MixerBlock(tokens, width) for _ in range(depth))
        self.leave = nn.Linear(width, 2 * pixels)
        nn.init.zeros_(self.leave.weight)
        nn.init.zeros_(self.leave.bias)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        batch, channels = x.shape[:2]
        seen = F.pixel_unshuffle(x, PATCH).flatten(2).mT  # [B, tokens, pixels]
        time = self.time(_waves(t * (1000 / self.num_timesteps), self.place.shape[1]))
        hidden = self.enter(seen) + self.place
        for block in self.blocks:
            hidden = block(hidden, time)
        side = SIZE // PATCH
        pixels = self.leave(hidden).mT.reshape(batch, 2 * channels * PATCH**2, side, side)
        return F.pixel_shuffle(pixels, PATCH)


class MixerBlock(nn.Module):
    """Mixes tokens, then channels."""

    def __init__(self, tokens: int, width: int) -> None:
        super().__init__()
        self.told = nn.Linear(width, 2 * width)
        self.first, self.second = nn.LayerNorm(width), nn.LayerNorm(width)
        self.tokens = nn.Sequential(
            nn.Linear(tokens, 2 * tokens), nn.SiLU(), nn.Linear(2 * tokens, tokens)
        )
        self.channels = nn.Sequential(
            nn.Linear(width, 2 * width), nn.SiLU(), nn.Linear(2 * width, width)
        )

    def forward(self, hidden: Tensor, time: Tensor) -> Tensor:
        scale, shift = self.told(time)[:, None].chunk(2, -1)
        hidden = hidden + self.tokens(self.first(hidden).mT).mT
        return hidden + self.channels(self.second(hidden) * (1 + scale) + shift)


def _waves(t: Tensor, width: int) -> Tensor:
    """The sinusoidal embedding ``[B, width]`` of timesteps."""
    half = width // 2
    rates = torch.exp(-math.log(10_000) * torch.arange(half) / half)
    angles = t[:, None].float() * rates
    return torch.cat([angles.cos(), angles.sin()], 1)


@dataclass(frozen=True)
class Images:
    """Float32 ``[N, C, 16, 16]`` in [-1, 1], of 256 levels."""

    train: Tensor
    test: Tensor


def load_images(dataset: str, data: str | Path | None) -> Images:
    """A data set of :func:`bench.experiments.datasets.load_dataset`, made smaller."""
    found = load_dataset(dataset, data)
    return Images(_small(found.x_train), _small(found.x_test))


def _small(images: Tensor) -> Tensor:
    """Averaged over squares of 2 x 2, after a border of black makes 32 of 28."""
    border = (2 * SIZE - images.shape[-1]) // 2
    means = F.avg_pool2d(F.pad(images, (border,) * 4, value=-1.0), 2)
    return (means.add_(1).mul_(127.5).round_()).div_(127.5).sub_(1)
