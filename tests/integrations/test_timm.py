"""timm's mixup with coefficients, and its schedule and average of weights in one loop."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import fastis

data = pytest.importorskip("timm.data")

N, CLASSES = 3, 3
X = torch.randn(N, 1, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
Y = torch.arange(N)
P = torch.tensor([0.6, 0.3, 0.1], dtype=torch.float64)


@pytest.fixture(autouse=True)
def _generators_as_they_were():
    states = torch.get_rng_state(), np.random.get_state()  # noqa: NPY002
    yield
    torch.set_rng_state(states[0])
    np.random.set_state(states[1])  # noqa: NPY002


@pytest.mark.parametrize("mode", ["batch", "pair", "elem"])
@pytest.mark.parametrize("alphas", [(0.2, 0.0), (0.0, 1.0)], ids=["mixup", "cutmix"])
def test_partner_is_the_minibatch_in_reverse_order(mode, alphas):
    """What ``batch.mix(arange.flip(0))`` takes for granted."""
    np.random.seed(0)  # noqa: NPY002
    mixup = data.Mixup(*alphas, mode=mode, num_classes=6, label_smoothing=0.0)
    x = torch.randn(6, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    mixed, target = mixup(x.clone(), torch.arange(6))
    labels = F.one_hot(torch.arange(6)).float()
    share = (target * labels).sum(1)
    assert bool((share < 1).any())
    torch.testing.assert_close(
        target, share[:, None] * labels + (1 - share)[:, None] * labels.flip(0)
    )
    if alphas[0]:
        share = share[:, None, None, None]
        torch.testing.assert_close(mixed, share * x + (1 - share) * x.flip(0))
    else:
        assert bool(((mixed == x) | (mixed == x.flip(0))).all())


@pytest.mark.parametrize("mode", ["batch", "elem"])
@pytest.mark.parametrize("probability", [1.0, 0.0])
def test_estimate_is_unbiased(mode, probability):
    """Over all pairs that can be drawn, weighted by their probabilities: as under uniform draws."""
    layer = torch.nn.Linear(16, CLASSES, dtype=torch.float64)
    mixup = data.Mixup(0.4, prob=probability, mode=mode, num_classes=CLASSES)

    def mean(p, coefficients):
        total = 0.0
        for drawn in itertools.product(range(N), repeat=2):
            indices = torch.tensor(drawn)
            np.random.seed(3)  # noqa: NPY002
            x, target = mixup(X[indices], Y[indices])
            batch = fastis.Batch(indices, coefficients[indices])
            pairs = batch.mix(torch.arange(2).flip(0))
            loss = fastis.cross_entropy(layer(x.flatten(1)), target.double(), pairs.weights).item()
            total += float(p[indices].prod()) * loss
        return total

    expected = mean(
        torch.full((N,), 1 / N, dtype=torch.float64), torch.ones(N, dtype=torch.float64)
    )
    assert mean(P, 1 / (N * P)) == pytest.approx(expected, rel=1e-6)
    assert mean(P, torch.ones(N, dtype=torch.float64)) != pytest.approx(expected, rel=1e-2)
