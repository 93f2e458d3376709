"""The loss column in Triton: allocates the outputs and launches the kernels.

The contract: :mod:`fastis.kernels.loss`, from float32, bfloat16 and float16 logits, in float32
arithmetic. Float64 logits and empty batches go to the reference. Nothing here waits for the device,
and equal calls give equal bits: partial sums in memory and fixed orders of addition, no atomics.

A call takes one to three launches: torch's denominator where it must be summed from the labels, the
rows, and the sums over rows; a small batch takes a single one.

Runs on CUDA tensors and, under ``TRITON_INTERPRET=1``, on CPU tensors: that is how it is tested
where there is no GPU.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch
from torch import Tensor

from fastis import kernels
from fastis.kernels.cuda import scale as cuda_scale
from fastis.kernels.formats import grad_dtype
from fastis.kernels.loss import (
    CrossEntropyOptions,
    Denominator,
    ElementwiseOptions,
    Scored,
    Wanted,
    scaled,
)
from fastis.kernels.reference import loss as reference_loss
from fastis.kernels.triton.cross_entropy import label_sweeps_kernel, label_tiles_kernel
from fastis.kernels.triton.elementwise import elementwise_kernel
from fastis.kernels.triton.geometry import (
    SWEEP_REGISTERS,
    Sweeps,
    Tiles,
    access_width,
    alignment,
    cdiv,
    column_sums,
    elementwise_launch,
    is_single_block,
    label_parts,
    power_of_two,
    row_launch,
    scaling,
)
from fastis.kernels.triton.launch import launch as _launch
from fastis.kernels.triton.reduce import (
    denominator_kernel,
    finish_columns_kernel,
    finish_tokens_kernel,
    scale_all_kernel,
    scale_rows_kernel,
)
from fastis.kernels.triton.soft_targets import soft_targets_sweeps_kernel, soft_targets_tiles_kernel

# torch 2.6 and newer tell a backward pass whether its graph outlives it.
_keeps_graph = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", lambda: True)
_functorch_active = torch._C._are_functorch_transforms_active
_dispatch_modes = torch._C._len_torch_dispatch_stack
_is_compiling = torch.compiler.is_compiling
_SCALE_BLOCK = 4096
_SCALE_PROGRAMS = 1024


class _Outputs(NamedTuple):
    """The results of a call, and where its rows write: the results themselves or parts of sums."""

    loss: Tensor
    losses: Tensor
    score: Tensor
    mean_grad: Tensor | None
    grad: Tensor | None
    row_loss: Tensor | None
    row_losses: Tensor
    row_score: Tensor
    row_mean_grad: Tensor | None

    @property
    def scored(self) -> Scored:
        return self.loss, self.losses, self.score, self.mean_grad, self.grad


class _Denominator(NamedTuple):
    """A number's inverse, or ``[num_parts]`` parts on the device whose sum is the denominator."""

    parts: Tensor | None
    inverse: float
    num_parts: int


def cross_entropy(
    logits: Tensor,
    target: Tensor,
    weights: Tensor | None,
    options: CrossEntropyOptions,
    wanted: Wanted,
) -> Scored:
    """Rows of unit column stride are read where they lie; other strides are copied first."""
    if not _serves(logits):
        return reference_loss.cross_entropy(logits, target, weights, options, wanted)
    class_weights, ignore_index, label_smoothing = options
    num_classes = logits.shape[-1]
    flat = logits if logits.dim() == 2 else logits.detach().reshape(-1, num_classes)
    if num_classes > 1 and flat.stride(1) != 1:
        flat = flat.contiguous()
    target = target.contiguous()
    labels = target.dtype == torch.int64
    by_label = labels and label_smoothing == 0
    rows, stride = flat.shape[0], flat.stride(0)
    aligned, plan = _row_plan(flat, by_label, wanted)
    single_block = is_single_block(rows, num_classes)
    out = _outputs(logits, rows, plan.programs, single_block, wanted)
    label_denominator = labels and wanted.reduce and wanted.denominator is None
    if label_denominator and not single_block:
        below = _label_denominator(target, class_weights, ignore_index, num_classes)
    else:
        number = float(rows) if wanted.denominator is None else wanted.denominator
        below = _known_denominator(number, wanted.reduce)
    tokens = rows // logits.shape[0]
    arguments = [
        flat, target, weights, class_weights, below.parts, out.grad, out.row_losses, out.row_score,
        out.row_loss,
    ]  # fmt: skip
    scalars: list[int | float] = [tokens, stride, ignore_index]
    if not by_label:
        scalars += [1.0 - label_smoothing, label_smoothing / num_classes]
    constants = {
        "NUM_CLASSES": num_classes,
        "ALIGNED": aligned,
        "DENOMINATOR_PARTS": below.num_parts,
    }
    if isinstance(plan, Tiles):
        _launch(
            label_tiles_kernel if by_label else soft_targets_tiles_kernel,
            (plan.programs,), plan.num_warps,
            *arguments, out.row_mean_grad, below.inverse, rows, *scalars, **constants,
            LABEL_DENOMINATOR=label_denominator and single_block, REDUCE=wanted.reduce,
            SINGLE_BLOCK=single_block, BLOCK_R=plan.block_rows, BLOCK_C=plan.block_columns,
            maxnreg=plan.max_registers,
        )  # fmt: skip
    else:
        if by_label:
            constants |= {"STAGES": plan.stages, "maxnreg": SWEEP_REGISTERS}
        _launch(
            label_sweeps_kernel if by_label else soft_targets_sweeps_kernel,
            (plan.programs,), plan.num_warps,
            *arguments, below.inverse, *scalars, **constants,
            CHUNKS=plan.chunks, LANES=plan.lanes, VECTOR=plan.vector,
        )  # fmt: skip
    if logits.dim() == 3:
        in_parts = wanted.reduce and not single_block
        _finish_tokens(out, weights, below, plan.programs, tokens, in_parts)
    elif not single_block:
        _finish_columns(out, below, plan.programs, rows, wanted.reduce)
    return out.scored


def binary_cross_entropy_with_logits(
    logits: Tensor,
    target: Tensor,
    weights: Tensor | None,
    options: ElementwiseOptions,
    wanted: Wanted,
) -> Scored:
    """Strides other than contiguous ones are copied first."""
    if not _serves(logits):
        return reference_loss.binary_cross_entropy_with_logits(
            logits, target, weights, options, wanted
        )
    return _elementwise(True, logits, target, weights, options, wanted)


def mse_loss(
    prediction: Tensor,
    target: Tensor,
    weights: Tensor | None,
    options: ElementwiseOptions,
    wanted: Wanted,
) -> Scored:
    """Strides other than contiguous ones are copied first."""
    if not _serves(prediction):
        return reference_loss.mse_loss(prediction, target, weights, options, wanted)
    return _elementwise(False, prediction, target, weights, options, wanted)


def scale_grad(grad: Tensor, grad_output: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """``grad`` times ``grad_output``, in place when nobody will read ``grad`` again.

    The host does not know whether ``grad_output`` is 1, and a second backward pass through a
    retained graph must find ``grad`` unchanged, so one that may come gets a new tensor. A backward
    pass that frees its graph, the usual one, holds the last reference to ``grad``: it is scaled
    where it lies, by a kernel that leaves at once where the device finds a 1. torch itself reuses
    the buffers of compiled graphs under the same condition (donated buffers). Before torch 2.6,
    which can't tell, the tensor is always new.

    The compiled kernel of csrc/cuda/scale.cu does it where it was built, Triton's otherwise.
    """
    dtype = grad.dtype if dtype is None else dtype
    # Under vmap and in tracers a tensor has no memory that a kernel could read.
    watched = _functorch_active() or _dispatch_modes() or _is_compiling()
    if grad.dtype == torch.float64 or grad.numel() == 0 or watched:
        return scaled(grad, grad_output, dtype)
    in_place = dtype == grad.dtype and grad.is_contiguous() and not _keeps_graph()
    grad = grad.contiguous()
    out = grad if in_place else torch.empty_like(grad, dtype=dtype)
    if kernels._forced is None and _compiled_scales(grad.device.type):
        return cuda_scale.scale(grad, grad_output, out)
    scale = grad_output.detach().to(torch.float32)
    if scale.dim() == 0:
        programs = min(cdiv(grad.numel(), _SCALE_BLOCK), _SCALE_PROGRAMS)
        _launch(
            scale_all_kernel, (programs,), 8,
            grad, out, scale, grad.numel(), IN_PLACE=in_place, BLOCK=_SCALE_BLOCK,
        )  # fmt: skip
    else:
        rows = grad.shape[0]
        plan = scaling(rows, grad.numel() // rows)
        _launch(
            scale_rows_kernel, (plan.programs, plan.column_programs), 8,
            grad, out, scale, rows, grad.numel() // rows, scale.stride(0),
            BLOCK_R=plan.block_rows, BLOCK_C=plan.block_columns,
        )  # fmt: skip
    return out


@functools.cache
def _compiled_scales(device_type: str) -> bool:
    """Whether the compiled kernel does the scaling: a launch of it takes the host a third."""
    return device_type == "cuda" and not kernels.missing("cuda", "table", "cuda")


def _serves(logits: Tensor) -> bool:
    """Whether the kernels take these logits; the rest is the reference's."""
    full = logits.numel() > 0 and logits.numel() // logits.shape[-1] < 2**31
    return full and logits.dtype != torch.float64


def _row_plan(flat: Tensor, by_label: bool, wanted: Wanted) -> tuple[int, Tiles | Sweeps]:
    """Elements to which the rows ``[R, C]`` of cross-entropy are aligned, and their launch."""
    (rows, columns), itemsize = flat.shape, flat.element_size()
    _, _, with_grad, with_mean_grad = wanted
    address, stride = flat.data_ptr(), flat.stride(0)
    if by_label:
        aligned, vector = access_width(address, stride, columns, itemsize, with_grad)
    else:
        aligned = vector = alignment(address, stride, itemsize)
    return aligned, row_launch(
        rows, columns, vector=vector, itemsize=itemsize, with_grad=with_grad,
        with_mean_grad=with_mean_grad, by_label=by_label,
    )  # fmt: skip


def _outputs(
    logits: Tensor, rows: int, programs: int, single_block: bool, wanted: Wanted
) -> _Outputs:
    """All tensors of a call: one row per sample unless the logits are ``[B, T, C]``."""
    _, reduce, with_grad, with_mean_grad = wanted
    batch, columns = logits.shape[0], logits.shape[-1]
    losses = torch.empty(batch, dtype=torch.float32, device=logits.device)
    empty = losses.new_empty
    score, loss = empty(batch), empty(() if reduce else batch)
    mean_grad = empty(columns) if with_mean_grad else None
    grad = None
    if with_grad:
        grad = empty(logits.shape, dtype=grad_dtype(logits.dtype))
    row_losses, row_score = losses, score
    row_loss: Tensor | None = loss
    row_mean_grad = mean_grad
    if logits.dim() == 3:
        row_losses, row_score = empty(2, rows)
        row_loss = loss if reduce else None
    if not single_block:
        row_loss = empty(programs) if reduce else row_loss
        row_mean_grad = empty(programs, columns) if with_mean_grad else None
    return _Outputs(
        loss, losses, score, mean_grad, grad, row_loss, row_losses, row_score, row_mean_grad
    )


def _known_denominator(denominator: Denominator, reduce: bool) -> _Denominator:
    if denominator is None or not reduce:
        return _Denominator(None, 1.0, 0)
    if isinstance(denominator, Tensor):
        return _Denominator(denominator.reshape(1).to(torch.float32), 1.0, 1)
    return _Denominator(None, 1 / denominator if denominator else math.inf, 0)


def _label_denominator(
    target: Tensor, class_weights: Tensor | None, ignore_index: int, num_classes: int
) -> _Denominator:
    """torch's: the weights of the unignored labels, to be added up from parts."""
    rows = target.numel()
    count = label_parts(rows)
    parts = torch.empty(count, dtype=torch.float32, device=target.device)
    _launch(
        denominator_kernel, (count,), 4,
        target, class_weights, parts, rows, ignore_index, NUM_CLASSES=num_classes, BLOCK=1024,
    )  # fmt: skip
    return _Denominator(parts, 1.0, count)


def _finish_columns(
    out: _Outputs, below: _Denominator, parts: int, rows: int, reduce: bool
) -> None:
    """The reduced loss and the mean gradient from the programs' parts."""
    if not reduce and out.mean_grad is None:
        return
    columns = 0 if out.mean_grad is None else len(out.mean_grad)
    plan = column_sums(parts, columns)
    _launch(
        finish_columns_kernel, (plan.programs + 1,), plan.num_warps,
        out.row_loss if reduce else None, out.loss if reduce else None, below.parts, below.inverse,
        out.row_mean_grad, out.mean_grad, parts, rows,
        DENOMINATOR_PARTS=below.num_parts, NUM_COLUMNS=columns, BLOCK_P=plan.block_parts,
        BLOCK_C=plan.block_columns,
    )  # fmt: skip


def _finish_tokens(
    out: _Outputs, weights: Tensor | None, below: _Denominator, parts: int, tokens: int,
    sum_parts: bool,
) -> None:  # fmt: skip
    """Losses and scores of samples from those of their tokens, and the loss from its parts."""
    loss = out.loss if sum_parts or out.row_loss is None else None
    _launch(
        finish_tokens_kernel, (len(out.losses) + sum_parts,), 4,
        out.row_losses, out.row_score, weights, out.losses, out.score,
        out.row_loss if sum_parts else None, loss, below.parts, below.inverse, parts, tokens,
        DENOMINATOR_PARTS=below.num_parts, BLOCK=min(power_of_two(tokens), 1024),
    )  # fmt: skip


def _elementwise(
    binary: bool,
    logits: Tensor,
    target: Tensor,
    weights: Tensor | None,
    options: ElementwiseOptions,
    wanted: Wanted,
) -> Scored:
    logits, target = logits.detach().contiguous(), target.contiguous()
    rows, outputs = logits.shape
    plan = elementwise_launch(rows, outputs, wanted.with_mean_grad)
    single_block = is_single_block(rows, outputs)
    out = _outputs(logits, rows, plan.programs, single_block, wanted)
    below = _known_denominator(wanted.denominator, wanted.reduce)
    _launch(
        elementwise_kernel, (plan.programs,), plan.num_warps,
        logits, target, weights, options.pos_weight, below.parts, out.grad, out.row_losses,
        out.row_score, out.row_loss, out.row_mean_grad, below.inverse, 1 / options.divisor, rows,
        NUM_OUTPUTS=outputs, BINARY=binary, DENOMINATOR_PARTS=below.num_parts,
        REDUCE=wanted.reduce, SINGLE_BLOCK=single_block, BLOCK_R=plan.block_rows,
        BLOCK_C=plan.block_columns, maxnreg=plan.max_registers,
    )  # fmt: skip
    if not single_block:
        _finish_columns(out, below, plan.programs, rows, wanted.reduce)
    return out.scored
