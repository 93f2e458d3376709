"""Cross-entropy against class labels on the GPU: loss, score and gradient, one read of the logits.

Equations: Kutsuna 2025, section 7; Katharopoulos and Fleuret 2018, eq. 19, in the form of
:mod:`fastis.kernels.reference_loss` that loses no digits: sums over ``j != y`` with the largest of
those logits as reference point, then a closed form a row (:func:`triton_math.solve_label_row`).

A row is a token: row r belongs to sample r / tokens. :mod:`fastis.kernels.triton_geometry` says who
takes which rows. An element costs one exponential in a sweep, and 7 to 9 instructions in all: at
4 TB/s a multiprocessor of an H200 has 13 issue slots for each bfloat16 that arrives.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastis.kernels.triton_math import exp_term, solve_label_row
from fastis.kernels.triton_reduce import inverse_of, over_denominator


@triton.jit
def read_label(target_ptr, rows, inside, ignore_index, NUM_CLASSES: tl.constexpr):
    """The label (0 where there is none), whether its row counts, whether it is no class at all."""
    label = tl.load(target_ptr + rows, mask=inside, other=ignore_index)
    kept = label != ignore_index
    outside = kept & ((label < 0) | (label >= NUM_CLASSES))
    return tl.where(kept & (outside == 0), label, 0).to(tl.int32), kept, outside


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
    loss_ptr,  # [programs] partial sums ([] when WHOLE); without REDUCE [num_rows] or None
    mean_grad_ptr,  # [programs, NUM_CLASSES] partial sums ([NUM_CLASSES] when WHOLE), or None
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
    WHOLE: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Rows of up to 4096 classes, each held in registers from its one read to its gradient.

    Moves the logits once, the gradient once when it is asked for, and 16 bytes a row. WHOLE: one
    program has all rows and finishes loss and mean gradient by itself, with torch's denominator.
    """
    columns = tl.arange(0, BLOCK_C)[None, :]
    inverse = inverse_of(denominator_ptr, inverse_denominator, DENOMINATOR_PARTS)
    loss_sum = tl.zeros([BLOCK_R], tl.float32)
    if mean_grad_ptr is not None:
        grad_sum = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    for tile in range(tl.program_id(0), tl.cdiv(num_rows, BLOCK_R), tl.num_programs(0)):
        rows = tl.arange(0, BLOCK_R).to(tl.int64) + tile * BLOCK_R
        inside = rows < num_rows
        here = inside[:, None] & (columns < NUM_CLASSES)
        row_ptr = logits_ptr + tl.multiple_of(rows * stride, ALIGNED)
        # Not masked by the label: this load would wait for that one.
        z = tl.load(row_ptr[:, None] + columns, mask=here, other=float("-inf")).to(tl.float32)
        label, kept, outside = read_label(target_ptr, rows, inside, ignore_index, NUM_CLASSES)
        z_y = tl.load(row_ptr + label, mask=kept, other=0.0).to(tl.float32)
        w = tl.where(kept, 1.0, 0.0)
        if class_weights_ptr is not None:
            w = tl.load(class_weights_ptr + label, mask=kept, other=0.0)
        if LABEL_DENOMINATOR:
            inverse = tl.div_rn(1.0, tl.sum(w, 0))

        # An ignored row has no class but a label at 0, and weight 0: all it gives is 0.
        is_label = columns == label[:, None]
        others = tl.where(is_label | (kept[:, None] == 0), float("-inf"), z)
        m = tl.max(others, 1)
        m = tl.where(m == float("-inf"), z_y, m)
        e = exp_term(others - m[:, None])
        s = tl.sum(e, 1)
        loss, norm, factor = solve_label_row(z_y, m, s, tl.sum(e * e, 1))
        bad = tl.where(outside, float("nan"), 1.0)
        loss *= w * bad
        factor *= w * bad
        tl.store(losses_ptr + rows, loss, mask=inside)
        tl.store(score_ptr + rows, norm * tl.abs(w) * bad, mask=inside)
        if weights_ptr is not None:
            r = tl.load(weights_ptr + rows // tokens, mask=inside, other=0.0)
            loss *= r
            factor *= r
        if REDUCE:
            loss_sum += loss
        elif loss_ptr is not None:
            tl.store(loss_ptr + rows, loss, mask=inside)
        if mean_grad_ptr is not None:
            grad_sum += tl.where(is_label, -s[:, None], e) * factor[:, None]
        if grad_ptr is not None:
            factor = over_denominator(factor, inverse)
            g = tl.where(is_label, -s[:, None], e) * factor[:, None]
            at = rows[:, None] * NUM_CLASSES + columns
            tl.store(grad_ptr + at, g.to(grad_ptr.dtype.element_ty), mask=here)

    if REDUCE:
        total = tl.sum(loss_sum, 0)
        tl.store(loss_ptr + tl.program_id(0), total * inverse if WHOLE else total)
    if mean_grad_ptr is not None:
        total = tl.sum(grad_sum, 0)
        columns = tl.arange(0, BLOCK_C)
        if WHOLE:
            total = total / num_rows
        tl.store(
            mean_grad_ptr + tl.program_id(0).to(tl.int64) * NUM_CLASSES + columns,
            total,
            mask=columns < NUM_CLASSES,
        )


@triton.jit
def lanes_of(CHUNKS: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr):
    """Columns of a block as [CHUNKS, LANES, VECTOR]: one lane a thread, so that reductions over
    chunks and vectors stay in it."""
    chunk = tl.arange(0, CHUNKS)[:, None, None] * (LANES * VECTOR)
    lane = tl.arange(0, LANES)[None, :, None] * VECTOR
    return chunk + lane + tl.arange(0, VECTOR)[None, None, :]


@triton.jit
def _without_label(z, columns, label, BLOCK: tl.constexpr):
    """The block with -inf at the label, given relative to the block; most blocks don't hold it."""
    if (label >= 0) & (label < BLOCK):
        z = tl.where(columns == label, float("-inf"), z)
    return z


@triton.jit
def _add_block(z, m, s, q):
    """Running maximum and sums [LANES] after one more block [CHUNKS, LANES, VECTOR]."""
    highest = tl.maximum(m, tl.max(tl.max(z, 2), 0))
    # A lane that has seen nothing but -inf: -inf - -inf would be NaN.
    base = tl.where(highest == float("-inf"), 0.0, highest)
    e = exp_term(z - base[None, :, None])
    k = exp_term(m - base)
    s = s * k + tl.sum(tl.sum(e, 2), 0)
    q = q * (k * k) + tl.sum(tl.sum(e * e, 2), 0)
    return highest, s, q


@triton.jit
def _sum_row(
    row_ptr, columns, label, z_y,
    NUM_CLASSES: tl.constexpr, LANES: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
    EVICT: tl.constexpr,
):  # fmt: skip
    """The first sweep: the largest logit m, s and q over ``j != label`` of one row."""
    FULL: tl.constexpr = NUM_CLASSES // BLOCK * BLOCK
    m = tl.full([LANES], float("-inf"), tl.float32)
    s = tl.zeros([LANES], tl.float32)
    q = tl.zeros([LANES], tl.float32)
    for start in tl.range(0, FULL, BLOCK, num_stages=STAGES):
        z = tl.load(row_ptr + start + columns, eviction_policy=EVICT).to(tl.float32)
        m, s, q = _add_block(_without_label(z, columns, label - start, BLOCK), m, s, q)
    if FULL < NUM_CLASSES:
        z = tl.load(
            row_ptr + FULL + columns,
            mask=columns < NUM_CLASSES - FULL,
            other=float("-inf"),
            eviction_policy=EVICT,
        ).to(tl.float32)
        m, s, q = _add_block(_without_label(z, columns, label - FULL, BLOCK), m, s, q)
    highest = tl.max(m, 0)
    highest = tl.where(highest == float("-inf"), z_y, highest)
    k = exp_term(tl.where(m == float("-inf"), m, m - highest))
    return highest, tl.sum(s * k, 0), tl.sum(q * (k * k), 0)


@triton.jit
def _grad_block(row_ptr, out_ptr, columns, inside, m, factor, label, at_label, BLOCK: tl.constexpr):
    z = tl.load(row_ptr + columns, mask=inside, eviction_policy="evict_first").to(tl.float32)
    g = exp_term(z - m) * factor
    if (label >= 0) & (label < BLOCK):
        g = tl.where(columns == label, at_label, g)
    tl.store(out_ptr + columns, g.to(out_ptr.dtype.element_ty), mask=inside, cache_modifier=".cs")


@triton.jit
def _grad_row(
    row_ptr, out_ptr, columns, label, m, s, factor,
    NUM_CLASSES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The second sweep, from the end of the row, which was read last, to its beginning."""
    FULL: tl.constexpr = NUM_CLASSES // BLOCK * BLOCK
    at_label = -s * factor
    if FULL < NUM_CLASSES:
        _grad_block(
            row_ptr + FULL, out_ptr + FULL, columns, columns < NUM_CLASSES - FULL, m, factor,
            label - FULL, at_label, BLOCK,
        )  # fmt: skip
    for back in range(BLOCK, FULL + BLOCK, BLOCK):
        start = FULL - back
        _grad_block(
            row_ptr + start, out_ptr + start, columns, None, m, factor, label - start, at_label,
            BLOCK,
        )  # fmt: skip


@triton.jit
def clear_row(out_ptr, columns, NUM_CLASSES: tl.constexpr, BLOCK: tl.constexpr):
    zero = (columns * 0).to(out_ptr.dtype.element_ty)
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

    Every thread keeps a running maximum of its own, so the loop has no barrier and no shuffle.
    """
    BLOCK: tl.constexpr = CHUNKS * LANES * VECTOR
    # Read once, a row should leave the caches first; read twice, it should stay.
    EVICT: tl.constexpr = "evict_first" if grad_ptr is None else "evict_last"
    columns = lanes_of(CHUNKS, LANES, VECTOR)
    inverse = inverse_of(denominator_ptr, inverse_denominator, DENOMINATOR_PARTS)
    row = tl.program_id(0).to(tl.int64)
    label, kept, outside = read_label(target_ptr, row, True, ignore_index, NUM_CLASSES)
    loss, norm = 0.0, 0.0
    w = tl.where(outside, float("nan"), 1.0)
    r = 1.0
    if weights_ptr is not None:
        r = tl.load(weights_ptr + row // tokens)
    if kept:
        row_ptr = logits_ptr + tl.multiple_of(row * stride, ALIGNED)
        z_y = tl.load(row_ptr + label).to(tl.float32)
        m, s, q = _sum_row(row_ptr, columns, label, z_y, NUM_CLASSES, LANES, BLOCK, STAGES, EVICT)
        loss, norm, factor = solve_label_row(z_y, m, s, q)
        if class_weights_ptr is not None:
            w *= tl.load(class_weights_ptr + label)
        loss *= w
        norm *= tl.abs(w)
        if grad_ptr is not None:
            factor = over_denominator(factor * w * r, inverse)
            out_ptr = grad_ptr + row * NUM_CLASSES
            _grad_row(row_ptr, out_ptr, columns, label, m, s, factor, NUM_CLASSES, BLOCK)
    elif grad_ptr is not None:
        clear_row(grad_ptr + row * NUM_CLASSES, columns, NUM_CLASSES, BLOCK)
    tl.store(losses_ptr + row, loss)
    tl.store(score_ptr + row, norm)
    if loss_ptr is not None:
        tl.store(loss_ptr + row, loss * r)
