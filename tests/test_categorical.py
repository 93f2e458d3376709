"""fastis.sample and AliasTable: integer exact, drop-in for torch.multinomial, unbiased."""

from __future__ import annotations

import itertools
import subprocess
import sys
from fractions import Fraction

import numpy as np
import pytest
import torch

import fastis
from fastis import categorical

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


CAPPED = {
    "none": ([3.0, 1.0, 2.0], 0.6),
    "one": ([30.0, 1.0, 2.0], 0.5),
    "the least cap": ([0.0, 1e30, 1.0, 2.0, 0.0], 1 / 3),
    "just above the least cap": ([5.0, 1e30, 1.0, 2.0], 0.25 * (1 + 1e-9)),
    "all but one": ([1e-300, 1e300, 3e300], 0.4),
    "beside a giant": ([1e30, 1.0, 2.0, 3.0], 0.5),
    "beside two, of which one is not capped": ([1e38, 1e30, 1.0, 2.0, 3.0], 0.5),
    "subnormal": ([1e-320, 5e-324, 1e300], 0.4),
    "sums that overflow": ([1e308, 1e308, 1e308, 1e308, 1e300], 0.22),
    "one possible": ([0.0, 7.0], 1.0),
}


def flattened(weights, cap):
    """p = min(c w, cap) in rational numbers: so many are capped that the next need not be."""
    weights = [Fraction(w) for w in weights]
    heaviest = sorted(weights, reverse=True)
    cap = max(Fraction(cap), Fraction(1, sum(w > 0 for w in weights)))
    rest = sum(weights)
    for capped, largest in enumerate(heaviest):
        scale = (1 - capped * cap) / rest
        if largest * scale <= cap:
            return [float(min(w * scale, cap)) for w in weights]
        rest -= largest
    raise AssertionError("the cap can't be met")


@pytest.mark.parametrize("name", CAPPED)
def test_caps_are_met_and_nothing_else_changes(any_backend, name):
    weights, cap = CAPPED[name]
    values = torch.tensor(weights, dtype=torch.float64)
    before = values.clone()
    table = fastis.AliasTable(values, max_prob=cap)
    exact = torch.tensor(flattened(weights, cap), dtype=torch.float64)
    torch.testing.assert_close(table.probabilities, exact, rtol=1e-14, atol=2**-57)
    assert table.probabilities.max() <= max(cap, 1 / int((values > 0).sum()))
    batch = fastis.sample(values, 20, max_duplicates=20 * cap)
    expected = 1 / (len(weights) * exact[batch.indices])
    torch.testing.assert_close(batch.weights.double(), expected, rtol=1e-6, atol=0)
    assert torch.equal(values, before)


def test_caps_of_many_weights_near_the_least_one(any_backend):
    n = 2000
    weights = torch.empty(n).log_normal_(0, 2, generator=torch.Generator().manual_seed(0))
    p = fastis.AliasTable(weights, max_prob=1.01 / n).probabilities
    assert p.max() <= 1.01 / n
    exact = torch.tensor(flattened(weights.tolist(), 1.01 / n), dtype=torch.float64)
    torch.testing.assert_close(p, exact, rtol=1e-10, atol=0)


@pytest.mark.parametrize("number", [np.float32(0.5), np.float64(0.5), Fraction(1, 2)])
def test_any_real_number_will_do(number):
    weights = torch.tensor([100.0, 1, 1, 1])
    assert fastis.AliasTable(weights, max_prob=number).probabilities.max() == 0.5
    assert fastis.sample(weights, np.int64(4), max_duplicates=number * 8).indices.shape == (4,)
    sampler = fastis.Sampler(9, 2, method=fastis.methods.EMAIS(tau=number), max_duplicates=number)
    assert type(sampler.state_dict()["settings"]["options"]["tau"]) is float


NOT_IN_MEMORY = """
import sys, warnings
import torch, fastis
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.two_tensor import TwoTensor
warnings.simplefilter("ignore")
real = torch.rand(100)
sources = {
    "wrapper": TwoTensor(real, real.clone()),
    "fake": FakeTensorMode().from_tensor(real),
    "meta": real.to("meta"),
    "sparse": real.to_sparse(),
    "mkldnn": real.to_mkldnn(),
}
for name, size in (("resized to 0", 0), ("resized below its tensor", 40)):
    sources[name] = real.clone()
    sources[name].untyped_storage().resize_(size)
calls = [
    lambda weights: fastis.AliasTable(weights),
    lambda weights: fastis.sample(weights, 10),
    lambda weights: fastis.sample(weights, 10, replacement=False),
]
for name, source in sources.items():
    for call in calls:
        try:
            call(source)
        except TypeError as error:
            assert str(error).startswith(("weights must be a ", "source must be a ")), error
            assert "got " in str(error), error
        else:
            raise AssertionError(name)
for source in (real.as_subclass(type("Own", (torch.Tensor,), {})), torch.nn.Parameter(real)):
    assert type(fastis.sample(source, 10).indices) is torch.Tensor
with FakeTensorMode(allow_non_fake_inputs=True):
    for call in calls:
        try:
            call(real)
        except TypeError as error:
            assert "got FakeTensor" in str(error)
        else:
            raise AssertionError("under a mode")
print("all refused")
"""


def test_tensors_without_memory_are_refused_by_name():
    done = subprocess.run([sys.executable, "-c", NOT_IN_MEMORY], capture_output=True, text=True)
    assert done.stdout == "all refused\n", (done.returncode, done.stderr)


def test_tensors_that_do_not_lie_in_memory_as_they_read(any_backend):
    weights = torch.rand(100)
    negated = torch._neg_view(-weights)
    assert negated.is_neg()
    for source in (negated, torch.stack([weights, -weights], 1)[:, 0], weights.flip(0).flip(0)):
        table, expected = fastis.AliasTable(source), fastis.AliasTable(weights)
        assert torch.equal(table.probabilities, expected.probabilities)
    with pytest.raises(ValueError, match="finite and non-negative"):
        fastis.AliasTable(torch._neg_view(weights))
    with pytest.raises(ValueError, match="positive weight among them"):
        fastis.AliasTable(torch._efficientzerotensor(100))


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
        monkeypatch.setattr(categorical, "_RACE_CHUNK", (chunk, chunk))
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
        (lambda: fastis.sample(torch.ones(3), -1), ValueError, r"num_samples must be in \[0, "),
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
            r"max_duplicates must be at least 2 / 4 = 0.5 \(.*positive weights is 4\), got 0.4",
        ),
        (
            lambda: fastis.sample(torch.ones(4), 2, replacement=False, max_duplicates=1.0),
            ValueError,
            "max_duplicates must be None without replacement",
        ),
        (lambda: fastis.sample(torch.ones(4), 2, generator=3), TypeError, "generator must be"),
        (
            lambda: fastis.sample(torch.tensor([0.0, 0, 1, 0]), 4, max_duplicates=1.0),
            ValueError,
            r"max_duplicates must be at least 4 / 1 = 4 \(.*positive weights is 1\), got 1.0",
        ),
        (
            lambda: fastis.AliasTable(torch.tensor([0.0, 0, 1, 0]), max_prob=0.25),
            ValueError,
            r"max_prob must be at least 1 / 1 = 1 \(.*positive weights is 1\), got 0.25",
        ),
        (
            lambda: fastis.sample(torch.ones(4), 2, max_duplicates=10**400),
            ValueError,
            "max_duplicates must be in .*, got an int of 1329 bits",
        ),
        (
            lambda: fastis.sample(torch.ones(4), 10**5000),
            ValueError,
            "num_samples must be in .*, got an int of",
        ),
        (
            lambda: fastis.sample(torch.ones(4), torch.tensor([1, 2])),
            TypeError,
            "num_samples must be an int, got Tensor",
        ),
        (
            lambda: fastis.sample(torch.ones(4), 2, max_duplicates=torch.nan),
            ValueError,
            "max_duplicates must be in .*, got nan",
        ),
        (lambda: fastis.AliasTable(torch.ones(4), max_prob=True), TypeError, "must be a number"),
        (
            lambda: fastis.AliasTable(torch.ones(4), max_prob=0.2),
            ValueError,
            "at least 1 / 4 = 0.25",
        ),
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
