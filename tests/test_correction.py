"""``Sampler.correction``: weights between 1/(N p) and 1, without harm to what is learnt."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from conftest import Observation, drive

import fastis
from fastis import methods
from fastis.methods import EMAIS

N, B = 100, 10


def samplers(count=2, **options):
    """Twins whose minibatches have coefficients."""
    made = [fastis.Sampler(N, B, method=EMAIS(warmup_epochs=0), seed=1, **options)]
    drive(made[0], 60)
    return [made[0], *(copy.deepcopy(made[0]) for _ in range(count - 1))]


def out_of(batch):
    """Scores by the index, so that equal draws give equal scores."""
    x = 1.0 + batch.indices.float().sqrt()
    return Observation(x, x, torch.full((4,), 0.1))


@pytest.mark.parametrize("correction", [0.0, 0.001, 0.4, 1.0])
@pytest.mark.parametrize("how", ["sample", "update_and_sample"])
def test_weights_are_a_power_of_the_coefficients(any_backend, how, correction):
    plain, sampler = samplers()
    sampler.correction = correction
    assert sampler.correction == correction
    batches = plain.sample(), sampler.sample()
    for _ in range(20):
        r, weights = (batch.weights for batch in batches)
        assert torch.equal(batches[0].indices, batches[1].indices)
        torch.testing.assert_close(weights, r.double().pow(correction).float(), rtol=3e-7, atol=0)
        assert r.std() > 0.1
        if how == "sample":
            for s, batch in zip((plain, sampler), batches, strict=True):
                s.update(batch, out_of(batch))
            batches = plain.sample(), sampler.sample()
        else:
            batches = tuple(
                s.update_and_sample(batch, out_of(batch))
                for s, batch in zip((plain, sampler), batches, strict=True)
            )


@pytest.mark.parametrize("name", ["emais", "rais"])
@pytest.mark.parametrize("correction", [0.2, 0.7])
def test_what_is_learnt_is_the_same(any_backend, name, correction):
    options = {"method": name, "seed": 1}
    plain = fastis.Sampler(N, B, **options)
    sampler = fastis.Sampler(N, B, correction=correction, **options)
    for _ in range(60):
        for s in (plain, sampler):
            batch = s.sample()
            s.update(batch, out_of(batch))
    theirs, ours = plain.state_dict(), sampler.state_dict()
    if name == "emais":
        assert torch.equal(ours["states"], theirs["states"])
    assert plain.variance.efficiency != 1
    torch.testing.assert_close(ours["variance"], theirs["variance"], rtol=1e-4, atol=1e-6)


def test_at_0_draws_count_as_uniform_and_near_0_nothing_explodes():
    for correction in (0.0, 1e-9, 1e-4):
        (sampler,) = samplers(1)
        sampler.correction = correction
        for _ in range(800):
            batch = sampler.sample()
            sampler.update(batch, out_of(batch))
        variance = sampler.variance
        assert float(variance.effective_batch_size) == pytest.approx(B, rel=0.2)
        assert float(variance.efficiency) == pytest.approx(1, abs=0.3)


def test_the_rate_has_no_factor_below_1():
    sampler = fastis.Sampler(N, B, method=EMAIS(warmup_epochs=0, least_gain=0.0), seed=1)
    drive(sampler, 400)
    factor = float(sampler.lr_factor())
    assert factor != 1
    stats = sampler.stats(full=True)
    assert "correction" not in repr(sampler)
    sampler.correction = 0.5
    assert float(sampler.lr_factor()) == float(sampler.lr_factor("adam", "linear")) == 1
    assert sampler.stats()["lr_factor"] == sampler.stats()["gain"] == 1
    assert sampler.stats(full=True)["largest_weight"] == stats["largest_weight"] ** 0.5
    assert sampler.prediction() == "gain not known while the correction is below 1"
    assert "seed=1, correction=0.5)" in repr(sampler)
    sampler.correction = 1
    assert float(sampler.lr_factor()) == factor


def test_it_is_saved(any_backend):
    (sampler,) = samplers(1, correction=0.25)
    sampler.correction = 0.75
    other = fastis.Sampler(N, B, method=EMAIS(warmup_epochs=0))
    other.load_state_dict(sampler.state_dict())
    for s in (other, copy.deepcopy(sampler), pickle.loads(pickle.dumps(sampler))):
        assert s.correction == 0.75
        assert torch.equal(s.sample().weights, copy.deepcopy(sampler).sample().weights)
    old = {k: v for k, v in sampler.state_dict().items() if k != "correction"}
    old["scalars"], old["variance"] = old["scalars"][:6], old["variance"][:12]
    with pytest.raises(ValueError, match="must have a correction, got None"):
        other.load_state_dict(old)
    never_pausing = fastis.Sampler(N, B, method=EMAIS(warmup_epochs=0, least_gain=0.0))
    never_pausing.correction = 0.5
    settings = {**old["settings"], "options": never_pausing.method.options()}
    never_pausing.load_state_dict({**old, "settings": settings, "version": 2})
    assert never_pausing.correction == 1


@pytest.mark.parametrize("value", [-0.1, 1.1, float("nan"), "1", True, torch.ones(())])
def test_other_values_are_refused(value):
    (sampler,) = samplers(1, correction=0.5)
    for name, use in (
        ("correction", lambda: setattr(sampler, "correction", value)),
        ("correction", lambda: fastis.Sampler(N, B, correction=value)),
        (
            "state_dict's correction",
            lambda: sampler.load_state_dict({**sampler.state_dict(), "correction": value}),
        ),
    ):
        with pytest.raises((TypeError, ValueError), match=rf"^{name} must be"):
            use()
    assert sampler.correction == 0.5


@pytest.mark.parametrize(
    "name", sorted(n for n, m in methods.BY_NAME.items() if n != "presampling")
)
def test_methods_without_coefficients_have_none_to_correct(name):
    sampler = fastis.Sampler(N, B, method=name)
    if sampler.method.has_coefficients:
        sampler.correction = 0.5
        return
    with pytest.raises(ValueError, match=rf"correction must be 1 for method '{name}'"):
        sampler.correction = 0.5
    sampler.correction = 1
    with pytest.raises(ValueError, match=r"state_dict's correction must be in \[1, 1\]"):
        sampler.load_state_dict({**sampler.state_dict(), "correction": 0.5})
