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
from torch.autograd.function import once_differentiable
from torch.nn.parameter import Parameter

from fastis.kernels.reference_loss import Scored
from fastis.loss_arguments import Denominator

_is_compiling = torch.compiler.is_compiling
_is_grad_enabled = torch.is_grad_enabled
_functorch_active = torch._C._are_functorch_transforms_active
_dispatch_modes = torch._C._len_torch_dispatch_stack


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
        ctx.save_for_backward(grad)
        return loss

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> Any:
        if _is_grad_enabled():  # create_graph: a second derivative must raise, not be silently 0
            return _scale_once(ctx, grad_output)
        return ctx.scale(ctx.saved_tensors[0], grad_output), None


# Function.apply minus its search for functorch wrappers, which needs_operator has excluded.
_attach = super(torch.autograd.Function, _Saved).apply
_new_tuple = tuple.__new__


@once_differentiable  # type: ignore[untyped-decorator]
def _scale_once(ctx: Any, grad_output: Tensor) -> Any:
    return ctx.scale(ctx.saved_tensors[0], grad_output), None


def needs_operator(logits: Tensor) -> bool:
    """Whether something watches the dispatcher and would miss a raw pointer being read."""
    return (
        _is_compiling()
        or (type(logits) is not Tensor and type(logits) is not Parameter)
        or _functorch_active()
        or _dispatch_modes() != 0
    )


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

    number = None if isinstance(denominator, Tensor) else denominator
    tensor = denominator if isinstance(denominator, Tensor) else None
    # Inside functorch's transforms requires_grad does not tell what is differentiated.
    with_grad = logits.requires_grad or _is_compiling() or _functorch_active()
    loss, losses, score, mean_grad, _ = getattr(operators, name)(
        logits, *arguments, number, tensor, reduce, with_grad, with_mean_grad
    )
    mean_grad = mean_grad.detach() if with_mean_grad else None
    return ScoredLoss(loss, losses.detach(), score.detach(), mean_grad)
