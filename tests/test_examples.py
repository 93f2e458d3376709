"""Every file of examples/ runs to its end, with arguments that make it short."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
# Arguments by file: a file that is not here is a failure.
SHORT = {
    "dataloader.py": ["--samples", "320", "--epochs", "3"],
    "distributed_scoring.py": ["--samples", "2000", "--steps", "200", "--scorers", "1"],
}


@pytest.fixture(autouse=True)
def _generator_as_it_was():
    state = torch.get_rng_state()
    yield
    torch.set_rng_state(state)


@pytest.fixture
def run(monkeypatch, capsys):
    """Runs an example; what it prints."""

    def run(name: str, *arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", [name, *arguments])
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        return capsys.readouterr().out

    return run


def test_every_example_is_run():
    assert {path.name for path in EXAMPLES.glob("*.py")} == SHORT.keys()


@pytest.mark.parametrize("name", SHORT)
def test_examples_run(run, name):
    assert run(name, *SHORT[name])


def test_the_data_loaders_example_goes_on_from_its_checkpoint(run, tmp_path):
    options = ["--samples", "640", "--workers", "0", "--checkpoint", str(tmp_path / "last.pt")]
    run("dataloader.py", *options, "--epochs", "6")  # of 10 steps, the 50th of which saves
    shown = run("dataloader.py", *options, "--epochs", "8").splitlines()
    assert shown[0] == "goes on from step 50"
    assert shown[1].startswith("step 50: test error"), "the rest of an epoch: nothing"
    assert shown[-1].startswith("step 80: ")
