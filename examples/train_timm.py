"""A training script in timm's way: its model, optimizer, schedule, mixup and average of weights.

    python examples/train_timm.py [--epochs 6] [--mixup 0.2]

Needs timm. Seconds on two cores; runs on a GPU if there is one.
"""

from __future__ import annotations

import argparse

import timm
import torch
from timm.data import Mixup
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import ModelEmaV3
from torch import nn
from torch.utils.data import TensorDataset

import fastis

CLASSES, SIZE = 4, 16


def bars(num_samples: int, seed: int) -> TensorDataset:
    """Noisy images of one of four bars; some are far noisier than others."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.randint(CLASSES, (num_samples,), generator=generator)
    noise = torch.rand(num_samples, 1, 1, 1, generator=generator).pow(4) * 4
    x = torch.randn(num_samples, 1, SIZE, SIZE, generator=generator) * (0.3 + noise)
    for i, label in enumerate(y.tolist()):
        x[i, 0, 4 * label : 4 * label + 4] += 1
    return TensorDataset(x, y)


@torch.no_grad()
def error(model: nn.Module, data: TensorDataset, device: str) -> float:
    """Percent, on data drawn uniformly: no coefficients."""
    x, y = data.tensors
    model.eval()
    wrong = model(x.to(device)).argmax(1).cpu() != y
    return 100 * float(wrong.float().mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--samples", type=int, default=4096)
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--mixup", type=float, default=0.2, help="alpha; 0: none")
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)

    train, test = bars(args.samples, seed=1), bars(1000, seed=2)
    # A network without BatchNorm, whose statistics would be those of the samples drawn.
    model = timm.create_model(
        "test_vit", img_size=SIZE, patch_size=4, depth=2, in_chans=1, num_classes=CLASSES
    ).to(device)
    average = ModelEmaV3(model, decay=0.99, use_warmup=True)
    optimizer = create_optimizer_v2(model, opt="adamw", lr=1e-3, weight_decay=0.05)
    # Both parents of a mixed sample are drawn: independently, for their coefficients to multiply.
    sampler = fastis.Sampler(len(train), batch_size=64, scheme="multinomial", device=device, seed=0)
    loader = fastis.DataLoader(
        train, sampler, num_workers=args.workers, pin_memory=device == "cuda"
    )
    schedule, epochs = create_scheduler_v2(
        optimizer,
        num_epochs=args.epochs,
        warmup_epochs=1,
        warmup_lr=1e-5,
        step_on_epochs=False,
        updates_per_epoch=len(loader),
    )
    schedule = fastis.EffectiveBatchLR(schedule, sampler, max_factor=2.0)
    mixup = Mixup(args.mixup, num_classes=CLASSES, label_smoothing=0.1) if args.mixup else None

    updates = 0
    for epoch in range(epochs):
        model.train()
        for batch, (x, y) in loader:
            batch = batch.to(device, non_blocking=True)
            x, target = x.to(device, non_blocking=True), y.to(device, non_blocking=True)
            if mixup is not None:
                x, target = mixup(x, target)  # with the minibatch in reverse order
                batch = batch.mix(torch.arange(len(y), device=device).flip(0))
            out = fastis.cross_entropy(model(x), target, batch.weights)
            sampler.update(batch, out)
            optimizer.zero_grad()
            out.backward()
            optimizer.step()
            updates += 1
            average.update(model, step=updates)
            schedule.step_update(num_updates=updates)
        schedule.step(epoch + 1)
        errors = [f"{error(m, test, device):.1f} %" for m in (model, average.module)]
        print(
            f"epoch {epoch + 1}: test error {errors[0]}, of the average {errors[1]}; "
            f"{sampler.prediction()}"
        )


if __name__ == "__main__":
    main()
