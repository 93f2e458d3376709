"""A training run that can be killed at any moment: ``test_kill.py`` starts this file.

It imports torch once, and forks a process for each line ``folder steps`` that it reads. That one
trains with two workers, saves every few steps to ``folder/last.pt``, and goes on from there when it
is started again. It writes its process id, "begins" when the first minibatch came, and, when it is
gone, how it ended.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
import torch._dynamo  # optimizers import it, for seconds, in every process that has not yet
from torch.utils.data import Dataset

import fastis

N, B = 400, 8
EVERY = 3  # steps between checkpoints


class Points(Dataset):
    """Two classes that overlap."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.y = torch.randint(2, (N,), generator=generator)
        self.x = torch.randn(N, 16, generator=generator) + self.y[:, None] * 0.7

    def __len__(self) -> int:
        return N

    def __getitem__(self, index: int):
        return self.x[index], self.y[index], index


def train(folder: Path, steps: int) -> None:
    torch.manual_seed(1)
    model = torch.nn.Sequential(
        torch.nn.Linear(16, 32), torch.nn.ReLU(), torch.nn.Dropout(0.1), torch.nn.Linear(32, 2)
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    sampler = fastis.Sampler(N, B, seed=2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    scheduler = fastis.EffectiveBatchLR(schedule, sampler, max_factor=3.0)
    loader = fastis.DataLoader(Points(), sampler, num_workers=2)
    parts = {"model": model, "optimizer": optimizer, "scheduler": scheduler, "loader": loader}
    losses, path = [], folder / "last.pt"
    if path.exists():
        losses = fastis.load_checkpoint(path, **parts)["losses"]
        assert len(losses) % EVERY == 0
    begun = False
    while len(losses) < steps:
        for batch, (x, y, index) in loader:
            if not begun:
                begun = True
                print("begins", flush=True)
            assert torch.equal(batch.indices, index)
            out = fastis.cross_entropy(model(x), y, batch.weights)
            sampler.update(batch, out)
            optimizer.zero_grad()
            out.backward()
            optimizer.step()
            scheduler.step()
            losses.append(out.item())
            if len(losses) % EVERY == 0:
                # The ballast makes writing take a good part of the time.
                ballast = torch.full((250_000,), len(losses))
                fastis.save_checkpoint(path, **parts, losses=losses, ballast=ballast)
            if len(losses) == steps:
                break
    final = {name: part.state_dict() for name, part in parts.items()}
    torch.save({**final, "losses": losses}, folder / "final.pt")


def main() -> None:
    torch.set_num_threads(1)
    for line in sys.stdin:
        folder, steps = line.split()
        process = os.fork()
        if process == 0:
            code = 1
            try:
                train(Path(folder), int(steps))
                code = 0
            finally:
                os._exit(code)
        print(process, flush=True)
        _, status = os.waitpid(process, 0)
        print(f"ended {os.waitstatus_to_exitcode(status)}", flush=True)


if __name__ == "__main__":
    main()
