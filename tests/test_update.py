"""The state table: formulas against float64, bits between backends, odd observations by name."""

from __future__ import annotations

import math

import pytest
import torch
from conftest import batch_of, drive, observe, sweep
from hypothesis import given, settings
from hypothesis import strategies as st

import fastis
from fastis.kernels import state
from fastis.kernels.code import code_of
from fastis.kernels.layout import LAST, UPDATES
from fastis.methods import EMAIS


def ema_in_float64(observations, tau=None, scale=1.0):
    """math: state table, straight from the formulas. observations: [(t, x)]."""
    mean = var = 0.0
    last = -1
    for t, x in observations:
        alpha = 0.0 if last < 0 else math.exp(-(t - last) / (tau or max(scale * t, 1)))
        d = x - mean
        mean, var, last = mean + (1 - alpha) * d, alpha * (var + (1 - alpha) * d * d), t
    return mean, var


@pytest.mark.parametrize(("tau", "scale"), [("linear", 1.0), ("linear", 0.3), (7.5, 1.0)])
def test_update_follows_the_formulas(any_backend, tau, scale):
    sampler = fastis.Sampler(20, 4, method=EMAIS(tau=tau, tau_scale=scale))
    generator = torch.Generator().manual_seed(0)
    seen = {i: [] for i in range(20)}
    for t in range(60):
        indices = torch.randperm(20, generator=generator)[:4]
        score = torch.rand(4, generator=generator) * 3
        sampler.update(fastis.Batch(indices, torch.ones(4)), observe(score))
        for i, x in zip(indices.tolist(), score.double().tolist(), strict=True):
            seen[i].append((t, x))
    mean, var, last = sampler.mean, sampler.var, sampler.last_seen
    for i, observations in seen.items():
        expected = ema_in_float64(observations, None if tau == "linear" else tau, scale)
        # 60 float32 operations of relative error 2^-24 each, on values of order 1.
        assert float(mean[i]) == pytest.approx(expected[0], rel=1e-5, abs=1e-5)
        assert float(var[i]) == pytest.approx(expected[1], rel=1e-5, abs=1e-5)
        assert int(last[i]) == observations[-1][0]


@given(st.floats(1e-9, 100))
@settings(max_examples=200, deadline=None)
def test_decay_is_accurate(y):
    alpha, one_minus_alpha = state.decay(torch.tensor([y], dtype=torch.float32))
    exact = float(torch.tensor(y, dtype=torch.float32))
    if exact < 79:
        assert float(alpha) == pytest.approx(math.exp(-exact), rel=4e-7)
    assert float(one_minus_alpha) == pytest.approx(-math.expm1(-exact), rel=4e-7)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"importance": "sum"},
        {"tau": 30},
        {"floor": 1e-6},
        {"floor": 1.0},
        {"warmup_epochs": 0},
    ],
)
@pytest.mark.parametrize("decay", [0.0, 0.08, -0.08])
def test_backends_agree_to_the_bit(options, decay):
    # Scores move over fourteen powers of ten, so that tables are rescaled on the way.
    runs = []
    for name in ("reference", "cpu"):
        with fastis.backend(name):
            sampler = fastis.Sampler(300, 16, method=EMAIS(**options), seed=5)
            runs.append((drive(sampler, 200, decay=decay), sampler.state_dict()))
    (batches, state), (other_batches, other_state) = runs
    for a, b in zip(batches, other_batches, strict=True):
        assert torch.equal(a.indices, b.indices)
        assert torch.equal(a.weights, b.weights)
    assert torch.equal(state["states"], other_state["states"])
    assert torch.equal(state["scalars"], other_state["scalars"])
    torch.testing.assert_close(state["variance"], other_state["variance"], rtol=1e-12, atol=1e-12)


def test_first_position_wins(any_backend):
    sampler = fastis.Sampler(8, 4)
    sampler.update(batch_of(3, 5, 3, 3), observe(torch.tensor([1.0, 2.0, 9.0, 7.0])))
    assert sampler.mean[3] == 1.0
    assert sampler.mean[5] == 2.0
    assert sampler.var[3] == 0.0


def test_first_usable_position_wins(any_backend):
    sampler = fastis.Sampler(8, 4)
    sampler.update(batch_of(3, 3, 3), observe(torch.tensor([math.nan, 4.0, 5.0])))
    assert sampler.mean[3] == 4.0
    assert sampler.skipped == 1


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 2.0**60])
def test_a_bad_score_leaves_its_sample_alone_and_is_counted(any_backend, bad):
    sampler = fastis.Sampler(8, 4)
    sampler.update(batch_of(0, 1, 2), observe(torch.tensor([1.0, 2.0, 3.0])))
    before, variance = sampler.state_dict(), sampler.variance.trace_is
    sampler.update(batch_of(0, 1, 2), observe(torch.tensor([1.5, bad, 2.5])))
    after = sampler.state_dict()
    assert torch.equal(before["states"][1], after["states"][1])
    assert not torch.equal(before["states"][0], after["states"][0])
    assert sampler.skipped == 1
    assert sampler.step == 2
    if not math.isfinite(bad):
        assert torch.equal(sampler.variance.trace_is, variance)


def test_all_scores_zero_is_uniform(any_backend):
    sampler = fastis.Sampler(40, 4, method=EMAIS(warmup_epochs=0))
    for _ in range(3):
        sweep(sampler, torch.zeros(40))
    torch.testing.assert_close(sampler.probabilities(), torch.full((40,), 1 / 40).double())
    assert (sampler.sample().weights == 1).all()


@pytest.mark.parametrize("scale", [1e-30, 1e-18, 1.0, 1e17])
def test_scores_of_any_scale_give_the_same_probabilities(any_backend, scale):
    score = torch.tensor([1.0, 2, 3, 4, 5, 6, 7, 8])
    sampler = fastis.Sampler(8, 2, method=EMAIS(warmup_epochs=0), max_duplicates=2)
    sweep(sampler, score * scale)
    expected = (score / score.sum()).double()
    torch.testing.assert_close(sampler.probabilities(), expected, rtol=2**-15, atol=0)


@pytest.mark.parametrize(
    ("method", "bound"),
    [(EMAIS(warmup_epochs=0), 11), (EMAIS.published(warmup_epochs=0), 1001)],
)
def test_floor_bounds_the_coefficient(any_backend, method, bound):
    score = torch.full((1000,), 1e-9)
    score[:10] = 1.0
    sampler = fastis.Sampler(1000, 10, method=method, max_duplicates=10)
    sweep(sampler, score)
    coefficient = 1 / (1000 * sampler.probabilities())
    assert coefficient.max() <= bound * (1 + 2**-15)
    assert coefficient.max() > 0.9 * bound


def test_unseen_samples_have_the_mean_weight_of_the_seen(any_backend):
    sampler = fastis.Sampler(100, 10, method=EMAIS(warmup_epochs=0))
    assert (sampler.probabilities() == 1 / 100).all()
    sampler.update(batch_of(4, 7, 50), observe(torch.tensor([1.0, 2.0, 6.0])))
    p = sampler.probabilities()
    assert float(p[4] / p[0]) == pytest.approx(1 / 3, rel=2**-14)
    assert float(p[50] / p[99]) == pytest.approx(2, rel=2**-14)
    assert sampler.importance[0] == pytest.approx(3.0, rel=2**-14)


def test_parts_equal_the_whole(any_backend):
    generator = torch.Generator().manual_seed(1)
    indices = torch.tensor([3, 1, 3, 7, 1, 2])
    score, grads = torch.rand(6, generator=generator), torch.rand(6, 5, generator=generator)
    whole, parts = fastis.Sampler(10, 6), fastis.Sampler(10, 6)
    batch = fastis.Batch(indices, torch.ones(6))
    whole.update(batch, observe(score, grads.mean(0)))
    parts.update(
        batch, [observe(score[:2], grads[:2].mean(0)), observe(score[2:], grads[2:].mean(0))]
    )
    assert parts.step == 1
    assert torch.equal(whole.state_dict()["states"], parts.state_dict()["states"])
    torch.testing.assert_close(whole.variance.trace_is, parts.variance.trace_is, rtol=1e-5, atol=0)


def test_codes_round_half_even_to_16_bits():
    one_ulp = 2.0**-15
    values = [1.0, 1 + one_ulp / 2, 1 + 1.5 * one_ulp, 1 + 0.51 * one_ulp, 2 - one_ulp / 4]
    expected = [1.0, 1.0, 1 + 2 * one_ulp, 1 + one_ulp, 2.0]
    assert code_of(torch.tensor(values), 0.0).view(torch.float32).tolist() == expected


def test_a_late_update_of_the_same_iteration_changes_nothing():
    sampler = fastis.Sampler(10, 2)
    sweep(sampler, torch.ones(10))
    sampler._table.scalars[UPDATES] = 5
    sampler._table.column(LAST)[3] = 9  # observed at iteration 9, in this update's future
    sampler.update(batch_of(3), observe(torch.tensor([4.0])))
    assert sampler.last_seen[3] == 9
    assert sampler.mean[3] == 1
