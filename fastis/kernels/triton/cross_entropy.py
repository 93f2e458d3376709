"""Cross-entropy against class labels on the GPU: loss, score and gradient, one read of the logits.

Equations: Kutsuna 2025, section 7; Katharopoulos and Fleuret 2018, eq. 19, in the form of
:mod:`fastis.kernels.reference.loss` that loses no digits: sums over ``j != y`` with the largest of
those logits as reference point, then a closed form for each row
(:func:`fastis.kernels.triton.math.solve_label_row`).

A row is a token: row r belongs to sample r / tokens. :mod:`fastis.kernels.triton.geometry` assigns
rows to programs. An element costs one exponential in a sweep, and 7 to 9 instructions in all: at
4 TB/s a multiprocessor of an H200 has 13 issue slots for each bfloat16 that arrives.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastis.kernels.triton.math import (
    correction,
    exp2_term,
    rounded_product,
    solve_label_row,
    to_float32,
    unit_of,
)
from fastis.kernels.triton.reduce import inverse_of, over_denominator, store_sums


@triton.jit
def read_label(target_ptr, rows, inside, ignore_index, NUM_CLASSES: tl.constexpr):
    """The label (0 where there is none), whether its row counts, whether it is no class at all."""
    label = tl.load(target_ptr + rows, mask=inside, other=ignore_index)
    kept = label != ignore_index
    outside = kept & ((label < 0) | (label >= NUM_CLASSES))
    return tl.where(kept & (outside == 0), label, 0).to(tl.int32), kept, outside


@triton.jit
def _is_label(label, columns):
    """[rows, columns] of a tile. The columns of a row that has a warp to itself, which differ by
    constants in a thread, are compared with these: otherwise each of them takes a register."""
    BLOCK_C: tl.constexpr = columns.shape[1]
    if label.shape[0] == 1 and BLOCK_C >= 256:
        lane = tl.arange(0, 32)[None, :, None] * 8
        apart = tl.arange(0, BLOCK_C // 256)[:, None, None] * 256 + tl.arange(0, 8)[None, None, :]
        found = apart == label[:, None, None] - lane
        return tl.reshape(found, [1, BLOCK_C])
    else:
        return columns == label[:, None]


@triton.jit(do_not_specialize=["num_rows"])
def label_tiles_kernel(
    logits_ptr,  # [num_rows, NUM_CLASSES], rows stride apart
    target_ptr,  # [num_rows] int64
    weights_ptr,  # [num_rows / tokens] coefficients r_i, or None
    class_weights_ptr,  # [NUM_CLASSES] or None
    denominator_ptr,  # [DENOMINATOR_PARTS] or None
    grad_ptr,  # [num_rows, NUM_CLASSES] or None
    losses_ptr,  # [num_rows], of the rows
    score_ptr,  # [num_rows]
    loss_ptr,  # [programs] partial sums, [] with SINGLE_BLOCK, [num_rows] without REDUCE or None
    mean_grad_ptr,  # [programs, NUM_CLASSES] partial sums, [NUM_CLASSES] with SINGLE_BLOCK, or None
    inverse_denominator,
    num_rows,
    tokens,
    stride,
    ignore_index,
    NUM_CLASSES: tl.constexpr,
    ALIGNED: tl.constexpr,
    DENOMINATOR_PARTS: tl.constexpr,
    LABEL_DENOMINATOR: tl.constexpr,
    REDUCE: tl.constexpr,
    SINGLE_BLOCK: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Rows of up to 4096 classes, each held in registers from its one read to its gradient.

    Moves the logits once, the gradient once when it is asked for, and 16 bytes a row. With
    SINGLE_BLOCK one program has all rows and finishes loss and mean gradient by itself, with
    torch's denominator.
    """
    columns = tl.arange(0, BLOCK_C)[None, :]
    inverse = inverse_of(denominator_ptr, inverse_denominator, DENOMINATOR_PARTS)
    loss_sum = tl.zeros([BLOCK_R], tl.float32)
    grad_sum = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    for tile in range(tl.program_id(0), tl.cdiv(num_rows, BLOCK_R), tl.num_programs(0)):
        rows = tl.arange(0, BLOCK_R).to(tl.int64) + tile * BLOCK_R
        inside = rows < num_rows
        here = inside[:, None] & (columns < NUM_CLASSES)
        row_ptr = logits_ptr + tl.multiple_of(rows * stride, ALIGNED)
        # Not masked by the label: this load would wait for that one.
        z = to_float32(tl.load(row_ptr[:, None] + columns, mask=here, other=float("-inf")))
        label, kept, outside = read_label(target_ptr, rows, inside, ignore_index, NUM_CLASSES)
        z_y = tl.load(row_ptr + label, mask=kept, other=0.0).to(tl.float32)
        w = tl.where(kept, 1.0, 0.0)
        if class_weights_ptr is not None:
            w = tl.load(class_weights_ptr + label, mask=kept, other=0.0)
        if LABEL_DENOMINATOR:
            inverse = tl.div_rn(1.0, tl.sum(w, 0))

        is_label = _is_label(label, columns)
        others = tl.where(is_label, float("-inf"), z)
        m = tl.max(others, 1)
        m = tl.where(m == float("-inf"), z_y, m)
        unit = unit_of(m)
        top = rounded_product(m, unit)
        e = exp2_term(others, unit[:, None], top[:, None])
        s = tl.sum(e, 1)
        back = correction(m, unit, top)
        loss, norm, factor = solve_label_row(z_y, m, s * back, tl.sum(e * e, 1) * (back * back))
        # (An ignored row gives 0, whatever is in it.)
        w *= tl.where(outside, float("nan"), 1.0)
        loss = tl.where(kept, loss * w, 0.0)
        norm = tl.where(kept, norm * tl.abs(w), 0.0)
        factor = tl.where(kept, factor * back * w, 0.0)
        tl.store(losses_ptr + rows, loss, mask=inside)
        tl.store(score_ptr + rows, norm, mask=inside)
        if weights_ptr is not None:
            r = tl.load(weights_ptr + rows // tokens, mask=inside, other=0.0)
            loss *= r
            factor *= r
        if REDUCE:
            loss_sum += loss
        elif loss_ptr is not None:
            tl.store(loss_ptr + rows, loss, mask=inside)
        e = tl.where(kept[:, None], tl.where(is_label, -s[:, None], e), 0.0)
        if mean_grad_ptr is not None:
            grad_sum += e * factor[:, None]
        if grad_ptr is not None:
            factor = over_denominator(factor, inverse)
            g = e * factor[:, None]
            at = rows[:, None] * NUM_CLASSES + columns
            tl.store(grad_ptr + at, g.to(grad_ptr.dtype.element_ty), mask=here)

    store_sums(
        loss_sum, grad_sum, loss_ptr, mean_grad_ptr, inverse, num_rows, NUM_CLASSES, REDUCE,
        SINGLE_BLOCK,
    )  # fmt: skip


@triton.jit
def columns_of(CHUNKS: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr):
    """Columns of a block as [CHUNKS, LANES * VECTOR]."""
    return tl.arange(0, CHUNKS)[:, None] * (LANES * VECTOR) + tl.arange(0, LANES * VECTOR)[None, :]


@triton.jit
def by_lane(x, LANES: tl.constexpr):
    """A block as [CHUNKS, LANES, VECTOR]: one lane a thread, so that sums over chunks and vectors
    stay in it.

    A block that is loaded in three dimensions is spread otherwise by Triton 3.6, which then has to
    shuffle. In two every release gives a thread VECTOR neighbours, and the new shape moves nothing.
    """
    return tl.reshape(x, [x.shape[0], LANES, x.shape[1] // LANES])


@triton.jit
def edges_of(head, length, NUM_CLASSES: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr):
    """Columns before and behind the aligned body of a row, relative to it, and which there are."""
    WIDTH: tl.constexpr = LANES if LANES > 2 * VECTOR else 2 * VECTOR
    lane = tl.arange(0, WIDTH)[None, :]
    before = lane < VECTOR
    columns = tl.where(before, lane - head, length + lane - VECTOR)
    return columns, tl.where(before, columns < 0, columns < NUM_CLASSES - head)


@triton.jit
def _add_block(z, m, unit, s, q, LANES: tl.constexpr):
    """m, unit and the sums [LANES] of :func:`_sum_row` after one more block."""
    z = by_lane(z, LANES)
    highest = tl.maximum(m, tl.max(tl.max(z, 2), 0))
    new_unit = unit_of(highest)
    # A lane that has seen nothing but -inf: -inf - -inf would be NaN.
    top = tl.where(highest == float("-inf"), 0.0, rounded_product(highest, new_unit))
    e = exp2_term(z, new_unit[None, :, None], top[None, :, None])
    k = _rescaling(m, unit, new_unit, top)
    s = s * k + tl.sum(tl.sum(e, 2), 0)
    q = q * (k * k) + tl.sum(tl.sum(e * e, 2), 0)
    return highest, new_unit, s, q


@triton.jit
def _rescaling(m, unit, new_unit, new_top):
    """What turns sums relative to 2^top of m into such relative to ``new_top``, which is higher."""
    k = tl.exp2(rounded_product(m, unit) - new_top)
    return tl.where(unit == new_unit, k, 0.0)


@triton.jit
def _sum_row(
    body_ptr, head, length, label, z_y,
    NUM_CLASSES: tl.constexpr, EDGES: tl.constexpr, CHUNKS: tl.constexpr, LANES: tl.constexpr,
    VECTOR: tl.constexpr, STAGES: tl.constexpr, EVICT: tl.constexpr,
):  # fmt: skip
    """The first sweep: the largest logit m over ``j != label``, and s and q relative to exp(m).

    The block with the label comes after the others, which are spared the comparison with it.
    """
    BLOCK: tl.constexpr = CHUNKS * LANES * VECTOR
    columns = columns_of(CHUNKS, LANES, VECTOR)
    full = length // BLOCK * BLOCK
    own = tl.minimum(tl.maximum(label, 0) // BLOCK, tl.maximum(full // BLOCK - 1, 0)) * BLOCK
    m = tl.full([LANES], float("-inf"), tl.float32)
    unit = unit_of(m)
    s = tl.zeros([LANES], tl.float32)
    q = s
    for start in tl.range(0, full - BLOCK, BLOCK, num_stages=STAGES):
        at = start + tl.where(start < own, 0, BLOCK) + columns
        z = to_float32(tl.load(body_ptr + at, eviction_policy=EVICT))
        m, unit, s, q = _add_block(z, m, unit, s, q, LANES)
    for last in tl.static_range(2):
        start = own if last == 0 else full
        inside = columns < (full if last == 0 else length) - start
        z = tl.load(
            body_ptr + start + columns, mask=inside, other=float("-inf"), eviction_policy=EVICT
        )
        z = tl.where(columns == label - start, float("-inf"), to_float32(z))
        m, unit, s, q = _add_block(z, m, unit, s, q, LANES)
    if EDGES:
        at, inside = edges_of(head, length, NUM_CLASSES, LANES, VECTOR)
        z = tl.load(body_ptr + at, mask=inside & (at != label), other=float("-inf"))
        m, unit, s, q = _add_block(z.to(tl.float32), m, unit, s, q, LANES)
    highest = tl.max(m, 0)
    highest = tl.where(highest == float("-inf"), z_y, highest)
    row_unit = unit_of(highest)
    top = rounded_product(highest, row_unit)
    k = _rescaling(m, unit, row_unit, top) * correction(highest, row_unit, top)
    return highest, tl.sum(s * k, 0), tl.sum(q * (k * k), 0)


@triton.jit
def _grad_block(body_ptr, out_ptr, columns, inside, unit, top, factor):
    z = tl.load(body_ptr + columns, mask=inside, eviction_policy="evict_first")
    g = exp2_term(to_float32(z), unit, top) * factor
    tl.store(out_ptr + columns, g.to(out_ptr.dtype.element_ty), mask=inside, cache_modifier=".cs")


@triton.jit
def _grad_row(
    body_ptr, out_ptr, head, length, m, factor,
    NUM_CLASSES: tl.constexpr, EDGES: tl.constexpr, CHUNKS: tl.constexpr, LANES: tl.constexpr,
    VECTOR: tl.constexpr,
):  # fmt: skip
    """The second sweep, from the end of the row, which was read last, to its beginning.

    The label's element is written like the others, and then once more by the caller.
    """
    BLOCK: tl.constexpr = CHUNKS * LANES * VECTOR
    # As wide as a store: nothing is added up here, and float16 logits have a wider gradient.
    WIDTH: tl.constexpr = min(VECTOR, 128 // out_ptr.dtype.element_ty.primitive_bitwidth)
    columns = columns_of(BLOCK // WIDTH, 1, WIDTH)
    full = length // BLOCK * BLOCK
    unit = unit_of(m)
    top = rounded_product(m, unit)
    factor *= correction(m, unit, top)
    if EDGES:
        at, inside = edges_of(head, length, NUM_CLASSES, LANES, VECTOR)
        _grad_block(body_ptr, out_ptr, at, inside, unit, top, factor)
    inside = columns < length - full
    _grad_block(body_ptr + full, out_ptr + full, columns, inside, unit, top, factor)
    for back in range(BLOCK, full + BLOCK, BLOCK):
        start = full - back
        _grad_block(body_ptr + start, out_ptr + start, columns, None, unit, top, factor)


@triton.jit
def clear_row(out_ptr, NUM_CLASSES: tl.constexpr, BLOCK: tl.constexpr):
    columns = tl.arange(0, BLOCK)
    zero = tl.zeros([BLOCK], out_ptr.dtype.element_ty)
    for start in range(0, NUM_CLASSES, BLOCK):
        tl.store(out_ptr + start + columns, zero, mask=columns < NUM_CLASSES - start)


@triton.jit
def label_sweeps_kernel(
    logits_ptr,  # [num_rows, NUM_CLASSES], rows stride apart
    target_ptr,  # [num_rows] int64
    weights_ptr,  # [num_rows / tokens] coefficients r_i, or None
    class_weights_ptr,  # [NUM_CLASSES] or None
    denominator_ptr,  # [DENOMINATOR_PARTS] or None
    grad_ptr,  # [num_rows, NUM_CLASSES] or None
    losses_ptr,  # [num_rows], of the rows
    score_ptr,  # [num_rows]
    loss_ptr,  # [num_rows], r_i loss_i, or None
    inverse_denominator,
    tokens,
    stride,
    ignore_index,
    NUM_CLASSES: tl.constexpr,
    ALIGNED: tl.constexpr,
    DENOMINATOR_PARTS: tl.constexpr,
    CHUNKS: tl.constexpr,
    LANES: tl.constexpr,
    VECTOR: tl.constexpr,
    STAGES: tl.constexpr,
):
    """A row of any length by each program. Moves the logits once and 20 bytes a row; with the
    gradient the logits are read again, from the caches, and the gradient is written once. An
    ignored row is not read at all.

    Every thread keeps a running maximum of its own, so no loop has a shuffle. A row that does not
    begin where VECTOR elements are read at once has a body that does, and edges of a few elements.
    """
    BLOCK: tl.constexpr = CHUNKS * LANES * VECTOR
    EDGES: tl.constexpr = ALIGNED < VECTOR or NUM_CLASSES % VECTOR != 0
    OUT_ALIGNED: tl.constexpr = VECTOR if ALIGNED < VECTOR or NUM_CLASSES % VECTOR == 0 else 1
    # Read once, a row should leave the caches first; read twice, it should stay.
    EVICT: tl.constexpr = "evict_first" if grad_ptr is None else "evict_last"
    inverse = inverse_of(denominator_ptr, inverse_denominator, DENOMINATOR_PARTS)
    row = tl.program_id(0).to(tl.int64)
    label, kept, outside = read_label(target_ptr, row, True, ignore_index, NUM_CLASSES)
    loss, norm = 0.0, 0.0
    w = tl.where(outside, float("nan"), 1.0)
    r = 1.0
    if weights_ptr is not None:
        r = tl.load(weights_ptr + row // tokens)
    if kept:
        row_ptr = logits_ptr + row * stride
        head = 0
        if ALIGNED < VECTOR:
            head = tl.minimum((-(row * stride) & (VECTOR - 1)).to(tl.int32), NUM_CLASSES)
        length = (NUM_CLASSES - head) // VECTOR * VECTOR
        body_ptr = logits_ptr + tl.multiple_of(row * stride + head, VECTOR)
        z_y = tl.load(row_ptr + label).to(tl.float32)
        m, s, q = _sum_row(
            body_ptr, head, length, label - head, z_y, NUM_CLASSES, EDGES, CHUNKS, LANES, VECTOR,
            STAGES, EVICT,
        )  # fmt: skip
        loss, norm, factor = solve_label_row(z_y, m, s, q)
        if class_weights_ptr is not None:
            w *= tl.load(class_weights_ptr + label)
        loss *= w
        norm *= tl.abs(w)
        if grad_ptr is not None:
            factor = over_denominator(factor * w * r, inverse)
            out_ptr = grad_ptr + row * NUM_CLASSES
            body_out_ptr = grad_ptr + tl.multiple_of(row * NUM_CLASSES + head, OUT_ALIGNED)
            _grad_row(
                body_ptr, body_out_ptr, head, length, m, factor, NUM_CLASSES, EDGES, CHUNKS, LANES,
                VECTOR,
            )  # fmt: skip
            tl.debug_barrier()  # The thread that wrote the label's element is any of the program's.
            tl.store(out_ptr + label, (-s * factor).to(grad_ptr.dtype.element_ty))
    elif grad_ptr is not None:
        clear_row(grad_ptr + row * NUM_CLASSES, NUM_CLASSES, BLOCK)
    tl.store(losses_ptr + row, loss)
    tl.store(score_ptr + row, norm)
    if loss_ptr is not None:
        tl.store(loss_ptr + row, loss * r)
