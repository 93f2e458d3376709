"""A coordinate network (SIREN) fitted to an image: pixels are drawn by how wrong they still are.

    python examples/coordinate_network.py [--method uniform] [--image photo.jpg] [--save fitted.png]

Three things are worth copying. The score of a pixel is the norm of its residual, which the loss has
at hand. Pixels lie along a Z-order curve, so that stratified draws are spread over the image. And
the correction is annealed from 0, where the fit leans towards what it finds hard, to 1, where it
minimises the plain squared error. Ten seconds on one core.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

import fastis


class Sine(nn.Module):
    """sin(w0 (W x + b)), initialised as in Sitzmann et al. 2020, section 3.2."""

    def __init__(self, inputs: int, outputs: int, w0: float = 30.0, first: bool = False) -> None:
        super().__init__()
        self.linear, self.w0 = nn.Linear(inputs, outputs), w0
        bound = 1 / inputs if first else math.sqrt(6 / inputs) / w0
        nn.init.uniform_(self.linear.weight, -bound, bound)

    def forward(self, x: Tensor) -> Tensor:
        return torch.sin(self.w0 * self.linear(x))


def siren(channels: int, width: int = 64, depth: int = 3, w0: float = 30.0) -> nn.Module:
    """Coordinates ``[n, 2]`` in [-1, 1] to colours ``[n, channels]``."""
    last = nn.Linear(width, channels)
    bound = math.sqrt(6 / width) / w0
    nn.init.uniform_(last.weight, -bound, bound)
    hidden = [Sine(width, width, w0) for _ in range(depth - 1)]
    return nn.Sequential(Sine(2, width, w0, first=True), *hidden, last)


def texture(size: int) -> Tensor:
    """``[size, size, 1]`` in [-1, 1]: smooth, but for a star of sharp edges and a grating."""
    v, u = torch.meshgrid(*[torch.linspace(-1, 1, size)] * 2, indexing="ij")
    radius, angle = torch.hypot(u + 0.35, v + 0.3), torch.atan2(v + 0.3, u + 0.35)
    image = torch.where(
        radius < 0.35, torch.sign(torch.sin(12 * angle)), 0.3 * torch.sin(2 * u + v)
    )
    grated = ((u - 0.4).abs() < 0.3) & ((v - 0.4).abs() < 0.3)
    return torch.where(grated, torch.sin(120 * u * u) * torch.sin(90 * v), image)[..., None]


def photo(path: str | Path, size: int) -> Tensor:
    """``[size, size, 3]`` in [-1, 1]: the largest square at the top left, scaled."""
    from PIL import Image

    image = Image.open(path).convert("RGB")
    side = min(image.size)
    image = image.crop((0, 0, side, side)).resize((size, size), Image.Resampling.LANCZOS)
    return torch.from_numpy(np.array(image)).float() / 127.5 - 1


def z_order(size: int) -> Tensor:
    """int64 ``[size * size]``: the pixels' indices along a curve that stays in one region long."""
    row, column = torch.meshgrid(*[torch.arange(size)] * 2, indexing="ij")
    bits = range((size - 1).bit_length())
    place = sum(((row >> b & 1) << (2 * b + 1)) + ((column >> b & 1) << (2 * b)) for b in bits)
    return place.flatten().argsort()


def pixels(image: Tensor) -> tuple[Tensor, Tensor]:
    """Coordinates ``[N, 2]`` in [-1, 1] and colours ``[N, channels]``, in Z-order."""
    size = len(image)
    v, u = torch.meshgrid(*[torch.linspace(-1, 1, size)] * 2, indexing="ij")
    order = z_order(size)
    return torch.stack([u, v], -1).reshape(-1, 2)[order], image.flatten(0, 1)[order]


@torch.no_grad()
def psnr(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """In dB, of all pixels; their range is 2."""
    return 10 * math.log10(4 / float((model(x) - y).square().mean()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--image", default="", help="file of an image; default: a made-up texture")
    parser.add_argument("--size", type=int, default=256, help="of the square image, in pixels")
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--batch-size", type=int, default=2048)
    parser.add_argument("--method", choices=["emais", "uniform"], default="emais")
    parser.add_argument("--save", default="", help="file for the fitted image (needs pillow)")
    args = parser.parse_args()
    torch.manual_seed(0)

    image = photo(args.image, args.size) if args.image else texture(args.size)
    x, y = pixels(image)
    model = siren(y.shape[1])
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.steps)
    method = fastis.methods.Uniform()
    if args.method == "emais":  # pixels are seen every few steps: one epoch tells enough
        method = fastis.methods.EMAIS(warmup_epochs=1, least_gain=0.0)
    sampler = fastis.Sampler(len(x), args.batch_size, method=method, scheme="stratified")
    for step in range(args.steps):
        sampler.correction = step / args.steps
        batch = sampler.sample()
        out = fastis.mse_loss(model(x[batch.indices]), y[batch.indices], batch.weights)
        sampler.update(batch, out)
        optimizer.zero_grad()
        out.backward()
        optimizer.step()
        schedule.step()
        if (step + 1) % max(1, args.steps // 5) == 0:
            print(f"step {step + 1}: PSNR {psnr(model, x, y):.2f} dB")
    if args.save:
        save(model, x, args.size, args.save)


@torch.no_grad()
def save(model: nn.Module, x: Tensor, size: int, file: str) -> None:
    from PIL import Image

    colours = torch.empty_like(fitted := model(x))
    colours[z_order(size)] = fitted
    grey = (127.5 * (colours.clamp(-1, 1) + 1)).byte().view(size, size, -1).squeeze(-1)
    Image.fromarray(grey.numpy()).save(file)


if __name__ == "__main__":
    main()
