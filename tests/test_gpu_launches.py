"""Kernels compiled for a GPU beforehand are found there; the host's time of a step can be taken."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).resolve().parents[1]))

from bench.gpu_check import ROOT, relocate

pytest.importorskip("triton")
pytestmark = pytest.mark.slow


def run(*arguments: str, cache: Path) -> str:
    environment = {**os.environ, "TRITON_CACHE_DIR": str(cache)}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def kernels(cache: Path) -> dict[str, int]:
    return {str(p.relative_to(cache)): p.stat().st_mtime_ns for p in cache.rglob("*.cubin")}


def test_a_carried_cache_is_hit(tmp_path):
    made, here = tmp_path / "carry" / "triton", tmp_path / "elsewhere"
    compile_some = ("bench/gpu_launches.py", "--jobs", "1", "--most", "2")
    assert "0 failed" in run(*compile_some, cache=made)
    assert len(kernels(made)) >= 2
    relocate(made, here, str(tmp_path))
    before = kernels(here)
    made.rename(tmp_path / "gone")  # what the index files named before
    run(*compile_some, cache=here)
    assert kernels(here) == before  # a miss would have compiled, and written, them anew


def test_host_time(tmp_path):
    shown = run("bench/host_time.py", "--seconds", "0.01", cache=tmp_path)
    for name in ("sample", "update", "cross_entropy", "scale_grad", "step"):
        assert f"\n| {name} " in shown
    assert "\na step takes " in shown
