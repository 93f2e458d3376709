"""The experiment on diffusion timesteps: its parts, against numbers worked out otherwise."""

from __future__ import annotations

import math
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch

pytest.importorskip("matplotlib")  # as all experiments

from bench.experiments import timesteps, timesteps_page
from bench.experiments.diffusion import Diffusion, Images, Mixer
from bench.experiments.timesteps import Config, LossSecondMoment, Run, gain_of, norms_of

SMALL = Config("uniform", 1e-3, 0, 4, num_timesteps=40, batch_size=8, width=8)


@pytest.fixture
def images():
    levels = torch.randint(256, (2, 40, 1, 16, 16), generator=torch.Generator().manual_seed(0))
    return Images(*(levels / 127.5 - 1))


def test_the_bound_is_the_likelihood_of_the_chain(images):
    """By torch.distributions, with the posterior worked out from Bayes' rule."""
    from torch.distributions import Normal, kl_divergence

    diffusion = Diffusion(40, "linear")
    x = images.train[:8].double()
    t = torch.arange(1, 9)
    noise = torch.randn(x.shape, dtype=torch.float64)
    output = torch.randn(8, 2, 16, 16, dtype=torch.float64) * 0.1
    beta = torch.linspace(0.1, 20, 40, dtype=torch.float64) / 40
    kept = torch.cumprod(1 - beta, 0)

    def of(values):
        return values.view(-1, 1, 1, 1)

    noisy = of(kept[t].sqrt()) * x + of((1 - kept[t]).sqrt()) * noise
    # q(x_{t-1} | x_0) N(x_t; sqrt(1 - beta) x_{t-1}, beta), as precisions
    precision = 1 / (1 - kept[t - 1]) + (1 - beta[t]) / beta[t]

    def posterior(start):
        there = of(kept[t - 1].sqrt()) * start / of(1 - kept[t - 1])
        return (there + of((1 - beta[t]).sqrt() / beta[t]) * noisy) / of(precision)

    predicted, part = output[:, :1], (output[:, 1:] + 1) / 2
    found = (noisy - of((1 - kept[t]).sqrt()) * predicted) / of(kept[t].sqrt())
    log_variance = part * of(beta[t].log()) - (1 - part) * of(precision.log())
    q = Normal(posterior(x), of(precision).rsqrt().expand_as(x))
    p = Normal(posterior(found), (log_variance / 2).exp())
    expected = 40 * kl_divergence(q, p).flatten(1).mean(1) / math.log(2)
    losses = diffusion.losses(output, x, t, noise, "vlb")
    torch.testing.assert_close(losses, expected, rtol=1e-4, atol=1e-6)  # constants are float32


def test_the_likelihood_of_all_levels_is_one():
    diffusion = Diffusion(10, "cosine")
    levels = torch.arange(256) / 127.5 - 1
    start = levels.view(256, 1, 1, 1)
    # A prediction for which the mean does not depend on the level.
    t, noise = torch.zeros(256, dtype=torch.int64), torch.zeros(256, 1, 1, 1)
    predicted = diffusion.signal[0] * (start - 0.3) / diffusion.noise[0]
    mean_free = torch.cat([predicted, torch.full_like(predicted, 1.0)], 1)
    bits = diffusion.losses(mean_free, start, t, noise, "vlb") / 10
    probabilities = (2.0**-bits).double()
    # The posterior's share of x_t, which is the level's own, is what is left.
    assert float(diffusion.of_noisy[0]) == pytest.approx(0.0, abs=1e-6)
    assert float(probabilities.sum()) == pytest.approx(1.0, abs=1e-3)


def test_loss_second_moment_waits_for_ten_losses_of_each():
    sampler = LossSecondMoment(4, seed=0)
    losses = torch.tensor([1.0, 2.0, 3.0, 4.0])
    for _ in range(9):
        sampler.update_with_local_losses(torch.arange(4), losses)
    assert sampler.weights().tolist() == [1.0] * 4
    for _ in range(2):
        sampler.update_with_local_losses(torch.arange(4), 2 * losses)
    root = np.sqrt((8 + 2 * 4) / 10) * losses.numpy()
    np.testing.assert_allclose(
        sampler.weights() / 4, 0.999 * root / root.sum() + 0.001 / 4, rtol=1e-12
    )
    t, weights = sampler.sample(8, "cpu")
    torch.testing.assert_close(weights, torch.from_numpy(1 / sampler.weights()[t]).float())


def test_norms_are_those_of_autograd(images):
    run = Run(SMALL, images)
    run.step()
    of_all, of_loss, of_output = norms_of(run)
    assert of_all.shape == (40, timesteps.IMAGES_A_STEP)
    generator = torch.Generator().manual_seed(1)
    t = torch.arange(5).repeat_interleave(timesteps.IMAGES_A_STEP)
    x = images.train[torch.randint(40, t.shape, generator=generator)][:1]
    noise = torch.randn(len(t), 1, 16, 16, generator=generator)[:1]
    output = run.model(run.diffusion.noised(x, t[:1], noise), t[:1])
    output.retain_grad()
    loss = run.diffusion.losses(output, x, t[:1], noise, "vlb").sum()
    run.optimizer.zero_grad()
    loss.backward()
    expected = sum(p.grad.double().square().sum() for p in run.model.parameters())
    torch.testing.assert_close(of_all[0, 0], expected, rtol=1e-4, atol=0)
    torch.testing.assert_close(of_loss[0, 0], loss.detach().double() ** 2, rtol=1e-4, atol=0)
    squares = output.grad.double().square().sum()
    torch.testing.assert_close(of_output[0, 0], squares, rtol=1e-4, atol=0)


def test_gains_by_hand():
    squares = torch.tensor([[9.0, 9.0], [1.0, 1.0]], dtype=torch.float64)
    assert gain_of(squares, np.ones(2)) == pytest.approx(1.0)
    assert gain_of(squares, np.array([3.0, 1.0])) == pytest.approx(5 / 4)
    assert timesteps.gains(squares, squares) == pytest.approx(5 / 4)


def test_the_network_takes_any_number_of_channels():
    model = Mixer(3, 10, width=8)
    assert model(torch.randn(2, 3, 16, 16), torch.tensor([0, 9])).shape == (2, 6, 16, 16)


def row_of(config: Config, loss: float) -> dict:
    return {
        "benchmark": "timesteps",
        "config": vars(config),
        "test": dict.fromkeys(("simple", "hybrid", "vlb"), loss),
    }


def test_time_to_the_incumbents_end():
    """Loss falls by 1 a doubling; a step costs twice the incumbent's."""
    full, peer = replace(SMALL, lr=timesteps.RATES[0], steps=400), "loss-second-moment"
    theirs, ours = (replace(full, method=m) for m in (peer, "fastis by loss"))
    rows = [row_of(theirs, 2.5), row_of(replace(full, method="uniform"), 9.0)]
    rows += [row_of(replace(ours, steps=n), x) for n, x in ((100, 3), (200, 2), (400, 1))]
    cost = {"config": vars(SMALL), "ms": {peer: 4.0, "uniform": 4.0, "fastis by loss": 8.0}}
    comparison = timesteps_page.Comparison(timesteps_page.setting_of(rows[0]), rows, [cost])
    assert comparison.incumbents() == ["uniform", peer]
    ratio = comparison.time_ratio("fastis by loss", peer, 0)
    assert ratio == pytest.approx(2 * 100 * 2**0.5 / 400)
    assert math.isnan(comparison.time_ratio("uniform", peer, 0))
    assert comparison.time_cell("fastis by loss", peer) == "0.71"
    assert comparison.time_cell("fastis by loss", "uniform") == "at most 0.50"
    assert comparison.time_cell("uniform", peer) == "not reached"


def test_runs_and_the_page(tmp_path, images, monkeypatch):
    monkeypatch.setattr(timesteps, "load_images", lambda *_: images)
    monkeypatch.setattr(timesteps, "SEEDS", 1)
    file = tmp_path / timesteps_page.ROWS
    short = ["--json", str(file), "--num-timesteps", "40", "--batch-size", "4", "--steps", "2"]
    timesteps.main(["probe", *short, "--at", "2"])
    timesteps.main(["costs", *short, "--rounds", "1"])
    for _ in range(2):  # the second time nothing is left to do
        timesteps.main(["compare", *short, "--parts", "1", "0.5"])
    found = file.read_text().splitlines()
    methods = len(timesteps.METHODS)
    assert len(found) == 2 + methods * (len(timesteps.RATES) + 1)
    text = timesteps_page.write(tmp_path).read_text()
    assert "fastis by gradient" in text
    assert timesteps_page.NOT_YET not in text
    empty = tmp_path / "empty"
    empty.mkdir()
    assert timesteps_page.NOT_YET in timesteps_page.write(empty).read_text()


def test_the_page_is_that_of_its_rows(tmp_path):
    shutil.copy(timesteps_page.RESULTS / timesteps_page.ROWS, tmp_path)
    page = timesteps_page.RESULTS / timesteps_page.PAGE
    assert timesteps_page.write(tmp_path).read_text() == page.read_text()
