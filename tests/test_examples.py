"""Every file of examples/ runs to its end, with arguments that make it short."""

from __future__ import annotations

import runpy
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
# Arguments by file: a file that is not here is a failure.
SHORT = {
    "dataloader.py": ["--samples", "320", "--epochs", "3"],
}


def run(name: str, *arguments: str) -> str:
    """What it prints, in a process of its own."""
    command = [sys.executable, str(EXAMPLES / name), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_example_is_run():
    assert {path.name for path in EXAMPLES.glob("*.py")} == SHORT.keys()


@pytest.mark.parametrize("name", SHORT)
def test_examples_run(name):
    assert run(name, *SHORT[name])


def test_the_data_loaders_example_goes_on_from_its_checkpoint(tmp_path, monkeypatch, capsys):
    path, whole = str(tmp_path / "last.pt"), ["--samples", "640", "--workers", "0"]
    for epochs in ("6", "12"):  # of 10 steps, the 50th and 100th of which save
        monkeypatch.setattr(
            sys, "argv", ["dataloader.py", *whole, "--epochs", epochs, "--checkpoint", path]
        )
        runpy.run_path(str(EXAMPLES / "dataloader.py"), run_name="__main__")
    shown = capsys.readouterr().out
    assert "goes on from step 50\nstep 50: test error" in shown, "the rest of an epoch: nothing"
    assert shown.rstrip().splitlines()[-1].startswith("step 120: ")
