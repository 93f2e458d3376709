"""The losses as operators of torch (``torch.ops.fastis``), for torch.compile and torch.func.

Eager code does not come through here: an operator registered from Python costs several times a
small autograd.Function. Each operator returns ``(loss, losses, score, mean_grad, grad)`` with empty
tensors for what was not asked for; ``grad`` is what the backward pass scales. The first derivative
in the logits is registered, and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastis.first_order import FirstOrderOnly
from fastis.kernels import kernels_for
from fastis.kernels.formats import Scored, compute_dtype, grad_dtype
from fastis.kernels.reference.loss import scale_grad

_TAIL = (
    "float? denominator, Tensor? denominator_tensor, bool reduce, bool with_grad, "
    "bool with_mean_grad) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)
_RESULTS = 5


def _all_tensors(results: Scored) -> tuple[Tensor, ...]:
    losses = results[1]
    return tuple(losses.new_empty(0) if r is None else r for r in results)


@torch.library.custom_op(
    "fastis::cross_entropy",
    mutates_args=(),
    schema="(Tensor logits, Tensor target, Tensor? weights, Tensor? class_weights, "
    "int ignore_index, float label_smoothing, " + _TAIL,
)
def cross_entropy(  # type: ignore[no-untyped-def]
    logits, target, weights, class_weights, ignore_index, label_smoothing,
    denominator, denominator_tensor, reduce, with_grad, with_mean_grad,
):  # fmt: skip
    """:func:`fastis.cross_entropy` after its checks."""
    kernels = kernels_for("loss", logits.device.type)
    return _all_tensors(
        kernels.cross_entropy(
            logits, target, weights, class_weights, ignore_index, label_smoothing,
            denominator if denominator_tensor is None else denominator_tensor,
            reduce, with_grad, with_mean_grad,
        )
    )  # fmt: skip


@torch.library.custom_op(
    "fastis::binary_cross_entropy_with_logits",
    mutates_args=(),
    schema="(Tensor logits, Tensor target, Tensor? weights, Tensor? pos_weight, float divisor, "
    + _TAIL,
)
def binary_cross_entropy_with_logits(  # type: ignore[no-untyped-def]
    logits, target, weights, pos_weight, divisor,
    denominator, denominator_tensor, reduce, with_grad, with_mean_grad,
):  # fmt: skip
    """:func:`fastis.binary_cross_entropy_with_logits` after its checks."""
    kernels = kernels_for("loss", logits.device.type)
    return _all_tensors(
        kernels.binary_cross_entropy_with_logits(
            logits, target, weights, pos_weight, divisor,
            denominator if denominator_tensor is None else denominator_tensor,
            reduce, with_grad, with_mean_grad,
        )
    )  # fmt: skip


@torch.library.custom_op(
    "fastis::mse_loss",
    mutates_args=(),
    schema="(Tensor logits, Tensor target, Tensor? weights, float divisor, " + _TAIL,
)
def mse_loss(  # type: ignore[no-untyped-def]
    logits, target, weights, divisor,
    denominator, denominator_tensor, reduce, with_grad, with_mean_grad,
):  # fmt: skip
    """:func:`fastis.mse_loss` after its checks."""
    kernels = kernels_for("loss", logits.device.type)
    return _all_tensors(
        kernels.mse_loss(
            logits, target, weights, divisor,
            denominator if denominator_tensor is None else denominator_tensor,
            reduce, with_grad, with_mean_grad,
        )
    )  # fmt: skip


def _fake(logits: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    """Shapes and dtypes of the results; the last three arguments are the flags."""
    reduce, with_grad, with_mean_grad = arguments[-3:]
    result = compute_dtype(logits.dtype)
    batch, columns = logits.shape[0], logits.shape[-1]
    grad = logits.new_empty(logits.shape, dtype=grad_dtype(logits.dtype))
    return (
        logits.new_empty(() if reduce else (batch,), dtype=result),
        logits.new_empty((batch,), dtype=result),
        logits.new_empty((batch,), dtype=result),
        logits.new_empty((columns if with_mean_grad else 0,), dtype=result),
        grad if with_grad else logits.new_empty((0,), dtype=result),
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    with_grad = inputs[-2]
    ctx.mark_non_differentiable(*output[1 if with_grad else 0 :])
    ctx.save_for_backward(output[-1], output[0])
    ctx.dtype = inputs[0].dtype
    ctx.num_inputs = len(inputs)
    ctx.set_materialize_grads(False)


def _scale(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    rest = (None,) * (ctx.num_inputs - 1)
    if grads[0] is None:
        return None, *rest
    grad, loss = ctx.saved_tensors
    if not torch.is_grad_enabled():
        return scale_grad(grad, grads[0], ctx.dtype), *rest
    scaled = scale_grad(grad, grads[0].detach(), ctx.dtype)  # create_graph
    return FirstOrderOnly.apply(scaled, grads[0], loss), *rest


def _by_slices(operator: Callable[..., tuple[Tensor, ...]]) -> Callable[..., Any]:
    """vmap by one call per slice: the kernels take one batch dimension, and a user's loop is no
    faster."""

    def rule(info: Any, in_dims: tuple[int | None, ...], *arguments: Any) -> Any:
        def at(i: int) -> list[Any]:
            pairs = zip(arguments, in_dims, strict=True)
            return [a if d is None else a.select(d, i) for a, d in pairs]

        slices = [operator(*at(i)) for i in range(info.batch_size)]
        return tuple(map(torch.stack, zip(*slices, strict=True))), (0,) * _RESULTS

    return rule


for _operator in (cross_entropy, binary_cross_entropy_with_logits, mse_loss):
    _operator.register_fake(_fake)
    _operator.register_autograd(_scale, setup_context=_save)
    if hasattr(_operator, "register_vmap"):  # torch 2.5
        _operator.register_vmap(_by_slices(_operator))
