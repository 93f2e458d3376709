"""Variance traces against brute force, and the learning rate that follows from them."""

from __future__ import annotations

import pytest
import torch
from conftest import observe, sweep
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, ReduceLROnPlateau, StepLR

import fastis
from fastis.methods import EMAIS, Presampling


class Problem:
    """Fixed gradients g [N, C], so that every trace is known exactly."""

    def __init__(self, n=64, c=5):
        generator = torch.Generator().manual_seed(0)
        sizes = torch.empty(n, 1).log_normal_(0, 1, generator=generator)
        self.g = sizes * torch.randn(n, c, generator=generator) + 0.3
        self.score = self.g.norm(dim=1)

    def exact(self, p):
        n = len(self.g)
        g, x = self.g.double(), self.score.double()
        mu2 = g.mean(0).square().sum()
        return {
            "trace_is": (x**2 / (n**2 * p)).sum() - mu2,
            "trace_uniform": (x**2).mean() - mu2,
            "trace_optimal": x.mean() ** 2 - mu2,
        }

    def observe(self, batch):
        mean_grad = (batch.weights[:, None] * self.g[batch.indices]).mean(0)
        return observe(self.score[batch.indices], mean_grad)


@pytest.mark.parametrize("estimator", ["unbiased", "plugin"])
def test_traces_against_exact_ones(estimator):
    problem = Problem()
    # Scores never change and tau is huge, so that p stays near where the sweep puts it.
    method = EMAIS(warmup_epochs=0, tau=1e9, smoothing=0.9999, estimator=estimator)
    sampler = fastis.Sampler(64, 8, method=method, max_duplicates=1.5)
    sweep(sampler, problem.score.sqrt())  # not the optimal weights
    exact = problem.exact(sampler.probabilities())
    for _ in range(20_000):
        batch = sampler.sample()
        sampler.update(batch, problem.observe(batch))
        if sampler.step == 2:  # the sweep's own moments are not of these draws
            sampler._table.variance[:5] = 0.0
    measured = {name: float(getattr(sampler.variance, name)) for name in exact}
    relative = {name: measured[name] / float(exact[name]) - 1 for name in exact}
    if estimator == "unbiased":
        assert max(map(abs, relative.values())) < 0.06  # about 1,700 effective minibatches
    else:
        assert relative["trace_is"] < -0.06  # the plug-in misses the factor B/(B-1) = 8/7
    ems = 8 * measured["trace_uniform"] / measured["trace_is"]
    assert float(sampler.variance.effective_batch_size) == pytest.approx(ems)
    if estimator == "unbiased":
        mu2 = float(problem.g.double().mean(0).square().sum())
        gain = (mu2 + exact["trace_uniform"] / 8) / (mu2 + exact["trace_is"] / 8)
        assert 1.1 < float(gain) < 0.9 * ems / 8  # a test that tells it from either end
        assert float(sampler.lr_factor(rule="gain")) == pytest.approx(float(gain), rel=0.03)


@pytest.mark.parametrize("candidates", [8, 24, 200])
def test_presamplings_traces_have_the_scatter_of_its_candidates(candidates):
    """Against the covariance of its minibatches' mean gradients, and the exact traces."""
    problem, steps, b = Problem(n=300), 4000, 8
    method = Presampling(
        lambda i: problem.score[i], presample=candidates, tau_threshold=0.0, smoothing=0.0
    )
    sampler = fastis.Sampler(300, b, method=method)
    batch = sampler.sample()  # uniform: tau starts at 0
    sampler.update(batch, problem.observe(batch))
    means, traces = [], []
    for _ in range(steps):
        batch = sampler.sample()
        sampler.update(batch, problem.observe(batch))
        means.append((batch.weights[:, None] * problem.g[batch.indices]).double().mean(0))
        v = sampler.variance
        traces.append(torch.stack([v.trace_is, v.trace_uniform, v.trace_optimal]))
    exact = problem.exact(torch.full((300,), 1 / 300, dtype=torch.float64))
    deviation = torch.stack(means) - problem.g.double().mean(0)
    scatter = b * deviation.square().sum(1)  # its mean is n times the variance of a minibatch
    found, error = torch.stack(traces), 5 / steps**0.5
    for values, true in (
        (found[:, 1], exact["trace_uniform"]),
        (found[:, 2], exact["trace_optimal"]),
        (found[:, 0] - scatter, 0.0),
    ):
        assert abs(float(values.mean() - true)) < error * float(values.std())
    # With the candidates' own draws alone it would be far off.
    ideal, uniform = float(exact["trace_optimal"]), float(exact["trace_uniform"])
    expected = ideal + b / candidates * uniform
    assert float(found[:, 0].mean()) == pytest.approx(expected, rel=0.1)


def test_optimal_probabilities_have_efficiency_zero_and_uniform_ones_one():
    problem = Problem()
    for method, expected, tolerance in (
        (EMAIS(warmup_epochs=0, tau=1e9, smoothing=0.999), 0.0, 0.1),
        (fastis.methods.Uniform(smoothing=0.999), 1.0, 1e-9),
    ):
        sampler = fastis.Sampler(64, 16, method=method, max_duplicates=16)
        if method.has_states:
            sweep(sampler, problem.score)
        for _ in range(3000):
            batch = sampler.sample()
            sampler.update(batch, problem.observe(batch))
        assert float(sampler.variance.efficiency) == pytest.approx(expected, abs=tolerance)


def test_without_mean_grad_the_mean_counts_as_zero(any_backend):
    sampler = fastis.Sampler(8, 4, method="uniform")
    batch = fastis.Batch(torch.arange(4), torch.ones(4))
    sampler.update(batch, observe(torch.tensor([1.0, 2, 3, 4])))
    second, first = 7.5, 2.5
    assert float(sampler.variance.trace_is) == pytest.approx(4 / 3 * second)
    assert float(sampler.variance.trace_uniform) == pytest.approx(second + second / 3)
    assert float(sampler.variance.trace_optimal) == pytest.approx(4 / 3 * first**2)


def test_nothing_is_claimed_before_the_first_update():
    variance = fastis.Sampler(8, 4).variance
    for name in (
        "trace_is",
        "trace_uniform",
        "trace_optimal",
        "effective_batch_size",
        "efficiency",
    ):
        value = getattr(variance, name)
        assert value.shape == ()
        assert torch.isnan(value)
    assert fastis.Sampler(8, 4).lr_factor() == 1


def test_a_batch_of_one_says_nothing_about_variance(any_backend):
    sampler = fastis.Sampler(8, 1, method=EMAIS(warmup_epochs=0))
    batch = sampler.sample()
    sampler.update(batch, observe(torch.tensor([2.0])))
    assert sampler.lr_factor() == sampler.lr_factor(rule="gain") == 1


def test_the_rules_are_one_without_a_mean_gradient(any_backend):
    sampler = fastis.Sampler(64, 8, method=EMAIS(warmup_epochs=0))
    problem = Problem()
    for _ in range(50):
        batch = sampler.sample()
        sampler.update(batch, observe(problem.score[batch.indices]))
    assert float(sampler.lr_factor()) != 1
    assert float(sampler.lr_factor(rule="gain")) == pytest.approx(float(sampler.lr_factor()))
    root = float(sampler.lr_factor("adam", rule="gain"))
    assert root == pytest.approx(float(sampler.lr_factor()) ** 0.5)


class FakeSampler:
    factor = 1.0

    def lr_factor(self, optimizer="sgd", rule="linear"):
        value = torch.tensor(self.factor, dtype=torch.float64)
        return value if optimizer == "sgd" else value.sqrt()


def parameters():
    return [torch.nn.Parameter(torch.zeros(2))]


@pytest.mark.parametrize(
    "schedule",
    [
        lambda o: CosineAnnealingLR(o, 20),
        lambda o: StepLR(o, 5),
        lambda o: LambdaLR(o, lambda t: 1 / (1 + t)),
    ],
)
def test_recursive_schedulers_see_their_own_rate(schedule):
    plain, wrapped = (torch.optim.SGD(parameters(), lr=0.5) for _ in range(2))
    alone, inner = schedule(plain), schedule(wrapped)
    sampler = FakeSampler()
    scheduler = fastis.EffectiveBatchLR(inner, sampler)
    for step in range(20):
        sampler.factor = 1.0 + step
        for optimizer in (plain, wrapped):
            optimizer.step()
        alone.step()
        scheduler.step()
        unscaled = plain.param_groups[0]["lr"]
        assert wrapped.param_groups[0]["lr"] == pytest.approx(unscaled * sampler.factor)
        assert scheduler.get_unscaled_lr() == pytest.approx([unscaled])
        assert scheduler.get_last_lr() == [wrapped.param_groups[0]["lr"]]


@pytest.mark.parametrize(
    ("optimizer", "expected"), [(torch.optim.SGD, 4.0), (torch.optim.AdamW, 2.0)]
)
def test_the_rule_follows_the_optimizer(optimizer, expected):
    made = optimizer(parameters(), lr=1.0)
    sampler = FakeSampler()
    sampler.factor = 4.0
    scheduler = fastis.EffectiveBatchLR(LambdaLR(made, lambda t: 1.0), sampler)
    made.step()
    scheduler.step()
    assert made.param_groups[0]["lr"] == expected
    limited = fastis.EffectiveBatchLR(LambdaLR(made, lambda t: 1.0), sampler, max_factor=1.5)
    made.step()
    limited.step()
    assert made.param_groups[0]["lr"] == pytest.approx(1.5 * limited.get_unscaled_lr()[0])


@pytest.mark.parametrize("kind", [float, torch.tensor])
def test_a_largest_rate_limits_what_the_factor_does(kind):
    made = torch.optim.Adam(parameters(), lr=kind(0.5), capturable=False)
    sampler = FakeSampler()
    sampler.factor = 9.0
    inner = LambdaLR(made, lambda t: [1.0, 0.8, 0.4, 0.1][t])
    scheduler = fastis.EffectiveBatchLR(inner, sampler, max_lr=0.4)
    rates = []
    for _ in range(3):
        made.step()
        scheduler.step()
        rates.append(scheduler.get_last_lr()[0])
    # 0.4 times 3 and 0.2 times 3 are too much, 0.05 times 3 is not.
    assert rates == pytest.approx([0.4, 0.4, 0.15])
    sampler.factor = 1.0
    beyond = fastis.EffectiveBatchLR(LambdaLR(made, lambda t: 10.0), sampler, max_lr=0.4)
    made.step()
    beyond.step()
    assert beyond.get_last_lr() == beyond.get_unscaled_lr()


def test_tensor_rates_are_scaled_in_place():
    rate = torch.tensor(0.5)
    optimizer = torch.optim.Adam(parameters(), lr=rate, capturable=False)
    sampler = FakeSampler()
    sampler.factor = 9.0
    scheduler = fastis.EffectiveBatchLR(StepLR(optimizer, 1, gamma=0.5), sampler)
    held = optimizer.param_groups[0]["lr"]
    for step in range(3):
        optimizer.step()
        scheduler.step()
        assert optimizer.param_groups[0]["lr"] is held
        assert float(held) == pytest.approx(0.5 ** (step + 2) * 3)


def test_plateau_scheduler_takes_its_metric():
    optimizer = torch.optim.SGD(parameters(), lr=1.0)
    sampler = FakeSampler()
    sampler.factor = 2.0
    scheduler = fastis.EffectiveBatchLR(ReduceLROnPlateau(optimizer, patience=0), sampler)
    for metric in (1.0, 2.0):
        scheduler.step(metric)
    assert scheduler.get_last_lr() == pytest.approx([0.2])


def test_scheduler_state_resumes():
    def make():
        optimizer = torch.optim.SGD(parameters(), lr=0.5)
        sampler = FakeSampler()
        sampler.factor = 3.0
        return optimizer, fastis.EffectiveBatchLR(CosineAnnealingLR(optimizer, 10), sampler)

    (first, a), (second, b) = make(), make()
    for _ in range(4):
        first.step()
        a.step()
    second.load_state_dict(first.state_dict())
    b.load_state_dict(a.state_dict())
    for _ in range(4):
        assert a.get_last_lr() == b.get_last_lr()
        for optimizer, scheduler in ((first, a), (second, b)):
            optimizer.step()
            scheduler.step()


@pytest.mark.parametrize("tensor", [False, True])
def test_loading_restores_the_rate_in_force_before_or_after_the_sampler(tensor):
    def make(factor):
        lr = torch.tensor(0.5) if tensor else 0.5
        optimizer = torch.optim.SGD(parameters(), lr=lr)
        sampler = FakeSampler()
        sampler.factor = factor
        return optimizer, sampler, fastis.EffectiveBatchLR(StepLR(optimizer, 2), sampler)

    first, _, a = make(3.0)
    first.step()
    a.step()
    second, sampler, b = make(1.0)  # the sampler is loaded last: its factor is another one yet
    b.load_state_dict(a.state_dict())
    assert a.get_last_lr() == b.get_last_lr() == [1.5]
    second.load_state_dict(first.state_dict())
    sampler.factor = 3.0
    for scheduler, optimizer in ((a, first), (b, second)):
        optimizer.step()
        scheduler.step()
    assert a.get_last_lr() == b.get_last_lr() == pytest.approx([0.15])


def test_a_wrong_scheduler_state_changes_nothing():
    optimizer = torch.optim.SGD(parameters(), lr=0.5)
    inner = StepLR(optimizer, 2)
    sampler = fastis.Sampler(20, 2, method="rais")
    plain = fastis.EffectiveBatchLR(inner, sampler).state_dict()
    for _ in range(5):
        optimizer.step()
        inner.step()
    scheduler = fastis.EffectiveIterationsLR(inner, sampler)
    with pytest.raises(ValueError, match="must have scheduler, unscaled, scaled, steps, got sched"):
        scheduler.load_state_dict(plain)
    with pytest.raises(ValueError, match="got nothing"):
        scheduler.load_state_dict({})
    assert inner.last_epoch == 5


class Lion(torch.optim.Optimizer):
    def __init__(self, params):
        super().__init__(params, {"lr": 0.1})


def test_lr_errors():
    sampler = FakeSampler()
    sgd = LambdaLR(torch.optim.SGD(parameters(), lr=1.0), lambda t: 1.0)
    with pytest.raises(TypeError, match="scheduler must be a torch LR scheduler, got int"):
        fastis.EffectiveBatchLR(3, sampler)
    with pytest.raises(TypeError, match=r"sampler must be a fastis.Sampler, got str"):
        fastis.EffectiveBatchLR(sgd, "emais")
    with pytest.raises(ValueError, match="optimizer must be one of 'sgd', 'adam', got 'lion'"):
        fastis.EffectiveBatchLR(sgd, sampler, optimizer="lion")
    with pytest.raises(ValueError, match=r"max_factor must be in \(0, inf\]"):
        fastis.EffectiveBatchLR(sgd, sampler, max_factor=0)
    with pytest.raises(ValueError, match=r"max_lr must be in \(0, inf\]"):
        fastis.EffectiveBatchLR(sgd, sampler, max_lr=-1.0)
    unknown = LambdaLR(Lion(parameters()), lambda t: 1.0)
    with pytest.raises(ValueError, match=r"optimizer must be given as 'sgd' .* for a Lion"):
        fastis.EffectiveBatchLR(unknown, sampler)
    state = fastis.EffectiveBatchLR(sgd, sampler).state_dict()
    state["unscaled"] = [1.0, 2.0]
    with pytest.raises(ValueError, match="must have 1 parameter groups, got 2"):
        fastis.EffectiveBatchLR(sgd, sampler).load_state_dict(state)
