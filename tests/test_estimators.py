"""Per-sample gradients against a loop of autograd; traces against sums over all samples.

Statistics: a mean over M minibatches is held to LIMIT standard errors of what it must be. A
correct mean is beyond 5 once in 1.7 million; the seeds are fixed, so a test passes always or never.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from conftest import observe
from torch import nn

import fastis
from fastis import estimators
from fastis.estimators import (
    Traces,
    estimate_traces,
    gradient_norms,
    per_sample_gradients,
    population_traces,
)

LIMIT = 5.0
NAMES = ("trace_is", "trace_uniform", "trace_optimal")
BATCH_SIZE, MINIBATCHES = 6, 40_000


# ---- gradients


def by_autograd(model, loss_fn, x, y):
    """[n, P], one backward pass a sample."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    rows = []
    for i in range(len(x)):
        loss = loss_fn(model(x[i : i + 1]), y[i : i + 1])
        rows.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, trainable)]))
    return torch.stack(rows)


def small_network(dtype=torch.float64):
    torch.manual_seed(0)
    layers = (nn.Conv2d(1, 3, 3), nn.ReLU(), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(48, 4))
    return nn.Sequential(*layers).to(dtype).eval()


def samples(n=11, dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(n, 1, 6, 6, generator=generator, dtype=dtype)
    return x, torch.randint(4, (n,), generator=generator)


@pytest.mark.parametrize("chunk_size", [None, 1, 4, 11, 100])
def test_gradients_equal_a_loop_of_autograd(chunk_size):
    model, (x, y) = small_network(), samples()
    rows = per_sample_gradients(model, F.cross_entropy, x, y, chunk_size=chunk_size)
    expected = by_autograd(model, F.cross_entropy, x, y)
    assert rows.shape == (11, sum(p.numel() for p in model.parameters()))
    torch.testing.assert_close(rows, expected, rtol=1e-12, atol=1e-14)
    norms = gradient_norms(model, F.cross_entropy, x, y, chunk_size=chunk_size)
    assert norms.dtype == torch.float64
    torch.testing.assert_close(norms, expected.norm(dim=1), rtol=1e-12, atol=0)


def test_float32_against_float64():
    (x, y), single, double = samples(), small_network(torch.float32), small_network()
    expected = by_autograd(double, F.cross_entropy, x, y)
    norms = gradient_norms(single, F.cross_entropy, x.float(), y)
    assert norms.dtype == torch.float32
    # Both networks have the same weights up to the conversion to float32.
    torch.testing.assert_close(norms.double(), expected.norm(dim=1), rtol=1e-4, atol=0)


def test_squares_of_small_gradients_do_not_vanish():
    model = nn.Linear(1, 1, bias=False)
    x = torch.tensor([[1e-25], [2e-25]])
    norms = gradient_norms(model, lambda out, y: out.sum(), x, torch.zeros(2))
    torch.testing.assert_close(norms, x.flatten(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_losses_of_fastis_serve_as_they_are(backend):
    model, (x, y) = small_network(torch.float32), samples(dtype=torch.float32)
    expected = gradient_norms(model, F.cross_entropy, x, y)
    with fastis.backend(backend):
        for loss_fn in (
            fastis.cross_entropy,
            lambda z, t: fastis.cross_entropy(z, t, reduction="none").loss,
        ):
            norms = gradient_norms(model, loss_fn, x, y)
            torch.testing.assert_close(norms, expected, rtol=1e-5, atol=1e-7)


def test_only_parameters_that_require_grad_count_and_nothing_is_changed():
    model, (x, y) = small_network(), samples()
    model[0].requires_grad_(False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    rows = per_sample_gradients(model, F.cross_entropy, x.requires_grad_(), y)
    torch.testing.assert_close(
        rows.norm(dim=1), by_autograd(model, F.cross_entropy, x, y).norm(dim=1)
    )
    assert not rows.requires_grad
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_linear_layer_has_the_known_norm():
    """|g_i| sqrt(|h_i|^2 + 1), the exact norm of the last layer's weight and bias."""
    torch.manual_seed(0)
    model = nn.Linear(7, 5).double()
    h, y = torch.randn(9, 7, dtype=torch.float64), torch.arange(9) % 5
    score = fastis.cross_entropy(model(h), y).score
    expected = score * (h.square().sum(1) + 1).sqrt()
    torch.testing.assert_close(gradient_norms(model, F.cross_entropy, h, y), expected)


def test_dropout_draws_anew_for_every_sample():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Dropout(0.5), nn.Linear(50, 1, bias=False)).train()
    rows = per_sample_gradients(model, lambda out, y: out.sum(), torch.ones(8, 50), torch.zeros(8))
    assert len(rows.unique(dim=0)) == 8


def test_no_samples():
    model, (x, y) = small_network(), samples(0)
    assert gradient_norms(model, F.cross_entropy, x, y).shape == (0,)
    rows = per_sample_gradients(model, F.cross_entropy, x, y)
    assert rows.shape == (0, sum(p.numel() for p in model.parameters()))
    assert rows.dtype == torch.float64


@pytest.mark.parametrize("function", [gradient_norms, per_sample_gradients])
def test_gradient_errors(function):
    model, (x, y) = small_network(), samples()
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got function"):
        function(by_autograd, F.cross_entropy, x, y)
    with pytest.raises(TypeError, match="x must be a tensor, got list"):
        function(model, F.cross_entropy, [1], y)
    with pytest.raises(ValueError, match=r"y must have shape \[n, ...\], got \[\]"):
        function(model, F.cross_entropy, x, y[0])
    with pytest.raises(ValueError, match="y must have as many samples as x, 11, got 10"):
        function(model, F.cross_entropy, x, y[:-1])
    with pytest.raises(ValueError, match="chunk_size must be at least 1, got 0"):
        function(model, F.cross_entropy, x, y, chunk_size=0)
    with pytest.raises(ValueError, match=r"loss_fn must return one value .* got shape \[1, 4\]"):
        function(model, lambda logits, target: logits, x, y)
    with pytest.raises(ValueError, match=r"loss_fn must return one value .* got float"):
        function(model, lambda logits, target: 1.0, x, y)
    with pytest.raises(ValueError, match=r"call model\.eval\(\) .*got '2', BatchNorm2d"):
        function(model.train(), F.cross_entropy, x, y)
    with pytest.raises(ValueError, match="model must have parameters that require grad, got none"):
        function(model.eval().requires_grad_(False), F.cross_entropy, x, y)


# ---- exact traces


class Problem:
    """A network's gradients at the logits [N, C] and of all parameters [N, P], all known."""

    def __init__(self, n=30):
        torch.manual_seed(2)
        model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
        with torch.no_grad():
            model[2].weight *= 6  # losses of very different size
        x, y = torch.randn(n, 4, dtype=torch.float64), torch.arange(n) % 3
        self.grads = {"parameters": per_sample_gradients(model, F.cross_entropy, x, y)}
        self.grads["logits"] = (model(x).softmax(1) - F.one_hot(y, 3)).detach()
        weights = torch.empty(n, dtype=torch.float64).log_normal_(0, 0.7)
        self.p = weights / weights.sum()
        self.r = 1 / (n * self.p)

    def draw(self, space, batch_size=BATCH_SIZE, minibatches=MINIBATCHES):
        """Independent draws: norms [M, B], coefficients [M, B], gradients [M, B, .]."""
        generator = torch.Generator().manual_seed(3)
        i = torch.multinomial(self.p, minibatches * batch_size, True, generator=generator)
        i = i.view(minibatches, batch_size)
        g = self.grads[space][i]
        return g.norm(dim=-1), self.r[i], g


@pytest.fixture(scope="module")
def problem():
    return Problem()


@pytest.fixture(params=["logits", "parameters"])
def space(request):
    return request.param


def trace_of_covariance(p, values):
    """sum_i p_i |v_i - mean|^2, straight from the definition."""
    mean = (p[:, None] * values).sum(0)
    return (p * (values - mean).square().sum(1)).sum()


def test_population_traces_are_those_of_the_definition(problem, space):
    g, p, n = problem.grads[space], problem.p, len(problem.p)
    best = g.norm(dim=1) / g.norm(dim=1).sum()
    traces = population_traces(None, p, grads=g, batch_size=8)
    expected = [
        trace_of_covariance(p, g / (n * p)[:, None]),
        trace_of_covariance(torch.full_like(p, 1 / n), g),
        trace_of_covariance(best, g / (n * best)[:, None]),
    ]
    torch.testing.assert_close(torch.stack(traces[:3]), torch.stack(expected))
    s = (expected[0] - expected[2]) / (expected[1] - expected[2])
    torch.testing.assert_close(traces.efficiency, s)
    torch.testing.assert_close(traces.effective_batch_size, 8 * expected[1] / expected[0])
    given = population_traces(g.norm(dim=1), p, g.mean(0), batch_size=8)
    torch.testing.assert_close(given, traces)


def test_efficiency_is_one_for_uniform_and_zero_for_optimal_probabilities(problem, space):
    g = problem.grads[space]
    norms = g.norm(dim=1)
    both = torch.stack([torch.full_like(norms, 1 / len(norms)), norms / norms.sum()])
    traces = population_traces(norms, both, g.mean(0))
    assert traces.efficiency.tolist() == pytest.approx([1, 0], abs=1e-12)
    assert float(traces.effective_batch_size[0]) == pytest.approx(1)
    no_gain = population_traces(torch.ones(4), torch.full((4,), 0.25))
    assert no_gain.efficiency.isnan()
    lost_sign = Traces(*torch.tensor([3.0, 1.0, 2.0]), 4)
    assert lost_sign.efficiency.isnan()


def test_a_sample_without_gradient_may_have_probability_zero():
    norms, p = torch.tensor([0.0, 3.0, 1.0]), torch.tensor([0.0, 0.75, 0.25])
    traces = population_traces(norms, p)
    torch.testing.assert_close(traces.trace_is, traces.trace_optimal)
    assert float(traces.trace_is) == pytest.approx((4 / 3) ** 2)


# ---- estimates


def check_mean(estimates, expected):
    """Within LIMIT standard errors of the expectation, or of rounding if there is no spread."""
    error = (estimates.mean() - expected).abs()
    assert error <= LIMIT * estimates.std() / len(estimates) ** 0.5 + 1e-12


def check_not_mean(estimates, expected):
    """So far off that the bias that is tested for can be told from none."""
    error = (estimates.mean() - expected).abs()
    assert error > 2 * LIMIT * estimates.std() / len(estimates) ** 0.5


@pytest.mark.parametrize("name", NAMES)
def test_unbiased_traces_are_unbiased(problem, space, name):
    x, r, g = problem.draw(space)
    estimates = getattr(estimate_traces(x, r, grads=g), name)
    assert estimates.shape == (MINIBATCHES,)
    exact = population_traces(None, problem.p, grads=problem.grads[space])
    check_mean(estimates, getattr(exact, name))


@pytest.mark.parametrize("name", NAMES)
def test_plugin_traces_fall_short_by_what_is_documented(problem, space, name):
    x, r, g = problem.draw(space)
    estimates = getattr(estimate_traces(x, r, grads=g, estimator="plugin"), name)
    exact = population_traces(None, problem.p, grads=problem.grads[space])
    missing = exact.trace_optimal if name == "trace_optimal" else exact.trace_is
    check_mean(estimates, getattr(exact, name) - missing / BATCH_SIZE)
    check_not_mean(estimates, getattr(exact, name))


def test_ratios_are_formed_after_averaging(problem, space):
    x, r, g = problem.draw(space)
    each = estimate_traces(x, r, grads=g)
    exact = population_traces(None, problem.p, grads=problem.grads[space], batch_size=BATCH_SIZE)
    average = each.mean()
    # First-order errors of the ratios of means; where they have the exact value, means of these
    # linear combinations are 0.
    check_mean(each.trace_uniform * BATCH_SIZE - exact.effective_batch_size * each.trace_is, 0)
    gain = each.trace_uniform - each.trace_optimal
    check_mean(each.trace_is - each.trace_optimal - exact.efficiency * gain, 0)
    # Ratios of single minibatches scatter about another value, and have no mean: a minibatch of one
    # sample drawn B times has trace 0.
    for name in ("effective_batch_size", "efficiency"):
        single = getattr(each, name)
        true, after = float(getattr(exact, name)), float(getattr(average, name))
        assert abs(after / true - 1) < 0.05
        assert abs(float(single.nanmedian()) / true - 1) > 0.1


def test_estimates_are_those_of_the_sampler(problem):
    """The first update's smoothed moments are the minibatch's own."""
    for estimator in ("unbiased", "plugin"):
        method = fastis.methods.Uniform(estimator=estimator)
        sampler = fastis.Sampler(30, 8, method=method, seed=1)
        batch = sampler.sample()
        g = problem.grads["logits"][batch.indices].float()
        mean_grad = (batch.weights[:, None] * g).mean(0)
        sampler.update(batch, observe(g.norm(dim=1), mean_grad))
        traces = estimate_traces(g.norm(dim=1), batch.weights, mean_grad, estimator=estimator)
        for name in (*NAMES, "effective_batch_size", "efficiency"):
            measured = float(getattr(sampler.variance, name))
            assert float(getattr(traces, name)) == pytest.approx(measured, rel=1e-9), name


def test_what_is_left_out_follows_or_counts_as_zero(problem):
    x, r, g = problem.draw("logits", minibatches=4)
    whole = estimate_traces(x, r, grads=g)
    torch.testing.assert_close(estimate_traces(None, r, grads=g), whole)
    torch.testing.assert_close(estimate_traces(x, r, (r[..., None] * g).mean(-2)), whole)
    row = estimate_traces(x[1], r[1], grads=g[1])
    torch.testing.assert_close(row.trace_is, whole.trace_is[1])
    without = estimate_traces(x, r)
    excess = torch.stack(without[:3]) - torch.stack(whole[:3])
    torch.testing.assert_close(excess, excess[:1].expand(3, -1))
    torch.testing.assert_close(without.efficiency, whole.efficiency)


def test_one_draw_says_nothing_about_variance():
    traces = estimate_traces(torch.tensor([2.0]), torch.tensor([1.0]), torch.tensor([2.0]))
    assert not any(bool(trace.isfinite()) for trace in traces[:3])
    assert traces.efficiency.isnan()


def test_trace_errors():
    x, p = torch.ones(4), torch.full((4,), 0.25)
    with pytest.raises(ValueError, match="estimator must be one of 'unbiased', 'plugin', got 'x'"):
        estimate_traces(x, x, estimator="x")
    with pytest.raises(TypeError, match="weights must be a tensor, got list"):
        estimate_traces(x, [1.0])
    with pytest.raises(TypeError, match=r"norms must be floating, got torch\.int64"):
        estimate_traces(x.long(), x)
    with pytest.raises(ValueError, match=r"norms must have shape \[4\], got \[3\]"):
        estimate_traces(x[:3], x)
    with pytest.raises(
        ValueError, match=r"weights must have shape \[..., B\], not empty, got \[0\]"
    ):
        estimate_traces(x, x[:0])
    with pytest.raises(ValueError, match=r"grads must have shape \[4, P\], got \[3, 2\]"):
        estimate_traces(x, x, grads=torch.ones(3, 2))
    with pytest.raises(ValueError, match=r"mean_grad must have shape \[2, P\], got \[2\]"):
        estimate_traces(torch.ones(2, 4), torch.ones(2, 4), torch.ones(2))
    with pytest.raises(ValueError, match="mean_grad must be None with grads"):
        estimate_traces(x, x, x, grads=torch.ones(4, 2))
    with pytest.raises(ValueError, match="norms must be given where grads aren't"):
        estimate_traces(None, x)
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        population_traces(x, p, batch_size=0)
    with pytest.raises(ValueError, match=r"sum to 1, got .* sums from 2 to 2"):
        population_traces(x, 2 * p)
    with pytest.raises(ValueError, match=r"at least 0 .*, got a least of -0\.25"):
        population_traces(x, torch.tensor([0.75, -0.25, 0.25, 0.25]))
    with pytest.raises(ValueError, match="above 0 where gradients aren't 0"):
        population_traces(x, torch.tensor([0.0, 0.5, 0.25, 0.25]))


def test_public_names():
    assert fastis.estimators is estimators
    assert set(estimators.__all__) <= set(vars(estimators))
    assert Traces._fields[:3] == NAMES
