"""Integer weights and alias tables: equal to the reference, exact item by item, draw by draw."""

from __future__ import annotations

import copy
import os
import pickle
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fastis
from fastis import _C
from fastis.kernels import alias
from fastis.kernels.cpu import categorical as cpu_categorical
from fastis.kernels.quantize import arguments
from fastis.kernels.reference import categorical as reference_categorical

FLOATS = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
THREADS = [1, 2, 5]


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def lognormal(n, sigma=1.0):
    return torch.empty(n, dtype=torch.float64).log_normal_(0, sigma, generator=seeded())


def one_giant(n):
    weights = torch.full((n,), 1e-3, dtype=torch.float64)
    weights[n // 3] = 6e4
    return weights


# Every shape that a sweep, a split into parts or a search may stumble over.
SHAPES = {
    "uniform": lambda n: torch.rand(n, dtype=torch.float64, generator=seeded()),
    "lognormal": lognormal,
    "heavy tail": lambda n: lognormal(n, 4.0).clamp(max=6e4),
    "ascending": lambda n: lognormal(n).sort().values,
    "descending": lambda n: lognormal(n).sort(descending=True).values,
    "all equal": lambda n: torch.full((n,), 0.7, dtype=torch.float64),
    "powers of two": lambda n: torch.full((n,), 1.0, dtype=torch.float64),
    "one giant": one_giant,
    "mostly zeros": lambda n: lognormal(n) * (torch.arange(n) % 50 == 0),
    "zeros at the end": lambda n: lognormal(n) * (torch.arange(n) < n // 4 + 1),
    "negative zeros": lambda n: torch.where(torch.arange(n) % 3 == 0, lognormal(n), -0.0),
    "few values": lambda n: (torch.arange(n) * 7 % 4).double() + (torch.arange(n) == 0),
    # Sums that doubles hold exactly, of weights that the shift cuts off.
    "fading": lambda n: lognormal(n) * 2.0 ** (-10 * (torch.arange(n) // 1024)).double(),
    "light first": lambda n: 1.0 + (torch.arange(n) >= n // 2).double(),
}
SIZES = [1, 2, 3, 63, 64, 65, 257, 1023, 1025, 5000]


def built(values, threads):
    """The compiled table for a given number of threads (the package decides by the size)."""
    weights = cpu_categorical.quantize(values)
    table = torch.empty(values.numel(), 2, dtype=torch.int64)
    _C.alias_build(*arguments(*weights), threads, table.data_ptr())
    return table


def check_against_reference(values):
    expected, got = reference_categorical.quantize(values), cpu_categorical.quantize(values)
    assert (got.shift, got.total) == (expected.shift, expected.total)
    integers = reference_categorical.integer_weights(expected)
    assert torch.equal(cpu_categorical.integer_weights(got), integers)
    table = reference_categorical.alias_build(expected)
    assert torch.equal(alias.alias_contents(table, expected.total), integers)
    for threads in THREADS:
        assert torch.equal(built(values, threads), table)
    drawn = reference_categorical.alias_draw(table, expected.total, 5, 3, 40)
    for ours, theirs in zip(
        cpu_categorical.alias_draw(table, expected.total, 5, 3, 40), drawn, strict=True
    ):
        assert torch.equal(ours, theirs)
    directly = cpu_categorical.draw(got, 5, 3, 40)
    for ours, theirs in zip(directly, reference_categorical.draw(expected, 5, 3, 40), strict=True):
        assert torch.equal(ours, theirs)
    assert (values[drawn.indices] > 0).all()
    assert (values[directly.indices] > 0).all()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", FLOATS)
def test_weights_tables_and_draws_equal_the_reference(shape, dtype):
    for n in SIZES:
        values = SHAPES[shape](n).to(dtype)
        if (values > 0).any():
            check_against_reference(values)


@pytest.mark.parametrize("exponent", [-1070, -1000, -500, 500, 960])
def test_doubles_of_any_magnitude(exponent):
    check_against_reference(lognormal(700) * 2.0**exponent)


@pytest.mark.parametrize("exponent", [-149, -126, 100])
def test_floats_of_any_magnitude(exponent):
    check_against_reference((8 * lognormal(3000)).float() * 2.0**exponent)


integer_weights = st.one_of(
    st.lists(st.integers(0, 20), min_size=1, max_size=60),
    st.lists(st.integers(0, 2**55), min_size=1, max_size=60),
    st.lists(st.sampled_from([0, 1, 5, 5, 5, 10**6]), min_size=1, max_size=60),
).filter(lambda w: 0 < 30 * sum(w) < 2**62)  # the most that the tests make of them


@given(integer_weights, st.integers(1, 12))
@settings(max_examples=300, deadline=None)
def test_buckets_hold_integer_weights_item_by_item(some, repeats):
    check_against_reference(torch.tensor(some * repeats))


@pytest.mark.parametrize("power", [1, 2, 5, 8, 11, 14])
@pytest.mark.parametrize("beyond", [-1, 0, 1])
def test_sizes_around_powers_of_two_with_the_largest_total(power, beyond):
    n = 2**power + beyond
    check_against_reference(torch.full((n,), 2**61 // n))
    check_against_reference(torch.full((n,), 0.999))


@pytest.mark.parametrize("shape", ["uniform", "ascending", "descending", "heavy tail"])
def test_a_million_weights(shape):
    values = SHAPES[shape](2**20 + 1).float()
    expected = reference_categorical.quantize(values)
    table = reference_categorical.alias_build(expected)
    assert torch.equal(
        alias.alias_contents(table, expected.total), reference_categorical.integer_weights(expected)
    )
    for threads in THREADS:
        assert torch.equal(built(values, threads), table)


def test_the_sum_is_of_61_bits_and_a_unit_is_all_that_is_lost():
    for shape in SHAPES:
        values = SHAPES[shape](1000)
        weights = cpu_categorical.quantize(values)
        assert 2**59 < weights.total <= 2**61 + 1000
        exact = values.abs() * 2.0**weights.shift  # a power of two: no rounding
        assert (
            (cpu_categorical.integer_weights(weights).double() - exact).abs()
            <= 1 + 2.0**-52 * exact
        ).all()


@pytest.mark.parametrize("bad", [-1.0, float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", FLOATS)
def test_bad_weights_are_found_wherever_they_are(bad, dtype):
    for n in (1, 70, 3000):
        for place in {0, n // 2, n - 1}:
            values = torch.ones(n, dtype=dtype)
            values[place] = bad
            assert cpu_categorical.quantize(values) is None
            assert reference_categorical.quantize(values) is None
    assert cpu_categorical.quantize(torch.zeros(70, dtype=dtype)) is None


@pytest.mark.parametrize(
    "weights",
    [
        torch.tensor([3, 1, 4, 1, 5]),
        torch.tensor([0, 0, 7]),
        torch.tensor([1, 1, 1, 1]),
        torch.tensor([100, 1, 1]),
        torch.tensor([2**24]),
        torch.ones(1 << 16, dtype=torch.int64),
        torch.arange(5790),  # a total just below 2^24
        torch.randint(0, 300, (100_000,), generator=seeded()),
    ],
    ids=lambda w: f"N={len(w)}",
)
def test_every_point_falls_on_its_item(weights):
    # All x below the total instead of random ones: the counts are then the weights.
    quantized = cpu_categorical.quantize(weights)
    table = cpu_categorical.alias_build(quantized)
    points = torch.arange(quantized.total)
    indices, r = cpu_categorical.alias_inverse_cdf(table, quantized.total, points)
    assert torch.equal(torch.bincount(indices, minlength=len(weights)), weights)
    exact = quantized.total / (len(weights) * weights[indices].double())
    assert torch.equal(r, exact.float())


@pytest.mark.parametrize("total", [2**61 + 3, 2**61 - 1, 2**60, 10**18 + 7])
@pytest.mark.parametrize("n", [1, 2, 3, 1000, 2**20 + 1])
def test_points_at_the_borders_of_buckets(total, n):
    # The division by the capacity is by a product: it must be exact at every border.
    weights = torch.full((n,), total // n)
    weights[: total - int(weights.sum())] += 1
    table = cpu_categorical.alias_build(cpu_categorical.quantize(weights))
    borders = torch.cumsum(weights, 0)
    points = torch.cat([borders - weights, borders - 1])
    indices, _ = cpu_categorical.alias_inverse_cdf(table, total, points)
    assert torch.equal(indices, torch.arange(n).repeat(2))


def test_one_key_gives_the_same_in_one_call_and_in_many():
    weights = cpu_categorical.quantize(torch.rand(1000, generator=seeded()))
    table = cpu_categorical.alias_build(weights)
    for kernels in (cpu_categorical, reference_categorical):
        whole = kernels.alias_draw(table, weights.total, 9, 0, 100)
        single = [kernels.alias_draw(table, weights.total, 9, b, 1) for b in range(100)]
        for part in (0, 1):
            assert torch.equal(whole[part], torch.cat([drawn[part] for drawn in single]))


def test_backends_draw_the_same():
    weights = torch.rand(1000, generator=seeded())
    drawn = []
    for name in ("reference", "cpu"):
        with fastis.backend(name):
            table = fastis.AliasTable(weights)
            drawn.append(table.sample(300, generator=seeded(5)))
            drawn.append(fastis.sample(weights, 300, generator=seeded(5)))
            drawn.append(fastis.sample(weights, 30, replacement=False, generator=seeded(5)))
    for reference, cpu in zip(drawn[:3], drawn[3:], strict=True):
        assert torch.equal(reference.indices, cpu.indices)
        torch.testing.assert_close(reference.weights, cpu.weights, rtol=1e-6, atol=0)


def test_a_table_copies_and_pickles():
    weights = torch.rand(100, generator=seeded())
    table = fastis.AliasTable(weights)
    expected = table.sample(50, generator=seeded(1))
    probabilities = table.probabilities
    weights.zero_()  # the table has kept nothing of it
    for other in (table, copy.deepcopy(table), pickle.loads(pickle.dumps(table))):
        assert torch.equal(other.probabilities, probabilities)
        assert torch.equal(other.sample(50, generator=seeded(1)).indices, expected.indices)


# The statistic of k classes has mean k - 1 and variance 2 (k - 1) and is nearly normal for
# k = 1024: beyond five standard deviations about once in three million.
CLASSES = 1024
LIMIT = CLASSES - 1 + 5 * (2 * (CLASSES - 1)) ** 0.5


def chi_square(counts, probabilities):
    expected = probabilities * counts.sum()
    return float(((counts - expected) ** 2 / expected).sum())


@pytest.mark.parametrize("power", [10, 20, 25])
def test_draws_follow_the_probabilities(power):
    n, count = 2**power, 2_000_000
    weights = torch.empty(n).log_normal_(0, 1, generator=seeded())
    table = fastis.AliasTable(weights)
    batch = table.sample(count, generator=seeded(1))
    probabilities = table.probabilities
    # Items in classes of neighbours, and in classes of equal last digits.
    for class_of in (lambda i: i // (n // CLASSES), lambda i: i % CLASSES):
        counts = torch.bincount(class_of(batch.indices), minlength=CLASSES).double()
        of_class = torch.zeros(CLASSES, dtype=torch.float64)
        of_class.index_add_(0, class_of(torch.arange(n)), probabilities)
        assert chi_square(counts, of_class) < LIMIT
    exact = 1 / (n * probabilities[batch.indices])
    torch.testing.assert_close(batch.weights.double(), exact, rtol=1e-7, atol=0)


@pytest.mark.skipif(_C.isa() == "baseline", reason="this is the baseline")
@pytest.mark.slow
def test_the_baseline_passes_too():
    env = {**os.environ, "FASTIS_CPU_ISA": "baseline"}
    chosen = "equal_the_reference or every_point or magnitude or bad_weights"
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", __file__, "-k", chosen],
        capture_output=True,
        text=True,
        env=env,
    )
    assert done.returncode == 0, done.stdout[-3000:]
