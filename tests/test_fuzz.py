"""A short run of the fuzzer (for a long one: ``python tests/fuzz.py``); that it finds faults."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import fuzz
import fuzz_sampler
import pytest
import torch
from conftest import sweep

import fastis


def run(*arguments: str) -> tuple[int, dict]:
    command = [sys.executable, str(Path(fuzz.__file__)), *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.stdout, done.stderr
    return done.returncode, json.loads(done.stdout)


@pytest.mark.parametrize("what", fuzz.WHATS)
def test_random_calls_are_right_or_refused(what):
    status, found = run("--what", what, "--calls", "400", "--seconds", "20", "--patience", "30")
    assert found["failures"] == []
    assert status == 0
    assert found["calls"] >= 400 or found["seconds"] >= 20


def one_run(monkeypatch, case, **limits):
    """The driver, with ``case`` for the cases."""
    monkeypatch.setattr(fuzz.importlib, "import_module", lambda name: _Module(case))
    arguments = [f"--{name}={value}" for name, value in limits.items()]
    return fuzz.main(["--what", "sampler", *arguments])


class _Module:
    def __init__(self, run):
        self.run = run


def test_a_case_that_dies_hangs_or_is_wrong_is_reported_with_its_number(monkeypatch):
    def case(case):
        case.count("draw")
        number = case._counts[fuzz.CASE]
        if number == 3:
            os.kill(os.getpid(), signal.SIGSEGV)
        if number == 5:
            time.sleep(60)
        if number == 7:
            raise AssertionError("wrong")

    found = one_run(monkeypatch, case, calls=12, patience=3)
    assert [(f["case"], f["error"]) for f in found["failures"]] == [
        (3, "SIGSEGV"),
        (5, "SIGKILL"),
        (7, "AssertionError: wrong"),
    ]
    assert found["calls"] == 12


def test_a_case_is_repeated_by_its_number():
    drawn = []
    counts = memoryview(bytearray(8 * 40)).cast("q")
    for _ in range(2):
        case = fuzz.Case("sampler", 0, 4, counts)
        drawn.append((case.size(1000), case.chance(0.5), case.generator.initial_seed()))
    assert drawn[0] == drawn[1]


def test_a_wrong_total_is_found():
    """What a kernel that loses one unit would look like."""
    counts = memoryview(bytearray(8 * 40)).cast("q")
    sampler = fastis.Sampler(50, 5, method=fastis.methods.EMAIS(warmup_epochs=0))
    session = fuzz_sampler.Session(fuzz.Case("sampler", 0, 0, counts), sampler)
    sweep(sampler, torch.rand(50))
    session.check_table()
    sampler._table.scalars[fuzz_sampler.TOTAL] += 1
    with pytest.raises(AssertionError, match="total is not the sum"):
        session.check_table()
