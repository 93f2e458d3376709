"""Proofs of the sampling engine: the probability reported is the probability drawn, to the unit.

Every proof runs on the sampler as it is and on one that took over its ``state_dict``.
"""

from __future__ import annotations

import pytest
import torch
from conftest import observe, sweep
from native import native

import fastis
from fastis import _C
from fastis.kernels.code import code_of, weight_of
from fastis.kernels.flatten import distribution
from fastis.kernels.layout import CODE, EXPONENT, LAST, SEEN, TOTAL, VALID
from fastis.kernels.reference import table as reference_table
from fastis.methods import EMAIS


@pytest.fixture(params=["as it is", "resumed"])
def resumed(request):
    """Replaces a sampler by one that continues from its saved state, or leaves it."""

    def replace(sampler: fastis.Sampler) -> fastis.Sampler:
        if request.param == "as it is":
            return sampler
        a = sampler._arguments
        names = ("num_samples", "batch_size", "method", "max_duplicates", "flatten", "scheme")
        twin = fastis.Sampler(**{name: a[name] for name in names})
        twin.load_state_dict(sampler.state_dict())
        return twin

    return replace


def inverse_cdf(table, points: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The items that the compiled draw finds at ``points`` below the total, and their weights."""
    indices, weights = torch.empty_like(points), torch.empty(len(points))
    addresses = indices.data_ptr(), weights.data_ptr()
    native().inverse_cdf(table.handle, points.data_ptr(), len(points), *addresses)
    return indices, weights


def weights_in_the_tree(sampler: fastis.Sampler) -> torch.Tensor:
    """Every item's integer weight, as the compiled draw finds it: by where its interval lies."""
    table = sampler._table
    drawn = distribution(table)
    order = torch.argsort(~torch.isin(torch.arange(len(drawn.weights)), drawn.capped), stable=True)
    prefix = torch.cumsum(drawn.weights[order], 0)
    some = drawn.weights[order] > 0
    assert int(prefix[-1]) == drawn.total
    # Both ends of every interval belong to its item, so its length is the item's weight.
    found = []
    for points in ((prefix - drawn.weights[order])[some], prefix[some] - 1):
        indices, weights = inverse_cdf(table, points)
        assert torch.equal(indices, order[some])
        expected = drawn.total / (len(order) * drawn.weights[indices].double())
        assert torch.equal(weights, expected.float())
        found.append(indices)
    return drawn.weights


def nodes(sampler: fastis.Sampler, uncapped: torch.Tensor) -> torch.Tensor:
    """What the tree should hold: prefix sums among 16 siblings, level by level."""
    below = torch.nn.functional.pad(uncapped, (0, -uncapped.numel() % 4)).view(-1, 4).sum(1)
    levels = []
    while True:
        siblings = torch.nn.functional.pad(below, (0, -below.numel() % 16)).view(-1, 16)
        levels.append((siblings.cumsum(1) - siblings).flatten())
        if len(siblings) == 1:
            return torch.cat(levels)
        below = siblings.sum(1)


@pytest.mark.parametrize("flatten", ["cap", "mix"])
def test_a_hundred_thousand_updates_leave_every_integer_right(flatten, resumed):
    n, batch_size = 3001, 16
    method = EMAIS(warmup_epochs=0, least_gain=0.0)
    sampler = fastis.Sampler(n, batch_size, method=method, flatten=flatten, seed=1)
    generator = torch.Generator().manual_seed(0)
    sampler.sample()  # from here on the tree is kept, never rebuilt but at a rescale
    scores = torch.empty(1000, 50).log_normal_(0, 2, generator=generator)
    ones = torch.ones(50)
    for step in range(2000):  # 2000 x 50 = 1e5
        indices = torch.randint(n, (50,), generator=generator)
        trend = 10.0 ** (step / 500 - 2)  # over four decades
        sampler.update(fastis.Batch(indices, ones), observe(scores[step % 1000] * trend))
        if step % 3 == 0:
            sampler.sample()  # moves items across the cap
    sampler = resumed(sampler)
    sampler.sample()
    table = sampler._table
    drawn = distribution(table)
    seen = table.column(LAST) >= 0
    assert int(table.scalars[VALID]) == 1
    exponent = int(table.scalars[EXPONENT])
    weights = torch.where(seen, weight_of(table.codes(), exponent), 0)
    uncapped = weights.clone()
    if flatten == "cap":
        uncapped[drawn.capped] = 0
    assert int(table.scalars[TOTAL]) == int(weights.sum())
    assert torch.equal(table._tree["prefix"], nodes(sampler, uncapped))
    assert torch.equal(table._tree["unseen_prefix"].long(), nodes(sampler, (~seen).long()))
    weights_in_the_tree(sampler)


def small_sampler(n: int, flatten: str, unseen: int, seed: int) -> fastis.Sampler:
    """A table written by hand: weights of 16 bits and little more, so a small total."""
    sampler = fastis.Sampler(n, 16, method=EMAIS(warmup_epochs=0, least_gain=0.0), flatten=flatten)
    table = sampler._table
    generator = torch.Generator().manual_seed(seed)
    importance = 1 + torch.rand(n, generator=generator)
    importance[:: n // 5] *= 8
    importance[3] *= 64 if flatten == "cap" else 16
    codes = code_of(importance, 0.0)
    codes[n - unseen :] = 0
    table.column(CODE).copy_(codes)
    table.column(LAST).copy_(torch.where(codes > 0, 3, -1))
    table.scalars[EXPONENT] = 0
    table.scalars[TOTAL] = weight_of(codes, 0).sum()
    table.scalars[SEEN] = n - unseen
    table.scalars[VALID] = 0
    return sampler


@pytest.mark.parametrize("unseen", [0, 7])
@pytest.mark.parametrize(("flatten", "n"), [("cap", 200), ("mix", 150), ("cap", 37)])
def test_every_point_of_a_small_total(flatten, n, unseen):
    sampler = small_sampler(n, flatten, unseen, seed=n)
    drawn = distribution(sampler._table)
    assert drawn.total <= 2**24
    if flatten == "cap":
        assert len(drawn.capped) > 0
    points = torch.arange(drawn.total)
    indices, weights = inverse_cdf(sampler._table, points)
    assert torch.equal(torch.bincount(indices, minlength=n), drawn.weights)
    # Unbiased to the last digit: the sum over all points of r is total / N for every item.
    sums = torch.zeros(n, dtype=torch.float64).index_add_(0, indices, weights.double())
    torch.testing.assert_close(sums, torch.full_like(sums, drawn.total / n), rtol=1e-7, atol=0)


@pytest.mark.parametrize("flatten", ["cap", "mix"])
def test_both_ends_of_every_leaf(flatten, resumed):
    n = 2**20
    sampler = fastis.Sampler(
        n, 128, method=EMAIS(warmup_epochs=0, least_gain=0.0), flatten=flatten, seed=3
    )
    generator = torch.Generator().manual_seed(0)
    sweep(sampler, torch.empty(n).log_normal_(0, 3, generator=generator))
    for _ in range(50):
        batch = sampler.sample()
        sampler.update(batch, observe(torch.empty(128).log_normal_(0, 3, generator=generator)))
    weights = weights_in_the_tree(resumed(sampler))
    assert int((weights == 0).sum()) == 0


@pytest.mark.parametrize("scheme", ["multinomial", "stratified", "systematic"])
@pytest.mark.parametrize("n", [2**10, 2**20, 2**25])
def test_draws_follow_the_probabilities(n, scheme, resumed):
    if n == 2**25 and scheme != "multinomial":
        pytest.skip("the largest once: the schemes share its inverse CDF")
    batch_size = min(4096, n // 8)
    sampler = fastis.Sampler(
        n,
        batch_size,
        method=EMAIS(warmup_epochs=0, least_gain=0.0),
        scheme=scheme,
        max_duplicates=2,
        seed=5,
    )
    generator = torch.Generator().manual_seed(1)
    for begin in range(0, n, 2**22):  # in parts, to spare memory
        part = torch.arange(begin, min(begin + 2**22, n))
        score = torch.empty(len(part)).log_normal_(0, 1.5, generator=generator)
        sampler.update(fastis.Batch(part, torch.ones(len(part))), observe(score))
    sampler = resumed(sampler)
    # Strata: 32 ranges of indices, each split by weight, so that neither order can hide an error.
    p = sampler.probabilities()
    stratum = torch.arange(n) * 32 // n * 8 + torch.bucketize(
        (p * n).float(), torch.tensor([0.1, 0.2, 0.4, 0.7, 1.2, 2.0, 4.0])
    )
    expected = torch.zeros(256, dtype=torch.float64).index_add_(0, stratum, p)
    assert float(p.sum()) == pytest.approx(1, abs=1e-9)
    counts = torch.zeros(256, dtype=torch.float64)
    draws = 400 if n < 2**25 else 200
    for _ in range(draws):
        counts += torch.bincount(stratum[sampler.sample().indices], minlength=256)
    kept = expected > 0
    expected = expected[kept] * draws * batch_size
    assert int(counts[~kept].sum()) == 0
    chi2 = float(((counts[kept] - expected) ** 2 / expected).sum())
    # Independent draws: with f degrees of freedom the cube root of chi2 / f is nearly normal around
    # 1 - 2 / (9 f) with variance 2 / (9 f) (Wilson and Hilferty); beyond 5 sigma about once in
    # 3.5 million. The other schemes vary less.
    f = int(kept.sum()) - 1
    sigma = (2 / (9 * f)) ** 0.5
    assert ((chi2 / f) ** (1 / 3) - (1 - 2 / (9 * f))) / sigma < 5


@pytest.mark.parametrize("flatten", ["cap", "mix"])
@pytest.mark.parametrize("scheme", ["multinomial", "stratified", "systematic"])
def test_the_weighted_mean_is_unbiased_after_updates(flatten, scheme, resumed):
    n, batch_size, draws = 400, 32, 4000
    sampler = fastis.Sampler(
        n,
        batch_size,
        method=EMAIS(warmup_epochs=0, least_gain=0.0),
        flatten=flatten,
        scheme=scheme,
        seed=2,
    )
    generator = torch.Generator().manual_seed(3)
    for _ in range(100):
        score = torch.empty(batch_size).log_normal_(0, 2, generator=generator)
        sampler.update(sampler.sample(), observe(score))
    sampler = resumed(sampler)
    values = torch.randn(n, generator=generator).double()
    estimates = torch.stack(
        [
            (b.weights.double() * values[b.indices]).mean()
            for b in (sampler.sample() for _ in range(draws))
        ]
    )
    # Beyond 5 standard errors about once in 1.7 million.
    error = float(estimates.mean() - values.mean())
    assert abs(error) < 5 * float(estimates.std()) / draws**0.5 + 1e-7


@pytest.mark.parametrize("flatten", ["cap", "mix"])
@pytest.mark.parametrize("scheme", ["multinomial", "stratified", "systematic"])
def test_backends_draw_the_same_indices(flatten, scheme, resumed):
    samplers = [
        fastis.Sampler(
            2000,
            64,
            method=EMAIS(warmup_epochs=0, least_gain=0.0),
            flatten=flatten,
            scheme=scheme,
            seed=7,
        )
        for _ in range(2)
    ]
    generator = torch.Generator().manual_seed(0)
    for step in range(120):
        if step == 60:
            samplers = [resumed(sampler) for sampler in samplers]
        score = torch.empty(64).log_normal_(0, 2, generator=generator)
        batches = []
        for name, sampler in zip(("reference", "cpu"), samplers, strict=True):
            with fastis.backend(name):
                batches.append(sampler.sample())
                sampler.update(batches[-1], observe(score))
        assert torch.equal(batches[0].indices, batches[1].indices)
        assert torch.equal(batches[0].weights, batches[1].weights)


def test_backends_find_the_same_items():
    table = small_sampler(200, "cap", 7, seed=1)._table
    drawn = distribution(table)
    points = torch.randint(drawn.total, (5000,))
    expected, expected_weights = torch.empty_like(points), torch.empty(5000)
    reference_table._inverse_cdf(drawn, points, expected, expected_weights)
    indices, weights = inverse_cdf(table, points)
    assert torch.equal(indices, expected)
    assert torch.equal(weights, expected_weights)


@pytest.mark.parametrize("n", [1, 4, 64, 65, 2**31, 2**31 + 1, 2**32 - 1])
def test_the_tree_has_every_node_of_the_largest_tables(n):
    # Nodes are padded to multiples of 16; the device's top level may have 1024.
    for most, counted in ((16, _C.tree_nodes(n)), (1024, _C.device_tree_nodes(n))):
        nodes, expected = -(-n // 4), 0
        while True:
            expected += -(-nodes // 16) * 16
            if nodes <= most:
                break
            nodes = -(-nodes // 16)
        assert counted == expected
        assert counted * 12 / n < 3.3 or n < 100  # bytes a sample
