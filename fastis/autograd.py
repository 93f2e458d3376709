"""How a loss that was computed in the forward pass enters torch's autograd.

Eager calls take the leanest way, a small autograd.Function around a gradient that is there already.
Where something watches the dispatcher (torch.compile, torch.func, subclasses, modes) the same
kernels run as operators: :mod:`fastis.operators`.

The first derivative comes from the forward pass, others are errors: a gradient that came out of a
kernel has no graph, and what is differentiated through it would be 0 without a word.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.parameter import Parameter

from fastis import check

is_compiling = torch.compiler.is_dynamo_compiling  # what else traces has a dispatch mode
functorch_active = torch._C._are_functorch_transforms_active
_is_grad_enabled = torch.is_grad_enabled
_dispatch_modes = torch._C._len_torch_dispatch_stack
_int64 = torch.int64

# The tensors that a loss takes, in the order of its kernels' arguments.
TENSORS = {
    "cross_entropy": ("logits", "target", "weights", "class_weights"),
    "binary_cross_entropy_with_logits": ("logits", "target", "weights", "pos_weight"),
    "mse_loss": ("prediction", "target", "weights"),
}


def refuse_derivative(ctx: Any = None, *_: Any) -> Any:
    """The end of every path on which a derivative would otherwise be silently 0."""
    raise RuntimeError(
        "fastis losses have a first derivative only, by the backward pass: their gradient was "
        "computed in the forward pass; for second derivatives and forward mode use scored_loss"
    )


class FirstOrderOnly(torch.autograd.Function):
    """``grad``, whose derivative in what it was computed from is an error."""

    @staticmethod
    def forward(ctx: Any, grad: Tensor, *depends_on: Tensor) -> Tensor:
        return grad.view_as(grad)

    backward = staticmethod(refuse_derivative)
    jvp = staticmethod(refuse_derivative)


class _Saved(torch.autograd.Function):
    """Hands on a loss whose gradient is already there."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, done: tuple[Tensor, Tensor, Any]) -> Tensor:
        loss, grad, ctx.scale = done
        # Saved, not an attribute: freed before the gradient is accumulated, it is then not copied.
        # The loss leads back to the logits without keeping them.
        ctx.save_for_backward(grad, loss)
        return loss

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> Any:
        grad, loss = ctx.saved_tensors
        if _is_grad_enabled():  # create_graph
            grad = ctx.scale(grad, grad_output.detach())
            return FirstOrderOnly.apply(grad, grad_output, loss), None
        return ctx.scale(grad, grad_output), None

    jvp = staticmethod(refuse_derivative)


# Function.apply minus its search for functorch wrappers, which needs_operator has excluded.
_attach = super(torch.autograd.Function, _Saved).apply


def attach(logits: Tensor, loss: Tensor, grad: Tensor, kernels: Any) -> Tensor:
    """``loss``, leading back to ``logits`` by the gradient that ``kernels`` have computed."""
    scale = kernels.scale_grad
    if grad.dtype is not logits.dtype:  # float16: kept in float32 until it is scaled
        scale = functools.partial(scale, dtype=logits.dtype)
    return _attach(logits, (loss, grad, scale))  # type: ignore[no-any-return]


def needs_operator(
    name: str, logits: Tensor, target: Tensor, weights: Tensor | None, option: Tensor | None
) -> bool:
    """Whether torch's dispatcher has to see the call.

    Because something watches it and would miss a raw pointer being read, or because the values of
    a tensor don't lie in its memory. What has no values either is refused.
    """
    if (
        is_compiling()
        or (type(logits) is not Tensor and type(logits) is not Parameter)
        or type(target) is not Tensor
        or (weights is not None and type(weights) is not Tensor)
        or (option is not None and type(option) is not Tensor)
        or functorch_active()
        or _dispatch_modes() != 0
        or forward_ad._current_level >= 0
    ):
        return True
    try:
        if (
            logits.data_ptr() != 0
            and target.data_ptr() != 0
            and (weights is None or weights.data_ptr() != 0)
            and (option is None or option.data_ptr() != 0)
        ):
            return (
                logits.is_neg()
                or (target.dtype is not _int64 and target.is_neg())  # only floats are, lazily
                or (weights is not None and weights.is_neg())
                or (option is not None and option.is_neg())
            )
    except RuntimeError:  # of a sparse tensor, say
        pass
    named = zip(TENSORS[name], (logits, target, weights, option), strict=False)
    return any(t is not None and check.readable(argument, t) is not t for argument, t in named)


def in_forward_mode() -> bool:
    """Whether tensors may carry tangents."""
    return forward_ad._current_level >= 0


def refuse_tangents(*arguments: Any) -> None:
    """Eager torch.func does not need this: it asks an autograd.Function for its jvp."""
    if functorch_active():
        if is_compiling():  # an operator would not be asked
            refuse_derivative()
        return
    for tensor in arguments:
        if isinstance(tensor, Tensor) and forward_ad.unpack_dual(tensor).tangent is not None:
            refuse_derivative()
