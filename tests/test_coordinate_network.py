"""The experiment on coordinate networks: who draws which pixels, and its page."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from bench.experiments import coordinate_network as experiment
from bench.experiments import coordinate_network_page
from bench.experiments.coordinate_network import WAYS, Fastis, LastError, Shuffled
from examples.coordinate_network import pixels, psnr, siren, texture, z_order

RESULTS = Path(__file__).resolve().parents[1] / "bench" / "results"
N, B = 64, 8


@pytest.fixture(autouse=True)
def _small_minibatches(monkeypatch):
    monkeypatch.setattr(experiment, "BATCH", B)


def test_the_z_order_is_a_walk_through_ever_larger_squares():
    order = z_order(8)
    assert order.sort().values.tolist() == list(range(64))
    assert order[:4].tolist() == [0, 1, 8, 9]
    assert order[:16].div(8, rounding_mode="floor").max() == 3
    assert (order[:16] % 8).max() == 3
    assert len(z_order(5).unique()) == 25


def test_pixels_lie_where_the_image_has_them():
    image = texture(8)
    assert image.abs().max() <= 1
    x, y = pixels(image)
    at = ((x + 1) * 3.5).round().long()  # column, row
    assert torch.equal(image[at[:, 1], at[:, 0]], y)


def test_psnr_by_hand():
    assert psnr(torch.nn.Identity(), torch.ones(3, 1), torch.zeros(3, 1)) == pytest.approx(6.0206)


def test_a_new_siren_is_as_wide_awake_as_its_paper_says():
    """What weights bring before a sine has a deviation of 1, in every layer but the first."""
    torch.manual_seed(0)
    x = torch.rand(4096, 2) * 2 - 1
    first, second, third, _ = siren(1, width=256)
    for layer, value in ((second, first(x)), (third, second(first(x)))):
        weighted = layer.w0 * value @ layer.linear.weight.T
        assert weighted.std().item() == pytest.approx(1.0, abs=0.1)


def drawn(way, steps):
    """Indices of steps after the first epoch, each pixel's loss being its index + 1."""
    found = []
    for step in range(steps):
        indices = way.indices(step / steps)
        error = (indices + 1.0).sqrt()[:, None]
        way.loss(error, torch.zeros_like(error))
        found.append(indices)
    return torch.stack(found)


@pytest.mark.parametrize("way", WAYS)
def test_the_first_epoch_takes_each_pixel_once(way):
    if "fastis" in way and "annealed" not in way:
        assert isinstance(WAYS[way](N, 0), Fastis)
    first = drawn(WAYS[way](N, 0), N // B).flatten()
    assert first.sort().values.tolist() == list(range(N))


def test_shuffled_epochs():
    found = drawn(Shuffled(N, 0), 2 * N // B).view(2, N)
    assert not torch.equal(found[0], found[1])
    assert found[1].sort().values.tolist() == list(range(N))


@pytest.mark.parametrize(("power", "correction"), [(1.0, 0.0), (1.0, 1.0), (0.5, 0.6)])
def test_pixels_of_large_errors_come_often_and_weigh_little(power, correction):
    way = LastError(N, 0, power, correction)
    counts = drawn(way, 4000)[N // B :].flatten().bincount(minlength=N).double()
    expected = torch.arange(1.0, N + 1).double() ** power
    p = 0.9 * expected / expected.sum() + 0.1 / N
    deviation = (p * counts.sum()).sqrt()
    assert ((counts - p * counts.sum()).abs() < 5 * deviation).all()
    weights = (N * p[way.drawn]) ** -correction
    torch.testing.assert_close(way.weights.double(), weights, rtol=1e-5, atol=0)


def test_the_correction_is_annealed():
    way = Fastis(N, 0, 0.0, "multinomial")
    for progress in (0.0, 0.25, 0.75):
        way.indices(progress)
        assert way.sampler.correction == progress
    kept = Fastis(N, 0, 1.0, "multinomial")
    kept.indices(0.5)
    assert kept.sampler.correction == 1.0


def test_time_to_a_quality():
    time_to = coordinate_network_page.time_to
    assert time_to([(0.5, 20.0), (1.0, 22.0)], 21.0) == 0.75
    assert time_to([(0.5, 20.0), (1.0, 22.0)], 19.0) == 0.5
    assert time_to([(0.5, 20.0), (1.0, 22.0)], 23.0) is None


def test_the_page_is_that_of_the_rows(tmp_path):
    shutil.copy(RESULTS / experiment.ROWS.name, tmp_path)
    page = coordinate_network_page.write(tmp_path)
    assert page.read_text() == (RESULTS / page.name).read_text()


def test_the_page_without_rows_says_so(tmp_path):
    text = coordinate_network_page.write(tmp_path).read_text()
    assert text.count(coordinate_network_page.NOT_YET) == 4
