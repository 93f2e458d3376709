"""The sampler as users see it: phases, clocks, unbiasedness, errors."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from conftest import drive, observe, sweep

import fastis
from fastis.methods import EMAIS, Scan, Uniform

SCHEMES = ["multinomial", "stratified", "systematic"]


def ready(n=200, b=16, **options):
    """A sampler past its warm-up, every sample seen once with lognormal scores."""
    sampler = fastis.Sampler(n, b, method=EMAIS(warmup_epochs=0), **options)
    score = torch.empty(n).log_normal_(0, 1.5, generator=torch.Generator().manual_seed(7))
    sweep(sampler, score)
    return sampler


def test_the_loop_of_the_readme_runs():
    sampler = fastis.Sampler(num_samples=100, batch_size=8, seed=0)
    batch = sampler.sample()
    assert isinstance(batch, fastis.Batch)
    assert batch.indices.dtype == torch.int64
    assert batch.weights.dtype == torch.float32
    assert batch.indices.shape == batch.weights.shape == (8,)
    indices, weights = fastis.sample(sampler)
    assert indices.shape == weights.shape == (8,)
    sampler.update(batch, observe(torch.rand(8)))
    assert sampler.step == 1


@pytest.mark.parametrize("method", ["emais", "scan"])
def test_warm_up_visits_every_sample_once_an_epoch(any_backend, method):
    sampler = fastis.Sampler(103, 10, method=method, seed=4)
    for _ in range(2):
        drawn = torch.cat([sampler.sample().indices for _ in range(10)])
        assert drawn.unique().numel() == 100  # the ragged last minibatch is dropped
    if method == "scan":
        assert (sampler.probabilities() == 1 / 103).all()


def test_warm_up_weights_are_one_and_factor_is_one():
    sampler = fastis.Sampler(64, 8, seed=1)
    batches = drive(sampler, 16)
    assert all((b.weights == 1).all() for b in batches)
    assert sampler.lr_factor() == 1
    assert float(sampler.variance.effective_batch_size) == pytest.approx(8)
    assert not (sampler.sample().weights == 1).all()


def test_uniform_draws_with_replacement(any_backend):
    sampler = fastis.Sampler(10, 2000, method="uniform")
    counts = torch.bincount(sampler.sample().indices, minlength=10)
    # Binomial(2000, 1/10) has SD 13.4; six of them.
    assert (counts - 200).abs().max() < 80


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("flatten", ["cap", "mix"])
def test_draws_follow_the_reported_probabilities(scheme, flatten):
    sampler = ready(n=50, b=10, scheme=scheme, flatten=flatten)
    p = sampler.probabilities()
    trials = 3000
    counts = torch.zeros(50, dtype=torch.float64)
    for _ in range(trials):
        batch = sampler.sample()
        counts += torch.bincount(batch.indices, minlength=50)
        torch.testing.assert_close(
            batch.weights.double(), 1 / (50 * p[batch.indices]), rtol=2e-7, atol=0
        )
    expected = p * trials * 10
    chi2 = float(((counts - expected) ** 2 / expected).sum())
    # 49 degrees of freedom: beyond 105 once in 200,000 (less for stratified draws).
    assert chi2 < 105


@pytest.mark.parametrize(("scheme", "slack"), [("stratified", 1), ("systematic", 0)])
def test_stratified_copies_are_bounded(any_backend, scheme, slack):
    sampler = ready(n=60, b=30, scheme=scheme)
    expected = 30 * sampler.probabilities()
    for _ in range(30):
        copies = torch.bincount(sampler.sample().indices, minlength=60)
        assert (copies <= (expected - 1e-9).ceil() + slack).all()
        if scheme == "systematic":
            assert (copies >= (expected + 1e-9).floor()).all()


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_weighted_mean_is_unbiased(scheme):
    sampler = ready(n=100, b=20, scheme=scheme)
    values = torch.arange(100.0) ** 2
    means = torch.stack(
        [(b.weights * values[b.indices]).mean() for b in (sampler.sample() for _ in range(4000))]
    )
    error = float(means.mean() - values.mean())
    assert abs(error) < 5 * float(means.std()) / 4000**0.5


def test_stratified_and_systematic_draws_have_less_variance():
    def spread(scheme):
        sampler = ready(n=100, b=20, scheme=scheme)
        values = sampler.probabilities().float() * torch.arange(100.0)  # r x smooth in the index
        return torch.stack(
            [(b.weights * values[b.indices]).mean() for b in (sampler.sample() for _ in range(500))]
        ).var()

    multinomial = spread("multinomial")
    assert spread("stratified") < 0.5 * multinomial
    assert spread("systematic") < 0.5 * multinomial


def test_drawing_ahead_keeps_the_weights_of_the_draw(any_backend):
    sampler = ready()
    p = sampler.probabilities()
    first, second = sampler.sample(), sampler.sample()
    sampler.update(first, observe(torch.full((16,), 50.0)))
    torch.testing.assert_close(
        second.weights.double(), 1 / (200 * p[second.indices]), rtol=2e-7, atol=0
    )
    assert not torch.equal(sampler.probabilities(), p)
    sampler.update(second, observe(torch.full((16,), 60.0)))
    assert sampler.step == 3


def test_seeds_differ_and_repeat():
    draws = [fastis.Sampler(1000, 10, seed=s).sample().indices for s in (0, 0, 1, 2**64 - 1)]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
    assert not torch.equal(draws[0], draws[3])


def test_default_device_is_torchs():
    assert fastis.Sampler(10, 2).device == torch.device("cpu")
    with torch.device("meta"):
        assert torch.get_default_device().type == "meta"
    assert fastis.Sampler(10, 2, device="cpu").device == torch.device("cpu")


def test_uniform_methods_have_no_state():
    sampler = fastis.Sampler(10, 2, method=Scan())
    assert (sampler.importance == 1).all()
    with pytest.raises(AttributeError, match="method 'scan' keeps no state"):
        _ = sampler.mean


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"num_samples": 0}, ValueError, "num_samples must be in"),
        ({"num_samples": 2.0}, TypeError, "num_samples must be an int, got float"),
        ({"num_samples": 2**32}, ValueError, "num_samples must be in"),
        ({"batch_size": -1}, ValueError, "batch_size must be in"),
        ({"batch_size": True}, TypeError, "batch_size must be an int, got bool"),
        ({"batch_size": 101}, ValueError, "batch_size must be at most num_samples=100"),
        ({"method": "emas"}, ValueError, "method must be one of 'emais'.* got 'emas'"),
        ({"method": 3}, TypeError, "method must be a name or an object"),
        ({"max_duplicates": 0.05}, ValueError, r"batch_size / num_samples = 0.1 .*got 0.05"),
        ({"max_duplicates": "2"}, TypeError, "max_duplicates must be a number"),
        ({"flatten": "clip"}, ValueError, "flatten must be one of 'cap'"),
        ({"scheme": "sobol"}, ValueError, "scheme must be one of 'multinomial'"),
        ({"seed": -1}, ValueError, "seed must be in"),
        ({"seed": 2**64}, ValueError, "seed must be in"),
        ({"device": "nonsense"}, RuntimeError, "nonsense"),
    ],
)
def test_constructor_errors(arguments, error, message):
    with pytest.raises(error, match=message):
        fastis.Sampler(**{"num_samples": 100, "batch_size": 10, **arguments})


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"tau": 0}, ValueError, "tau must be 'linear' or a positive number"),
        ({"tau_scale": 0.0}, ValueError, r"tau_scale must be in \(0, inf\)"),
        ({"tau": "log"}, ValueError, "tau must be 'linear' or a positive number"),
        ({"tau": None}, TypeError, "tau must be a number"),
        ({"importance": "max"}, ValueError, "importance must be one of 'rms', 'sum'"),
        ({"warmup_epochs": -1}, ValueError, "warmup_epochs must be at least 0"),
        ({"floor": 0}, ValueError, "floor must be in"),
        ({"floor": 2.0}, ValueError, "floor must be in"),
        ({"estimator": "jackknife"}, ValueError, "estimator must be one of"),
        ({"smoothing": 1.0}, ValueError, r"smoothing must be in \[0, 1\)"),
    ],
)
def test_method_option_errors(options, error, message):
    with pytest.raises(error, match=message):
        EMAIS(**options)


def test_too_many_samples_for_the_sums_is_an_error():
    with pytest.raises(ValueError, match=r"num_samples=4000000000 .*needs sums of"):
        fastis.Sampler(4_000_000_000, 128, flatten="mix", method=EMAIS(floor=1e-6), device="meta")


good = fastis.Batch(torch.tensor([1, 2]), torch.ones(2))


@pytest.mark.parametrize(
    ("batch", "out", "error", "message"),
    [
        (good, observe(torch.ones(3)), ValueError, r"out.score must have shape \[2\], got \[3\]"),
        (good, observe(torch.ones(2, 1)), ValueError, r"out.score must have shape \[2\]"),
        (good, 3.0, TypeError, "out must be a ScoredLoss"),
        (good, [], ValueError, "out must have at least one part"),
        (good, [torch.ones(2)], TypeError, "out must be a ScoredLoss"),
        (
            fastis.Batch(torch.tensor([1, 10]), torch.ones(2)),
            observe(torch.ones(2)),
            IndexError,
            r"batch.indices must be in \[0, 10\), got values from 1 to 10",
        ),
        (
            fastis.Batch(torch.tensor([-1, 1]), torch.ones(2)),
            observe(torch.ones(2)),
            IndexError,
            "batch.indices must be in",
        ),
        (
            fastis.Batch(torch.tensor([1, 2]).int(), torch.ones(2)),
            observe(torch.ones(2)),
            TypeError,
            "batch.indices must have dtype torch.int64, got torch.int32",
        ),
        (
            fastis.Batch(torch.tensor([1, 2]), torch.ones(2).double()),
            observe(torch.ones(2)),
            TypeError,
            "batch.weights must have dtype torch.float32",
        ),
        (
            fastis.Batch(torch.arange(4)[::2], torch.ones(2)),
            observe(torch.ones(2)),
            ValueError,
            "batch.indices must be contiguous",
        ),
    ],
)
def test_update_errors_change_nothing(any_backend, batch, out, error, message):
    sampler = fastis.Sampler(10, 2)
    sampler.update(good, observe(torch.tensor([3.0, 4.0])))
    before = sampler.state_dict()
    with pytest.raises(error, match=message):
        sampler.update(batch, out)
    after = sampler.state_dict()
    assert all(torch.equal(before[k], after[k]) for k in ("states", "scalars", "variance"))


@pytest.mark.parametrize("method", ["emais", "scan", "loss", "confidence", "prioritized"])
@pytest.mark.parametrize("flatten", ["cap", "mix"])
def test_update_and_sample_is_update_then_sample(any_backend, method, flatten):
    one, two = (fastis.Sampler(60, 6, method=method, flatten=flatten, seed=3) for _ in range(2))
    batch, expected = one.sample(), two.sample()
    generator = torch.Generator().manual_seed(0)
    for _ in range(40):
        out = observe(torch.empty(6).log_normal_(0, 2, generator=generator).clamp(max=1.0))
        batch = one.update_and_sample(batch, out)
        two.update(expected, out)
        expected = two.sample()
        assert torch.equal(batch.indices, expected.indices)
        assert torch.equal(batch.weights, expected.weights)
    assert one.step == two.step == 40


def test_update_and_sample_draws_nothing_on_errors(any_backend):
    sampler = fastis.Sampler(10, 2)
    before = sampler.state_dict()
    bad = fastis.Batch(torch.tensor([1, 10]), torch.ones(2))
    with pytest.raises(IndexError, match=r"batch.indices must be in"):
        sampler.update_and_sample(bad, observe(torch.ones(2)))
    with pytest.raises(ValueError, match=r"out.score must have shape"):
        sampler.update_and_sample(good, observe(torch.ones(3)))
    assert torch.equal(sampler.state_dict()["scalars"], before["scalars"])


def test_an_empty_update_is_no_iteration():
    sampler = fastis.Sampler(10, 2)
    sampler.update(fastis.Batch(torch.empty(0).long(), torch.empty(0)), observe(torch.empty(0)))
    assert sampler.step == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_samples": 11}, "at most num_samples=10 samples, got 11"),
        ({"batch_size": 3}, "batch_size=2, got 3"),
        ({"method": "scan"}, "method='emais', got 'scan'"),
        ({"method": EMAIS(tau=5)}, "options="),
        ({"scheme": "stratified"}, "scheme='multinomial', got 'stratified'"),
    ],
)
def test_loading_another_samplers_state_is_an_error(change, message):
    other = fastis.Sampler(**{"num_samples": 10, "batch_size": 2, **change})
    sampler = fastis.Sampler(10, 2)
    with pytest.raises(ValueError, match=message):
        sampler.load_state_dict(other.state_dict())


def test_loading_nonsense_is_an_error():
    sampler = fastis.Sampler(10, 2)
    with pytest.raises(ValueError, match="version 3, got None"):
        sampler.load_state_dict({})
    state = sampler.state_dict()
    state["states"] = state["states"][:5]
    with pytest.raises(ValueError, match=r"state_dict\['states'\] must have shape \[10, 4\]"):
        sampler.load_state_dict(state)


def test_lr_factor_rules():
    sampler = ready()
    for seed in range(3):
        drive(sampler, 20, seed=seed)
    factor = float(sampler.variance.effective_batch_size) / 16
    assert float(sampler.lr_factor()) == pytest.approx(factor)
    assert float(sampler.lr_factor("adam")) == pytest.approx(factor**0.5)
    with pytest.raises(ValueError, match="optimizer must be one of 'sgd', 'adam', got 'lion'"):
        sampler.lr_factor("lion")
    with pytest.raises(ValueError, match="rule must be one of 'linear', 'gain', got 'root'"):
        sampler.lr_factor(rule="root")


def test_repr_says_what_it_is():
    text = repr(fastis.Sampler(10, 2, method=Uniform(), seed=5))
    assert "num_samples=10" in text
    assert "Uniform(" in text
    assert "seed=5" in text


def test_without_a_seed_torchs_decides():
    samplers = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        samplers.append(fastis.Sampler(1000, 10))
    a, b, c = (sampler.sample().indices for sampler in samplers)
    assert torch.equal(a, b)
    assert not torch.equal(a, c)
    torch.manual_seed(1)
    first, second = (fastis.Sampler(1000, 10).sample().indices for _ in range(2))
    assert torch.equal(first, a)
    assert not torch.equal(first, second)


def test_a_seed_leaves_torchs_generator_alone():
    torch.manual_seed(1)
    before = torch.get_rng_state()
    sampler = pickle.loads(pickle.dumps(fastis.Sampler(1000, 10, seed=3)))
    copy.deepcopy(sampler).sample()
    assert torch.equal(torch.get_rng_state(), before)
