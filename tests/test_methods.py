"""Every method: an example worked by hand, what it is expected to do, and saving."""

from __future__ import annotations

import copy
import io
import math

import pytest
import torch
from conftest import Observation, drive, observe

import fastis
from fastis import methods
from fastis.methods.rais import non_negative_least_squares

QUANTISED = 2.0**-15  # relative: a weight is rounded to 16 bits, and so is the mean


def scores(indices):
    """A score for every index, between 0.1 and about 5."""
    return 0.1 + 5 * torch.frac(indices * 0.6180339887).square().float()


def make(name):
    return methods.Presampling(scores) if name == "presampling" else methods.BY_NAME[name]()


def batch_of(*indices, weights=None):
    weights = torch.ones(len(indices)) if weights is None else torch.tensor(weights)
    return fastis.Batch(torch.tensor(indices), weights)


def losses_of(*values):
    return observe(torch.tensor(values))


def probabilities(sampler):
    assert float(sampler.probabilities().sum()) == pytest.approx(1, abs=1e-12)
    return sampler.probabilities().tolist()


def normalised(*weights):
    return pytest.approx([w / sum(weights) for w in weights], rel=QUANTISED)


def train(sampler, steps):
    """The loop with scores (and losses) that follow from the index; how often each was drawn."""
    value = scores(torch.arange(sampler.num_samples))
    counts = torch.zeros(sampler.num_samples)
    for _ in range(steps):
        batch = sampler.sample()
        i = batch.indices
        sampler.update(batch, Observation(value[i], value[i], torch.full((4,), 0.1)))
        counts.index_add_(0, i, torch.ones(len(i)))
    return counts


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
    if sampler.method.has_records:
        assert sampler.skipped == 1
        assert sampler.importance.isfinite().all()
    drive(sampler, 3)


@pytest.mark.parametrize("name", ["emais", "loss", "rais", "presampling", "auto"])
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


# One by one ---------------------------------------------------------------------------------------


def test_loss_is_emais_on_the_loss():
    sampler = fastis.Sampler(4, 2, method=methods.Loss(warmup_epochs=0), max_duplicates=2)
    sweep_out = Observation(torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor([4.0, 3.0, 2.0, 1.0]))
    sampler.update(batch_of(0, 1, 2, 3), sweep_out)
    assert probabilities(sampler) == normalised(1, 2, 3, 4)


def test_emais_with_additional_updates():
    """Kutsuna 2025, sec. 9.8: all other samples are observed in the iteration of the minibatch."""
    calls = []

    def score_fn(indices):
        calls.append(indices)
        assert not torch.is_grad_enabled()
        return observe(scores(indices))

    method = methods.EMAIS(refresh_every=3, score_fn=score_fn, warmup_epochs=0)
    sampler = fastis.Sampler(50, 4, method=method)
    for step in range(3):
        assert not calls
        sampler.update(batch_of(0, 1, 2, 3), losses_of(8.0, 8.0, 8.0, 8.0 + step))
    assert torch.equal(torch.cat(calls), torch.arange(50))
    assert (sampler.last_seen == 2).all()
    expected = scores(torch.arange(50))
    assert torch.equal(sampler.mean[4:], expected[4:])  # their first observation
    alpha, mean, var = 1.0, 8.0, 0.0
    for t, x in ((1, 9.0), (2, 10.0)):
        alpha = math.exp(-1 / t)
        mean, var = mean + (1 - alpha) * (x - mean), alpha * (var + (1 - alpha) * (x - mean) ** 2)
    assert float(sampler.mean[3]) == pytest.approx(mean)  # what the minibatch said, not score_fn
    assert float(sampler.var[3]) == pytest.approx(var)
    weights = [8.0, 8.0, 8.0, math.hypot(mean, math.sqrt(var)), *expected[4:].tolist()]
    assert sampler.importance.tolist() == pytest.approx(weights, rel=QUANTISED)


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


def test_auto_draws_uniformly_while_the_table_predicts_no_gain():
    sampler = fastis.Sampler(4, 2, method=methods.Auto(warmup_epochs=0), seed=1, max_duplicates=2)
    sampler.update(batch_of(0, 1, 2, 3), losses_of(1.0, 1.0, 1.0, 3.0))
    assert probabilities(sampler) == normalised(1, 1, 1, 3)
    # The table has it the wrong way round now: q = 1.5, 0.5 where |g|^2 = 25, 0.01.
    batch = fastis.Batch(torch.tensor([0, 3]), torch.tensor([1.5, 0.5]))
    sampler.update(batch, losses_of(5.0, 0.1))
    uniform, table = sampler.state_dict()["memory.moments"].tolist()
    assert uniform == pytest.approx(0.01 * (1.5 * 25 + 0.5 * 0.01) / 2, rel=QUANTISED)
    assert table == pytest.approx(0.01 * (1.5**2 * 25 + 0.5**2 * 0.01) / 2, rel=QUANTISED)
    assert sampler.probabilities().tolist() == [0.25] * 4
    assert (sampler.sample().weights == 1).all()
    # With what it learnt the table is right again, and that shows in uniform draws too.
    while sampler.probabilities().tolist() == [0.25] * 4:
        sampler.update(batch_of(0, 1, 2, 3), losses_of(5.0, 1.0, 1.0, 0.1))
    assert not (sampler.sample().weights == 1).all()
    assert not sampler.method.is_plain


def test_confidence_by_hand():
    sampler = fastis.Sampler(4, 2, method=methods.Confidence(warmup_epochs=0))
    for p in (0.9, 0.7):  # of sample 0; sample 1 has 0.5 twice
        sampler.update(batch_of(0, 1), losses_of(-math.log(p), -math.log(0.5)))
    # a = 0.2, 0.5; the others have their mean, 0.35, which is also the mean of all.
    assert probabilities(sampler) == normalised(0.55, 0.85, 0.70, 0.70)


def test_confvar_by_hand():
    sampler = fastis.Sampler(4, 2, method=methods.ConfVar(warmup_epochs=0))
    sampler.update(batch_of(0, 1), losses_of(-math.log(0.9), -math.log(0.5)))
    assert probabilities(sampler) == [0.25] * 4  # one visit has no variance
    sampler.update(batch_of(0, 1), losses_of(-math.log(0.5), -math.log(0.5)))
    a = math.sqrt(0.08 + 0.08**2)  # v = 0.08 of (0.9, 0.5), n = 2
    unseen = mean = a / 2
    assert probabilities(sampler) == normalised(a + mean, mean, unseen + mean, unseen + mean)


def test_confidence_visits_what_is_not_sure():
    sampler = fastis.Sampler(300, 10, method="confidence", seed=3)
    counts = train(sampler, 600)
    sure = scores(torch.arange(300)) < 1
    assert counts[~sure].mean() > 1.5 * counts[sure].mean()


def test_self_paced_by_hand():
    sampler = fastis.Sampler(10, 5, method="self_paced", seed=1)
    loss = torch.arange(1.0, 11.0)
    selected = []
    for _ in range(5):
        counted = set()
        for _ in range(2):
            batch = sampler.sample()
            v = batch.weights > 0
            counted |= set(loss[batch.indices[v]].tolist())
            mean = float((batch.weights * loss[batch.indices]).mean())
            by_hand = float(loss[batch.indices[v]].sum()) / max(1, int(v.sum()))
            assert mean == pytest.approx(by_hand)
            sampler.update(batch, observe(loss[batch.indices]))
        selected.append(len(counted))
    # lambda: none, just above 6, 7.8, 10.1 and so no more selection.
    assert selected == [10, 6, 7, 10, 10]


def test_self_paced_by_the_last_known_loss():
    sampler = fastis.Sampler(4, 2, method=methods.SelfPaced(quantile=0.5), seed=1)
    for _ in range(2):
        batch = sampler.sample()
        sampler.update(batch, observe(torch.tensor([1.0, 5.0, 2.0, 6.0])[batch.indices]))
    batch = sampler.sample()
    assert torch.equal(batch.weights > 0, (batch.indices == 0) | (batch.indices == 2))


def test_online_batch_by_hand():
    sampler = fastis.Sampler(4, 2, method=methods.OnlineBatch(), max_duplicates=2)
    assert probabilities(sampler) == [0.25] * 4
    loss = torch.tensor([1.0, 4.0, 2.0, 3.0])
    for _ in range(2):
        batch = sampler.sample()
        sampler.update(batch, observe(loss[batch.indices]))
    by_rank = [math.exp(-math.log(100) * rank / 4) for rank in (4, 1, 3, 2)]
    assert probabilities(sampler) == normalised(*by_rank)
    before = sampler.probabilities()
    sampler.update(batch_of(0, 1), losses_of(9.0, 0.1))  # counts from the end of the epoch on
    assert torch.equal(sampler.probabilities(), before)
    sampler.update(batch_of(0, 1), losses_of(9.0, 0.1))
    by_rank = [math.exp(-math.log(100) * rank / 4) for rank in (1, 4, 3, 2)]
    assert probabilities(sampler) == normalised(*by_rank)


def test_online_batch_pressure_falls_and_losses_are_recomputed():
    calls = []

    def score_fn(indices):
        calls.append(sampler.step)
        return scores(indices)

    method = methods.OnlineBatch(total_epochs=5, score_fn=score_fn)
    assert [method.pressure_in(e) for e in (1, 3, 5, 7)] == pytest.approx([100, 10, 1, 1])
    sampler = fastis.Sampler(40, 10, method=method)
    train(sampler, 20)
    assert calls == [4, 12, 20]  # at the end of epochs 1, 3 and 5 of four steps
    assert probabilities(sampler) == pytest.approx([1 / 40] * 40, rel=QUANTISED)


def test_prioritized_by_hand():
    method = methods.Prioritized(total_steps=10)
    sampler = fastis.Sampler(3, 2, method=method, max_duplicates=2)
    assert probabilities(sampler) == pytest.approx([1 / 3] * 3)
    sampler.update(batch_of(0, 1), losses_of(1.0, 4.0))
    assert probabilities(sampler) == normalised(1, 4**0.6, 4**0.6)  # unseen: the largest so far
    sampler.update(batch_of(0, 1), losses_of(1.0, 2.0))
    assert probabilities(sampler) == normalised(1, 2**0.6, 4**0.6)
    p = sampler.probabilities()
    for draw in range(12):
        batch = sampler.sample()
        beta = 0.4 + 0.6 * min(1, draw / 10)
        by_hand = (1 / (3 * p[batch.indices])) ** beta
        torch.testing.assert_close(batch.weights, (by_hand / by_hand.max()).float())


def test_presampling_by_hand():
    n, b = 1000, 8
    seen = []

    def score_fn(indices):
        seen.append(indices)
        return scores(indices)

    sampler = fastis.Sampler(n, b, method=methods.Presampling(score_fn), seed=3)
    tau = 0.0
    peaked = torch.tensor([50.0, *[0.01] * 7])
    while tau <= 2:  # (M + 3 b) / (3 b) with M = 3 b
        batch = sampler.sample()
        assert (batch.weights == 1).all()
        assert not seen
        sampler.update(batch, observe(peaked))
        q = peaked.double() / peaked.double().sum()
        tau = 0.9 * tau + 0.1 * float((8 * q.square().sum()).sqrt())
        assert float(sampler.state_dict()["memory.tau"]) == pytest.approx(tau)
    with pytest.raises(ValueError, match="not known before its candidates are scored"):
        sampler.probabilities()
    batch = sampler.sample()
    (candidates,) = seen
    assert candidates.shape == (24,)
    assert set(batch.indices.tolist()) <= set(candidates.tolist())
    q = dict(zip(candidates.tolist(), (s := scores(candidates).double()) / s.sum(), strict=True))
    by_hand = [1 / (24 * float(q[i])) for i in batch.indices.tolist()]
    assert batch.weights.tolist() == pytest.approx(by_hand, rel=1e-5)
    tau = 0.9 * tau + 0.1 * float((24 * (s / s.sum()).square().sum()).sqrt())
    assert float(sampler.state_dict()["memory.tau"]) == pytest.approx(tau)
    sampler.update(batch, observe(scores(batch.indices)))  # not from these: they are not uniform
    assert float(sampler.state_dict()["memory.tau"]) == pytest.approx(tau)


def test_presampling_chooses_the_column_and_floors_zeros():
    out = Observation(torch.tensor([1.0, 2.0]), torch.tensor([3.0, 4.0]))
    for name, column in (("upper_bound", out.score), ("loss", out.losses)):
        assert methods.Presampling(scores, score=name).observed(out) is column
    sampler = fastis.Sampler(
        100, 4, method=methods.Presampling(lambda i: torch.zeros(len(i)), tau_threshold=0.0)
    )
    sampler.sample()
    sampler.update(sampler.sample(), losses_of(1.0, 0.0, 0.0, 0.0))
    assert sampler.sample().weights.tolist() == pytest.approx([1.0] * 4, rel=1e-6)  # all 0: q = 1/M


def test_presampling_warns_when_it_can_never_switch_on():
    with pytest.warns(UserWarning, match="tau is at most sqrt"):
        fastis.Sampler(100, 4, method=methods.Presampling(scores))


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


def test_rais_features_gain_and_effective_iterations_by_hand():
    sampler = fastis.Sampler(4, 2, method=methods.RAIS(warmup_epochs=0, refit_epochs=100))
    sampler.update(batch_of(0, 1), losses_of(1.0, 2.0))
    sampler.update(batch_of(0, 2), losses_of(3.0, 1.0))
    history = sampler.state_dict()["memory.history"]
    expected = [[9.0, 5.0, 1.8], [4.0, 4.0, 4.0], [1.0, 1.0, 1.0], [0.0, 0.0, 0.0]]
    torch.testing.assert_close(history, torch.tensor(expected))
    buffer = sampler.state_dict()["memory.buffer"][0]  # sample 0 at its second visit
    torch.testing.assert_close(buffer, torch.tensor([1.0, 1.0, 1.0, 2.5, 9.0, 1.0]))
    # Until the first fit by the slowest average; unseen samples have the mean weight.
    weights = [math.sqrt(1.8), 2.0, 1.0]
    assert probabilities(sampler) == normalised(*weights, sum(weights) / 3)
    assert float(sampler.lr_factor()) == 1

    r, x = torch.tensor([0.5, 2.0]), torch.tensor([3.0, 1.0])
    mean_grad = torch.tensor([0.3, 0.4])
    batch = fastis.Batch(torch.tensor([0, 1]), r)
    sampler.update(batch, Observation(x, x, mean_grad))
    extra = ((0.5 - 0.25) * 9 + (2 - 4) * 1) / 2 / 2
    before = (1 + 4) / 4, (9 + 1) / 4  # without mean_grad: E[r^2 x^2] / B
    share = 0.99
    smoothed = share**2 * before[0] + share * before[1] + 0.25
    gain = 1 + extra / smoothed
    assert float(sampler.lr_factor()) == pytest.approx(gain)
    assert float(sampler.lr_factor("adam")) == pytest.approx(math.sqrt(gain))
    assert float(sampler.effective_iterations) == pytest.approx(2 + gain)


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

        def lr_factor(self, optimizer="sgd"):
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
        (lambda: methods.Presampling(3), TypeError, "score_fn must be callable .* got int 3"),
        (lambda: methods.Presampling(scores, "norm"), ValueError, "score must be one of .*'norm'"),
        (
            lambda: methods.Presampling(scores, presample=0),
            ValueError,
            "presample must be at least",
        ),
        (lambda: methods.Presampling(scores, tau_smoothing=1.0), ValueError, "tau_smoothing must"),
        (lambda: methods.EMAIS(refresh_every=3), ValueError, "must be given together"),
        (lambda: methods.RAIS(uncertainty=-1.0), ValueError, "uncertainty must be in"),
        (lambda: methods.RAIS(refit_epochs=0.0), ValueError, "refit_epochs must be above 0"),
        (lambda: methods.RAIS(buffer_size=0), ValueError, "buffer_size must be at least 1"),
        (lambda: methods.SelfPaced(quantile=0.0), ValueError, r"quantile must be in \(0, 1\]"),
        (lambda: methods.SelfPaced(growth=1.0), ValueError, "growth must be above 1"),
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
