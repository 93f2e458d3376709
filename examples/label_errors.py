"""Label errors for free: which samples are mislabelled, by what training has learnt anyway.

    python examples/label_errors.py [--epochs 6] [--plot suspects.png] [--data fashion_mnist.npz]

Gives a fifth of the labels of 10,000 images (the subset of Fashion-MNIST in bench/data) another
class, trains a small network on them with importance sampling, and looks for the wrong ones in the
sampler's table: no second training, no held-out folds. Seconds on one core.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

import fastis

SUBSET = Path(__file__).resolve().parents[1] / "bench" / "data" / "fashion_mnist_subset.npz"
NAMES = ["T-shirt", "trousers", "pullover", "dress", "coat"]
NAMES += ["sandal", "shirt", "sneaker", "bag", "boot"]


def mislabelled(y: Tensor, share: float) -> tuple[Tensor, Tensor]:
    """The labels, a part of them replaced by another class, and which [n] those are."""
    wrong = torch.randperm(len(y))[: round(share * len(y))]
    labels = y.clone()
    labels[wrong] = (y[wrong] + torch.randint(1, len(NAMES), wrong.shape)) % len(NAMES)
    return labels, wrong


def network() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 8, 5, stride=2),
        nn.ReLU(),
        nn.Conv2d(8, 16, 5, stride=2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(256, 64),
        nn.ReLU(),
        nn.Linear(64, len(NAMES)),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data", default=SUBSET, help=".npz with x_train [N, 28, 28] and y_train")
    parser.add_argument("--samples", type=int, default=10_000)
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--share", type=float, default=0.2, help="of wrong labels")
    parser.add_argument("--plot", default="", help="file for the picture (needs matplotlib)")
    args = parser.parse_args()
    torch.manual_seed(0)

    file = np.load(args.data)
    images = torch.from_numpy(file["x_train"][: args.samples])
    truth = torch.from_numpy(file["y_train"][: args.samples].astype(np.int64))
    x, (y, wrong) = images[:, None] / 127.5 - 1, mislabelled(truth, args.share)

    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    sampler = fastis.Sampler(len(x), batch_size=64)
    steps = args.epochs * (len(x) // sampler.batch_size)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        batch = sampler.sample()
        out = fastis.cross_entropy(model(x[batch.indices]), y[batch.indices], batch.weights)
        sampler.update(batch, out)
        optimizer.zero_grad()
        out.backward()
        optimizer.step()
        schedule.step()

    suspects = fastis.suspects(sampler, len(wrong))
    found = torch.isin(suspects, wrong)
    for i in suspects[:5].tolist():
        print(f"image {i}: labelled {NAMES[y[i]]}, in truth {NAMES[truth[i]]}")
    print(f"of the {len(wrong)} most suspicious {found.double().mean():.1%} are mislabelled")
    if args.plot:
        names = [NAMES[label] for label in y]
        fastis.contact_sheet(sampler, images, names).savefig(args.plot)


if __name__ == "__main__":
    main()
