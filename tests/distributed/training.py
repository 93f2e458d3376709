"""Trains a small network in the processes of a group, from the last checkpoint on.

Also a script for torchrun: ``training.py FOLDER STEPS [KILL]``; with KILL, the last rank of the
first attempt kills itself in that step.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

sys.path.append(str(Path(__file__).resolve().parents[1]))  # of the script

from two_classes import TwoClasses

import fastis

N, B = 320, 8  # of each process
EVERY = 10  # steps between checkpoints


def train(
    group: Any, folder: Path, steps: int, begins: Callable[[int], None] = lambda step: None
) -> dict[str, Any]:
    """To the last step; calls ``begins(step)`` before each. What the run ends with."""
    torch.manual_seed(1)
    network = torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.ReLU(), torch.nn.Linear(32, 2))
    model = DistributedDataParallel(network, process_group=group)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    sampler = fastis.Sampler(N, B, group=group, seed=2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    scheduler = fastis.EffectiveBatchLR(schedule, sampler, max_factor=3.0)
    loader = fastis.DataLoader(TwoClasses(N), sampler, num_workers=1)
    parts = {"model": network, "optimizer": optimizer, "scheduler": scheduler, "loader": loader}
    step, path = 0, folder / "last.pt"
    if path.exists():
        step = fastis.load_checkpoint(path, **parts)["step"]
        assert step % EVERY == 0
    while step < steps:
        for batch, (x, y, _) in loader:
            begins(step)
            out = fastis.cross_entropy(model(x), y, batch.weights)
            sampler.update(batch, out)
            optimizer.zero_grad()
            out.backward()
            optimizer.step()
            scheduler.step()
            step += 1
            if step % EVERY == 0 and group.rank() == 0:
                fastis.save_checkpoint(path, **parts, step=step)
            if step == steps:
                break
    return {name: part.state_dict() for name, part in parts.items()}


def main() -> None:
    folder, steps, *kill = Path(sys.argv[1]), *map(int, sys.argv[2:])
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    group = dist.group.WORLD
    first_attempt = os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"

    def begins(step: int) -> None:
        if kill and first_attempt and group.rank() == 1 and step == kill[0]:
            os.kill(os.getpid(), signal.SIGKILL)

    final = train(group, folder, steps, begins)
    torch.save(final, folder / f"final{group.rank()}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
