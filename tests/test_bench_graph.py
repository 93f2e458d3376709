"""The ways of a training step in a graph, run eagerly on the CPU: what they draw, in what order."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

sys.path.append(str(Path(__file__).resolve().parents[1]))

import fastis
from bench import bench_graph as bench
from bench.bench_sample import scored


def test_without_a_gpu_it_says_so(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert bench.main([]) == 2
    assert "torch finds none" in capsys.readouterr().err


@pytest.mark.parametrize("name", bench.WAYS)
def test_a_way_draws_what_a_sampler_driven_in_its_order_draws(monkeypatch, name):
    stream = SimpleNamespace(wait_stream=lambda other: None)
    monkeypatch.setattr(torch.cuda, "Stream", lambda: stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda _: contextlib.nullcontext())
    method = fastis.methods.EMAIS(warmup_epochs=0)
    sampler, twin = (fastis.Sampler(300, 16, method=method, seed=1) for _ in range(2))
    generator = torch.Generator().manual_seed(0)
    out = scored(torch.empty(16).log_normal_(0, 2, generator=generator))
    finished = []
    step = bench.WAYS[name](sampler, sampler.sample(), lambda _: out, finished.append)
    present = twin.sample()
    for _ in range(30):
        drawn = step()
        present = bench.follow(name, twin, present, out)
        assert torch.equal(drawn.indices, present.indices)
        assert torch.equal(drawn.weights, present.weights)
    assert sampler.step == twin.step == len(finished) == 30
