"""What a sampler tells about itself: numbers for a logger, a line of text, the phase."""

from __future__ import annotations

import json
from unittest import mock

import pytest
import torch
from conftest import Observation, drive, observe, scores
from no_host_reads import META, no_host_reads, on_meta
from torch import Tensor

import fastis
from fastis import methods
from fastis.kernels.layout import GAIN
from fastis.methods import EMAIS
from fastis.monitor import UPDATES_TO_KNOW

PHASES = ["warm-up", "importance", "uniform"]


def method_named(name):
    if name == "presampling":
        return methods.Presampling(scores, tau_threshold=1.0)
    return methods.BY_NAME[name]()


@pytest.mark.parametrize("name", sorted(methods.BY_NAME))
def test_stats_are_numbers_for_any_logger(any_backend, name):
    sampler = fastis.Sampler(60, 6, method=method_named(name), seed=1)
    for steps in (0, 5, 40):
        drive(sampler, steps)
        stats = sampler.stats(full=True)
        assert all(type(value) is float for value in stats.values())
        assert json.loads(json.dumps(stats)).keys() == stats.keys()
        assert stats["step"] == sampler.step
        assert PHASES[int(stats["phase"])] == sampler.phase
        assert stats["lr_factor"] == float(sampler.lr_factor())
        assert stats["gain"] == float(sampler.lr_factor(rule="gain"))
        for key in ("effective_batch_size", "efficiency"):
            value = float(getattr(sampler.variance, key))
            assert stats[key] == value or (steps == 0 and value != value)
        states, weights = sampler.method.has_states, sampler.method.has_coefficients
        assert ("share_unseen" in stats) == ("staleness" in stats) == states
        assert ("largest_weight" in stats) == (states and weights)


def test_stats_of_a_table_worked_out_by_hand():
    sampler = fastis.Sampler(8, 2, method=EMAIS(warmup_epochs=0), max_duplicates=2, seed=0)
    ones = torch.ones(2)
    for first in (0, 2, 0):
        score = torch.tensor([1.0, 3.0])
        batch = fastis.Batch(torch.tensor([first, first + 1]), ones)
        sampler.update(batch, observe(score))
    sampler.update(
        fastis.Batch(torch.tensor([4, 5]), ones), observe(torch.tensor([1.0, torch.nan]))
    )
    stats = sampler.stats(full=True)
    assert stats["step"] == 4
    assert stats["skipped"] == 1
    assert stats["share_unseen"] == 3 / 8
    # Last seen in iterations 2, 2, 1, 1, 3, of which 4 have been made.
    assert stats["staleness"] == (2 + 2 + 3 + 3 + 1) / 5
    # Weights 1, 3, 1, 3, 1; three unseen ones of the mean, 9/5: together 14.4.
    assert stats["largest_weight"] == pytest.approx(14.4 / 8, rel=1e-4)


def test_what_costs_much_is_asked_for():
    sampler = fastis.Sampler(60, 6, seed=1)
    with mock.patch.object(sampler, "probabilities", side_effect=AssertionError):
        assert not {"staleness", "largest_weight"} & sampler.stats().keys()


@pytest.mark.parametrize("name", sorted(set(methods.BY_NAME) - {"presampling"}))
def test_stats_wait_for_a_device_once(monkeypatch, name):
    on_meta(monkeypatch)
    sampler = fastis.Sampler(320, 16, method=name, device=META)
    calls = []

    def tolist(self: Tensor) -> list[float]:
        calls.append(self)
        return [0.0] * len(self)

    with no_host_reads(), mock.patch.object(Tensor, "tolist", tolist):
        sampler.stats()
    assert len(calls) == 1
    assert "at step" not in repr(sampler)  # nothing to be read there


def test_the_phase_of_the_next_draw():
    sampler = fastis.Sampler(60, 6, seed=1)
    for draws in range(25):
        assert sampler.phase == ("warm-up" if draws < 20 else "importance")
        sampler.sample()
    assert fastis.Sampler(60, 6, method=EMAIS(warmup_epochs=0)).phase == "importance"
    for name in ("scan", "uniform", "self_paced"):
        assert fastis.Sampler(60, 6, method=name).phase == "uniform"


def test_the_phase_of_methods_that_choose():
    presampling = fastis.Sampler(60, 6, method=method_named("presampling"), seed=0)
    assert presampling.phase == "uniform"
    presampling._table.memory["tau"].fill_(2.0)
    assert presampling.phase == "importance"


def loop(sampler, score, mean_grad, steps):
    for _ in range(steps):
        batch = sampler.sample()
        x = score[batch.indices]
        sampler.update(batch, Observation(x, x, mean_grad))


def test_the_prediction_comes_when_it_is_known():
    score = torch.empty(600).log_normal_(0, 1.5, generator=torch.Generator().manual_seed(2))
    sampler = fastis.Sampler(600, 60, seed=1)
    needed = 20 + UPDATES_TO_KNOW
    wanted = f"gain not yet known: 0 of {needed} updates, of which 20 are warm-up"
    assert sampler.prediction() == wanted
    loop(sampler, score, None, needed - 1)
    assert sampler.prediction().startswith(f"gain not yet known: {needed - 1} of")
    loop(sampler, score, None, 1)
    gain = float(sampler.lr_factor(rule="gain"))
    assert gain > 1.3
    wanted = f"gain at most {gain:.2f}: no loss has told its mean gradient (mean_grad)"
    assert sampler.prediction() == wanted
    loop(sampler, score, torch.tensor([0.1]), 1)
    gain = float(sampler.lr_factor(rule="gain"))
    assert sampler.prediction() == f"gain {gain:.2f}: a minibatch is worth {gain:.2f} uniform ones"


@pytest.mark.parametrize(
    ("gain", "verdict"),
    [
        (1.04, "gain 1.04: uniform sampling is as good"),
        (0.91, "gain 0.91: uniform sampling is as good"),
        (0.5, "gain 0.50: uniform sampling is better"),
        (2.1, "gain 2.10: a minibatch is worth 2.10 uniform ones"),
    ],
)
def test_the_prediction_says_what_a_gain_means(gain, verdict):
    sampler = fastis.Sampler(60, 6, method=EMAIS(warmup_epochs=0, least_gain=0.0), seed=1)
    drive(sampler, UPDATES_TO_KNOW)
    sampler._table.variance[GAIN] = gain
    assert sampler.prediction() == verdict


def test_the_prediction_while_importance_sampling_pauses():
    sampler = fastis.Sampler(60, 6, method=EMAIS(warmup_epochs=0), seed=1)
    loop(sampler, torch.ones(60), None, UPDATES_TO_KNOW + 10)
    assert sampler.phase == "uniform"
    wanted = "gain below 1.25: draws are uniform while no more is predicted"
    assert sampler.prediction() == wanted
    sampler.uniform = True
    assert sampler.prediction() == "gain not known while draws are uniform"


@pytest.mark.parametrize("name", ["scan", "confidence", "self_paced", "prioritized"])
def test_no_prediction_by_methods_that_estimate_none(name):
    sampler = fastis.Sampler(60, 6, method=name)
    assert sampler.prediction() == f"gain not known: method {name!r} does not estimate it"


def test_repr_says_where_it_stands():
    sampler = fastis.Sampler(60, 6, seed=5)
    assert repr(sampler).endswith(
        "seed=5) at step 0, warm-up, effective_batch_size=nan, efficiency=nan"
    )
    drive(sampler, 30)
    variance = sampler.variance
    assert repr(sampler).endswith(
        f"seed=5) at step 30, importance, effective_batch_size="
        f"{float(variance.effective_batch_size):.4g}, efficiency={float(variance.efficiency):.3g}"
    )
