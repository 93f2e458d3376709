"""The GPU benchmark's arithmetic, and that it says so where there is no GPU."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).resolve().parents[1]))

from bench import bench_gpu_loss as bench

BIG, MIDDLE, SMALL = bench.SHAPES[0], bench.SHAPES[1], bench.SHAPES[3]
CEILING = {"read": 4e12, "copy": 4e12}


def test_without_a_gpu_it_says_so(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert bench.main([]) == 2
    assert "torch finds none here" in capsys.readouterr().err


def test_bytes_are_those_that_must_move():
    assert bench.bytes_moved("score", BIG) == 8192 * 128256 * 2 + 24 * 8192
    assert bench.bytes_moved("grad", BIG) == 2 * 8192 * 128256 * 2 + 24 * 8192
    assert bench.bytes_moved("score", SMALL) == 128 * (40 + 24)


def test_data_of_a_graph_outgrows_the_cache():
    for shape in bench.SHAPES:
        copies = bench.copies_of(shape)
        assert 2 <= copies <= 20
        assert copies == 20 or copies * bench.bytes_moved("score", shape) >= bench.COLD_BYTES


@pytest.mark.parametrize(
    ("what", "shape", "share", "peers", "met"),
    [
        ("score", BIG, 0.93, {"forward": 2.1, "step": 9.0}, True),
        ("score", BIG, 0.91, {"forward": 2.1, "step": 9.0}, False),
        ("score", BIG, 0.93, {"forward": 1.9, "step": 9.0}, False),
        ("score", MIDDLE, 0.81, {"forward": 2.1, "step": 9.0}, True),
        ("grad", BIG, 0.91, {"forward": 1.1, "step": 2.6}, True),
        ("grad", BIG, 0.91, {"forward": 0.9, "step": 2.6}, False),
        ("grad", BIG, 0.91, {"forward": 1.1, "step": 2.4}, False),
        ("score", SMALL, 0.01, {"forward": 0.1, "step": 0.1}, None),
        ("step", BIG, 0.01, {"forward": 0.1, "step": 0.1}, None),
    ],
)
def test_targets(what, shape, share, peers, met):
    """``peers`` in multiples of our own time."""
    us = bench.bytes_moved(what, shape) / (share * 4e12) * 1e6
    row = bench.verdict(what, shape, us, {k: v * us for k, v in peers.items()}, CEILING)
    assert row["of_ceiling"] == pytest.approx(share)
    assert row["of_peer"]["forward"] == pytest.approx(1 / peers["forward"])
    assert row["met"] is met


def test_a_row_becomes_a_line():
    row = {"side": "torch", "what": "step", "shape": (4, 5), "dtype": "float32"}
    row |= {"us": 1.25, "eager_us": 9.0}
    assert len(bench.line_of(row)) == len(bench.HEADER)
    row |= bench.verdict("score", MIDDLE, 10.0, {"forward": 40.0}, CEILING)
    assert bench.line_of(row)[5] == "0.25"


def test_alternatives_start_with_the_plan_and_keep_a_lane_a_thread():
    from fastis.kernels.triton.geometry import Sweeps, Tiles

    for plan in (Sweeps(4, 256, 8, 3, 8, 8192), Tiles(1, 1024, 1, 4096)):
        others = list(bench.alternatives(plan))
        assert others[0] == plan
        assert len(set(others)) > 10
        assert all(o.lanes == 32 * o.num_warps for o in others if isinstance(o, Sweeps))


@pytest.mark.parametrize("name", ["rows.jsonl", "bench.json"])
def test_the_fastest_geometry_is_taken(tmp_path, name):
    import json

    pytest.importorskip("triton")
    from fastis.kernels.triton import geometry as triton_geometry
    from fastis.kernels.triton import loss as triton_loss

    options = {"vector": 8, "itemsize": 2, "with_mean_grad": False}
    plan = triton_geometry.row_launch(*MIDDLE[:2], with_grad=True, **options)
    slow, fast = list(bench.alternatives(plan))[:2]
    rows = [
        {"benchmark": "gpu loss tuned", "what": "grad", "shape": MIDDLE[:2], "us": us,
         "kind": type(other).__name__, "plan": other._asdict()}
        for us, other in ((9.0, slow), (8.0, fast), (9.5, slow))
    ]  # fmt: skip
    path = tmp_path / name
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    path.write_text(lines if name == "rows.jsonl" else json.dumps({"rows": rows}))
    with bench.winners(path):
        assert triton_loss.row_launch(*MIDDLE[:2], with_grad=True, **options) == fast
        other = triton_geometry.row_launch(*MIDDLE[:2], with_grad=False, **options)
        assert triton_loss.row_launch(*MIDDLE[:2], with_grad=False, **options) == other
    with bench.winners(None):
        assert triton_loss.row_launch(*MIDDLE[:2], with_grad=True, **options) == plan


def test_every_shape_has_a_plan():
    for shape in bench.SHAPES:
        for with_grad in (False, True):
            assert bench.plan_of(shape, with_grad).programs > 0
