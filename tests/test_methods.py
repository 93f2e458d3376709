"""Every method: what all have in common, saving, what it is expected to do, and errors."""

from __future__ import annotations

import copy
import io
import math
import operator

import pytest
import torch
from conftest import batch_of, drive, losses_of, observe, scores, train

import fastis
from fastis import methods
from fastis.methods.rais import non_negative_least_squares


def make(name):
    return methods.Presampling(scores) if name == "presampling" else methods.BY_NAME[name]()


# What all have in common --------------------------------------------------------------------------


@pytest.mark.parametrize("name", methods.BY_NAME)
def test_every_method_runs_from_its_name_and_draws_the_same_on_every_backend(name):
    drawn = {}
    for backend in ("reference", "cpu"):
        with fastis.backend(backend):
            sampler = fastis.Sampler(300, 10, method=make(name), seed=5)
            drawn[backend] = drive(sampler, 80)
    for a, b in zip(drawn["reference"], drawn["cpu"], strict=True):
        assert torch.equal(a.indices, b.indices)
        assert torch.equal(a.weights, b.weights)


@pytest.mark.parametrize("name", methods.BY_NAME)
@pytest.mark.parametrize("steps", [0, 31, 75])
def test_every_method_resumes_bit_for_bit(name, steps):
    sampler = fastis.Sampler(300, 10, method=make(name), seed=5)
    drive(sampler, steps, decay=0.05)
    file = io.BytesIO()
    torch.save(sampler.state_dict(), file)
    file.seek(0)
    resumed = fastis.Sampler(300, 10, method=make(name), seed=6)
    drive(resumed, 33)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    for other in (resumed, copy.deepcopy(sampler)):
        again = copy.deepcopy(sampler)
        for x, y in zip(drive(again, 70, seed=9), drive(other, 70, seed=9), strict=True):
            assert torch.equal(x.indices, y.indices)
            assert torch.equal(x.weights, y.weights)
        assert torch.equal(again.lr_factor(), other.lr_factor())
        assert torch.equal(again.effective_iterations, other.effective_iterations)


@pytest.mark.filterwarnings("ignore:presampling will never switch on")
@pytest.mark.parametrize("name", methods.BY_NAME)
def test_bad_observations_change_nothing(name):
    sampler = fastis.Sampler(30, 3, method=make(name))
    drive(sampler, 25)
    before = sampler.state_dict()
    with pytest.raises(IndexError, match=r"batch\.indices must be in \[0, 30\), got values from 3"):
        sampler.update(batch_of(3, 4, 30), losses_of(1.0, 2.0, 3.0))
    for key, value in sampler.state_dict().items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, before[key]), key


@pytest.mark.filterwarnings("ignore:presampling will never switch on")
@pytest.mark.parametrize("name", methods.BY_NAME)
def test_scores_that_are_not_numbers_are_left_out(name):
    sampler = fastis.Sampler(30, 3, method=make(name))
    drive(sampler, 25)
    sampler.update(batch_of(3, 4, 5), losses_of(1.0, math.nan, 3.0))
    for key, value in sampler.state_dict().items():
        if key.startswith("memory.") and key != "memory.losses":
            assert not value.isnan().any(), key
    if sampler.method.has_states:
        assert sampler.skipped == 1
        assert sampler.importance.isfinite().all()
    drive(sampler, 3)


@pytest.mark.parametrize("name", ["emais", "loss", "rais", "presampling"])
def test_methods_with_coefficients_are_unbiased(name):
    """The mean of r x over many minibatches is that of x over the data."""
    n, b, draws = 200, 20, 4000
    sampler = fastis.Sampler(n, b, method=make(name), seed=1)
    train(sampler, 60)
    value = scores(torch.arange(n)).double()
    means = []
    for _ in range(draws):
        batch = sampler.sample()
        means.append(float((batch.weights.double() * value[batch.indices]).mean()))
    means = torch.tensor(means)
    # Importance sampling by the value itself has hardly any variance: hence the absolute part.
    error = 4.5 * float(means.std()) / math.sqrt(draws) + 1e-4
    assert float(means.mean()) == pytest.approx(float(value.mean()), abs=error)


@pytest.mark.parametrize("name", ["confidence", "confvar", "self_paced", "online_batch"])
def test_biased_methods_have_no_coefficients_and_leave_the_learning_rate_alone(name):
    sampler = fastis.Sampler(300, 10, method=name)
    drive(sampler, 100)
    weights = sampler.sample().weights
    assert float(sampler.lr_factor()) == 1
    if name == "self_paced":  # those that do not count are zero, and the others make up for it
        assert weights.unique().numel() <= 2
        assert float(weights.sum()) == pytest.approx(10)
    else:
        assert (weights == 1).all()


# What they are expected to do ---------------------------------------------------------------------


def test_additional_updates_lower_the_efficiency_score_of_stale_tables():
    """Expected of sec. 9.8 (Fig. 7): with scores that moved, the refreshed table fits better."""

    def mean_efficiency(**options):
        method = methods.EMAIS(warmup_epochs=1, tau=1.0, **options)
        sampler = fastis.Sampler(2000, 50, method=method, seed=2)
        drive_scores(sampler, 40, 1.0)
        return drive_scores(sampler, 40, -1.0)  # now those matter that did not

    def drive_scores(sampler, steps, sign):
        log = torch.linspace(-2, 2, 2000)
        efficiency = []
        for _ in range(steps):
            batch = sampler.sample()
            now.copy_((sign * log).exp())
            sampler.update(batch, observe(now[batch.indices]))
            efficiency.append(float(sampler.variance.efficiency))
        return sum(e for e in efficiency if math.isfinite(e)) / len(efficiency)

    now = torch.ones(2000)
    refreshed = mean_efficiency(refresh_every=5, score_fn=lambda i: now[i])
    assert refreshed < 0.7 * mean_efficiency()


def test_confidence_visits_what_is_not_sure():
    sampler = fastis.Sampler(300, 10, method="confidence", seed=3)
    counts = train(sampler, 600)
    sure = scores(torch.arange(300)) < 1
    assert counts[~sure].mean() > 1.5 * counts[sure].mean()


def test_presampling_takes_a_forward_pass_of_the_users():
    torch.manual_seed(0)
    x, y = torch.randn(64, 5), torch.randint(3, (64,))
    model = torch.nn.Linear(5, 3)
    method = methods.Presampling(
        lambda i: fastis.cross_entropy(model(x[i]), y[i]), score="loss", tau_threshold=0.5
    )
    sampler = fastis.Sampler(64, 8, method=method)
    for _ in range(20):
        batch = sampler.sample()
        out = fastis.cross_entropy(model(x[batch.indices]), y[batch.indices], batch.weights)
        sampler.update(batch, out)
    assert float(sampler.state_dict()["memory.tau"]) > 0.5
    assert not (sampler.sample().weights == 1).all()


def test_rais_fits_what_can_be_fitted():
    """Scores that stay: the past norm predicts the next one exactly, so p ~ the norm."""
    sampler = fastis.Sampler(300, 10, method="rais", seed=2)
    train(sampler, 200)
    state = sampler.state_dict()
    assert float(state["memory.c"][:3].sum()) == pytest.approx(1, rel=1e-3)
    assert float(state["memory.d"].sum()) < 1e-3
    x = scores(torch.arange(300)).double()
    torch.testing.assert_close(sampler.probabilities(), x / x.sum(), rtol=2e-3, atol=0)
    assert float(sampler.lr_factor()) > 1


@pytest.mark.parametrize("seed", range(20))
def test_non_negative_least_squares_meets_the_optimality_conditions(seed):
    generator = torch.Generator().manual_seed(seed)
    a = torch.rand((40, 4), generator=generator, dtype=torch.float64)
    y = a @ torch.randn(4, generator=generator, dtype=torch.float64)
    y += 0.1 * torch.randn(40, generator=generator, dtype=torch.float64)
    weights = torch.rand(40, generator=generator, dtype=torch.float64)
    x = non_negative_least_squares(a, y, weights)
    gradient = a.T @ (weights * (a @ x - y))
    assert (x >= 0).all()
    assert (gradient >= -1e-9).all()  # no column wants to grow ...
    assert (gradient[x > 0].abs() <= 1e-9).all()  # ... and those in use are where they should be


def test_effective_iterations_drive_the_schedule():
    weight = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([weight], lr=1.0)

    class Progress:
        effective_iterations = torch.tensor(0.0)

        def lr_factor(self, optimizer="sgd", rule="linear"):
            return torch.tensor(2.0)

    progress = Progress()
    inner = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    scheduler = fastis.EffectiveIterationsLR(inner, progress, total_iterations=4)
    rates = []
    for done in (0.7, 2.5, 2.9, 9.0):
        progress.effective_iterations = torch.tensor(done)
        optimizer.step()
        scheduler.step()
        rates.append((scheduler.get_last_lr()[0], scheduler.get_unscaled_lr()[0]))
    assert rates == [(2, 1), (2 / 3, 1 / 3), (2 / 3, 1 / 3), (2 / 5, 1 / 5)]
    assert scheduler.finished
    progress.effective_iterations = torch.tensor(3.9)
    assert not scheduler.finished
    saved = scheduler.state_dict()
    scheduler.load_state_dict(saved)
    assert saved["steps"] == 4


# Errors -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: fastis.Sampler(9, 2, method="presampling"), ValueError, "needs a score_fn"),
        (lambda: methods.Presampling(3), TypeError, "score_fn must be callable, got int 3"),
        (lambda: methods.Presampling(scores, "norm"), ValueError, "score must be one of .*'norm'"),
        (
            lambda: methods.Presampling(scores, presample=0),
            ValueError,
            "presample must be at least",
        ),
        (lambda: methods.Presampling(scores, tau_smoothing=1.0), ValueError, "tau_smoothing must"),
        (lambda: methods.EMAIS(refresh_every=3), ValueError, "must be given together"),
        (
            lambda: methods.EMAIS(refresh_every=3, score_fn=3),
            TypeError,
            "score_fn must be callable, got int 3",
        ),
        (
            lambda: methods.OnlineBatch(score_fn="x"),
            TypeError,
            "score_fn must be callable, got str 'x'",
        ),
        (lambda: methods.RAIS(uncertainty=math.inf), ValueError, "uncertainty must be in"),
        (lambda: methods.RAIS(refit_epochs=math.inf), ValueError, "refit_epochs must be in"),
        (lambda: methods.RAIS(uncertainty=-1.0), ValueError, "uncertainty must be in"),
        (
            lambda: methods.RAIS(refit_epochs=0.0),
            ValueError,
            r"refit_epochs must be in \(0,",
        ),
        (lambda: methods.RAIS(buffer_size=0), ValueError, "buffer_size must be at least 1"),
        (lambda: methods.SelfPaced(quantile=0.0), ValueError, r"quantile must be in \(0, 1\]"),
        (lambda: methods.SelfPaced(growth=1.0), ValueError, r"growth must be in \(1,"),
        (lambda: methods.OnlineBatch(pressure=0.5), ValueError, "pressure must be in"),
        (
            lambda: methods.OnlineBatch(total_epochs=1),
            ValueError,
            "total_epochs must be at least 2",
        ),
        (lambda: methods.Prioritized(alpha=2.0), ValueError, r"alpha must be in \[0, 1\]"),
        (lambda: methods.Prioritized(total_steps=0), ValueError, "total_steps must be at least 1"),
        (
            lambda: methods.Confidence(warmup_epochs=-1),
            ValueError,
            "warmup_epochs must be at least",
        ),
    ],
)
def test_option_errors(make, error, message):
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize(
    ("returned", "error", "message"),
    [
        (lambda i: "no", TypeError, "score_fn must return a ScoredLoss or a tensor .* got str"),
        (lambda i: torch.ones(3), ValueError, r"score_fn\(indices\) must have shape \[24\]"),
        (lambda i: torch.ones(len(i), dtype=torch.int64), TypeError, "must have dtype"),
    ],
)
def test_score_fn_errors_leave_the_sampler_as_it_was(returned, error, message):
    method = methods.Presampling(returned, tau_threshold=0.0)
    sampler = fastis.Sampler(100, 8, method=method)
    sampler.update(sampler.sample(), losses_of(*[1.0] * 8))
    before = sampler.state_dict()
    with pytest.raises(error, match=message):
        sampler.sample()
    for key, value in sampler.state_dict().items():
        if isinstance(value, torch.Tensor):
            torch.testing.assert_close(value, before[key], rtol=0, atol=0, equal_nan=True)


# A forward pass of the user's that fails ---------------------------------------------------------


FAILING = {
    "emais": lambda f: methods.EMAIS(refresh_every=5, score_fn=f),
    "online_batch": lambda f: methods.OnlineBatch(score_fn=f, recompute_every=1),
    "presampling": lambda f: methods.Presampling(f, score="gradient_norm"),
}


@pytest.mark.parametrize("returns", ["nothing", "too few", "an error"])
@pytest.mark.parametrize("name", FAILING)
def test_a_score_fn_that_fails_in_update_leaves_all_as_it_was(name, returns):
    fails = False

    def score_fn(indices):
        if fails and returns == "an error":
            raise RuntimeError("out of memory")
        return scores(indices)[:-1] if fails and returns == "too few" else scores(indices)

    sampler = fastis.Sampler(60, 6, method=FAILING[name](score_fn), seed=1)
    train(sampler, 19)
    batch, before = sampler.sample(), sampler.state_dict()
    out = observe(scores(batch.indices), torch.full((4,), 0.1))
    if returns != "nothing":
        fails = True
        with pytest.raises((RuntimeError, ValueError)):
            sampler.update(batch, out)
        after = sampler.state_dict()
        for key, value in before.items():
            same = torch.equal if isinstance(value, torch.Tensor) else operator.eq
            assert same(after[key], value), key
        fails = False
    sampler.update(batch, out)
    assert sampler.step == 20


def test_last_seen_is_that_of_observations():
    for name in ("confidence", "confvar", "rais"):
        sampler = fastis.Sampler(60, 6, method=make(name))
        last = torch.full((60,), -1)
        for step in range(45):
            batch = sampler.sample()
            sampler.update(batch, observe(scores(batch.indices)))
            last[batch.indices] = step
            assert torch.equal(sampler.last_seen, last), (name, step)
