"""``examples/train_ddp.py`` by torchrun: two processes train what one trains."""

from __future__ import annotations

import re
import runpy
import sys

import pytest
import torch

from distributed.torchrun import ROOT, torchrun

SCRIPT = ROOT / "examples" / "train_ddp.py"


@pytest.fixture
def in_one_process(monkeypatch, capsys):
    def run(*arguments: object) -> str:
        monkeypatch.setattr(sys, "argv", ["train_ddp.py", *map(str, arguments)])
        runpy.run_path(str(SCRIPT), run_name="__main__")
        return capsys.readouterr().out

    return run


def train_loss(shown: str) -> float:
    (found,) = re.findall(
        r"^train loss ([\d.]+), test error [\d.]+ %, N_ems/B [\d.]+$", shown, re.M
    )
    return float(found)


def test_two_processes_train_what_one_trains(in_one_process, tmp_path):
    """One process, from the checkpoint that two have left: the same as one alone, but rounding."""
    last = tmp_path / "last.pt"
    arguments = ["--epochs", 2, "--lr", 0.002]  # so small that rounding does not grow
    expected = train_loss(in_one_process(*arguments))
    found = train_loss(torchrun(SCRIPT, *arguments, "--checkpoint", last))
    assert abs(found / expected - 1) < 1e-4
    state = torch.load(last, weights_only=True)["states"]["loader"]["sampler"]
    assert state["settings"]["batch_size"] == 128
    assert state["scalars"][:2].tolist() == [156, 156]
    evaluated_again = train_loss(in_one_process(*arguments, "--checkpoint", last))
    assert evaluated_again == pytest.approx(found, abs=2e-6)


@pytest.mark.slow
def test_within_noise_of_one_process(in_one_process):
    """Over a whole run two processes are nearer to one than seeds are to one another."""
    alone = [train_loss(in_one_process("--seed", seed)) for seed in range(3)]
    together = [train_loss(torchrun(SCRIPT, "--seed", seed)) for seed in range(3)]
    deviation = torch.tensor(alone).std()
    differences = torch.tensor(together) - torch.tensor(alone)
    assert differences.abs().max() < deviation
    uniform = train_loss(in_one_process("--method", "scan"))
    assert max(together[0], alone[0]) < uniform
