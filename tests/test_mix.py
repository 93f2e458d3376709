"""``Batch.mix``: the estimate over pairs has the expectation of uniform draws, by enumeration."""

from __future__ import annotations

from itertools import permutations, product

import pytest
import torch
from conftest import sweep

import fastis
from fastis.methods import EMAIS

N, B = 3, 3
PAIR_LOSS = torch.tensor([[1.0, 7.0, 0.5], [2.0, 3.0, 11.0], [0.1, 4.0, 5.0]]).double()


def expectation(p, permutation, coefficients):
    """Over all minibatches of B independent draws: of the mean loss of its pairs."""
    total = 0.0
    for draws in product(range(N), repeat=B):
        i = torch.tensor(draws)
        losses = PAIR_LOSS[i, i[permutation]]
        total += float(p[i].prod() * (coefficients(i) * losses).mean())
    return total


@pytest.mark.parametrize("order", list(permutations(range(B))))
def test_it_is_unbiased(order):
    sampler = fastis.Sampler(N, B, method=EMAIS(warmup_epochs=0), seed=0, max_duplicates=3)
    sweep(sampler, torch.tensor([1.0, 2.0, 6.0]))
    p, permutation = sampler.probabilities(), torch.tensor(order)
    assert p.max() > 0.6
    r = 1 / (N * p)

    def mixed(i):
        return fastis.Batch(i, r[i]).mix(permutation).weights

    uniform = torch.full_like(p, 1 / N)
    wanted = expectation(uniform, permutation, torch.ones_like)
    assert expectation(p, permutation, mixed) == pytest.approx(wanted, rel=1e-12)
    if order == (1, 2, 0):  # by the coefficient of one parent it is not
        assert expectation(p, permutation, lambda i: r[i]) != pytest.approx(wanted, rel=0.1)


def test_a_minibatch_of_a_sampler_goes_to_the_loss_and_back():
    sampler = fastis.Sampler(50, 8, method=EMAIS(warmup_epochs=0), seed=0)
    sweep(sampler, torch.rand(50) + 0.1)
    batch, permutation = sampler.sample(), torch.arange(7, -1, -1)
    mixed = batch.mix(permutation)
    assert torch.equal(mixed.indices, batch.indices)
    assert torch.equal(mixed.weights, batch.weights * batch.weights.flip(0))
    target = torch.rand(8, 5).softmax(1)
    out = fastis.cross_entropy(torch.randn(8, 5), target, mixed.weights)
    sampler.update(mixed, out)
    assert sampler.step == 2
    first = {int(i): b for b, i in reversed(list(enumerate(batch.indices)))}
    seen = torch.tensor(sorted(first))
    assert (sampler.last_seen[seen] == 1).all()
    assert (sampler.last_seen == 1).sum() == len(seen)


@pytest.mark.parametrize(
    ("permutation", "error", "message"),
    [
        ([1, 0], TypeError, "permutation must be an int64 tensor, got <class 'list'>"),
        (torch.tensor([1.0, 0.0]), TypeError, "an int64 tensor, got torch.float32"),
        (torch.arange(3), ValueError, r"permutation must have shape \[2\], got \[3\]"),
        (torch.tensor([0, 2]), IndexError, "out of bounds"),
    ],
)
def test_other_permutations_are_refused(permutation, error, message):
    with pytest.raises(error, match=message):
        fastis.Batch(torch.arange(2), torch.ones(2)).mix(permutation)
