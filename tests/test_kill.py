"""A training process with two workers, killed at random moments and started again each time, ends
with the bits of a run that was left alone."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import assert_equal
from two_classes import TwoClasses

import fastis

N, B = 400, 8
EVERY = 3  # steps between checkpoints


def train(folder: Path, steps: int, begins: Callable[[], object]) -> None:
    """To the last step, from the last checkpoint on; calls ``begins`` at the first minibatch."""
    torch.manual_seed(1)
    model = torch.nn.Sequential(
        torch.nn.Linear(16, 32), torch.nn.ReLU(), torch.nn.Dropout(0.1), torch.nn.Linear(32, 2)
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    sampler = fastis.Sampler(N, B, seed=2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    scheduler = fastis.EffectiveBatchLR(schedule, sampler, max_factor=3.0)
    loader = fastis.DataLoader(TwoClasses(N), sampler, num_workers=2)
    parts = {"model": model, "optimizer": optimizer, "scheduler": scheduler, "loader": loader}
    losses, path = [], folder / "last.pt"
    if path.exists():
        losses = fastis.load_checkpoint(path, **parts)["losses"]
        assert len(losses) % EVERY == 0
    while len(losses) < steps:
        for batch, (x, y, index) in loader:
            begins()
            assert torch.equal(batch.indices, index)
            out = fastis.cross_entropy(model(x), y, batch.weights)
            sampler.update(batch, out)
            optimizer.zero_grad()
            out.backward()
            optimizer.step()
            scheduler.step()
            losses.append(out.item())
            if len(losses) % EVERY == 0:
                # Ballast, so that writing takes a good part of the time.
                ballast = torch.full((250_000,), len(losses))
                fastis.save_checkpoint(path, **parts, losses=losses, ballast=ballast)
            if len(losses) == steps:
                break
    final = {name: part.state_dict() for name, part in parts.items()}
    torch.save({**final, "losses": losses}, folder / "final.pt")


class Training:
    """A process that trains; what it and its workers complain of goes to a file."""

    def __init__(self, folder: Path, steps: int) -> None:
        self.errors = folder.with_suffix(".errors")
        self._reads, writes = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            code = 1
            try:
                os.setsid()
                os.dup2(os.open(self.errors, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
                train(folder, steps, lambda: os.write(writes, b"."))
                code = 0
            except BaseException:
                os.write(2, traceback.format_exc().encode())
            finally:
                os._exit(code)
        os.close(writes)

    def wait_until_it_begins(self) -> None:
        assert os.read(self._reads, 1), self.errors.read_text()

    def ends(self, expected: int) -> None:
        """Waits for that, with this exit code."""
        _, status = os.waitpid(self.pid, 0)
        os.close(self._reads)
        # A worker whose parent was gone before it looked who that is would stay for ever.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        assert os.waitstatus_to_exitcode(status) == expected, self.errors.read_text()


def killed_and_resumed(folder: Path, steps: int, kills: int, seconds: float) -> int:
    """Trains to the end; how many of the kills came while a checkpoint was being written."""
    rng, writing = random.Random(0), 0
    for number in range(kills):
        training = Training(folder, steps)
        if number % 5:  # else it may come while the state is loaded, or the workers start
            training.wait_until_it_begins()
        time.sleep(rng.uniform(0, seconds))
        os.kill(training.pid, signal.SIGKILL)
        training.ends(-signal.SIGKILL)
        writing += any(f".{training.pid}." in file.name for file in folder.iterdir())
    Training(folder, steps).ends(0)
    return writing


@pytest.mark.parametrize(
    ("steps", "kills", "seconds"),
    [(90, 3, 0.2), pytest.param(2000, 50, 0.15, marks=pytest.mark.slow)],
)
def test_killed_and_resumed_as_if_left_alone(tmp_path, steps, kills, seconds):
    torch.optim.SGD([torch.ones(1, requires_grad=True)]).step()  # whose imports take seconds
    alone, killed = tmp_path / "alone", tmp_path / "killed"
    alone.mkdir()
    killed.mkdir()
    writing = killed_and_resumed(killed, steps, kills, seconds)
    Training(alone, steps).ends(0)
    found, expected = (
        torch.load(folder / "final.pt", weights_only=True) for folder in (killed, alone)
    )
    assert_equal(found, expected)
    assert len(found["losses"]) == steps
    assert sorted(os.listdir(killed)) == ["final.pt", "last.pt"], "what was left was removed"
    print(f"{writing} of {kills} kills came while a checkpoint was written")
    assert writing > 0 or kills < 50
