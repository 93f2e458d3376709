"""Losses that are sums over the outputs of a sample, on the GPU: BCE with logits, squared error.

    bce: loss (1-y) softplus(z) + w y softplus(-z),  g = (1-y) sigmoid(z) - w y sigmoid(-z)
    mse: loss (z-y)^2,  g = 2 (z-y)

A sample's sum over its outputs is divided by ``divisor``, loss and gradient alike; the score is the
norm of that gradient (Kutsuna 2025, section 7). An element's gradient depends on nothing else, so
every row is read once, whatever its length.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastis.kernels.triton.math import RAISE, exp_full, log1p, root_of_squares
from fastis.kernels.triton.reduce import inverse_of, over_denominator, store_sums


@triton.jit
def _binary_cross_entropy(z, y, on):
    """loss and g of an element; ``on`` is pos_weight y."""
    off = 1.0 - y
    x = exp_full(-tl.abs(z))
    inverse = 1.0 / (1.0 + x)
    tail = log1p(x, inverse)
    up = tl.where(z >= 0, inverse, x * inverse)  # sigmoid(z)
    down = tl.where(z >= 0, x * inverse, inverse)  # sigmoid(-z)
    loss = off * (tl.maximum(z, 0.0) + tail) + on * (tl.maximum(-z, 0.0) + tail)
    return loss, off * up - on * down


@triton.jit(do_not_specialize=["num_rows"])
def elementwise_kernel(
    logits_ptr,  # [num_rows, NUM_OUTPUTS]
    target_ptr,  # [num_rows, NUM_OUTPUTS] float32
    weights_ptr,  # [num_rows] coefficients r_i, or None
    pos_weight_ptr,  # [NUM_OUTPUTS] or None
    denominator_ptr,  # [DENOMINATOR_PARTS] or None
    grad_ptr,  # [num_rows, NUM_OUTPUTS] or None
    losses_ptr,  # [num_rows]
    score_ptr,  # [num_rows]
    loss_ptr,  # [programs] partial sums, [] with SINGLE_BLOCK, [num_rows] without REDUCE
    mean_grad_ptr,  # [programs, NUM_OUTPUTS] partial sums, [NUM_OUTPUTS] with SINGLE_BLOCK, or None
    inverse_denominator,
    inverse_divisor,
    num_rows,
    NUM_OUTPUTS: tl.constexpr,
    BINARY: tl.constexpr,
    DENOMINATOR_PARTS: tl.constexpr,
    REDUCE: tl.constexpr,
    SINGLE_BLOCK: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Rows of any length, in tiles; whole rows where the mean gradient is asked for.

    Moves the logits and the float32 target once, the gradient once when asked for, 12 bytes a row.
    """
    columns = tl.arange(0, BLOCK_C)[None, :]
    inverse = inverse_of(denominator_ptr, inverse_denominator, DENOMINATOR_PARTS)
    loss_sum = tl.zeros([BLOCK_R], tl.float32)
    grad_sum = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    for tile in range(tl.program_id(0), tl.cdiv(num_rows, BLOCK_R), tl.num_programs(0)):
        rows = tl.arange(0, BLOCK_R).to(tl.int64) + tile * BLOCK_R
        inside = rows < num_rows
        factor = tl.where(inside, inverse_divisor, 0.0)
        r = tl.where(inside, 1.0, 0.0)
        if weights_ptr is not None:
            r = tl.load(weights_ptr + rows, mask=inside, other=0.0)
        scaled = over_denominator(factor * r, inverse)
        loss = tl.zeros([BLOCK_R], tl.float32)
        large = tl.zeros([BLOCK_R], tl.float32)
        raised = tl.zeros([BLOCK_R], tl.float32)
        for start in range(0, NUM_OUTPUTS, BLOCK_C):
            here = inside[:, None] & (start + columns < NUM_OUTPUTS)
            at = rows[:, None] * NUM_OUTPUTS + (start + columns)
            z = tl.load(logits_ptr + at, mask=here, other=0.0).to(tl.float32)
            y = tl.load(target_ptr + at, mask=here, other=0.0)
            if BINARY:
                on = y
                if pos_weight_ptr is not None:
                    pos = start + columns
                    on *= tl.load(pos_weight_ptr + pos, mask=pos < NUM_OUTPUTS, other=0.0)
                term, g = _binary_cross_entropy(z, y, on)
                term = tl.where(here, term, 0.0)
                g = tl.where(here, g, 0.0)
            else:
                g = 2.0 * (z - y)
                term = (z - y) * (z - y)
            loss += tl.sum(term, 1)
            large += tl.sum(g * g, 1)
            raised += tl.sum((g * RAISE) * (g * RAISE), 1)
            if mean_grad_ptr is not None:
                grad_sum += g * (factor * r)[:, None]
            if grad_ptr is not None:
                g *= scaled[:, None]
                tl.store(grad_ptr + at, g.to(grad_ptr.dtype.element_ty), mask=here)
        loss *= inverse_divisor
        tl.store(losses_ptr + rows, loss, mask=inside)
        tl.store(score_ptr + rows, root_of_squares(large, raised) * inverse_divisor, mask=inside)
        loss = tl.where(inside, loss * r, 0.0)
        if REDUCE:
            loss_sum += loss
        else:
            tl.store(loss_ptr + rows, loss, mask=inside)

    store_sums(
        loss_sum, grad_sum, loss_ptr, mean_grad_ptr, inverse, num_rows, NUM_OUTPUTS, REDUCE,
        SINGLE_BLOCK,
    )  # fmt: skip
