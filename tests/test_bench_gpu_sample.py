"""The GPU sampling benchmark's arithmetic, and that it says so where there is no GPU."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).resolve().parents[1]))

from bench import bench_gpu_sample as bench


def test_without_a_gpu_it_says_so(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert bench.main([]) == 2
    assert "torch finds none here" in capsys.readouterr().err


def row(case, n=bench.MILLION, b=4096, **figures):
    return {"case": case, "num_samples": n, "batch_size": b, **figures}


@pytest.mark.parametrize(
    ("row", "met"),
    [
        (row("update", nodes=4.0), True),
        (row("update", nodes=4.1), False),
        (row("update", b=128, nodes=3.0, of_million=9.0), True),  # N = 1e6: nothing to compare
        (row("update", bench.LARGEST, nodes=3.0, of_million=1.6), False),
        (row("draw", bench.LARGEST, of_million=1.5), True),
        (row("draw", us=1.0), None),
        (row("update + draw", us=9.9, of_torchrl=0.03), True),
        (row("update + draw", us=9.9, of_torchrl=0.04), False),
        (row("update + draw", us=9.9, of_torchrl=None), True),
        (row("update + draw", us=10.1, of_torchrl=0.01), False),
        (row("update + draw", b=128, us=50.0), None),
        (row("alias build", bench.LARGEST, None, us=1400.0), True),
        (row("alias build", bench.LARGEST, None, us=1401.0), False),
        (row("alias build", b=None, us=9999.0), None),
        (row("alias draw", of_gather=0.7), True),
        (row("alias draw", of_gather=0.69), False),
        (row("torch.multinomial", us=1.0), None),
    ],
)
def test_aims(row, met):
    assert bench.verdict(row) is met


def test_ratios_and_lines():
    made = bench.ratios(row("update + draw", us=8.0, sigma=1.0), 2.0, {"of_torchrl": 400.0})
    assert made["nodes"] == 4
    assert made["of_torchrl"] == pytest.approx(0.02)
    line = bench.line_of(made)
    assert len(line) == len(bench.HEADER)
    assert line[:7] == ("update + draw", "1e+06", "4096", "1", "8.00", "4.00", "0.020")
    assert line[-2:] == ("us <= 10, of_torchrl <= 0.03", "yes")
    assert bench.ratios(row("draw", us=8.0), 2.0, {"of_torchrl": None})["of_torchrl"] is None
