"""Where the Triton losses go: every row and column exactly once, within the limits of a GPU."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastis.kernels.triton import geometry
from fastis.kernels.triton.geometry import Sweeps, Tiles
from fastis.loss import MAX_MEAN_GRAD

SIZES = st.one_of(st.integers(1, 70), st.integers(1, 300_000))
SOME_ROWS = [1, 7, 128, 4096, 32768, 2**31 - 1]
SOME_COLUMNS = [1, 2, 10, 100, 1000, 1024, 4095, 4096, 4097, 8192, 50257, 128256, 262144]


def launches():
    """Every plan for some sizes, with the sizes."""
    grid = itertools.product(SOME_ROWS, SOME_COLUMNS, (2, 4), (False, True), (False, True))
    for rows, columns, itemsize, with_grad, by_label in grid:
        for aligned in (1, 2, 16 // itemsize):
            plan = geometry.row_launch(
                rows,
                columns,
                vector=aligned,
                itemsize=itemsize,
                with_grad=with_grad,
                with_mean_grad=columns <= MAX_MEAN_GRAD,
                by_label=by_label,
            )
            yield plan, rows, columns, aligned
    for rows, columns in itertools.product(SOME_ROWS, SOME_COLUMNS):
        yield geometry.elementwise_launch(rows, columns, columns <= MAX_MEAN_GRAD), rows, columns, 1


def rows_taken(plan, rows):
    """The rows in the order of programs, as the kernels' loops take them."""
    if isinstance(plan, Sweeps):
        return list(range(plan.programs))
    tiles = geometry.cdiv(rows, plan.block_rows)
    taken = []
    for program in range(plan.programs):
        for tile in range(program, tiles, plan.programs):
            first = tile * plan.block_rows
            taken += range(first, min(first + plan.block_rows, rows))
    return taken


@settings(deadline=None)
@given(rows=st.integers(1, 20_000), columns=SIZES, mean=st.booleans(), label=st.booleans())
def test_every_row_is_taken_once(rows, columns, mean, label):
    plan = geometry.row_launch(
        rows, columns, vector=1, itemsize=4, with_grad=True,
        with_mean_grad=mean and columns <= MAX_MEAN_GRAD, by_label=label,
    )  # fmt: skip
    assert sorted(rows_taken(plan, rows)) == list(range(rows))
    plan = geometry.elementwise_launch(rows, columns, mean)
    assert sorted(rows_taken(plan, rows)) == list(range(rows))


def test_plans_fit_a_gpu():
    for plan, rows, columns, aligned in launches():
        assert 1 <= plan.programs <= rows < 2**31
        assert plan.num_warps in (1, 2, 4, 8, 16)
        threads = 32 * plan.num_warps
        if isinstance(plan, Tiles):
            block = plan.block_rows * plan.block_columns
            assert block & (block - 1) == 0
            assert plan.block_columns >= min(columns, geometry.MAX_TILE_COLUMNS)
        else:
            block = plan.block
            assert columns > geometry.MAX_TILE_COLUMNS
            # One lane a thread, or reductions over a block would leave it.
            assert plan.lanes == threads
            assert plan.vector == aligned
            assert block <= columns
        assert block >= 1
        assert block & (block - 1) == 0
        assert block <= 64 * threads, "more elements than a thread has registers for"


def test_a_loop_never_leaves_a_program_without_work():
    for plan, rows, _, _ in launches():
        if isinstance(plan, Tiles):
            assert plan.programs <= geometry.cdiv(rows, plan.block_rows)


def test_single_block_means_one_tile_of_one_program():
    for rows, columns in itertools.product(range(1, 140), (1, 3, 10, 64, 100, 4096, 4097)):
        if not geometry.is_single_block(rows, columns):
            continue
        options = {"vector": 1, "itemsize": 4, "with_grad": True, "with_mean_grad": False}
        for plan in (
            geometry.row_launch(rows, columns, **options),
            geometry.elementwise_launch(rows, columns, True),
        ):
            assert plan.programs == 1
            assert plan.block_rows >= rows
            assert plan.block_columns >= columns
    assert geometry.is_single_block(128, 10)
    assert not geometry.is_single_block(4096, 10)


def test_rows_that_give_a_mean_gradient_are_held_whole():
    assert geometry.MAX_TILE_COLUMNS >= MAX_MEAN_GRAD


@pytest.mark.parametrize(
    ("address", "stride", "itemsize", "expected"),
    [(0, 128256, 2, 8), (0, 1000, 2, 8), (0, 1000, 4, 4), (0, 50257, 2, 1), (0, 10, 4, 2),
     (16, 0, 2, 8), (2, 128256, 2, 1), (8, 128256, 2, 4), (4, 4, 4, 1), (0, 6, 2, 2)],
)  # fmt: skip
def test_alignment(address, stride, itemsize, expected):
    assert geometry.alignment(address, stride, itemsize) == expected
    for row in range(5):
        assert (address + row * stride * itemsize) % (expected * itemsize) == 0


@pytest.mark.parametrize(
    ("address", "stride", "columns", "itemsize", "grad", "expected"),
    [(0, 50257, 50257, 2, True, (1, 8)),  # odd rows, which begin alike in logits and gradient
     (0, 50257, 50257, 4, True, (1, 4)),
     (0, 50304, 50257, 2, False, (8, 8)),
     (0, 50304, 50257, 2, True, (8, 8)),
     (0, 50300, 50257, 2, False, (4, 8)),
     (0, 50300, 50257, 2, True, (4, 4)),  # they do not
     (2, 50257, 50257, 2, False, (1, 1)),  # Triton knows nothing of the address
     (8, 128256, 128256, 2, True, (4, 4)),
     (0, 128256, 128256, 2, True, (8, 8))],
)  # fmt: skip
def test_width_of_accesses(address, stride, columns, itemsize, grad, expected):
    assert geometry.access_width(address, stride, columns, itemsize, grad) == expected


def test_all_programs_of_a_looping_launch_are_resident_at_once():
    """As far as registers and warps decide, on the 132 multiprocessors of an H200."""
    for plan, _, _, _ in launches():
        if isinstance(plan, Tiles) and plan.programs > 1:
            warps = 65536 // (32 * plan.max_registers)
            assert plan.programs <= 132 * (warps // plan.num_warps)


@settings(deadline=None)
@given(parts=st.integers(1, 5000), columns=st.integers(0, 4096))
def test_column_sums_cover_parts_and_columns(parts, columns):
    plan = geometry.column_sums(parts, columns)
    assert plan.programs * plan.block_columns >= columns > (plan.programs - 1) * plan.block_columns
    assert plan.block_parts & (plan.block_parts - 1) == 0
    assert plan.block_parts * plan.block_columns <= 64 * 32 * plan.num_warps


@settings(deadline=None)
@given(rows=SIZES, columns=st.one_of(SIZES, st.integers(1, 2**40)))
def test_scaling_covers_rows_and_columns(rows, columns):
    plan = geometry.scaling(rows, columns)
    assert plan.programs * plan.block_rows >= rows > (plan.programs - 1) * plan.block_rows
    assert plan.block_rows * plan.block_columns == 4096
    assert 1 <= plan.column_programs <= 64
    step = plan.column_programs * plan.block_columns
    assert step <= columns + plan.block_columns


@settings(deadline=None)
@given(rows=st.integers(1, 2**31 - 1))
def test_parts_of_the_denominator_are_a_power_of_two(rows):
    parts = geometry.label_parts(rows)
    assert parts & (parts - 1) == 0
    assert 1 <= parts <= 256
