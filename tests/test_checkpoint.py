"""Checkpoints: written whole or not at all, loaded into all objects or into none."""

from __future__ import annotations

import errno
import os
import random
import stat
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import drive

import fastis
from fastis import checkpoint


@pytest.fixture(autouse=True)
def _generators_as_they_were():
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002
    yield
    random.setstate(states[0])
    np.random.set_state(states[1])  # noqa: NPY002
    torch.set_rng_state(states[2])


def objects(steps: int = 0) -> dict:
    """A network, its optimizer and scheduler, and a sampler, after some steps."""
    model = torch.nn.Linear(4, 3)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    sampler = fastis.Sampler(60, 6, seed=5)
    scheduler = fastis.EffectiveBatchLR(torch.optim.lr_scheduler.StepLR(optimizer, 2), sampler)
    for _ in range(steps):
        model(torch.ones(4)).sum().backward()
        optimizer.step()
        scheduler.step()
        drive(sampler, 1)
    return {"model": model, "optimizer": optimizer, "scheduler": scheduler, "sampler": sampler}


def flat(value):
    """A nested state as a list, for comparing."""
    if isinstance(value, dict):
        return [(key, flat(item)) for key, item in value.items()]
    if isinstance(value, list | tuple):
        return [flat(item) for item in value]
    return value.tolist() if torch.is_tensor(value) else value


def bits(parts: dict) -> str:
    return str({name: flat(part.state_dict()) for name, part in parts.items()})


def numbers() -> tuple:
    return float(torch.rand(())), random.random(), float(np.random.rand())  # noqa: NPY002


def test_objects_values_and_random_numbers_come_back(tmp_path):
    parts, path = objects(7), tmp_path / "last.pt"
    fastis.save_checkpoint(path, **parts, step=7, best=[0.5, "x"], ema={"w": torch.ones(2)})
    expected, after = bits(parts), numbers()
    others = objects(2)
    values = fastis.load_checkpoint(path, **others)
    assert bits(others) == expected
    assert values["step"] == 7
    assert values["best"] == [0.5, "x"]
    assert torch.equal(values["ema"]["w"], torch.ones(2))
    assert values.keys() == {"step", "best", "ema"}
    assert numbers() == after


def test_random_numbers_are_left_alone_on_request(tmp_path):
    fastis.save_checkpoint(tmp_path / "a.pt", rng=False, step=1)
    before = torch.get_rng_state()
    assert fastis.load_checkpoint(tmp_path / "a.pt", rng=False) == {"step": 1}
    with pytest.raises(ValueError, match=r"must have random states, got none: .*rng=False"):
        fastis.load_checkpoint(tmp_path / "a.pt")
    fastis.save_checkpoint(tmp_path / "b.pt", step=1)
    torch.rand(3)
    before = torch.get_rng_state()
    fastis.load_checkpoint(tmp_path / "b.pt", rng=False)
    assert torch.equal(torch.get_rng_state(), before)


def test_one_state_alone(tmp_path):
    parts = objects(3)
    fastis.save_checkpoint(tmp_path / "last.pt", **parts)
    state = torch.load(tmp_path / "last.pt", weights_only=True)["states"]["model"]
    torch.nn.Linear(4, 3).load_state_dict(state)


# Writing -----------------------------------------------------------------------------------------


def test_the_new_file_takes_the_place_of_the_old_one_last(tmp_path, monkeypatch):
    """Whatever stops it before that, the old one is there, whole."""
    path, done = tmp_path / "last.pt", []

    def recorded(name):
        real = getattr(os, name)

        def call(*arguments):
            if name == "fsync":
                folder = stat.S_ISDIR(os.fstat(arguments[0]).st_mode)
                done.append("folder" if folder else "file")
            else:
                assert fastis.load_checkpoint(path)["step"] == 1
                assert torch.load(arguments[0], weights_only=True)["values"] == {"step": 2}
                done.append(name)
            return real(*arguments)

        monkeypatch.setattr(checkpoint.os, name, call)

    fastis.save_checkpoint(path, step=1)
    recorded("fsync")
    recorded("replace")
    fastis.save_checkpoint(path, step=2)
    assert done == ["file", "replace", "folder"]
    assert fastis.load_checkpoint(path)["step"] == 2
    assert os.listdir(tmp_path) == ["last.pt"]


@pytest.mark.parametrize("at", ["fsync", "replace"])
def test_a_full_disk_leaves_the_old_file(tmp_path, monkeypatch, at):
    def full(*_):
        raise OSError(errno.ENOSPC, "no space left")

    path = tmp_path / "last.pt"
    fastis.save_checkpoint(path, step=1)
    monkeypatch.setattr(checkpoint.os, at, full)
    with pytest.raises(OSError, match="no space left"):
        fastis.save_checkpoint(path, step=2)
    assert fastis.load_checkpoint(path)["step"] == 1
    assert os.listdir(tmp_path) == ["last.pt"]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"step": np.float64(3)}, "step must be of tensors, .* got numpy.*scalar in it"),
        ({"net": torch.nn.Linear}, r"net must be of tensors, .* got torch\.nn\.modules"),
        ({"step": 3, "loss": lambda x: x}, "loss must be of tensors"),
    ],
)
def test_what_could_not_be_read_again_is_refused_when_it_is_saved(tmp_path, values, message):
    path = tmp_path / "last.pt"
    fastis.save_checkpoint(path, step=1)
    with pytest.raises(ValueError, match=message):
        fastis.save_checkpoint(path, **values)
    assert fastis.load_checkpoint(path)["step"] == 1
    assert os.listdir(tmp_path) == ["last.pt"]


def test_what_a_killed_process_left_is_removed_and_what_a_running_one_writes_is_not(tmp_path):
    path = tmp_path / "last.pt"
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    prefix = checkpoint._prefix(path)
    left = tmp_path / f"{prefix}.{gone.pid}.1.tmp"
    kept = [tmp_path / name for name in (f"{prefix}.1.1.tmp", f"other.{gone.pid}.1.tmp", "x.tmp")]
    for file in (left, *kept):
        file.touch()
    fastis.save_checkpoint(path, step=1)
    assert not left.exists()
    assert all(file.exists() for file in kept)


def test_a_link_leads_to_the_new_file(tmp_path):
    (tmp_path / "disk").mkdir()
    link = tmp_path / "last.pt"
    link.symlink_to(tmp_path / "disk" / "real.pt")
    fastis.save_checkpoint(link, step=1)
    assert link.is_symlink()
    assert fastis.load_checkpoint(tmp_path / "disk" / "real.pt")["step"] == 1


# Loading -----------------------------------------------------------------------------------------


def refuses(path, parts, error, message, **arguments):
    before, random_state = bits(parts), torch.get_rng_state()
    with pytest.raises(error, match=message):
        fastis.load_checkpoint(path, **parts, **arguments)
    assert bits(parts) == before
    assert torch.equal(torch.get_rng_state(), random_state)


class Scaled(torch.nn.Linear):
    """One more parameter: torch has loaded the others when it says that it is missing."""

    def __init__(self, *sizes: int) -> None:
        super().__init__(*sizes)
        self.scale = torch.nn.Parameter(torch.ones(()))


def wider_model(parts):
    parts["model"] = torch.nn.Linear(4, 5)


def one_more_parameter(parts):
    parts["model"] = Scaled(4, 3)


def more_parameters(parts):
    parts["optimizer"] = torch.optim.SGD([torch.ones(1, requires_grad=True)] * 1, lr=1)
    parts["optimizer"].add_param_group({"params": [torch.ones(2, requires_grad=True)]})


def another_batch_size(parts):
    parts["sampler"] = fastis.Sampler(60, 5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (wider_model, r"model \(Linear\) does not take its state from [\s\S]*size mismatch"),
        (one_more_parameter, r"model \(Scaled\) does not take [\s\S]*Missing key"),
        (more_parameters, r"optimizer \(SGD\) does not take its state"),
        (another_batch_size, r"sampler \(Sampler\) does not take .* must have batch_size=5, got 6"),
    ],
)
def test_nothing_is_half_loaded(tmp_path, change, message):
    path = tmp_path / "last.pt"
    fastis.save_checkpoint(path, **objects(5))
    parts = objects(2)
    change(parts)
    refuses(path, parts, ValueError, message)
    refuses(path, dict(reversed(parts.items())), ValueError, message)


def test_names_must_be_those_of_the_file(tmp_path):
    path, parts = tmp_path / "last.pt", objects(3)
    fastis.save_checkpoint(path, **parts, step=3)
    optimizer = parts.pop("optimizer")
    refuses(path, parts, ValueError, r"has states of \['optimizer'\] too: give an object for each")
    refuses(
        path,
        {**parts, "opt": optimizer},
        ValueError,
        r"must have states of \['opt'\], got those of \['model', 'optimizer'",
    )
    with pytest.raises(TypeError, match=r"step must have state_dict .* got int; plain values are"):
        fastis.load_checkpoint(path, **parts, optimizer=optimizer, step=0)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "must be a file of fastis.save_checkpoint"),
        (b"not a checkpoint", "must be a file of fastis.save_checkpoint"),
        ({"model": {}}, "must be a file of fastis.save_checkpoint, got something else"),
        ({"format": "fastis checkpoint", "version": 2}, "must have version 1, got 2"),
    ],
)
def test_what_is_no_checkpoint(tmp_path, content, message):
    path = tmp_path / "last.pt"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    refuses(path, objects(), ValueError, message)


def test_a_file_that_was_cut_off(tmp_path):
    path = tmp_path / "last.pt"
    fastis.save_checkpoint(path, **objects(3))
    path.write_bytes(path.read_bytes()[:-200])
    refuses(path, objects(), ValueError, "must be a file of fastis.save_checkpoint")


def test_random_states_that_are_none(tmp_path):
    path = tmp_path / "last.pt"
    fastis.save_checkpoint(path, **objects(3))
    content = torch.load(path, weights_only=True)
    content["rng"]["python"] = (3, (1, 2), None)
    torch.save(content, path)
    refuses(path, objects(), ValueError, "must have states of random generators")


def test_no_file(tmp_path):
    with pytest.raises(FileNotFoundError):
        fastis.load_checkpoint(tmp_path / "last.pt", **objects())
