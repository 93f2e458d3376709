"""Cross-entropy against soft targets, probabilities or smoothed labels, on the GPU.

    t_j = (1-a) w_y [j = y] + (a/C) w_j,  or  t_j = w_j ((1-a) T_j + a/C)
    loss = -sum t_j log p_j,  g = p sum(t) - t,  |g| from the sum of g_j^2

as in :mod:`fastis.kernels.reference.loss` (the score: Kutsuna 2025, section 7). The largest logit
stays out of every sum, so a confident row loses no digits; the norm is summed from the gradient
itself, because its expanded form cancels. :mod:`fastis.kernels.triton.geometry` assigns rows to
programs; a row is a token.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastis.kernels.triton.cross_entropy import by_lane, clear_row, columns_of, read_label
from fastis.kernels.triton.math import RAISE, exp_full, log1p, root_of_squares
from fastis.kernels.triton.reduce import inverse_of, over_denominator, store_sums


@triton.jit
def _class_weighted(t, class_weights_ptr, columns, inside):
    if class_weights_ptr is not None:
        t *= tl.load(class_weights_ptr + columns, mask=inside, other=0.0)
    return tl.where(inside, t, 0.0)


@triton.jit(do_not_specialize=["num_rows"])
def soft_targets_tiles_kernel(
    logits_ptr,  # [num_rows, NUM_CLASSES], rows stride apart
    target_ptr,  # [num_rows] int64 labels, or [num_rows, NUM_CLASSES] float32 probabilities
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
    keep,  # 1 - a
    spread,  # a / C
    NUM_CLASSES: tl.constexpr,
    ALIGNED: tl.constexpr,
    DENOMINATOR_PARTS: tl.constexpr,
    LABEL_DENOMINATOR: tl.constexpr,
    REDUCE: tl.constexpr,
    SINGLE_BLOCK: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Rows of up to 4096 classes, held in registers.

    Moves the logits and probabilities once, the gradient once when asked for, 16 bytes a row.
    """
    SOFT: tl.constexpr = target_ptr.dtype.element_ty != tl.int64
    columns = tl.arange(0, BLOCK_C)[None, :]
    inverse = inverse_of(denominator_ptr, inverse_denominator, DENOMINATOR_PARTS)
    loss_sum = tl.zeros([BLOCK_R], tl.float32)
    grad_sum = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    for tile in range(tl.program_id(0), tl.cdiv(num_rows, BLOCK_R), tl.num_programs(0)):
        rows = tl.arange(0, BLOCK_R).to(tl.int64) + tile * BLOCK_R
        inside = rows < num_rows
        here = inside[:, None] & (columns < NUM_CLASSES)
        at = rows[:, None] * NUM_CLASSES + columns
        row_ptr = logits_ptr + tl.multiple_of(rows * stride, ALIGNED)
        z = tl.load(row_ptr[:, None] + columns, mask=here, other=float("-inf")).to(tl.float32)
        bad = tl.where(inside, 1.0, 0.0)
        if SOFT:
            kept = inside
            t = tl.load(target_ptr + at, mask=here, other=0.0) * keep + spread
        else:
            label, kept, outside = read_label(target_ptr, rows, inside, ignore_index, NUM_CLASSES)
            t = tl.where(columns == label[:, None], keep, 0.0) + spread
            bad = tl.where(outside, float("nan"), 1.0)
            z = tl.where(kept[:, None], z, 0.0)  # with t = 0: all that an ignored row gives is 0
            if LABEL_DENOMINATOR:
                w = tl.where(kept, 1.0, 0.0)
                if class_weights_ptr is not None:
                    w = tl.load(class_weights_ptr + label, mask=kept, other=0.0)
                inverse = tl.div_rn(1.0, tl.sum(w, 0))
        t = _class_weighted(t, class_weights_ptr, columns, here & kept[:, None])

        highest, top = tl.max(z, 1, return_indices=True)
        is_top = columns == top[:, None]
        x = z - highest[:, None]
        e = exp_full(x)
        # NaN where the largest is not finite, as in torch.
        s = tl.sum(tl.where(is_top, 0.0, e), 1) + (highest - highest)
        t_rest = tl.sum(tl.where(is_top, 0.0, t), 1)
        t_top = tl.sum(tl.where(is_top, t, 0.0), 1)
        cross = tl.sum(tl.where(here, t * -x, 0.0), 1)
        share = 1.0 / (1.0 + s)
        total = t_rest + t_top
        g = e * (total * share)[:, None] - t
        # p_top sum(t) - t_top without the difference of two numbers near 1.
        g = tl.where(is_top, ((t_rest - t_top * s) * share)[:, None], g)
        raised = g * RAISE
        norm = root_of_squares(tl.sum(g * g, 1), tl.sum(raised * raised, 1)) * bad
        loss = (cross + total * log1p(s, share)) * bad
        tl.store(losses_ptr + rows, loss, mask=inside)
        tl.store(score_ptr + rows, norm, mask=inside)

        factor = tl.where(kept, 1.0, 0.0) * bad
        if weights_ptr is not None:
            r = tl.load(weights_ptr + rows // tokens, mask=inside, other=0.0)
            loss *= r
            factor *= r
        if REDUCE:
            loss_sum += tl.where(inside, loss, 0.0)
        elif loss_ptr is not None:
            tl.store(loss_ptr + rows, loss, mask=inside)
        if mean_grad_ptr is not None:
            grad_sum += tl.where(here, g * factor[:, None], 0.0)
        if grad_ptr is not None:
            g *= over_denominator(factor, inverse)[:, None]
            tl.store(grad_ptr + at, g.to(grad_ptr.dtype.element_ty), mask=here)

    store_sums(
        loss_sum, grad_sum, loss_ptr, mean_grad_ptr, inverse, num_rows, NUM_CLASSES, REDUCE,
        SINGLE_BLOCK,
    )  # fmt: skip


@triton.jit
def _lane_sums(x, LANES: tl.constexpr):
    return tl.sum(tl.sum(by_lane(x, LANES), 2), 0)


@triton.jit
def _target_block(
    target_ptr, class_weights_ptr, columns, inside, label, keep, spread, SOFT: tl.constexpr
):  # fmt: skip
    """t of the classes ``columns`` of a row; 0 past its end."""
    if SOFT:
        t = tl.load(target_ptr + columns, mask=inside, other=0.0) * keep + spread
    else:
        t = tl.where(columns == label, keep, 0.0) + spread
    return _class_weighted(t, class_weights_ptr, columns, inside)


@triton.jit
def _find_largest(
    row_ptr, lanes, NUM_CLASSES: tl.constexpr, LANES: tl.constexpr, BLOCK: tl.constexpr
):
    """The largest logit of a row and its first class."""
    highest = tl.full([LANES], float("-inf"), tl.float32)
    block = tl.zeros([LANES], tl.int32)  # where a lane met its largest first
    for start in range(0, NUM_CLASSES, BLOCK):
        inside = lanes < NUM_CLASSES - start
        z = tl.load(row_ptr + start + lanes, mask=inside, other=float("-inf")).to(tl.float32)
        here = tl.max(tl.max(by_lane(z, LANES), 2), 0)
        block = tl.where(here > highest, start, block)
        highest = tl.maximum(highest, here)
    largest = tl.max(highest, 0)
    start = tl.min(tl.where(highest == largest, block, NUM_CLASSES), 0)
    z = tl.load(row_ptr + start + lanes, mask=lanes < NUM_CLASSES - start).to(tl.float32)
    at = tl.where((z == largest) & (lanes < NUM_CLASSES - start), start + lanes, NUM_CLASSES)
    return largest, tl.min(tl.min(at, 1), 0)


@triton.jit
def _sum_row(
    row_ptr, target_ptr, class_weights_ptr, lanes, label, keep, spread, largest, top,
    SOFT: tl.constexpr, NUM_CLASSES: tl.constexpr, LANES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """s and sum t without the largest, and sum t_j (z_top - z_j)."""
    # A label, smoothed, without weights: all classes but two have the same t.
    UNIFORM: tl.constexpr = not SOFT and class_weights_ptr is None
    s = tl.zeros([LANES], tl.float32)
    t_rest = tl.zeros([LANES], tl.float32)
    cross = tl.zeros([LANES], tl.float32)
    for start in range(0, NUM_CLASSES, BLOCK):
        columns = start + lanes
        inside = columns < NUM_CLASSES
        x = tl.load(row_ptr + columns, mask=inside, other=float("-inf")).to(tl.float32) - largest
        t = _target_block(target_ptr, class_weights_ptr, columns, inside, label, keep, spread, SOFT)
        is_top = columns == top
        s += _lane_sums(tl.where(is_top, 0.0, exp_full(x)), LANES)
        if not UNIFORM:
            t_rest += _lane_sums(tl.where(is_top, 0.0, t), LANES)
        cross += _lane_sums(tl.where(inside, t * -x, 0.0), LANES)
    # NaN where the largest is not finite, as in torch.
    s = tl.sum(s, 0) + (largest - largest)
    rest = tl.sum(t_rest, 0)
    if UNIFORM:
        rest = spread * (NUM_CLASSES - 1) + tl.where(label == top, 0.0, keep)
    return s, rest, tl.sum(cross, 0)


@triton.jit
def _grad_row(
    row_ptr, target_ptr, class_weights_ptr, grad_ptr, lanes, label, keep, spread, largest, top,
    p_scale, at_top, factor,
    SOFT: tl.constexpr, NUM_CLASSES: tl.constexpr, LANES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """|g|; writes factor * g unless ``grad_ptr`` is None. From the end of the row backwards."""
    BLOCKS: tl.constexpr = (NUM_CLASSES + BLOCK - 1) // BLOCK
    large = tl.zeros([LANES], tl.float32)
    raised = tl.zeros([LANES], tl.float32)
    for back in range(1, BLOCKS + 1):
        columns = (BLOCKS - back) * BLOCK + lanes
        inside = columns < NUM_CLASSES
        z = tl.load(row_ptr + columns, mask=inside, other=float("-inf")).to(tl.float32)
        t = _target_block(target_ptr, class_weights_ptr, columns, inside, label, keep, spread, SOFT)
        g = exp_full(z - largest) * p_scale - t
        g = tl.where(columns == top, at_top, g)
        g = tl.where(inside, g, 0.0)
        large += _lane_sums(g * g, LANES)
        raised += _lane_sums((g * RAISE) * (g * RAISE), LANES)
        if grad_ptr is not None:
            out = (g * factor).to(grad_ptr.dtype.element_ty)
            tl.store(grad_ptr + columns, out, mask=inside, cache_modifier=".cs")
    return root_of_squares(tl.sum(large, 0), tl.sum(raised, 0))


@triton.jit
def soft_targets_sweeps_kernel(
    logits_ptr,  # [num_rows, NUM_CLASSES], rows stride apart
    target_ptr,  # [num_rows] int64 labels, or [num_rows, NUM_CLASSES] float32 probabilities
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
    keep,  # 1 - a
    spread,  # a / C
    NUM_CLASSES: tl.constexpr,
    ALIGNED: tl.constexpr,
    DENOMINATOR_PARTS: tl.constexpr,
    CHUNKS: tl.constexpr,
    LANES: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """A row of any length by each program, in three sweeps: the largest logit, the sums, the
    gradient and its norm.

    Moves the logits once and, from the caches, twice more (the probabilities once and once more);
    the gradient once when asked for; 20 bytes a row. An ignored row is not read.
    """
    SOFT: tl.constexpr = target_ptr.dtype.element_ty != tl.int64
    BLOCK: tl.constexpr = CHUNKS * LANES * VECTOR
    lanes = columns_of(CHUNKS, LANES, VECTOR)
    inverse = inverse_of(denominator_ptr, inverse_denominator, DENOMINATOR_PARTS)
    row = tl.program_id(0).to(tl.int64)
    bad = 1.0
    if SOFT:
        share_ptr = target_ptr + row * NUM_CLASSES
        label = -1
        kept = row >= 0
    else:
        share_ptr = target_ptr
        label, kept, outside = read_label(target_ptr, row, True, ignore_index, NUM_CLASSES)
        bad = tl.where(outside, float("nan"), 1.0)
    out_ptr = grad_ptr
    if grad_ptr is not None:
        out_ptr = grad_ptr + row * NUM_CLASSES
    r = 1.0
    if weights_ptr is not None:
        r = tl.load(weights_ptr + row // tokens)
    loss, norm = 0.0, 0.0
    if kept:
        row_ptr = logits_ptr + tl.multiple_of(row * stride, ALIGNED)
        largest, top = _find_largest(row_ptr, lanes, NUM_CLASSES, LANES, BLOCK)
        s, t_rest, cross = _sum_row(
            row_ptr, share_ptr, class_weights_ptr, lanes, label, keep, spread, largest, top,
            SOFT, NUM_CLASSES, LANES, BLOCK,
        )  # fmt: skip
        t_top = _target_block(
            share_ptr, class_weights_ptr, top, top < NUM_CLASSES, label, keep, spread, SOFT
        )
        share = 1.0 / (1.0 + s)
        total = t_rest + t_top
        loss = (cross + total * log1p(s, share)) * bad
        norm = bad * _grad_row(
            row_ptr, share_ptr, class_weights_ptr, out_ptr, lanes, label, keep, spread,
            largest, top, total * share, (t_rest - t_top * s) * share,
            over_denominator(r * bad, inverse), SOFT, NUM_CLASSES, LANES, BLOCK,
        )  # fmt: skip
    elif grad_ptr is not None:
        clear_row(out_ptr, NUM_CLASSES, BLOCK)
    tl.store(losses_ptr + row, loss)
    tl.store(score_ptr + row, norm)
    if loss_ptr is not None:
        tl.store(loss_ptr + row, loss * r)
