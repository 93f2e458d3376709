"""The host's side of the CUDA backend: the devices that it serves, its build, its errors."""

from __future__ import annotations

import re
import runpy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import fastis
from fastis import kernels
from fastis.kernels.cuda import categorical as cuda_categorical
from fastis.kernels.cuda import launch as cuda_launch
from fastis.kernels.reference import table as reference_table

ROOT = Path(__file__).resolve().parents[1]
DEFAULT = "sm_80 sm_90 sm_100 sm_120 compute_120 compute_80"


@pytest.mark.parametrize(
    ("capability", "targets", "served"),
    [
        ((8, 0), DEFAULT, True),
        ((8, 9), DEFAULT, True),  # machine code of the generation's first release
        ((9, 0), DEFAULT, True),
        ((11, 0), DEFAULT, True),  # between: PTX of the oldest
        ((12, 1), DEFAULT, True),
        ((13, 0), DEFAULT, True),
        ((7, 5), DEFAULT, False),
        ((11, 0), "sm_80 sm_120 compute_120", False),
        ((9, 0), "sm_90", True),
        ((10, 0), "sm_90", False),
        ((8, 0), "sm_86", False),
        ((9, 0), "sm_90a", True),
        ((9, 1), "sm_90a compute_90a", False),
    ],
)
def test_devices_that_a_build_has_code_for(capability, targets, served):
    assert kernels._has_code_for(capability, targets) is served


@pytest.fixture
def device(monkeypatch):
    """A machine with devices of these capabilities, and a fastis._C with CUDA."""

    def pretend(*capabilities, why="", built=True):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: len(capabilities))
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda i: capabilities[i])
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda i: f"device {i}")
        entries = {"cuda_update": None, "cuda_targets": DEFAULT, "cuda_missing": lambda i: why}
        extra = {"build_info": lambda: "made up", "isa": lambda: "baseline"}
        monkeypatch.setattr(kernels, "_C", SimpleNamespace(**(entries if built else {}), **extra))
        monkeypatch.setattr(kernels, "_chosen", {})

    return pretend


def test_the_reference_serves_where_there_is_no_code(device, capsys):
    device((9, 0), (7, 5))
    assert kernels.kernels_for("table", "cuda") is reference_table
    why = kernels.missing("cuda", "table", "cuda")
    assert "no code for cuda:1 (compute capability 7.5)" in why
    assert "FASTIS_CUDA_ARCHS=75" in why
    assert "CUDA_VISIBLE_DEVICES" in why
    fastis.show_config()
    assert why in capsys.readouterr().out


def test_the_reference_serves_beside_a_driver_that_is_too_old(device, capsys):
    device((9, 0), why="the CUDA driver serves CUDA 12.4")
    assert kernels.kernels_for("table", "cuda") is reference_table
    fastis.show_config()
    shown = capsys.readouterr().out
    assert "table on cuda: reference" in shown
    assert "the CUDA driver serves CUDA 12.4" in shown
    with pytest.raises(RuntimeError, match="'cuda' was asked for, but the CUDA driver"):
        fastis.backend("cuda").__enter__()


def test_devices_with_code_are_served_by_it(device):
    device((9, 0), (8, 6))
    assert kernels.missing("cuda", "table", "cuda") == ""
    assert kernels.kernels_for("categorical", "cuda").__name__ == "fastis.kernels.cuda.categorical"
    device((9, 0), built=False)
    assert "built without CUDA" in kernels.missing("cuda", "table", "cuda")


def test_one_gpu_is_one_index():
    from fastis.loss import _on_one_gpu

    gpus = [SimpleNamespace(is_cuda=True, get_device=lambda i=i: i) for i in (0, 1)]
    assert _on_one_gpu(gpus[0], gpus[0])
    assert not _on_one_gpu(*gpus)
    assert not _on_one_gpu(gpus[0], torch.zeros(1))
    assert not _on_one_gpu(torch.zeros(1), gpus[0])


def test_errors_of_a_launch_are_raised(monkeypatch):
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda i: 7, raising=False)
    monkeypatch.setattr(
        cuda_launch, "_C", SimpleNamespace(cuda_error_string=lambda error: f"error {error}")
    )
    device = torch.device("cuda", 1)
    seen = []
    cuda_launch.launch(lambda *arguments: seen.append(arguments) or 0, device, 5, 6)
    assert seen == [(5, 6, 1, 7)]
    with pytest.raises(RuntimeError, match="a CUDA launch of fastis failed: error 98"):
        cuda_launch.launch(lambda *_: 98, device)
    monkeypatch.setattr(
        cuda_categorical, "_C", SimpleNamespace(cuda_alias_build_bytes=lambda *_: -46)
    )
    with pytest.raises(RuntimeError, match="error 46"):
        cuda_categorical._scratch("alias_build", 10, device)


@pytest.mark.skipif(not hasattr(fastis._C, "cuda_update"), reason="built without CUDA")
@pytest.mark.skipif(torch.cuda.is_available(), reason="about a machine without a device")
def test_without_a_device_entry_points_report_it():
    from fastis import _C

    assert "driver" in _C.cuda_missing(0)
    assert _C.cuda_alias_build_bytes(1000, 0) < 0
    assert _C.cuda_prefix_sums_bytes(1000, 0) < 0
    error = _C.cuda_scale_grad(0, 0, 0, 0, 0, 1, 5, 0, 0, 0)
    assert error > 0
    assert _C.cuda_error_string(error)


# The build ---------------------------------------------------------------------------------------


@pytest.fixture
def targets_of(tmp_path, monkeypatch):
    """What setup.py compiles for beside an nvcc that knows these targets."""

    def ask(known, archs=None):
        nvcc = tmp_path / "nvcc"
        listing = "\\n".join(f"sm_{name}" for name in known)
        nvcc.write_text(f'#!/bin/sh\n[ "$1" = --list-gpu-code ] && printf "{listing}\\n"\n')
        nvcc.chmod(0o755)
        monkeypatch.delenv("FASTIS_CUDA_ARCHS", raising=False)
        if archs is not None:
            monkeypatch.setenv("FASTIS_CUDA_ARCHS", archs)
        return runpy.run_path(str(ROOT / "setup.py"))["cuda_targets"](str(nvcc))

    return ask


@pytest.mark.parametrize(
    ("known", "archs", "targets"),
    [
        (["75", "80", "86", "90", "100", "120"], None, DEFAULT),
        (["70", "75", "80", "86", "90"], None, "sm_80 sm_90 compute_80 compute_90"),  # nvcc 12.0
        (["80", "90", "100", "120"], "90", "sm_90 compute_90"),
        (["75", "80", "90"], "7.5;9.0", "sm_75 sm_90 compute_75 compute_90"),
        (["90", "90a"], "90a", "sm_90a compute_90a"),
        (["80", "90", "100", "120"], "", DEFAULT),
    ],
)
def test_targets_are_those_that_nvcc_knows(targets_of, known, archs, targets):
    assert targets_of(known, archs) == targets.split()


def test_targets_that_nvcc_lacks(targets_of):
    with pytest.raises(ValueError, match=r"FASTIS_CUDA_ARCHS must name targets .*got 120"):
        targets_of(["80", "90"], "90 120")
    with pytest.raises(RuntimeError, match="knows none of 80, 90, 100, 120"):
        targets_of(["50", "52"])


def test_entry_points_with_cuda_are_declared():
    """A build with CUDA binds every one that the backend calls."""
    bound = (ROOT / "csrc" / "bindings.cpp").read_text()
    code = "".join(p.read_text() for p in (ROOT / "fastis/kernels/cuda").glob("*.py"))
    called = set(re.findall(r"_C\.cuda_(\w+)", code) + re.findall(r"_call\(\s*\"(\w+)", code))
    assert called > {"update_and_draw", "alias_build"}
    for name in called - {"targets"}:
        assert f"FASTIS_DEVICE({name})" in bound, name


def test_importing_asks_no_device():
    code = "import fastis, torch; assert not torch.cuda.is_initialized()"
    subprocess.run([sys.executable, "-c", code], check=True)
