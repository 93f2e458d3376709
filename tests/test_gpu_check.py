"""The calls of bench/gpu_check.sh: limits and records of their steps, and a rehearsal of each."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).resolve().parents[1]))

from bench import gpu_check
from bench.gpu_check import ROOT, Call, Step


@pytest.fixture
def call(tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    return Call("check", tmp_path / "out", dry=False)


def found(call: Call) -> dict:
    return json.loads((call.out / "check.json").read_text())


def shell(name: str, command: str, limit: float = 30.0) -> Step:
    return Step(name, ["bash", "-c", command], limit, [])


def test_what_a_step_found_is_kept_when_a_later_one_crashes_or_hangs(call):
    row = json.dumps({"case": "draw", "us": 1.5})
    assert call.run(shell("stores", f"echo '{row}' >> {call.rows}; echo said")) == 0
    assert found(call)["rows"] == [json.loads(row)]
    # The last line of a process that is killed may be cut off.
    assert call.run(shell("crashes", f"printf '{{\"cut' >> {call.rows}; kill -SEGV $$")) == -11
    begin = time.monotonic()
    assert call.run(shell("hangs", "sleep 600 & sleep 600", limit=4)) == 124
    assert time.monotonic() - begin < 20
    assert call.run(shell("goes on", "true")) == 0
    assert [s["outcome"] for s in found(call)["steps"]] == [
        "passed", "FAILED (-11)", "out of time", "passed",
    ]  # fmt: skip
    assert found(call)["rows"] == [json.loads(row)]
    assert call.finish() == 1
    assert "said" in (call.out / "check.log").read_text()


def test_no_step_outlasts_its_call(call):
    call.end = time.monotonic() + 2
    assert call.run(shell("too late", "true")) == 124
    assert found(call)["steps"][0]["outcome"] == "out of time"


def test_limits_of_the_steps_fit_into_the_minutes(tmp_path, monkeypatch):
    """The sum of what steps may take, without building, is little more than the call has."""
    monkeypatch.setattr(Call, "_spawn", lambda *_: 0)
    monkeypatch.setattr(gpu_check.shutil, "which", lambda name: f"/usr/bin/{name}")
    for name, steps in gpu_check.CALLS.items():
        limits = []
        run = Call.run
        monkeypatch.setattr(
            Call, "run", lambda self, step, run=run, limits=limits: limits.append(step.limit)
            or run(self, step),
        )  # fmt: skip
        steps(Call(name, tmp_path, dry=True))
        monkeypatch.setattr(Call, "run", run)
        assert sum(limits) <= 60 * gpu_check.MINUTES[name] * 1.35, f"{name}: {limits}"


def test_smoke_goes_on_after_a_case_that_took_its_process_with_it(call, monkeypatch):
    order = []

    def spawn(self, command, left, environment):
        first = command[command.index("--from") + 1] if "--from" in command else None
        order.append(first)
        rows = {None: "rescale", gpu_check.after("rescale"): "cross_entropy"}
        if first not in rows:
            return 0
        row = {"benchmark": "smoke", "case": rows[first], "outcome": "begun"}
        with call.rows.open("a") as file:
            file.write(json.dumps(row) + "\n")
        return -11

    monkeypatch.setattr(Call, "_spawn", spawn)
    gpu_check.smoke(call)
    assert order == [None, gpu_check.after("rescale"), gpu_check.after("cross_entropy")]


def test_cases_are_found_in_the_source():
    from bench.gpu_smoke import CASES

    names = list(CASES)
    assert [gpu_check.after(name) for name in names] == [*names[1:], None]


def test_a_carried_cache_is_read_from_its_new_place(tmp_path):
    entry = tmp_path / "carried" / "KEY"
    entry.mkdir(parents=True)
    (entry / "kernel.cubin").write_bytes(b"code")
    index = {"child_paths": {"kernel.cubin": "/there/carry/triton/KEY/kernel.cubin"}}
    (entry / "__grp__kernel.json").write_text(json.dumps(index))
    gpu_check.relocate(tmp_path / "carried", tmp_path / "here", "/there")
    moved = json.loads((tmp_path / "here" / "KEY" / "__grp__kernel.json").read_text())
    path = Path(moved["child_paths"]["kernel.cubin"])
    assert path.read_bytes() == b"code"
    assert path.is_relative_to(tmp_path / "here")


def test_scripts_are_sound():
    for name in ("gpu_check.sh", "gpu_prepare.sh"):
        subprocess.run(["bash", "-n", str(ROOT / "bench" / name)], check=True)
        assert os.access(ROOT / "bench" / name, os.X_OK)


@pytest.mark.slow
@pytest.mark.parametrize("name", gpu_check.CALLS)
def test_a_rehearsal_goes_through_every_step(name, tmp_path):
    pytest.importorskip("triton")
    environment = {**os.environ, "OUT": str(tmp_path), "PYTHON": sys.executable}
    command = [str(ROOT / "bench" / "gpu_check.sh"), name, "--dry-run"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + (tmp_path / f"{name}.log").read_text()[-3000:]
    made = json.loads((tmp_path / f"{name}.json").read_text())
    assert made["dry_run"]
    assert {s["outcome"] for s in made["steps"]} <= {"passed", "not rehearsed"}
    if name in ("check", "bench", "full"):
        assert made["rows"]
