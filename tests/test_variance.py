"""Variance traces against brute force, and the factors that follow from them."""

from __future__ import annotations

import pytest
import torch
from conftest import observe, sweep

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
