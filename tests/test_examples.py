"""Every file of examples/ runs to its end, with arguments that make it short."""

from __future__ import annotations

import ast
import runpy
import sys
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
# Arguments by file: a file that is not here is a failure.
SHORT = {
    "accumulation_amp.py": ["--samples", "512", "--epochs", "8"],
    "compiled.py": ["--steps", "100", "--backend", "aot_eager"],
    "coordinate_network.py": ["--size", "32", "--steps", "50", "--batch-size", "128"],
    "label_errors.py": ["--samples", "2000", "--epochs", "5"],
    "pinn.py": ["--points", "1000", "--steps", "250"],
    "plain_loop.py": ["--samples", "640", "--epochs", "4"],
    "dataloader.py": ["--samples", "320", "--epochs", "3"],
    "train_lightning.py": ["--samples", "320", "--epochs", "3"],
    "train_timm.py": ["--samples", "128", "--epochs", "3"],
    "train_transformers.py": ["--samples", "256", "--epochs", "3"],
    "train_ddp.py": ["--epochs", "1"],  # in one process; by torchrun: tests/distributed
    "replay.py": ["--steps", "1500"],
    "diffusion_timesteps.py": ["--steps", "120"],
    "distributed_scoring.py": ["--samples", "2000", "--steps", "200", "--scorers", "1"],
}


@pytest.fixture(autouse=True)
def _generator_as_it_was():
    state = torch.get_rng_state()
    yield
    torch.set_rng_state(state)


def libraries(path: Path) -> set[str]:
    """What an example imports."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(str(node.module))
    return {name.partition(".")[0] for name in names}


@pytest.fixture
def run(monkeypatch, capsys, tmp_path):
    """Runs an example, in a folder of its own, if its libraries are installed; what it prints."""

    def run(name: str, *arguments: str) -> str:
        for library in libraries(EXAMPLES / name):
            pytest.importorskip(library)
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", [name, *arguments])
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        return capsys.readouterr().out

    return run


def test_every_example_is_run():
    assert {path.name for path in EXAMPLES.glob("*.py")} == SHORT.keys()


@pytest.mark.parametrize("name", SHORT)
def test_examples_run(run, name):
    assert run(name, *SHORT[name])


def test_the_lightning_example_goes_on_from_its_checkpoint(run, tmp_path):
    options = ["--samples", "640", "--workers", "0", "--folder", str(tmp_path)]
    shown = run("train_lightning.py", *options, "--epochs", "6")  # of 10 steps, saved at the 50th
    assert shown.startswith("step 60: test error")
    assert "epoch=4-step=50.ckpt" in {path.name for path in tmp_path.iterdir()}
    assert run("train_lightning.py", *options, "--epochs", "8").startswith("step 80: ")


def test_the_plain_loops_example_draws_what_it_logs(run, tmp_path):
    pytest.importorskip("matplotlib")
    picture = tmp_path / "sampler.png"
    shown = run("plain_loop.py", *SHORT["plain_loop.py"], "--plot", str(picture)).splitlines()
    assert shown[-1] == "gain not yet known: 40 of 320 updates, of which 20 are warm-up"
    assert picture.read_bytes()[:4] == b"\x89PNG"


def test_the_data_loaders_example_goes_on_from_its_checkpoint(run, tmp_path):
    options = ["--samples", "640", "--workers", "0", "--checkpoint", str(tmp_path / "last.pt")]
    run("dataloader.py", *options, "--epochs", "6")  # of 10 steps, the 50th of which saves
    shown = run("dataloader.py", *options, "--epochs", "8").splitlines()
    assert shown[0] == "goes on from step 50"
    assert shown[1].startswith("step 50: test error"), "the rest of an epoch: nothing"
    assert shown[-1].startswith("step 80: ")


def test_the_trainers_example_goes_on_from_its_checkpoint(run):
    options = ["--samples", "640", "--folder", "runs"]  # 10 steps an epoch
    whole = run("train_transformers.py", *options, "--epochs", "6")  # the 50th of which saves
    resumed = run("train_transformers.py", *options, "--epochs", "6", "--resume")
    last = whole.splitlines()[-1]
    assert last.startswith("gain not yet known: 60 of")
    assert resumed.splitlines()[-1] == last
    assert "'epoch': '1'" not in resumed
