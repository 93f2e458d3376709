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

from fastis import autograd, check
from fastis.kernels import kernels_for
from fastis.kernels.formats import compute_dtype, grad_dtype
from fastis.kernels.loss import CrossEntropyOptions, ElementwiseOptions, Wanted, scaled

_RESULTS = 5


def _operator(name: str, options: str, make: Callable[..., Any]) -> Any:
    """Registers one: a schema is flat, so options and wishes come as single arguments."""
    schema = (
        f"(Tensor logits, Tensor target, Tensor? weights, {options}, float? denominator, "
        "Tensor? denominator_tensor, bool reduce, bool with_grad, bool with_mean_grad)"
        " -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
    )

    def call(
        logits: Tensor, target: Tensor, weights: Tensor | None, *rest: Any
    ) -> tuple[Tensor, ...]:
        *chosen, number, tensor, reduce, with_grad, with_mean_grad = rest
        wanted = Wanted(number if tensor is None else tensor, reduce, with_grad, with_mean_grad)
        kernels = kernels_for("loss", logits.device.type)
        results = getattr(kernels, name)(logits, target, weights, make(*chosen), wanted)
        return tuple(results[1].new_empty(0) if r is None else r for r in results)

    operator: Any = torch.library.custom_op(f"fastis::{name}", call, mutates_args=(), schema=schema)
    operator.register_fake(_fake)
    operator.register_autograd(_scale, setup_context=_save)
    if hasattr(operator, "register_vmap"):  # torch 2.5
        operator.register_vmap(_by_slices(operator))
    return operator


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
        return scaled(grad, grads[0], ctx.dtype), *rest
    again = scaled(grad, grads[0].detach(), ctx.dtype)  # create_graph
    return autograd.FirstOrderOnly.apply(again, grads[0], loss), *rest


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


cross_entropy = _operator(
    "cross_entropy",
    "Tensor? class_weights, int ignore_index, float label_smoothing",
    CrossEntropyOptions,
)
binary_cross_entropy_with_logits = _operator(
    "binary_cross_entropy_with_logits", "Tensor? pos_weight, float divisor", ElementwiseOptions
)
mse_loss = _operator("mse_loss", "Tensor? pos_weight, float divisor", ElementwiseOptions)
_OPERATORS = {
    "cross_entropy": cross_entropy,
    "binary_cross_entropy_with_logits": binary_cross_entropy_with_logits,
    "mse_loss": mse_loss,
}


class _Functional(torch.autograd.Function):
    """An operator under torch.func, which takes no other form of autograd."""

    generate_vmap_rule = True

    @staticmethod
    def forward(operator: Any, logits: Tensor, *arguments: Any) -> Any:
        return operator(logits, *arguments)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        # The saved gradient counts as differentiable, so that its derivative is asked for here.
        ctx.mark_non_differentiable(*output[1:-1])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(output[-1])
        ctx.dtype, ctx.num_inputs = inputs[1].dtype, len(inputs)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor, *others: Any) -> Any:
        if others[-1] is not None:
            autograd.refuse_derivative()
        (grad,) = ctx.saved_tensors
        rest = (None,) * (ctx.num_inputs - 2)
        return None, scaled(grad, grad_output, ctx.dtype), *rest

    jvp = staticmethod(autograd.refuse_derivative)


def call(
    name: str,
    logits: Tensor,
    target: Tensor,
    weights: Tensor | None,
    options: tuple[Any, ...],
    wanted: Wanted,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """``(loss, losses, score, mean_grad)`` of the operator ``name``; arguments as its kernels'."""
    arguments: list[Any] = [logits, target, weights, *options]
    if not autograd.is_compiling():
        for i, argument in enumerate(autograd.TENSORS[name]):
            if arguments[i] is not None:
                arguments[i] = check.written(argument, arguments[i])
    denominator, reduce, with_grad, with_mean_grad = wanted
    if autograd.in_forward_mode():
        autograd.refuse_tangents(*arguments, denominator)
    number = None if isinstance(denominator, Tensor) else denominator
    tensor = denominator if isinstance(denominator, Tensor) else None
    arguments += [number, tensor, reduce]
    operator = _OPERATORS[name]
    if not autograd.is_compiling() and autograd.functorch_active():
        # requires_grad does not tell here what is differentiated.
        results = _Functional.apply(operator, *arguments, True, with_mean_grad)
    else:
        results = operator(*arguments, with_grad, with_mean_grad)
    loss, losses, score, mean_grad, _ = results
    return loss, losses.detach(), score.detach(), mean_grad.detach() if with_mean_grad else None
