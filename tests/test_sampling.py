"""fastis.sample and AliasTable: integer exact, drop-in for torch.multinomial, unbiased."""

from __future__ import annotations

import itertools

import pytest
import torch

import fastis
from fastis import sampling

ODD_WEIGHTS = {
    "size 1": [3.0],
    "all equal": [2.0] * 7,
    "one heavy": [1e9] + [1.0] * 9,
    "one light": [1e-9] + [1.0] * 9,
    "zeros": [0.0, 1.0, 0.0, 0.0, 2.0, 0.0],
    "one possible": [0.0, 0.0, 5.0],
    "tiny": [1e-300, 2e-300, 3e-300],
    "huge": [1e300, 2e300, 3e300],
    "ascending": list(range(1, 101)),
}


@pytest.mark.parametrize("name", ODD_WEIGHTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_odd_weights(any_backend, name, dtype):
    weights = torch.tensor(ODD_WEIGHTS[name], dtype=torch.float64)
    if dtype == torch.float32 and name in ("tiny", "huge"):
        pytest.skip("not representable in float32")
    weights = weights.to(dtype)
    table = fastis.AliasTable(weights)
    exact = weights.double() / weights.double().sum()
    # An integer weight is off by one unit of a total of about 2^61 at most.
    torch.testing.assert_close(table.probabilities, exact, rtol=2**-52, atol=2**-58)
    assert len(table) == weights.numel()
    for batch in (table.sample(500), fastis.sample(weights, 500)):
        assert (weights[batch.indices] > 0).all()
        expected = 1 / (len(table) * table.probabilities[batch.indices])
        torch.testing.assert_close(batch.weights.double(), expected, rtol=1e-7, atol=0)


def test_max_prob_caps():
    weights = torch.tensor([100.0, 10, 1, 1, 1, 1])
    p = fastis.AliasTable(weights, max_prob=0.25).probabilities
    assert p.max() <= 0.25
    torch.testing.assert_close(p, torch.tensor([4, 4, 2, 2, 2, 2]).double() / 16)
    p = fastis.AliasTable(weights, max_prob=1 / 6).probabilities
    assert (p == p[0]).all()
    uncapped = fastis.AliasTable(weights, max_prob=1.0).probabilities
    torch.testing.assert_close(uncapped, weights.double() / 114)


def chi2(counts, p):
    expected = p * counts.sum()
    return float(((counts - expected) ** 2 / expected).sum())


@pytest.mark.parametrize("source", ["alias", "weights"])
def test_draws_follow_the_weights(source):
    generator = torch.Generator().manual_seed(1)
    weights = torch.empty(1024).log_normal_(0, 1, generator=generator)
    table = fastis.AliasTable(weights)
    draw = table if source == "alias" else weights
    batch = fastis.sample(draw, 200_000, generator=generator)
    counts = torch.bincount(batch.indices, minlength=1024).double()
    # 1023 degrees of freedom, SD 45: beyond five of them about once in a million.
    assert chi2(counts, table.probabilities) < 1023 + 5 * 45.3


def test_neighbours_stay_apart_beyond_2_to_the_24():
    # In float32 prefix sums most of these could never be drawn.
    n = 2**24 + 5
    weights = torch.ones(n)
    batch = fastis.sample(weights, 100_000, generator=torch.Generator().manual_seed(0))
    assert batch.indices.max() < n
    assert ((batch.indices > 2**24 - 2**18).float().mean() - 2**-6).abs() < 0.003
    odd = (batch.indices % 2).double().mean()
    assert (odd - 0.5).abs() < 5 * 0.5 / 100_000**0.5
    torch.testing.assert_close(batch.weights, torch.ones(100_000), rtol=1e-6, atol=0)


def test_max_duplicates_flattens():
    weights = torch.tensor([1000.0] + [1.0] * 99)
    batch = fastis.sample(weights, 50, max_duplicates=2.0)
    heavy = batch.weights[batch.indices == 0]
    # p = D / B = 0.04, so r = 1 / (100 * 0.04).
    torch.testing.assert_close(heavy, torch.full_like(heavy, 0.25))
    same = fastis.sample(weights, 50, max_duplicates=50.0)
    assert (same.indices == 0).sum() > 30


def test_without_replacement_is_successive_sampling():
    weights = torch.tensor([1.0, 2.0, 3.0, 4.0])
    generator = torch.Generator().manual_seed(0)
    trials = 20_000
    counts = {}
    for _ in range(trials):
        order = tuple(
            fastis.sample(weights, 2, replacement=False, generator=generator).indices.tolist()
        )
        counts[order] = counts.get(order, 0) + 1
    w = weights.tolist()
    total = 0.0
    for i, j in itertools.permutations(range(4), 2):
        expected = trials * w[i] / 10 * w[j] / (10 - w[i])
        total += (counts.get((i, j), 0) - expected) ** 2 / expected
    assert total < 45  # 11 degrees of freedom: beyond 45 about once in 200,000


def test_without_replacement_the_weighted_sum_is_unbiased():
    weights = torch.tensor([1.0, 2.0, 3.0, 40.0, 5.0, 0.5])
    values = torch.tensor([5.0, -1.0, 2.0, 8.0, 1.0, 30.0])
    generator = torch.Generator().manual_seed(1)
    estimates = []
    for _ in range(20_000):
        batch = fastis.sample(weights, 3, replacement=False, generator=generator)
        assert batch.indices.unique().numel() == 3
        estimates.append((batch.weights * values[batch.indices]).sum())
    estimates = torch.stack(estimates)
    error = float(estimates.mean() - values.mean())
    assert abs(error) < 5 * float(estimates.std()) / 20_000**0.5


def test_without_replacement_known_inclusion():
    equal = fastis.sample(torch.full((10,), 3.0), 4, replacement=False)
    torch.testing.assert_close(equal.weights, torch.full((4,), 1 / (10 * 0.4)))
    everything = fastis.sample(torch.tensor([1.0, 0, 2, 3]), 3, replacement=False)
    assert set(everything.indices.tolist()) == {0, 2, 3}
    torch.testing.assert_close(everything.weights, torch.full((3,), 0.25))


@pytest.mark.parametrize("count", [0, 1, 7, 300, 900])
def test_a_race_in_heats_is_the_same_race(count, monkeypatch):
    weights = torch.rand(1000) * (torch.arange(1000) % 10 > 0)
    drawn = []
    for chunk in (1000, 64, 999, 1):
        monkeypatch.setattr(sampling, "_RACE_CHUNK", (chunk, chunk))
        generator = torch.Generator().manual_seed(2)
        drawn.append(fastis.sample(weights, count, replacement=False, generator=generator))
    assert (weights[drawn[0].indices] > 0).all()
    for other in drawn[1:]:
        assert torch.equal(other.indices, drawn[0].indices)
        assert torch.equal(other.weights, drawn[0].weights)


def test_a_race_of_weights_beyond_the_range_of_their_quotients():
    weights = torch.tensor([1e308, 0.0, 1e-300, 5e-324], dtype=torch.float64)
    drawn = fastis.sample(weights, 3, replacement=False)
    assert drawn.indices[0] == 0
    assert set(drawn.indices.tolist()) == {0, 2, 3}
    torch.testing.assert_close(drawn.weights, torch.full((3,), 0.25))


def test_torchs_default_device_is_not_asked(any_backend):
    weights = torch.rand(100)
    with torch.device("meta"):
        table = fastis.AliasTable(weights, max_prob=0.5)
        drawn = [
            table.sample(10),
            fastis.sample(weights, 10, max_duplicates=2.0),
            fastis.sample(weights, 10, replacement=False),
        ]
    for batch in drawn:
        assert batch.indices.device == batch.weights.device == weights.device


def test_generator_is_torchs():
    weights = torch.rand(50)
    for replacement in (True, False):
        draws = []
        for _ in range(2):
            torch.manual_seed(3)
            draws.append(fastis.sample(weights, 10, replacement=replacement).indices)
        assert torch.equal(draws[0], draws[1])
        again = fastis.sample(weights, 10, replacement=replacement).indices
        assert not torch.equal(draws[0], again)


def test_no_draws_is_fine():
    assert fastis.sample(torch.ones(3), 0).indices.shape == (0,)
    assert fastis.AliasTable(torch.ones(3)).sample(0).weights.shape == (0,)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: fastis.sample(torch.ones(3)), TypeError, "num_samples must be an int"),
        (lambda: fastis.sample(torch.ones(3), -1), ValueError, "num_samples must be at least 0"),
        (lambda: fastis.sample([1.0], 1), TypeError, "source must be a tensor, got list"),
        (lambda: fastis.sample(torch.ones(2, 2), 1), ValueError, r"source must have shape \[n\]"),
        (lambda: fastis.sample(torch.ones(2).long(), 1), TypeError, "source must have dtype"),
        (lambda: fastis.sample(torch.empty(0), 1), ValueError, "at least one weight"),
        (lambda: fastis.sample(torch.zeros(3), 1), ValueError, "positive weight among them"),
        (lambda: fastis.sample(torch.tensor([1, -1.0]), 1), ValueError, "finite and non-negative"),
        (lambda: fastis.sample(torch.tensor([1, torch.nan]), 1), ValueError, "finite and non-neg"),
        (lambda: fastis.sample(torch.tensor([1, torch.inf]), 1), ValueError, "finite and non-neg"),
        (
            lambda: fastis.sample(torch.tensor([1.0, 0]), 2, replacement=False),
            ValueError,
            "at most the number of positive weights without replacement, 1, got 2",
        ),
        (
            lambda: fastis.sample(torch.ones(4), 2, max_duplicates=0.4),
            ValueError,
            "max_duplicates must be in",
        ),
        (
            lambda: fastis.sample(torch.ones(4), 2, replacement=False, max_duplicates=1.0),
            ValueError,
            "max_duplicates must be None without replacement",
        ),
        (lambda: fastis.sample(torch.ones(4), 2, generator=3), TypeError, "generator must be"),
        (lambda: fastis.AliasTable(torch.ones(4), max_prob=0.2), ValueError, "at least 1/N"),
        (
            lambda: fastis.sample(fastis.AliasTable(torch.ones(4)), 2, replacement=False),
            ValueError,
            "replacement must be True for an AliasTable",
        ),
        (
            lambda: fastis.sample(fastis.AliasTable(torch.ones(4)), 2, max_duplicates=1.0),
            ValueError,
            "max_duplicates must be None for an AliasTable",
        ),
        (
            lambda: fastis.sample(fastis.Sampler(9, 2), 4),
            ValueError,
            "num_samples must be left out",
        ),
        (
            lambda: fastis.sample(fastis.Sampler(9, 2), replacement=False),
            ValueError,
            "replacement must be left out",
        ),
    ],
)
def test_errors(call, error, message):
    with pytest.raises(error, match=message):
        call()
