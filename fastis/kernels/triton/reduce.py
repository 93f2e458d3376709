"""The small launches around a Triton loss: torch's denominator, sums over rows, the scaling.

Every sum is taken in an order that the launch geometry fixes: partial sums in memory, then one
program (or one per column block) adds them up. No atomics, so the same call gives the same bits.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastis.kernels.triton.math import RAISE, root_of_squares


@triton.jit
def inverse_of(denominator_ptr, inverse_denominator, DENOMINATOR_PARTS: tl.constexpr):
    """1 / denominator: the number given, or from its parts in memory."""
    if DENOMINATOR_PARTS == 0:
        return inverse_denominator
    else:
        parts = tl.load(denominator_ptr + tl.arange(0, DENOMINATOR_PARTS))
        return tl.div_rn(1.0, tl.sum(parts, 0))


@triton.jit
def over_denominator(x, inverse):
    """x / denominator; 0 stays 0 where torch's denominator is that of no rows at all."""
    return tl.where(x == 0, 0.0, x * inverse)


@triton.jit
def store_sums(
    loss_sum,  # [rows of a tile]
    grad_sum,  # [rows of a tile, columns of a tile]
    loss_ptr,  # [programs] partial sums, or [] with SINGLE_BLOCK
    mean_grad_ptr,  # [programs, NUM_COLUMNS] partial sums, [NUM_COLUMNS] with SINGLE_BLOCK, or None
    inverse,
    num_rows,
    NUM_COLUMNS: tl.constexpr,
    REDUCE: tl.constexpr,
    SINGLE_BLOCK: tl.constexpr,
):
    """What a program adds up over its tiles: results where it has all rows, else parts of them."""
    if REDUCE:
        total = tl.sum(loss_sum, 0)
        tl.store(loss_ptr + tl.program_id(0), total * inverse if SINGLE_BLOCK else total)
    if mean_grad_ptr is not None:
        total = tl.sum(grad_sum, 0)
        if SINGLE_BLOCK:
            total = total / num_rows
        columns = tl.arange(0, grad_sum.shape[1])
        row_ptr = mean_grad_ptr + tl.program_id(0).to(tl.int64) * NUM_COLUMNS
        tl.store(row_ptr + columns, total, mask=columns < NUM_COLUMNS)


@triton.jit
def sum_losses(
    loss_parts_ptr,  # [num_parts]
    loss_ptr,  # []
    denominator_ptr,
    inverse_denominator,
    num_parts,
    DENOMINATOR_PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """loss = sum of the parts / denominator, by one program."""
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, num_parts, BLOCK):
        at = start + tl.arange(0, BLOCK)
        total += tl.load(loss_parts_ptr + at, mask=at < num_parts, other=0.0)
    inverse = inverse_of(denominator_ptr, inverse_denominator, DENOMINATOR_PARTS)
    tl.store(loss_ptr, tl.sum(total, 0) * inverse)


@triton.jit(do_not_specialize=["num_rows"])
def denominator_kernel(
    target_ptr,  # [num_rows] int64
    class_weights_ptr,  # [C] or None
    parts_ptr,  # [programs]
    num_rows,
    ignore_index,
    NUM_CLASSES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """torch's denominator: the summed class weights (or number) of the unignored labels.

    Moves 8 bytes a row. Labels that are no class count as class 0, as in the reference.
    """
    total = tl.zeros([BLOCK], tl.float32)
    step = BLOCK * tl.num_programs(0)
    for start in range(BLOCK * tl.program_id(0), num_rows, step):
        rows = start + tl.arange(0, BLOCK)
        label = tl.load(target_ptr + rows, mask=rows < num_rows, other=ignore_index)
        kept = label != ignore_index
        if class_weights_ptr is None:
            total += tl.where(kept, 1.0, 0.0)
        else:
            label = tl.where((label < 0) | (label >= NUM_CLASSES), 0, label)
            total += tl.load(class_weights_ptr + label, mask=kept, other=0.0)
    tl.store(parts_ptr + tl.program_id(0), tl.sum(total, 0))


@triton.jit(do_not_specialize=["num_parts", "num_rows"])
def finish_columns_kernel(
    loss_parts_ptr,  # [num_parts] or None
    loss_ptr,  # [] or None
    denominator_ptr,
    inverse_denominator,
    column_parts_ptr,  # [num_parts, NUM_COLUMNS] or None
    mean_grad_ptr,  # [NUM_COLUMNS] or None
    num_parts,
    num_rows,
    DENOMINATOR_PARTS: tl.constexpr,
    NUM_COLUMNS: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """The last program sums the losses, the others mean_grad = (sum of the parts) / num_rows.

    Moves 4 num_parts NUM_COLUMNS bytes, which the kernel before has just left in the cache.
    """
    if tl.program_id(0) == tl.num_programs(0) - 1:
        if loss_ptr is not None:
            sum_losses(
                loss_parts_ptr, loss_ptr, denominator_ptr, inverse_denominator, num_parts,
                DENOMINATOR_PARTS, 4096,
            )  # fmt: skip
    elif mean_grad_ptr is not None:
        columns = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
        total = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
        for start in range(0, num_parts, BLOCK_P):
            parts = start + tl.arange(0, BLOCK_P)[:, None]
            total += tl.load(
                column_parts_ptr + parts * NUM_COLUMNS + columns,
                mask=(parts < num_parts) & (columns < NUM_COLUMNS),
                other=0.0,
            )
        mean = tl.sum(total, 0) / num_rows
        columns = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
        tl.store(mean_grad_ptr + columns, mean, mask=columns < NUM_COLUMNS)


@triton.jit(do_not_specialize=["num_parts", "tokens"])
def finish_tokens_kernel(
    row_loss_ptr,  # [B, tokens]
    row_norm_ptr,  # [B, tokens]
    weights_ptr,  # [B] or None
    losses_ptr,  # [B]
    score_ptr,  # [B]
    loss_parts_ptr,  # [num_parts], or None: nothing to add up
    loss_ptr,  # [] with parts, else [B], or None where it is there already
    denominator_ptr,
    inverse_denominator,
    num_parts,
    tokens,
    DENOMINATOR_PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A sample's loss is the sum over its tokens, its score the root of the sum of their squares.

    Program b does sample b, the last one the sum of all losses. Moves 8 bytes a token.
    """
    sample = tl.program_id(0).to(tl.int64)
    if loss_parts_ptr is not None and tl.program_id(0) == tl.num_programs(0) - 1:
        sum_losses(
            loss_parts_ptr, loss_ptr, denominator_ptr, inverse_denominator, num_parts,
            DENOMINATOR_PARTS, 4096,
        )  # fmt: skip
    else:
        total = tl.zeros([BLOCK], tl.float32)
        large = tl.zeros([BLOCK], tl.float32)
        raised = tl.zeros([BLOCK], tl.float32)
        for start in range(0, tokens, BLOCK):
            at = start + tl.arange(0, BLOCK)
            total += tl.load(row_loss_ptr + sample * tokens + at, mask=at < tokens, other=0.0)
            norm = tl.load(row_norm_ptr + sample * tokens + at, mask=at < tokens, other=0.0)
            large += norm * norm
            raised += (norm * RAISE) * (norm * RAISE)
        loss = tl.sum(total, 0)
        tl.store(losses_ptr + sample, loss)
        tl.store(score_ptr + sample, root_of_squares(tl.sum(large, 0), tl.sum(raised, 0)))
        if loss_parts_ptr is None and loss_ptr is not None:
            if weights_ptr is not None:
                loss *= tl.load(weights_ptr + sample)
            tl.store(loss_ptr + sample, loss)


@triton.jit
def _scale_block(grad_ptr, out_ptr, at, inside, scale):
    x = tl.load(grad_ptr + at, mask=inside).to(tl.float32) * scale
    tl.store(out_ptr + at, x.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def scale_all_kernel(
    grad_ptr,  # [num_elements]
    out_ptr,  # [num_elements]: grad itself with IN_PLACE
    scale_ptr,  # [] float32
    num_elements,
    IN_PLACE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """out = grad * scale. In place and with scale 1 it moves 4 bytes a program, else one read and
    one write of the gradient. The host never learns the scale."""
    scale = tl.load(scale_ptr)
    if not IN_PLACE or scale != 1:
        first = tl.program_id(0).to(tl.int64) * BLOCK
        step = tl.num_programs(0).to(tl.int64) * BLOCK
        for start in range(first, num_elements, step):
            at = start + tl.arange(0, BLOCK)
            if start + BLOCK <= num_elements:  # its own branch: a mask would split wide accesses
                _scale_block(grad_ptr, out_ptr, at, None, scale)
            else:
                _scale_block(grad_ptr, out_ptr, at, at < num_elements, scale)


@triton.jit(do_not_specialize=["num_rows"])
def scale_rows_kernel(
    grad_ptr,  # [num_rows, num_columns]
    out_ptr,  # [num_rows, num_columns]: grad itself when in place
    scale_ptr,  # [num_rows] float32, scale_stride apart
    num_rows,
    num_columns,
    scale_stride,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """out[i] = grad[i] * scale[i]: one read and one write of the gradient."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    inside = rows < num_rows
    scale = tl.load(scale_ptr + rows * scale_stride, mask=inside, other=0.0)[:, None]
    first = tl.program_id(1).to(tl.int64) * BLOCK_C
    for start in range(first, num_columns, tl.num_programs(1).to(tl.int64) * BLOCK_C):
        columns = start + tl.arange(0, BLOCK_C)[None, :]
        at = rows[:, None] * num_columns + columns
        _scale_block(grad_ptr, out_ptr, at, inside[:, None] & (columns < num_columns), scale)
