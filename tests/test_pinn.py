"""The experiment on collocation points: solutions, jets and scores, ways to choose, the page."""

from __future__ import annotations

import runpy
from dataclasses import asdict, replace
from math import exp, pi
from pathlib import Path

import pytest
import torch

import fastis
from bench.experiments import pinn, pinn_page
from bench.experiments.collocation import Fresh, Resampled, uniform_points
from bench.experiments.equations import (
    DIFFUSION,
    EQUATIONS,
    NU,
    REACTION,
    allen_cahn_flow,
    allen_cahn_solution,
    burgers_solution,
)
from bench.experiments.pinn import PinnConfig, Run, cheap
from bench.report import append_row, read_rows

EXAMPLE = Path(__file__).resolve().parents[1] / "examples" / "pinn.py"


@pytest.fixture(autouse=True)
def _small_grid(monkeypatch):
    monkeypatch.setattr(pinn, "GRID", (5, 17))
    pinn.truth.cache_clear()
    yield
    pinn.truth.cache_clear()


SMALL = PinnConfig("burgers", "fixed points", 1e-3, 40, batch_size=8, points=64, width=5)


def vector(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


# ---- the solutions


def test_burgers_solution_has_the_known_start_symmetry_and_steepest_slope():
    x = torch.linspace(-1, 1, 21, dtype=torch.float64)
    u = burgers_solution(vector(0, 0.3, 1), x)
    torch.testing.assert_close(u[0], -torch.sin(pi * x), rtol=0, atol=1e-12)
    torch.testing.assert_close(u, -u.flip(1), rtol=0, atol=1e-12)
    # Basdevant et al. 1986: |u_x| at x = 0 is largest, 152.00516, at t = 1.6037 / pi.
    h = 1e-5
    u = burgers_solution(vector(1.5, 1.6037, 1.7) / pi, vector(-h, h))
    slopes = (u[:, 0] - u[:, 1]) / (2 * h)
    assert float(slopes[1]) == pytest.approx(152.00516, abs=2e-3)
    assert slopes.argmax() == 1


def test_burgers_solution_satisfies_the_equation():
    h = 1e-4
    u = burgers_solution(vector(0.3 - h, 0.3, 0.3 + h), vector(0.4 - h, 0.4, 0.4 + h))
    u_t, u_x = (u[2, 1] - u[0, 1]) / (2 * h), (u[1, 2] - u[1, 0]) / (2 * h)
    u_xx = (u[1, 2] - 2 * u[1, 1] + u[1, 0]) / h**2
    assert float(u_t + u[1, 1] * u_x) == pytest.approx(float(NU * u_xx), abs=1e-5)


def test_allen_cahns_flow_keeps_fronts_and_follows_the_reaction_on_a_plateau():
    x = torch.linspace(-1, 1, 513, dtype=torch.float64)
    width = (2 * DIFFUSION / REACTION) ** 0.5
    fronts = torch.tanh((x + 0.5) / width) * torch.tanh((0.5 - x) / width)
    after = allen_cahn_flow(fronts, 1.0, 2000)
    torch.testing.assert_close(after, fronts, rtol=0, atol=1e-4)  # Strang's h^2
    plateau = -1 + 1.1 * torch.sigmoid((0.7 - x.abs()) / 0.02)
    after = allen_cahn_flow(plateau, 0.2, 400)[256]
    grown = exp(REACTION * 0.2)
    assert float(after) == pytest.approx(0.1 * grown / (1 + 0.01 * (grown**2 - 1)) ** 0.5, rel=1e-6)


def test_allen_cahn_solution_converges_in_both_steps_and_keeps_its_boundary():
    t, x = vector(0, 0.4, 1), torch.linspace(-1, 1, 17, dtype=torch.float64)
    u = allen_cahn_solution(t, x)
    torch.testing.assert_close(u[0], x**2 * torch.cos(pi * x), rtol=0, atol=1e-14)
    torch.testing.assert_close(u, allen_cahn_solution(t, x, 1024, 4000), rtol=0, atol=1e-6)
    assert float((u[:, [0, -1]] + 1).abs().max()) < 1e-12
    with pytest.raises(ValueError, match="x must lie on the grid"):
        allen_cahn_solution(t, x + 0.001)


# ---- jets and scores against autograd


def by_autograd(run: Run, t: torch.Tensor, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Residuals ``[n]`` and each point's gradient of r^2 ``[n, parameters]``, in float64, with the
    derivatives of the residual by autograd, too."""
    theta = run.model.theta.detach().double().requires_grad_()
    shapes = [(w.shape, b.shape) for w, b in run.model.layers]
    parts = iter(theta.split([s.numel() for pair in shapes for s in pair]))
    layers = [(next(parts).view(w), next(parts)) for w, _ in shapes]
    t, x = t.clone().requires_grad_(), x.clone().requires_grad_()
    h = torch.stack([t, x], 1)
    for weight, bias in layers[:-1]:
        h = torch.tanh(h @ weight.T + bias)
    n = (h @ layers[-1][0].T + layers[-1][1])[:, 0]
    start = -torch.sin(pi * x) if run.config.equation == "burgers" else x**2 * torch.cos(pi * x)
    u = start + t * (1 - x**2) * n
    u_t, u_x = torch.autograd.grad(u.sum(), (t, x), create_graph=True)
    (u_xx,) = torch.autograd.grad(u_x.sum(), x, create_graph=True)
    if run.config.equation == "burgers":
        r = u_t + u * u_x - NU * u_xx
    else:
        r = u_t - DIFFUSION * u_xx - REACTION * (u - u**3)
    grads = [torch.autograd.grad(value**2, theta, retain_graph=True)[0] for value in r]
    return r.detach(), torch.stack(grads)


@pytest.mark.parametrize("equation", EQUATIONS)
def test_jets_gradient_and_scores_are_those_of_autograd(equation):
    run = Run(replace(SMALL, equation=equation, width=7))
    run.model.theta.data.add_(0.1 * torch.randn_like(run.model.theta))
    t, x = uniform_points(9, torch.Generator().manual_seed(1))
    expected, grads = by_autograd(run, t, x)
    r, slopes, tapes = run.forward(run.equation.form(t, x))
    norms = run.model.backward(tapes, 2 * r * slopes, norms=True)
    assert norms is not None
    # float32 throughout, residuals of about 1: some hundred roundings.
    torch.testing.assert_close(r.double(), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(run.model.theta.grad.double(), grads.sum(0), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(norms.double(), grads.norm(dim=1), rtol=1e-4, atol=1e-5)
    last = grads[:, -8:].norm(dim=1)  # 7 weights and a bias
    torch.testing.assert_close(cheap("last", r, slopes, tapes).double(), last, rtol=1e-4, atol=1e-5)
    assert bool((last <= norms * 1.0001).all())
    # The output's bias has the gradient 2 r d r / d N.
    assert float(cheap("output", r, slopes, tapes).min()) >= 0
    value = cheap("output", r, torch.eye(4)[0][:, None] * slopes, tapes)
    torch.testing.assert_close(value.double(), grads[:, -1].abs(), rtol=1e-4, atol=1e-5)
    assert torch.equal(cheap("loss", r, slopes, tapes), cheap("residual", r, slopes, tapes) ** 2)


def test_the_example_has_the_residual_its_score_and_the_solution():
    example = runpy.run_path(str(EXAMPLE))
    torch.manual_seed(0)
    model = example["JetNetwork"](6, 2)
    t, x = (part.float() for part in uniform_points(5, torch.Generator().manual_seed(1)))
    jet, h = model(t, x)
    _, residual = example["burgers"](t, x, jet)
    score = example["score"](t, x, jet, h)
    for i in range(5):
        (by_last,) = torch.autograd.grad(residual[i] ** 2, model.last.weight, retain_graph=True)
        assert float(score[i]) == pytest.approx(float(by_last.norm()), rel=1e-5)
    t.requires_grad_(), x.requires_grad_()
    u, _ = example["burgers"](t, x, model(t, x)[0])
    u_t, u_x = torch.autograd.grad(u.sum(), (t, x), create_graph=True)
    (u_xx,) = torch.autograd.grad(u_x.sum(), x)
    torch.testing.assert_close(residual, u_t + u * u_x - NU * u_xx, rtol=1e-4, atol=1e-4)
    at = vector(0.1, 1), vector(-0.5, 0.01)
    torch.testing.assert_close(example["solution"](*at), burgers_solution(*at), rtol=0, atol=1e-12)


# ---- ways to choose points


def resampled(residuals: list[float], **options) -> Resampled:
    n = len(residuals)
    t, x = torch.zeros(n, dtype=torch.float64), torch.linspace(-1, 1, n, dtype=torch.float64)
    form = EQUATIONS["burgers"].form(t, x)
    values = dict(zip(form.inputs[0, :, 1].tolist(), residuals, strict=True))
    generator = torch.Generator().manual_seed(0)
    return Resampled(
        form,
        torch.stack([t, x], 1).float(),
        4,
        generator,
        lambda part: torch.tensor([values[v] for v in part.inputs[0, :, 1].tolist()]),
        **options,
    )


def test_rad_draws_in_proportion_to_the_residual_and_a_constant_without_coefficients():
    way = resampled([0, -1, 3, 0], power=1.0, constant=1.0, every=2500)
    drawn = [way.next() for _ in range(2500)]  # 10,000 points, with |r| / mean + 1 = 1, 2, 4, 1
    x = torch.cat([points.form.inputs[0, :, 1] for points in drawn])
    shares = torch.stack([(x == v).double().mean() for v in x.unique()])
    # 6 standard deviations of a share of 1/2
    torch.testing.assert_close(shares, vector(1, 2, 4, 1) / 8, rtol=0, atol=0.03)
    assert all(points.weights is None for points in drawn)


def test_rescoring_corrects_by_the_probabilities_it_draws_with():
    way = resampled([0, -1, 3, 0], power=2.0, constant=0.2, every=2500, corrected=True)
    drawn = [way.next() for _ in range(2500)]  # r^2 / mean + 0.2 = 0.2, 0.6, 3.8, 0.2
    x = torch.cat([points.form.inputs[0, :, 1] for points in drawn])
    w = torch.cat([points.weights for points in drawn])
    for value, expected in zip(x.unique(), [6, 2, 1.2 / 3.8, 6], strict=True):
        assert w[x == value].unique().tolist() == pytest.approx([expected], rel=1e-6)
        assert float((w * (x == value)).mean()) == pytest.approx(0.25, rel=0.2)


def test_points_without_a_score_have_that_of_the_nearest_seed():
    way = resampled([2.0, 2.0, 2.0, 2.0], power=2.0, constant=0.1, corrected=True, seeds=1)
    points = way.next()
    torch.testing.assert_close(points.weights, torch.ones(4))
    way = resampled([1.0, 1.0, 5.0, 5.0], power=1.0, constant=0.0, corrected=True, seeds=4)
    assert sorted(way.next().weights.unique().tolist()) == pytest.approx([0.6, 3.0])


def test_new_points_are_used_once():
    way = Fresh(EQUATIONS["burgers"], 4, torch.Generator().manual_seed(0), every=3)
    x = torch.cat([way.next().form.inputs[0, :, 1] for _ in range(7)])
    assert len(x.unique()) == 28


# ---- the probe


def test_gains_are_those_of_the_covariance():
    run = Run(replace(SMALL, contender="no pauses, last"))
    for _ in range(20):
        run.step()
    _, grads = by_autograd(run, *uniform_points(64, torch.Generator().manual_seed(1000)))
    p = run.points.sampler.probabilities()
    assert not torch.allclose(p, p.mean())

    def trace(p: torch.Tensor) -> float:
        return float((grads.square().sum(1) / (64**2 * p)).sum() - grads.mean(0).square().sum())

    found = pinn.gains(run)
    uniform = torch.full((64,), 1 / 64, dtype=torch.float64)
    assert found["in force"] == pytest.approx(trace(uniform) / trace(p), rel=1e-3)
    norms = grads.norm(dim=1)
    ideal = 0.9 * norms / norms.sum() + 0.1 / 64
    assert found["norm"] == pytest.approx(trace(uniform) / trace(ideal), rel=1e-3)
    assert set(found) == {*pinn.SCORES, "in force"}


# ---- runs, rows and the page


@pytest.mark.parametrize("label", pinn.CONTENDERS)
def test_every_contender_trains_and_again_the_same(label, monkeypatch):
    options = dict(pinn.CONTENDERS[label].options)
    if "seeds" in options:
        options["seeds"] = 10
    monkeypatch.setitem(pinn.CONTENDERS, "small", replace(pinn.CONTENDERS[label], options=options))
    config = replace(SMALL, contender="small", lr=1e-2, steps=220)
    one, two = pinn.train(config), pinn.train(config)
    before = Run(config).error()
    assert one == two
    assert len(one["curve"]) == 10
    assert one["error"] < before


def test_coefficients_reach_the_gradient():
    """The mean of weighted gradients over many draws is the gradient over the pool."""
    run = Run(replace(SMALL, contender="no pauses, last"))
    for _ in range(20):
        run.step()
    scores, mean = pinn.population(run)
    p = run.points.sampler.probabilities()
    run.optimizer.step, run.points.learn = lambda: None, lambda *_: None
    total = torch.zeros_like(mean)
    draws = 1500
    for _ in range(draws):
        run.step()
        total += run.model.theta.grad
    # What independent draws of this p leave, six times over.
    sd = float((scores["norm"].square() / (64**2 * p)).sum() / (8 * draws)) ** 0.5
    assert float((total / draws - mean).norm()) < 6 * sd < 0.6 * float(mean.norm())


def test_the_best_rate_is_of_those_with_most_seeds():
    rows = []
    for rate, errors in ((1e-3, (0.2, 0.2)), (3e-3, (0.1, 0.3)), (1e-2, (0.01,))):
        for seed, error in enumerate(errors):
            config = asdict(replace(SMALL, lr=rate, seed=seed))
            rows.append({"benchmark": pinn.RUN, "config": config, "base_steps": 40, "error": error})
    result = pinn_page.Comparison(rows, "burgers")
    assert result.rate("fixed points", 40) == 3e-3  # 0.173 < 0.2
    assert result.errors("fixed points", 40) == {0: 0.1, 1: 0.3}
    rows.append({**rows[0], "config": {**rows[0]["config"], "seed": 2}, "error": float("nan")})
    assert result.rate("fixed points", 40) == 3e-3
    assert pinn_page.Comparison(rows, "burgers").rate("fixed points", 40) == 1e-3
    assert result.rate("new points", 40) is None


@pytest.fixture
def small_plan(monkeypatch):
    monkeypatch.setattr(pinn, "RATES", {"burgers": (1e-3, 1e-2), "allen_cahn": (1e-3, 1e-2)})


@pytest.mark.usefixtures("small_plan")
def test_costs_runs_and_page_come_from_one_command(tmp_path, capsys):
    threads, out = torch.get_num_threads(), tmp_path / pinn_page.ROWS
    labels = ["fixed points", "RAD, k = 1", "defaults, last"]
    some = ["--equations", "burgers", "--only", *labels, "--seeds", "2", "--steps", "60"]
    once = ["--costs", "--rounds", "1", "--calls", "2", "--only", *labels]
    with pytest.raises(SystemExit, match="run --costs first"):
        pinn.main(["--compare", "--json", str(out), *some])
    assert pinn.main([*once, "--json", str(out)]) == 0
    (costs,) = read_rows(out)
    assert list(costs["ratio"]) == labels
    assert pinn.main(["--compare", "--json", str(out), *some]) == 0
    assert pinn.main(["--compare", "--json", str(out), *some]) == 0, "nothing is run twice"
    rows = read_rows(out)[1:]
    assert len(rows) == len(labels) * 2 * 2  # rates, seeds
    for row in rows:
        label = row["config"]["contender"]
        assert row["config"]["steps"] == pinn.steps_of(label, costs, 60)
    page = pinn_page.write(tmp_path).read_text()
    torch.set_num_threads(threads)
    assert "RAD, k = 1" in page
    assert "Not yet measured: new points" in page
    capsys.readouterr()


def made_up_rows(tmp_path: Path) -> Path:
    """Two incumbents, and one of ours at 1/4, 1/2 and all of the time, whose errors halve."""
    where = {"date": "2030-01-02T03:04:05+00:00", "machine": {"cpu": "an abacus", "threads": 1}}
    where["versions"] = {"fastis": "9"}
    ratio = {label: [1.0, 1.0, 1.0] for label in pinn.CONTENDERS}
    us = dict.fromkeys(pinn.CONTENDERS, 100.0)
    path = tmp_path / pinn_page.ROWS
    append_row(path, {"benchmark": pinn.COSTS, "us": us, "ratio": ratio, "calls": 10, **where})
    errors = {"fixed points": {400: 0.4}, "RAD, k = 1": {400: 0.2}}
    errors["refreshed, last"] = {100: 0.4, 200: 0.2, 400: 0.1}
    for label, by_length in errors.items():
        for steps, error in by_length.items():
            for seed in range(3):
                for rate in pinn.RATES["burgers"]:
                    config = PinnConfig("burgers", label, rate, steps, seed)
                    worse = 1.0 if rate == 3e-3 else 2.0
                    row = {"config": asdict(config), "base_steps": steps, "error": worse * error}
                    append_row(path, {"benchmark": pinn.RUN, **row, "curve": [1.0], **where})
    return tmp_path


def test_the_page_has_the_time_to_the_best_incumbents_error(tmp_path):
    rows = read_rows(made_up_rows(tmp_path) / pinn_page.ROWS)
    result = pinn_page.Comparison(rows, "burgers")
    assert result.best_incumbent == "RAD, k = 1"
    assert result.time_ratio("refreshed, last") == pytest.approx((0.5, 0.5, 0.5))
    assert result.time_ratio("fixed points") is None
    assert result.error("refreshed, last", 400) == pytest.approx(0.1)
    page = pinn_page.write(tmp_path).read_text()
    assert "an abacus" in page


def test_the_page_of_the_repository_is_that_of_its_rows(tmp_path):
    results = Path(__file__).resolve().parents[1] / "bench" / "results"
    (tmp_path / pinn_page.ROWS).write_bytes((results / pinn_page.ROWS).read_bytes())
    assert pinn_page.write(tmp_path).read_text() == (results / pinn_page.PAGE).read_text()


def test_scores_reach_the_sampler_unweighted():
    """fastis' own estimate of the ratio of variances is that of the gradients' norms."""
    run = Run(replace(SMALL, contender="no pauses, norm"))
    seen = []
    learn = run.points.learn
    run.points.learn = lambda points, scores: (seen.append((points, scores)), learn(points, scores))
    for _ in range(20):
        run.step()
    points, scores = seen[-1]
    assert not torch.equal(points.weights, torch.ones(8))
    assert isinstance(points.batch, fastis.Batch)
    at = Run(replace(SMALL, contender="no pauses, norm"))
    for _ in range(19):
        at.step()
    exact, _ = pinn.population(at)
    torch.testing.assert_close(
        scores.double(), exact["norm"][points.batch.indices], rtol=1e-4, atol=1e-6
    )
