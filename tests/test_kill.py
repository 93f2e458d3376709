"""A training process with two workers, killed at random moments and started again each time, ends
with the bits of a run that was left alone."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

TRAINING = Path(__file__).with_name("kill_training.py")


class Server:
    """``kill_training.py``, which starts training processes."""

    def __init__(self, errors: Path) -> None:
        """Workers whose process was killed complain: what they write goes to a file."""
        self.errors = errors
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
        self.process = subprocess.Popen(
            [sys.executable, str(TRAINING)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors.open("w"),
            text=True,
            env=environment,
        )

    def line(self) -> str:
        return self.process.stdout.readline().strip()

    def start(self, folder: Path, steps: int) -> int:
        """Its process id."""
        self.process.stdin.write(f"{folder} {steps}\n")
        self.process.stdin.flush()
        lines = {self.line(), ""}
        while not any(line.isdigit() for line in lines):  # the child may be the first to write
            lines.add(self.line())
        self.began = "begins" in lines
        return int(next(line for line in lines if line.isdigit()))

    def wait_until_it_begins(self) -> None:
        if not self.began:
            assert self.line() == "begins", self.errors.read_text()
            self.began = True

    def ends(self, expected: int) -> None:
        """Waits until it ends, with that exit code."""
        while not (line := self.line()).startswith("ended"):
            assert line == "begins", self.errors.read_text()
        assert line == f"ended {expected}", self.errors.read_text()


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    server = Server(tmp_path_factory.mktemp("server") / "errors")
    yield server
    server.process.stdin.close()
    server.process.wait()


def killed_and_resumed(server: Server, folder: Path, steps: int, kills: int, seconds: float) -> int:
    """Trains to the end; how many of the kills came while a checkpoint was being written."""
    rng, writing = random.Random(0), 0
    for number in range(kills):
        process = server.start(folder, steps)
        if number % 5:  # else it may come while the state is loaded, or the workers start
            server.wait_until_it_begins()
        time.sleep(rng.uniform(0, seconds))
        os.kill(process, signal.SIGKILL)
        server.ends(-signal.SIGKILL)
        writing += any(f".{process}." in file.name for file in folder.iterdir())
    server.start(folder, steps)
    server.ends(0)
    return writing


def assert_equal(found, expected, where=""):
    if isinstance(expected, dict):
        assert found.keys() == expected.keys(), where
        for name, value in expected.items():
            assert_equal(found[name], value, f"{where}.{name}")
    elif isinstance(expected, torch.Tensor):
        assert torch.equal(
            found.reshape(-1).view(torch.uint8), expected.reshape(-1).view(torch.uint8)
        ), where
    else:
        assert found == expected, where


@pytest.mark.parametrize(
    ("steps", "kills", "seconds"),
    [(90, 3, 0.2), pytest.param(2000, 50, 0.2, marks=pytest.mark.slow)],
)
def test_killed_and_resumed_as_if_left_alone(server, tmp_path, steps, kills, seconds):
    alone, killed = tmp_path / "alone", tmp_path / "killed"
    alone.mkdir()
    killed.mkdir()
    writing = killed_and_resumed(server, killed, steps, kills, seconds)
    server.start(alone, steps)
    server.ends(0)
    found, expected = (
        torch.load(folder / "final.pt", weights_only=True) for folder in (killed, alone)
    )
    assert_equal(found, expected)
    assert len(found["losses"]) == steps
    assert sorted(os.listdir(killed)) == ["final.pt", "last.pt"], "what was left was removed"
    print(f"{writing} of {kills} kills came while a checkpoint was written")
    assert writing > 0 or kills < 50
