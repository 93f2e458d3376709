"""A training script in plain PyTorch: workers, augmentation, checkpoints, resuming.

    python examples/dataloader.py [--epochs 6] [--workers 2] [--checkpoint last.pt]

Stop it at any moment and start it again with the same --checkpoint: it goes on where the last
checkpoint was written, in the middle of an epoch too. Seconds on two cores; runs on a GPU if there
is one.
"""

from __future__ import annotations

import argparse
import os

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

import fastis


class Shapes(Dataset):
    """Noisy images of one of four bars; some are far noisier than others."""

    def __init__(self, num_samples: int, seed: int, augment: bool) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.y = torch.randint(4, (num_samples,), generator=generator)
        noise = torch.rand(num_samples, 1, 1, 1, generator=generator).pow(4) * 4
        self.x = torch.randn(num_samples, 1, 16, 16, generator=generator) * (0.3 + noise)
        for i, label in enumerate(self.y.tolist()):
            self.x[i, 0, 4 * label : 4 * label + 4] += 1
        self.augment = augment

    def __len__(self) -> int:
        return len(self.y)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        x = self.x[index]
        if self.augment and torch.rand(()) < 0.5:
            x = x.flip(2)
        return x, int(self.y[index])


def network() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(1, 8, 3, stride=2), nn.ReLU(), nn.Conv2d(8, 16, 3, stride=2), nn.ReLU()),
        *(nn.Flatten(), nn.LazyLinear(32), nn.ReLU(), nn.Linear(32, 4)),
    )


@torch.no_grad()
def error(model: nn.Module, data: Shapes, device: str) -> float:
    """Percent, on data drawn uniformly: no coefficients."""
    wrong = model(data.x.to(device)).argmax(1).cpu() != data.y
    return 100 * float(wrong.float().mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--samples", type=int, default=4000)
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--checkpoint", default="", help="file to go on from, and to write")
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)

    train = Shapes(args.samples, seed=1, augment=True)
    test = Shapes(1000, seed=2, augment=False)
    model = network().to(device)
    model(train.x[:1].to(device))  # gives the lazy layer its size
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    # The sampler lives with the model, so that update() has no scores to bring to the host.
    sampler = fastis.Sampler(len(train), batch_size=64, device=device, seed=0)
    loader = fastis.DataLoader(
        train, sampler, num_workers=args.workers, pin_memory=device == "cuda"
    )
    total = args.epochs * len(loader)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, total)
    scheduler = fastis.EffectiveBatchLR(schedule, sampler, max_factor=3.0)

    parts = {"model": model, "optimizer": optimizer, "scheduler": scheduler, "loader": loader}
    step = 0
    if os.path.exists(args.checkpoint):
        step = fastis.load_checkpoint(args.checkpoint, **parts)["step"]
        print(f"goes on from step {step}")
    while step < total:
        for batch, (x, y) in loader:
            batch = batch.to(device, non_blocking=True)
            x, y = x.to(device, non_blocking=True), y.to(device, non_blocking=True)
            out = fastis.cross_entropy(model(x), y, batch.weights)
            sampler.update(batch, out)
            optimizer.zero_grad()
            out.backward()
            optimizer.step()
            scheduler.step()
            step += 1
            if args.checkpoint and step % 50 == 0:
                fastis.save_checkpoint(args.checkpoint, **parts, step=step)
        n_ems = float(sampler.variance.effective_batch_size) / sampler.batch_size
        print(f"step {step}: test error {error(model, test, device):.1f} %, N_ems/B {n_ems:.2f}")


if __name__ == "__main__":
    main()
