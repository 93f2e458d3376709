"""Fixed weights on the device, run on the host: bit for bit what the reference does.

The CUDA backend's own Python drives tests/csrc/emulate_categorical.h, which hands out the shares
of a launch's threads and blocks one after the other, forwards, backwards and scrambled.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from native import native
from test_alias import FLOATS, SHAPES, SIZES, integer_weights, lognormal, seeded

from fastis.kernels.cuda import categorical as cuda_categorical
from fastis.kernels.reference import categorical as reference_categorical

FORWARDS, BACKWARDS, SCRAMBLED = 1, 0, 7919
ORDERS = [FORWARDS, BACKWARDS, SCRAMBLED]


def emulate(monkeypatch, stride):
    def call(name, device, *arguments):
        assert getattr(native(), name)(*arguments, stride) == 0

    monkeypatch.setattr(cuda_categorical, "_call", call)
    monkeypatch.setattr(cuda_categorical, "_scratch", lambda *_: torch.empty(1, dtype=torch.uint8))


@pytest.fixture
def emulated(monkeypatch):
    emulate(monkeypatch, SCRAMBLED)


def assert_equal(ours, theirs):
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def check_against_reference(values):
    expected, got = reference_categorical.quantize(values), cuda_categorical.quantize(values)
    assert (got.shift, got.total) == (expected.shift, expected.total)
    assert torch.equal(
        cuda_categorical.integer_weights(got), reference_categorical.integer_weights(expected)
    )
    table = reference_categorical.alias_build(expected)
    ours = cuda_categorical.alias_build(got)
    assert torch.equal(ours, table)
    total = expected.total
    drawn = reference_categorical.alias_draw(table, total, 5, 3, 40)
    assert_equal(cuda_categorical.alias_draw(ours, total, 5, 3, 40), drawn)
    assert_equal(
        cuda_categorical.draw(got, 5, 3, 40), reference_categorical.draw(expected, 5, 3, 40)
    )


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", FLOATS)
def test_weights_tables_and_draws_equal_the_reference(emulated, shape, dtype):
    for n in SIZES:
        values = SHAPES[shape](n).to(dtype)
        if (values > 0).any():
            check_against_reference(values)


# Items of one side so far apart that parts have none of their own.
FAR_APART = {
    "few heavy": lambda n: 1.0 + 99.0 * (torch.arange(n) % 3001 == 0).double(),
    "few light": lambda n: 1.0 - (torch.arange(n) % 3001 == 0).double(),
    "heavy first and last": lambda n: 1.0 + 99.0 * (torch.arange(n) % (n - 1) == 0).double(),
    "halves": lambda n: torch.where(torch.arange(n) % 2048 < 1024, 1.0, 3.0).double(),
    # Capacity to the unit: neither deficit nor surplus over whole tiles.
    "one and three among twos": lambda n: (
        2.0 + (torch.arange(n) == n // 2).double() - (torch.arange(n) == n // 3).double()
    ),
}


@pytest.mark.parametrize("stride", ORDERS)
@pytest.mark.parametrize("shape", [*SHAPES, *FAR_APART])
def test_many_parts_in_any_order(monkeypatch, shape, stride):
    emulate(monkeypatch, stride)
    check_against_reference((SHAPES | FAR_APART)[shape](40_007).float())


def test_integers_at_their_capacity(emulated):
    weights = torch.full((20_000,), 7)
    check_against_reference(weights)
    weights[[3, 15_000]] = torch.tensor([0, 14])
    check_against_reference(weights)
    weights[:5000], weights[5000:10_000] = 6, 8
    check_against_reference(weights)


@pytest.mark.parametrize("exponent", [-1070, -1000, -500, 500, 960])
def test_doubles_of_any_magnitude(emulated, exponent):
    check_against_reference(lognormal(700) * 2.0**exponent)


def test_doubles_whose_sum_is_infinite(emulated):
    check_against_reference(torch.full((3000,), 1.7e308, dtype=torch.float64))


@pytest.mark.parametrize("exponent", [-149, -126, 100])
def test_floats_of_any_magnitude(emulated, exponent):
    check_against_reference((8 * lognormal(3000)).float() * 2.0**exponent)


def test_integers_from_weights(monkeypatch):
    monkeypatch.undo()

    @given(integer_weights)
    @settings(max_examples=200, deadline=None)
    def check(some):
        check_against_reference(torch.tensor(some * 30))

    with pytest.MonkeyPatch.context() as patch:
        emulate(patch, SCRAMBLED)
        check()


def test_weights_that_do_not_start_at_sixteen_bytes(emulated):
    values = lognormal(1001).float()
    for begin in (1, 2, 3):
        check_against_reference(values[begin:])


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("bad", [-1.0, float("nan"), float("inf"), -float("inf")])
def test_bad_weights_are_refused(emulated, dtype, bad):
    values = torch.ones(300, dtype=dtype)
    values[257] = bad
    assert cuda_categorical.quantize(values) is None
    assert cuda_categorical.quantize(torch.zeros(5, dtype=dtype)) is None


@pytest.mark.parametrize("total", [2**61, 2**61 + 12345, 7, 1])
def test_every_border_of_a_bucket(emulated, total):
    n = 5000
    weights = torch.full((n,), total // n)
    weights[: total - int(weights.sum())] += 1
    table = cuda_categorical.alias_build(cuda_categorical.quantize(weights))
    prefix = torch.cumsum(weights, 0)
    some = weights > 0
    points = torch.cat([(prefix - weights)[some], (prefix - 1)[some]])
    expected = reference_categorical.alias_inverse_cdf(table, total, points)
    assert_equal(cuda_categorical.alias_inverse_cdf(table, total, points), expected)


def test_random_below_are_the_references(emulated):
    args = (2**62, 2**63 + 5, 2**33 - 250, 5001, torch.device("cpu"))
    expected = reference_categorical.random_below(*args)
    assert torch.equal(cuda_categorical.random_below(*args), expected)


@pytest.mark.parametrize("count", [1, 767, 768, 769, 3072, 3073, 20_000])
def test_every_draw_is_made_once(emulated, count):
    weights = cuda_categorical.quantize(torch.rand(1000, generator=seeded()))
    table = cuda_categorical.alias_build(weights)
    drawn = cuda_categorical.alias_draw(table, weights.total, 9, 2**40, count)
    assert_equal(drawn, reference_categorical.alias_draw(table, weights.total, 9, 2**40, count))


@pytest.mark.parametrize("count", [0, 1, 255, 256, 100_001, 2**31, 2**32 + 3, 2**40])
@pytest.mark.parametrize("blocks", [1, 3, 1056])
def test_threads_share_every_index_in_64_bits(count, blocks):
    found, threads = torch.zeros(3, dtype=torch.int64), 256 * blocks
    seen = 0
    for block, thread in [(0, 0), (0, 255), (blocks // 2, 17), (blocks - 1, 255)]:
        native().share(block, thread, blocks, count, found.data_ptr())
        first, step, number = found.tolist()
        assert (first, step) == (256 * block + thread, threads)
        assert number == len(range(first, count, threads))
    if count <= 100_001:
        for k in range(threads):
            native().share(k // 256, k % 256, blocks, count, found.data_ptr())
            seen += int(found[2])
        assert seen == count


@pytest.mark.parametrize(
    ("items", "most", "expected"),
    [
        (0, 10, 1), (1, 10, 1), (256, 10, 1), (257, 10, 2), (2560, 10, 10), (2561, 10, 10),
        (2**31, 2**40, 2**23), (2**33 + 1, 2**40, 2**25 + 1), (2**62, 1056, 1056),
    ],
)  # fmt: skip
def test_blocks_of_a_launch(items, most, expected):
    assert native().blocks_for(items, most) == expected
