"""The tree: rebuilt and compared integer by integer, the cap to the unit."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch
from conftest import drive, observe, sweep
from hypothesis import given, settings
from hypothesis import strategies as st

import fastis
from fastis.kernels.constants import cap_ratio
from fastis.kernels.flatten import distribution, water_level
from fastis.kernels.layout import CODE, LAST, LAST_EXCLUDED, LAST_UNSEEN, VALID
from fastis.methods import EMAIS


def padded(values, size):
    """Rows of ``size`` values, the last filled up with zeros."""
    return torch.nn.functional.pad(values, (0, -values.numel() % size)).view(-1, size)


def assert_prefix_sums(prefix, of_items):
    """``prefix`` holds the prefix sums among 16 siblings, level by level, 4 items a leaf."""
    below, first = padded(of_items, 4).sum(1), 0
    while True:
        nodes = padded(below, 16)
        expected = (nodes.cumsum(1) - nodes).flatten()
        assert torch.equal(prefix[first : first + expected.numel()].long(), expected)
        first += expected.numel()
        if len(nodes) == 1:
            break
        below = nodes.sum(1)
    assert first == prefix.numel()


def assert_tree(sampler):
    """The tree that the compiled draw has just used is that of the weights as they are drawn."""
    table = sampler._table
    names = ("valid", "uncapped", "num_capped", "theta", "unseen", "offset", "ceiling")
    s = dict(zip(names, table.scalars[VALID : VALID + 7].tolist(), strict=True))
    expected = distribution(table)
    assert s["valid"] == 1
    last = table.column(LAST)
    unseen, excluded = last == LAST_UNSEEN, last == LAST_EXCLUDED
    capped = table.column(CODE) < 0
    assert torch.equal(capped.nonzero().flatten(), expected.capped)
    uncapped = torch.where((last < 0) | capped, 0, expected.weights - s["offset"])
    assert_prefix_sums(table._tree["prefix"], uncapped)
    assert_prefix_sums(table._tree["unseen_prefix"], unseen.long())
    assert_prefix_sums(table._tree["capped_prefix"], capped.long())
    *_, any_excluded = counts = table._tree["excluded_prefix"]
    assert_prefix_sums(counts[:-1], excluded.long())
    assert any_excluded or not counts.any()
    assert (uncapped <= s["ceiling"]).all()
    assert s["uncapped"] == int(uncapped.sum())
    assert s["num_capped"] == int(capped.sum())
    total = s["uncapped"] + s["num_capped"] * s["theta"] + s["unseen"] * int(unseen.sum())
    assert total + s["offset"] * int((~excluded).sum()) == expected.total


@pytest.mark.parametrize("n", [17, 300, 5000])
@pytest.mark.parametrize("batch_size", [8, 17])
@pytest.mark.parametrize(("flatten", "duplicates"), [("cap", 2), ("cap", 0.03), ("mix", 2)])
def test_nodes_hold_the_integer_weights_after_many_updates(n, batch_size, flatten, duplicates):
    duplicates = max(duplicates, 1.01 * batch_size / n)
    sampler = fastis.Sampler(
        n,
        batch_size,
        method=EMAIS(warmup_epochs=0, least_gain=0.0),
        max_duplicates=duplicates,
        flatten=flatten,
    )
    for epoch in range(3):
        drive(sampler, 200, seed=epoch, decay=0.02)
        sampler.sample()  # brings the tree up to date
        assert_tree(sampler)


weights = st.lists(st.integers(1, 2**40), min_size=4, max_size=40)


@given(weights, st.integers(1, 64), st.fractions(Fraction(1, 8), 8, max_denominator=64))
@settings(max_examples=300, deadline=None)
def test_water_level_is_the_largest_that_meets_the_cap(values, batch_size, duplicates):
    n = len(values)
    if duplicates * n < batch_size or duplicates >= batch_size:
        return
    w = torch.tensor(values)
    theta = water_level(w, batch_size, duplicates.numerator, duplicates.denominator)

    def meets(level):
        capped = [min(v, level) for v in values]
        return batch_size * max(capped) <= duplicates * sum(capped)

    if theta < max(values):
        assert meets(theta)
        # One unit more is too much unless rounding down made room: the cap is then tight to a unit.
        assert not meets(theta + 1) or theta + 1 >= max(values)
    else:
        assert meets(max(values))


@pytest.mark.parametrize("flatten", ["cap", "mix"])
@pytest.mark.parametrize("duplicates", [0.2, 1, 1.1, 2, 5])
def test_cap_holds_exactly(flatten, duplicates):
    sampler = fastis.Sampler(
        500,
        50,
        method=EMAIS(warmup_epochs=0, least_gain=0.0),
        max_duplicates=duplicates,
        flatten=flatten,
    )
    generator = torch.Generator().manual_seed(2)
    sweep(sampler, torch.empty(500).log_normal_(0, 3, generator=generator))
    drawn = distribution(sampler._table)
    ratio = cap_ratio(duplicates, 50, 500)
    assert 50 * int(drawn.weights.max()) <= ratio * drawn.total
    # ... and is used: flattening more than needed would waste variance.
    assert 50 * int(drawn.weights.max()) >= 0.999 * ratio * drawn.total
    assert float(sampler.probabilities().sum()) == pytest.approx(1, abs=1e-12)


def test_cap_has_the_least_second_moment():
    generator = torch.Generator().manual_seed(3)
    score = torch.empty(2000).log_normal_(0, 3, generator=generator)
    second = {}
    for flatten in ("cap", "mix"):
        sampler = fastis.Sampler(
            2000, 128, method=EMAIS(warmup_epochs=0, least_gain=0.0), flatten=flatten
        )
        sweep(sampler, score)
        second[flatten] = float((score.double() ** 2 / sampler.probabilities()).sum())
    assert second["cap"] < second["mix"]


def test_smallest_cap_is_uniform(any_backend):
    for flatten in ("cap", "mix"):
        sampler = fastis.Sampler(
            64,
            8,
            method=EMAIS(warmup_epochs=0, least_gain=0.0),
            max_duplicates=0.125,
            flatten=flatten,
        )
        sweep(sampler, torch.arange(1.0, 65))
        assert torch.equal(sampler.probabilities(), torch.full((64,), 1 / 64).double())
        batch = sampler.sample()
        assert (batch.weights == 1).all()


def test_unseen_items_above_the_cap_share_it(any_backend):
    # One giant among the seen makes the mean weight, and so every unseen item, exceed the cap.
    sampler = fastis.Sampler(
        100, 50, method=EMAIS(warmup_epochs=0, least_gain=0.0), max_duplicates=1
    )
    sampler.update(
        fastis.Batch(torch.arange(90), torch.ones(90)),
        observe(torch.tensor([1e6] + [1.0] * 89)),
    )
    p = sampler.probabilities()
    assert p.max() * 50 <= 1
    assert float(p[0]) == float(p[99]) == pytest.approx(0.02, rel=1e-9)
    for _ in range(20):
        batch = sampler.sample()
        torch.testing.assert_close(
            batch.weights.double(), 1 / (100 * p[batch.indices]), rtol=1e-6, atol=0
        )


def test_backends_can_take_turns():
    samplers = [
        fastis.Sampler(200, 8, method=EMAIS(warmup_epochs=0, least_gain=0.0), seed=1)
        for _ in range(2)
    ]
    generator = torch.Generator().manual_seed(0)
    for step in range(60):
        score = torch.empty(8).log_normal_(0, 2, generator=generator)
        with fastis.backend("reference"):
            expected = samplers[0].sample()
            samplers[0].update(expected, observe(score))
        with fastis.backend(("cpu", "reference")[step % 3 == 0]):
            batch = samplers[1].sample()
        with fastis.backend(("cpu", "reference")[step % 5 == 0]):
            samplers[1].update(batch, observe(score))
        assert torch.equal(batch.indices, expected.indices)


@pytest.mark.parametrize("n", [2**16 - 1, 2**20 + 1])
def test_deep_trees_draw_what_the_cumulative_sum_draws(n):
    samplers = [
        fastis.Sampler(n, 128, method=EMAIS(warmup_epochs=0, least_gain=0.0), seed=5)
        for _ in range(2)
    ]
    generator = torch.Generator().manual_seed(0)
    score = torch.empty(n).log_normal_(0, 2, generator=generator)
    for sampler in samplers:
        sweep(sampler, score)
    for _ in range(4):
        score = torch.empty(128).log_normal_(0, 3, generator=generator)
        batch = samplers[0].sample()
        samplers[0].update(batch, observe(score))
        with fastis.backend("reference"):
            expected = samplers[1].sample()
            samplers[1].update(expected, observe(score))
        assert torch.equal(batch.indices, expected.indices)
        assert torch.equal(batch.weights, expected.weights)


# D = B/N of real sizes, whose floats are a little off, and what is barely above it.
@pytest.mark.parametrize(
    ("flatten", "above"),
    [
        ("cap", 1.0),
        ("cap", 1 + 1e-9),
        ("cap", 1.001),
        ("cap", 1.5),
        ("mix", 1.0),
        ("mix", 1 + 1e-9),
        ("mix", (1 + 1e-6) * (1 + 1e-13)),
    ],
)
@pytest.mark.parametrize(("n", "b"), [(6000, 10), (60_000, 64), (50_000, 256), (10_007, 7)])
def test_caps_about_the_least_one_are_met(n, b, above, flatten, any_backend):
    duplicates = b / n * above
    sampler = fastis.Sampler(
        n,
        b,
        method=EMAIS(warmup_epochs=0, least_gain=0.0),
        max_duplicates=duplicates,
        flatten=flatten,
    )
    sweep(sampler, torch.linspace(0.1, 2.0, n))
    batch = sampler.sample()
    assert 0 <= int(batch.indices.min()) <= int(batch.indices.max()) < n
    p = sampler.probabilities()
    assert float(p.sum()) == pytest.approx(1)
    assert b * float(p.max()) <= max(duplicates, b / n) * (1 + 1e-9)
    assert batch.weights.tolist() == pytest.approx((1 / (n * p[batch.indices])).tolist(), rel=1e-6)


@pytest.mark.parametrize("duplicates", [0.1, 1 / 3, 0.6, 1.1, 2, 2**0.5, 5.5, 1e-4])
def test_the_cap_is_the_simplest_ratio_that_is_not_above(duplicates):
    ratio = cap_ratio(duplicates, 1, 1_000_000)
    assert duplicates * (1 - 1e-6) <= ratio <= Fraction(duplicates) * (1 + Fraction(1, 2**50))
    for denominator in range(1, ratio.denominator):
        below = Fraction(int(duplicates * denominator * (1 + 1e-15)), denominator)
        assert below < duplicates * (1 - 1e-6)
