"""EMAIS(least_gain=...): uniform draws while importance sampling is not predicted to pay."""

import math

import pytest
import torch
from conftest import observe
from test_device import BACKWARDS, FORWARDS, SCRAMBLED, assert_equal_tables, emulated  # noqa: F401

import fastis
from fastis import kernels
from fastis.kernels.layout import PAUSE
from fastis.methods import EMAIS

N, B = 64, 8
METHOD = EMAIS(least_gain=1.3, smoothing=0.9, tau=5.0, warmup_epochs=1)
SETTLED = math.ceil(math.log(0.05) / math.log(0.9))  # updates until anything is decided


def alike(indices):
    """Scores of which nothing is to be gained."""
    return 1.0 + 0.01 * (indices % 3).float()


def unlike(indices):
    """Scores of which one in eight is ten times the others."""
    return torch.where(indices % 8 == 0, 10.0, 1.0) + 0.01 * (indices % 3)


def sampler(method=METHOD, **changes) -> fastis.Sampler:
    return fastis.Sampler(
        **{"num_samples": N, "batch_size": B, "seed": 5, "method": method} | changes
    )


def learn(sampler, scores, steps) -> list[str]:
    """The phase before each step."""
    phases = []
    for _ in range(steps):
        phases.append(sampler.phase)
        batch = sampler.sample()
        sampler.update(batch, observe(scores(batch.indices)))
    return phases


def test_it_pauses_where_nothing_is_gained_and_resumes_where_it_is(any_backend):
    s = sampler()
    phases = learn(s, alike, 60)
    first = N // B + SETTLED
    # Known from update number `first`, in force from the draw after the next.
    assert phases[: N // B] == ["warm-up"] * (N // B)
    assert phases[N // B : first + 1] == ["importance"] * (SETTLED + 1)
    assert phases[first + 1 :] == ["uniform"] * (60 - first - 1)
    assert float(s.lr_factor()) == float(s.lr_factor(rule="gain")) == 1.0
    assert s.probabilities().unique().tolist() == [1 / N]

    phases = learn(s, unlike, 200)
    assert phases[0] == "uniform"
    assert phases[-1] == "importance"
    assert float(s.lr_factor(rule="gain")) > 1.3
    assert phases.index("importance") >= 5  # not by one minibatch
    assert phases[phases.index("importance") :].count("uniform") == 0


def test_uniform_draws_are_whole_epochs_with_coefficients_of_one(any_backend):
    s = sampler()
    learn(s, alike, 80)
    assert s.phase == "uniform"
    batches = []
    for _ in range(N // B):
        batch = s.sample()
        assert torch.equal(batch.weights, torch.ones(B))
        s.update(batch, observe(alike(batch.indices)))
        batches.append(batch.indices)
    assert torch.cat(batches).sort().values.tolist() == list(range(N))


def test_without_a_least_gain_it_never_pauses(any_backend):
    s = sampler(EMAIS(least_gain=0.0, smoothing=0.9, tau=5.0, warmup_epochs=1))
    assert "uniform" not in learn(s, alike, 120)


def test_the_default_pauses_and_the_published_settings_do_not():
    for method, expected in ((EMAIS, "uniform"), (EMAIS.published, "importance")):
        s = sampler(method(smoothing=0.9, warmup_epochs=1))
        learn(s, alike, 60)
        assert s.phase == expected


@pytest.mark.parametrize("correction", [0.0, 0.5])
def test_it_does_not_pause_with_a_correction_below_1(any_backend, correction):
    s = sampler(correction=correction)
    assert "uniform" not in learn(s, alike, 60)
    s.correction = 1.0
    learn(s, alike, 60)
    assert s.phase == "uniform"
    s.correction = correction
    assert set(learn(s, alike, 60)) == {"importance"}
    assert s.sample().weights.unique().tolist() != [1.0] or correction == 0


def test_it_does_not_pause_where_a_minibatch_exceeds_the_samples(any_backend):
    s = sampler(EMAIS(least_gain=9.0, smoothing=0.5, warmup_epochs=0), num_samples=6)
    assert set(learn(s, alike, 40)) == {"importance"}
    assert int(s.sample().indices.max()) < 6


def test_a_loaded_correction_ends_a_pause():
    s = sampler()
    learn(s, alike, 60)
    state = s.state_dict() | {"correction": 0.5}
    other = sampler()
    other.load_state_dict(state)
    assert (s.phase, other.phase) == ("uniform", "importance")


def test_what_the_user_asks_for_comes_first(any_backend):
    s = sampler()
    learn(s, alike, 20)
    s.uniform = True
    assert set(learn(s, unlike, 80)) == {"uniform"}
    s.uniform = False
    assert learn(s, unlike, 1) == ["importance"]
    learn(s, alike, 80)
    assert s.phase == "uniform"  # paused
    assert not s.uniform
    s.uniform = True
    s.uniform = False
    assert s.phase == "uniform"  # still


def test_a_pause_is_saved(any_backend):
    s, other = sampler(), sampler(seed=9)
    learn(s, alike, 60)
    other.load_state_dict(s.state_dict())
    assert other.phase == "uniform"
    for one in (s, other):
        learn(one, unlike, 120)
    assert other.phase == "importance"
    states = s.state_dict(), other.state_dict()
    for name in ("scalars", "states"):
        assert torch.equal(states[0][name], states[1][name])


@pytest.mark.parametrize("scheme", ["multinomial", "systematic"])
def test_cpu_draws_as_the_reference_does(scheme):
    ours, theirs = sampler(scheme=scheme), sampler(scheme=scheme)
    for scores, steps in ((alike, 60), (unlike, 150), (alike, 150)):
        for _ in range(steps):
            with fastis.backend("cpu"):
                batch = ours.sample()
                ours.update(batch, observe(scores(batch.indices)))
            with fastis.backend("reference"):
                expected = theirs.sample()
                theirs.update(expected, observe(scores(expected.indices)))
            assert torch.equal(batch.indices, expected.indices)
            assert torch.equal(batch.weights, expected.weights)
        assert_equal_tables(theirs, ours)
    assert int(ours.state_dict()["scalars"][PAUSE]) > 0


@pytest.mark.parametrize("stride", [FORWARDS, BACKWARDS, SCRAMBLED])
@pytest.mark.parametrize("fused", [False, True])
def test_the_device_pauses_at_the_same_draw(emulated, stride, fused):  # noqa: F811
    """Also where an update and the next draw are one launch."""
    ours, theirs = sampler(), sampler()
    emulated(stride)
    device = kernels._chosen["table", "cpu"]
    batch = ours.sample()
    for scores, steps in ((alike, 60), (unlike, 150), (alike, 100)):
        for _ in range(steps):
            kernels._chosen.clear()
            with fastis.backend("reference"):
                expected = theirs.sample()
                theirs.update(expected, observe(scores(expected.indices)))
            assert torch.equal(batch.indices, expected.indices)
            assert torch.equal(batch.weights, expected.weights)
            kernels._chosen["table", "cpu"] = device
            out = observe(scores(batch.indices))
            if fused:
                batch = ours.update_and_sample(batch, out)
            else:
                ours.update(batch, out)
                batch = ours.sample()
    assert int(ours.state_dict()["scalars"][PAUSE]) > 0


def test_bad_least_gains_are_named():
    with pytest.raises(ValueError, match=r"least_gain must be in \[0, inf\]"):
        EMAIS(least_gain=-1.0)
