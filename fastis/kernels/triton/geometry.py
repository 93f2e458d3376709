"""How the Triton losses are laid out on the GPU: plain Python, so that it is tested without one.

A loss walks the rows of a matrix ``[rows, columns]`` (tokens by classes, or samples by outputs) in
one of two ways. The choice depends on the arguments of :func:`row_launch` alone, so the same call
adds in the same order every time, on every GPU.

- :class:`Tiles`, up to 4096 columns: a program holds whole rows in registers, ``block_rows`` at a
  time, so that one read serves the maximum, the sums and the gradient.
- :class:`Sweeps`, above: a program goes along one row in blocks with a running maximum per thread.
  The loss and its score take one sweep, one read; the gradient takes a second one, backwards, which
  finds the end of the row in the first-level cache and the rest in the second-level cache.

Why sweeps, and not a group of programs that share a row: a row of 128,256 bfloat16 logits is 256
KB, as much as all registers of a multiprocessor. To hold it means eight programs that wait for each
other through memory on every row (about 2 us in the 16 us that copying a row takes), in a launch
that hangs unless they are resident together. Sweeps need neither. With two programs on each of an
H200's 132 multiprocessors 264 rows are under way, on average half of each between its two reads: 34
MB of a 60 MB cache, which the gradient's stores are told to leave first. Rows above 288 KB get
programs so wide that only one fits a multiprocessor, for the same reason. These are estimates: no
GPU has timed them yet.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

# Rows up to here are held in registers; fastis.loss.MAX_MEAN_GRAD must not be above.
MAX_TILE_COLUMNS = 4096
# Elements of a row or tile that one thread holds at a time.
ELEMENTS_PER_THREAD = 32
# Padded elements of a matrix that one program takes whole: loss and mean gradient in one launch.
SINGLE_BLOCK_ELEMENTS = 8192
# Warps of a launch, 31 for each of an H200's 132 multiprocessors; from there on programs loop. Half
# as many where each program leaves a row of partial column sums behind.
RESIDENT_WARPS = 4096
# All of them must be resident at once, or the rest run alone for as long again: a thread may have
# its share of the registers of a multiprocessor with 32 warps, or 16, and no more.
TILE_REGISTERS = 64
# Bytes of a row above which only one program is to work on each multiprocessor.
WIDE_ROW_BYTES = 288 * 1024
ACCESS_BYTES = 16
# Of a thread in a sweep: sixteen warps then fit a multiprocessor, whatever the compiler likes.
SWEEP_REGISTERS = 128


class Tiles(NamedTuple):
    """Program p takes tiles p, p + programs, ...; tile t has block_rows rows from t block_rows."""

    block_rows: int
    block_columns: int
    num_warps: int
    programs: int
    max_registers: int | None = None  # of a thread


class Sweeps(NamedTuple):
    """Program p takes row p, in blocks of chunks x lanes x vector elements.

    A thread is a lane: it reads ``vector`` neighbours at once, ``chunks`` times in a block.
    """

    chunks: int
    lanes: int
    vector: int
    stages: int
    num_warps: int
    programs: int

    @property
    def block(self) -> int:
        """Columns of one step."""
        return self.chunks * self.lanes * self.vector


def power_of_two(n: int) -> int:
    """The smallest power of two that is at least n (and at least 1)."""
    return 1 << max(n - 1, 0).bit_length()


def cdiv(n: int, d: int) -> int:
    """n / d, rounded up."""
    return -(-n // d)


def alignment(address: int, row_stride: int, itemsize: int) -> int:
    """Elements (a power of two, at most 16 bytes) to which every row of a matrix is aligned."""
    return math.gcd(ACCESS_BYTES // itemsize, row_stride, address % ACCESS_BYTES // itemsize)


def access_width(
    address: int, row_stride: int, columns: int, itemsize: int, with_grad: bool
) -> tuple[int, int]:
    """Elements to which rows are aligned, and those that a sweep over them reads at once.

    It reads as many as an access can hold, even where rows begin anywhere, as they do when their
    length is odd: their aligned parts, and the few elements before and behind singly. Rows of the
    gradient must then begin as far from an aligned place as those of the logits.
    """
    aligned, most = alignment(address, row_stride, itemsize), ACCESS_BYTES // itemsize
    together = not with_grad or (row_stride - columns) % most == 0
    return aligned, most if address % ACCESS_BYTES == 0 and together else aligned


@functools.lru_cache(maxsize=1024)
def is_single_block(rows: int, columns: int) -> bool:
    """Whether one program takes the whole matrix, so that nothing is left to a second launch."""
    return (
        columns <= MAX_TILE_COLUMNS
        and power_of_two(rows) * power_of_two(columns) <= SINGLE_BLOCK_ELEMENTS
    )


@functools.lru_cache(maxsize=1024)  # as long as the rest of a small loss on the host
def row_launch(
    rows: int,
    columns: int,
    *,
    vector: int,
    itemsize: int,
    with_grad: bool,
    with_mean_grad: bool,
    by_label: bool = True,
) -> Tiles | Sweeps:
    """The launch of cross-entropy over ``[rows, columns]``.

    ``vector`` is :func:`access_width`. ``by_label``: against class labels; soft targets keep
    more for each element, so a thread gets fewer.
    """
    if columns <= MAX_TILE_COLUMNS:
        elements = ELEMENTS_PER_THREAD if by_label else ELEMENTS_PER_THREAD // 2
        return _tiles(rows, columns, with_mean_grad, elements)
    elements = ELEMENTS_PER_THREAD if by_label else ELEMENTS_PER_THREAD // 4
    return _sweeps(rows, columns, vector, itemsize, with_grad, elements)


def _tiles(rows: int, columns: int, with_mean_grad: bool, elements: int) -> Tiles:
    """A warp per row where it can hold one: its sums then need no barrier."""
    block_columns = power_of_two(columns)
    if is_single_block(rows, columns):
        # Few elements a thread: only this one program's latency matters.
        block_rows = power_of_two(rows)
        num_warps = min(max(block_rows * block_columns // 256, 1), 16)
        return Tiles(block_rows, block_columns, num_warps, 1)
    if block_columns < 512:
        elements = min(elements, 16)  # what is kept per row weighs on a thread with many short rows
    warp_elements = 32 * elements
    block_rows = max(warp_elements // block_columns, 1)
    num_warps = max(block_columns // warp_elements, 1)
    share = 2 if with_mean_grad else 1
    programs = min(cdiv(rows, block_rows), RESIDENT_WARPS // share // num_warps)
    return Tiles(block_rows, block_columns, num_warps, programs, TILE_REGISTERS * share)


def _sweeps(
    rows: int, columns: int, vector: int, itemsize: int, with_grad: bool, elements: int
) -> Sweeps:
    """Two warps at least; eight from 16,384 columns; twice as many for the widest gradients."""
    num_warps = min(power_of_two(columns + 1) // 4096, 8)
    if with_grad and columns * itemsize > WIDE_ROW_BYTES:
        num_warps, elements = 16, elements // 2
    # The copies of a pipeline go past the first-level cache, where the second sweep wants the row.
    stages = 1 if with_grad else 3
    # Unaligned rows take an address an access: more than 16 of them would not fit in registers.
    chunks = min(max(elements // vector, 1), 16)
    return Sweeps(chunks, 32 * num_warps, vector, stages, num_warps, rows)


def elementwise_launch(rows: int, outputs: int, with_mean_grad: bool) -> Tiles:
    """The launch of an elementwise loss: the tiles of a row need not meet."""
    elements = ELEMENTS_PER_THREAD // 4  # logit, target, loss and gradient of each
    if outputs <= MAX_TILE_COLUMNS:
        return _tiles(rows, outputs, with_mean_grad, elements)
    return Tiles(1, 16 * 32 * elements, 16, min(rows, RESIDENT_WARPS // 16), TILE_REGISTERS)


class Sums(NamedTuple):
    """The launch that adds up partial column sums: a program takes block_columns of them."""

    block_parts: int
    block_columns: int
    num_warps: int
    programs: int


def column_sums(parts: int, columns: int) -> Sums:
    """Eight columns, one 32-byte sector, a program: many programs and hardly any loop."""
    return Sums(min(power_of_two(parts), 1024), 8, 8 if parts > 128 else 4, cdiv(columns, 8))


def label_parts(rows: int) -> int:
    """Programs (a power of two) that add up the labels' weights, for torch's denominator."""
    return min(power_of_two(cdiv(rows, 4096)), 256)


class Scaling(NamedTuple):
    """The launch that multiplies rows by a factor each: programs x column_programs of them."""

    block_rows: int
    block_columns: int
    programs: int
    column_programs: int


def scaling(rows: int, columns: int) -> Scaling:
    """Blocks of at most 4096 elements; up to 64 programs share a row and loop over its columns."""
    block_columns = min(power_of_two(columns), 4096)
    block_rows = 4096 // block_columns
    return Scaling(
        block_rows, block_columns, cdiv(rows, block_rows), min(cdiv(columns, block_columns), 64)
    )
