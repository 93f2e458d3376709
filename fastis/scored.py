"""How a loss that was computed in the forward pass enters torch: autograd or a registered operator.

Eager calls take the leanest way, a small autograd.Function around results that are there already.
Where something watches the dispatcher (torch.compile, torch.func, subclasses, modes) the same
kernels run as operators of :mod:`fastis.operators`.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.parameter import Parameter

from fastis import dense
from fastis.first_order import FirstOrderOnly, refuse_derivative
from fastis.kernels.formats import Scored
from fastis.kernels.reference import loss as reference_loss
from fastis.loss_arguments import Denominator

_is_compiling = torch.compiler.is_dynamo_compiling  # what else traces has a dispatch mode
_is_grad_enabled = torch.is_grad_enabled
_int64 = torch.int64
functorch_active = torch._C._are_functorch_transforms_active
_dispatch_modes = torch._C._len_torch_dispatch_stack

# The tensors that a loss takes, in the order of its kernels' arguments.
_TENSORS = {
    "cross_entropy": ("logits", "target", "weights", "class_weights"),
    "binary_cross_entropy_with_logits": ("logits", "target", "weights", "pos_weight"),
    "mse_loss": ("prediction", "target", "weights"),
}


class ScoredLoss(NamedTuple):
    """What a loss hands to the optimiser and to :meth:`fastis.Sampler.update`.

    Attributes
    ----------
    loss : Tensor
        0-d (``[B]`` for ``reduction="none"``), differentiable in the logits.
    losses : Tensor
        ``[B]``, detached: per-sample losses, class weights included, coefficients not.
    score : Tensor
        ``[B]``, detached: ``|g_i|``, the norm of each sample's gradient ``d loss_i / d logits_i``.
    mean_grad : Tensor or None
        ``(1/B) sum_i r_i g_i``, ``[C]``, detached, for ``[B, C]`` logits with C <= 4096; else None,
        and the variance traces take ``|G|^2 = 0``.

    float32 for float32, bfloat16 and float16 logits; float64 for float64.
    """

    loss: Tensor
    losses: Tensor
    score: Tensor
    mean_grad: Tensor | None


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
_new_tuple = tuple.__new__


class _Functional(torch.autograd.Function):
    """An operator of fastis.operators under torch.func, which takes no other form of autograd."""

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
            refuse_derivative()
        (grad,) = ctx.saved_tensors
        rest = (None,) * (ctx.num_inputs - 2)
        return None, reference_loss.scale_grad(grad, grad_output, ctx.dtype), *rest

    jvp = staticmethod(refuse_derivative)


def needs_operator(
    name: str, logits: Tensor, target: Tensor, weights: Tensor | None, options: Tensor | None = None
) -> bool:
    """Whether torch's dispatcher has to see the call.

    Because something watches it and would miss a raw pointer being read, or because the values of
    a tensor don't lie in its memory. What has no values either is refused.
    """
    if (
        _is_compiling()
        or (type(logits) is not Tensor and type(logits) is not Parameter)
        or type(target) is not Tensor
        or (weights is not None and type(weights) is not Tensor)
        or (options is not None and type(options) is not Tensor)
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
            and (options is None or options.data_ptr() != 0)
        ):
            return (
                logits.is_neg()
                or (target.dtype is not _int64 and target.is_neg())  # only floats are, lazily
                or (weights is not None and weights.is_neg())
                or (options is not None and options.is_neg())
            )
    except RuntimeError:  # of a sparse tensor, say
        pass
    named = zip(_TENSORS[name], (logits, target, weights, options), strict=False)
    return any(t is not None and dense.readable(argument, t) is not t for argument, t in named)


def in_forward_mode() -> bool:
    """Whether tensors may carry tangents."""
    return forward_ad._current_level >= 0


def _refuse_tangents(*arguments: Any) -> None:
    """Eager torch.func does not need this: it asks :class:`_Functional` for its jvp."""
    if functorch_active():
        if _is_compiling():  # an operator would not be asked
            refuse_derivative()
        return
    for tensor in arguments:
        if isinstance(tensor, Tensor) and forward_ad.unpack_dual(tensor).tangent is not None:
            refuse_derivative()


def with_backward(logits: Tensor, results: Scored, kernels: Any) -> ScoredLoss:
    """Results of ``kernels`` as a ScoredLoss whose loss leads back to ``logits``."""
    loss, losses, score, mean_grad, grad = results
    if grad is not None:
        scale = kernels.scale_grad
        if grad.dtype is not logits.dtype:  # float16: kept in float32 until it is scaled
            scale = functools.partial(scale, dtype=logits.dtype)
        loss = _attach(logits, (loss, grad, scale))
    return _new_tuple(ScoredLoss, (loss, losses, score, mean_grad))


def by_operator(
    name: str,
    logits: Tensor,
    arguments: tuple[Any, ...],
    denominator: Denominator,
    reduce: bool,
    with_mean_grad: bool,
) -> ScoredLoss:
    """The same by the operator ``name``: arguments up to the denominator, then the flags."""
    from fastis import operators

    if not _is_compiling():
        names = _TENSORS[name]
        logits = dense.written(names[0], logits)
        tensors = zip(names[1:], arguments, strict=False)
        written = [t if t is None else dense.written(n, t) for n, t in tensors]
        arguments = (*written, *arguments[len(written) :])
    if in_forward_mode():
        _refuse_tangents(logits, *arguments, denominator)
    number = None if isinstance(denominator, Tensor) else denominator
    tensor = denominator if isinstance(denominator, Tensor) else None
    operator = getattr(operators, name)
    rest = (*arguments, number, tensor, reduce)
    if not _is_compiling() and functorch_active():
        # requires_grad does not tell here what is differentiated.
        results = _Functional.apply(operator, logits, *rest, True, with_mean_grad)
    else:
        with_grad = logits.requires_grad and _is_grad_enabled()
        results = operator(logits, *rest, with_grad, with_mean_grad)
    loss, losses, score, mean_grad, _ = results
    mean_grad = mean_grad.detach() if with_mean_grad else None
    return ScoredLoss(loss, losses.detach(), score.detach(), mean_grad)
