"""The plain loop: data in memory, a schedule, a log, and a picture at the end.

    python examples/plain_loop.py [--epochs 12] [--plot sampler.png] [--method scan]

Classes of points, a few of them far noisier than the rest. With --method scan the same script draws
uniformly, for a comparison. Seconds on one core; runs on a GPU if there is one.
"""

from __future__ import annotations

import argparse

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastis

NUM_CLASSES = 10


def points(num_samples: int, seed: int) -> tuple[Tensor, Tensor]:
    """Each around the centre of its class, at a distance that varies a hundredfold."""
    centres = torch.randn(NUM_CLASSES, 32, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(seed)
    y = torch.randint(NUM_CLASSES, (num_samples,), generator=generator)
    distance = 0.3 + 3 * torch.rand(num_samples, 1, generator=generator).pow(6)
    return centres[y] + distance * torch.randn(num_samples, 32, generator=generator), y


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--samples", type=int, default=10_000)
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--method", default="emais", help="scan: uniform draws")
    parser.add_argument("--plot", default="", help="file for the picture (needs matplotlib)")
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)

    x, y = (part.to(device) for part in points(args.samples, seed=1))
    x_test, y_test = (part.to(device) for part in points(5000, seed=2))
    model = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, NUM_CLASSES)).to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    sampler = fastis.Sampler(len(x), batch_size=64, method=args.method, device=device)
    steps_per_epoch = len(x) // sampler.batch_size
    total = args.epochs * steps_per_epoch
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, total)
    scheduler = fastis.EffectiveBatchLR(schedule, sampler, max_factor=3.0)

    history = []
    for step in range(1, total + 1):
        batch = sampler.sample()
        out = fastis.cross_entropy(model(x[batch.indices]), y[batch.indices], batch.weights)
        sampler.update(batch, out)
        optimizer.zero_grad()
        out.backward()
        optimizer.step()
        scheduler.step()
        if step % steps_per_epoch == 0:
            history.append(sampler.stats())  # or fastis.log(sampler, writer, step)
            with torch.no_grad():
                train = F.cross_entropy(model(x), y).item()
                wrong = (model(x_test).argmax(1) != y_test).float().mean().item()
            print(f"step {step}: train loss {train:.4f}, test error {100 * wrong:.2f} %")
    print(sampler.prediction())
    if args.plot:
        fastis.plot(sampler, history).savefig(args.plot)


if __name__ == "__main__":
    main()
