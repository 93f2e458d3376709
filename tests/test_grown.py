"""A state of fewer samples: the new ones, at the end, are unseen; the others go on as they were."""

from __future__ import annotations

import pytest
import torch
from conftest import drive, observe
from test_methods import make
from test_state_checks import bits_of

import fastis
from fastis.methods import BY_NAME, EMAIS

N, GROWN, B = 53, 70, 5

pytestmark = pytest.mark.filterwarnings("ignore:presampling will never switch on")


def trained(method, n=N, steps=60):
    sampler = fastis.Sampler(n, B, method=method, seed=2)
    drive(sampler, steps)
    return sampler


def grown_from(sampler, n=GROWN):
    bigger = fastis.Sampler(n, B, method=sampler.method, seed=7)
    with pytest.warns(
        UserWarning, match=f"state is of 53 samples, the sampler of {n}: samples from"
    ):
        bigger.load_state_dict(sampler.state_dict())
    return bigger


@pytest.mark.parametrize("n", [N + 1, GROWN, 10 * N])
@pytest.mark.parametrize("warmup_epochs", [0, 2])
def test_the_old_samples_keep_their_states_and_the_new_have_none(any_backend, n, warmup_epochs):
    before = trained(EMAIS(warmup_epochs=warmup_epochs))
    after = grown_from(before, n)
    assert after.num_samples == n
    assert torch.equal(after.mean[:N], before.mean)
    assert torch.equal(after.var[:N], before.var)
    assert torch.equal(after.last_seen[:N], before.last_seen)
    assert bool((after.last_seen[N:] == -1).all())
    assert after.step == before.step
    mean = before.importance.double().mean().float()
    torch.testing.assert_close(after.importance[N:], mean.expand(n - N), rtol=1e-6, atol=0)
    assert after.state_dict()["settings"]["seed"] == 2


@pytest.mark.parametrize("name", BY_NAME)
def test_every_method_goes_on(name):
    after = grown_from(trained(make(name)))
    seen = torch.cat([batch.indices for batch in drive(after, 200)])
    assert bool((seen >= N).any())
    probabilities = after.probabilities()
    assert bool((probabilities > 0).all())
    assert float(probabilities.sum()) == pytest.approx(1)
    again = fastis.Sampler(GROWN, B, method=after.method)
    again.load_state_dict(after.state_dict())  # which checks every number
    assert torch.equal(again.sample().indices, after.sample().indices)


def test_draws_are_unbiased_right_away():
    """The coefficients are those of the new table: E[r] = 1 and E[r x] is the mean of x."""
    after = grown_from(trained(EMAIS(warmup_epochs=0)))
    p, x = after.probabilities(), torch.rand(GROWN, dtype=torch.float64)
    batch = after.sample()
    expected = (1 / (GROWN * p[batch.indices])).float()
    torch.testing.assert_close(batch.weights, expected, rtol=3e-7, atol=0)
    assert float((p * x / (GROWN * p)).sum()) == pytest.approx(float(x.mean()))


def test_a_run_in_its_uniform_epochs_goes_on_with_the_longer_ones():
    after = grown_from(trained(EMAIS(warmup_epochs=2), steps=12))
    assert bool((after.sample().weights == 1).all())


def test_uniform_draws_on_demand_go_on(any_backend):
    before = trained(EMAIS(warmup_epochs=2), steps=22)  # of which 20 are warm-up; then it is 28
    before.uniform = True
    after = grown_from(before)
    assert after.uniform
    assert all(bool((batch.weights == 1).all()) for batch in drive(after, 30))
    assert after.phase == "uniform"
    after.uniform = False
    assert after.phase == "importance"


def test_prioritized_gives_new_samples_the_largest_priority():
    after = grown_from(trained(make("prioritized")))
    p = after.probabilities()
    assert bool((p[N:] == p.max()).all())


def test_fewer_samples_are_an_error_that_says_what_to_do():
    state = trained("emais").state_dict()
    smaller = fastis.Sampler(N - 1, B)
    before = bits_of(smaller)
    message = "at most num_samples=52 samples, got 53: .*Keep those in the data set; or make a new"
    with pytest.raises(ValueError, match=message):
        smaller.load_state_dict(state)
    assert bits_of(smaller) == before


@pytest.mark.filterwarnings("ignore:the state is of 53 samples")
def test_a_damaged_state_of_fewer_samples_is_refused():
    def refuses(change, message):
        sampler = trained("emais")
        state = sampler.state_dict()
        change(state)
        bigger = fastis.Sampler(GROWN, B)
        before = bits_of(bigger)
        with pytest.raises((ValueError, TypeError), match=message):
            bigger.load_state_dict(state)
        assert bits_of(bigger) == before

    refuses(lambda s: s.update(states=s["states"][:-1]), r"'states'\] must have shape \[70, 4\]")
    refuses(lambda s: s.update(states=s["states"].float()), r"'states'\] must have shape \[70, 4\]")
    refuses(lambda s: s.pop("states"), "must have 'states'")
    refuses(lambda s: s["states"][3, 2].fill_(10**6), r"must have last in \[-2, 60\]")
    refuses(lambda s: s["scalars"][5].add_(1), "must have seen=53, as its states have")


def test_a_state_on_another_device_is_still_refused():
    state = trained("emais").state_dict()
    state["states"] = state["states"].to("meta")
    with pytest.raises(TypeError, match="on meta"):
        fastis.Sampler(GROWN, B).load_state_dict(state)


def test_the_same_number_of_samples_needs_no_warning(recwarn):
    other = fastis.Sampler(N, B)
    other.load_state_dict(trained("emais").state_dict())
    assert not recwarn.list
    other.update(other.sample(), observe(torch.ones(B)))
