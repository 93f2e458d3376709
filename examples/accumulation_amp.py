"""Gradient accumulation and mixed precision: one minibatch in parts, float16 with a GradScaler.

    python examples/accumulation_amp.py [--parts 4] [--epochs 4]

A minibatch is drawn whole, computed in parts, and learnt from once. A step that the scaler skips
is no step of the network, but one of the sampler, which has seen its scores. On a CPU autocast
computes in bfloat16. Seconds on one core; runs on a GPU if there is one.
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor, nn

import fastis


def stripes(num_samples: int) -> tuple[Tensor, Tensor]:
    """Images of one of four bars in noise; in some of them it is hardly to be seen."""
    y = torch.randint(4, (num_samples,))
    noise = 0.3 + 4 * torch.rand(num_samples, 1, 1, 1).pow(4)
    x = torch.randn(num_samples, 1, 16, 16) * noise
    rows = torch.arange(16)[None, :, None] // 4 == y[:, None, None]
    x[:, 0] += rows.float()
    return x, y


def network() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(1, 8, 3, stride=2), nn.GroupNorm(2, 8), nn.ReLU()),
        *(nn.Conv2d(8, 16, 3, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(144, 4)),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--samples", type=int, default=4096)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--parts", type=int, default=4, help="of a minibatch of 128")
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.float16 if device == "cuda" else torch.bfloat16
    torch.manual_seed(0)

    x, y = (part.to(device) for part in stripes(args.samples))
    model = network().to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    sampler = fastis.Sampler(len(x), batch_size=128, device=device)  # of a whole minibatch
    scheduler = fastis.EffectiveBatchLR(optimizer, sampler)  # a constant rate, times the factor
    scaler = torch.amp.GradScaler(device)

    for step in range(1, args.epochs * (len(x) // 128) + 1):
        batch = sampler.sample()
        indices, weights = (part.chunk(args.parts) for part in batch)
        outs = []
        for i, r in zip(indices, weights, strict=True):
            with torch.autocast(device, dtype=dtype):
                logits = model(x[i])
            # The parts are added up: the mean is that over the whole minibatch.
            out = fastis.cross_entropy(logits, y[i], r, denominator=len(batch.indices))
            scaler.scale(out.loss).backward()
            outs.append(out)
        sampler.update(batch, outs)  # one iteration, whether the scaler skips the step or not
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        scheduler.step()
        optimizer.zero_grad()
        if step % 32 == 0:
            loss = sum(out.item() for out in outs)
            print(f"step {step}: loss {loss:.3f}, {sampler.phase}, scale {scaler.get_scale():g}")
    print(sampler.prediction())


if __name__ == "__main__":
    main()
