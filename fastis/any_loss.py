"""Scored losses of the user's own: of a function, or of per-sample losses that exist already."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from fastis import check
from fastis.autograd import functorch_active, in_forward_mode
from fastis.kernels.formats import compute_dtype
from fastis.scored import MAX_MEAN_GRAD, ScoredLoss, UnweightedLoss

_DIMENSIONS = tuple(range(1, 9))
_is_grad_enabled = torch.is_grad_enabled


def from_losses(
    losses: Tensor,
    weights: Tensor | None,
    score: Tensor | None = None,
    *,
    denominator: float | Tensor | None = None,
) -> ScoredLoss:
    """A :class:`fastis.ScoredLoss` of per-sample losses that were computed elsewhere.

    Equal::

        loss = (weights * losses).sum() / (denominator or B)
        ScoredLoss(loss, losses.detach(), losses.detach() if score is None else score)

    Parameters
    ----------
    losses : Tensor
        ``[B]``, floating, differentiable: sample i's loss depends on sample i only.
    weights : Tensor or None
        ``[B]``: the coefficients ``r_i = 1/(N p_i)`` of the draws, ``batch.weights``; None: all 1.
    score : Tensor, optional
        ``[B]``, not negative: what samples are to be drawn in proportion to, best the norm of each
        one's gradient. None: its loss, a rougher guide.
    denominator : float or Tensor, optional
        of the mean; None: B.

    Returns
    -------
    ScoredLoss
        without ``mean_grad``: the variance traces take ``|G|^2 = 0``.

    Raises
    ------
    TypeError, ValueError
        for a wrong type, dtype, shape or device, naming the argument.
    """
    check.logits("losses", losses, "[B], one loss per sample", (1,))
    check.tensor("losses", losses)
    weights, denominator = check.weighting(losses, weights, "mean", denominator)
    kept = losses.to(compute_dtype(losses.dtype))
    detached = kept.detach()
    if score is not None:
        score = check.constant("score", score, losses.shape, losses)
    loss = _reduced(kept, weights, "mean", len(losses) if denominator is None else denominator)
    made = UnweightedLoss if weights is None and loss.requires_grad else ScoredLoss
    return made(loss, detached, detached if score is None else score)


def scored_loss(
    loss_fn: Callable[[Any, Any], Tensor],
    logits: Any,
    target: Any,
    weights: Tensor | None = None,
    *,
    reduction: str = "mean",
    denominator: float | Tensor | None = None,
) -> ScoredLoss:
    """Any differentiable per-sample loss, with the score taken by autograd.

    The loss stays in the graph, so it is differentiable in all that ``loss_fn`` uses, to any order;
    the price is a second backward pass through ``loss_fn``. Equal::

        losses = loss_fn(logits, target)
        (g,) = torch.autograd.grad(losses.sum(), logits, retain_graph=True)
        score = g.flatten(1).norm(dim=1)
        loss = (weights * losses).sum() / (denominator or B)

    Parameters
    ----------
    loss_fn : callable
        ``loss_fn(logits, target)`` -> ``[B]``, where sample i's loss depends on row i only.
    logits : Tensor, or tuple, list or dict of tensors
        ``[B, ...]``, floating; several outputs of a network may be nested, and what is no floating
        tensor in there is handed on as it is. The score is the norm over all of them (of those that
        require grad, while a graph is being built).
    target
        handed to ``loss_fn`` as it is.
    weights, reduction, denominator
        as in :func:`cross_entropy`; the denominator of the mean is B.

    Returns
    -------
    ScoredLoss
        ``mean_grad`` is ``[C]`` for ``[B, C]`` logits with C <= 4096, else None.

    Raises
    ------
    TypeError, ValueError
        for wrong arguments; ValueError when ``loss_fn`` returns anything but ``[B]`` values that
        depend on the logits. A scalar hides the per-sample losses: pass ``reduction="none"``, or
        let ``torch.func.vmap`` call it for each sample.
    """
    check.choice("reduction", reduction, check.REDUCTIONS)
    single = isinstance(logits, Tensor)
    outputs = _tensor(logits) if single else _several(logits)
    like, building = outputs.like, outputs.building
    weights, denominator = check.weighting(like, weights, reduction, denominator)
    losses, grads = _losses_and_gradients(loss_fn, outputs, target)
    batch, dtype = like.shape[0], compute_dtype(like.dtype)
    flat = grads[0].reshape(batch, grads[0].shape[1:].numel()).to(dtype)
    score, mean_grad = flat.norm(dim=1), None
    if not single:
        norms = [score, *(g.flatten(1).to(dtype).norm(dim=1) for g in grads[1:])]
        score = torch.stack(norms).norm(dim=0)
    elif logits.dim() <= 2 and flat.shape[1] <= MAX_MEAN_GRAD:
        mean_grad = (flat if weights is None else flat * weights[:, None]).mean(0)
    kept = losses.to(dtype)
    loss = _reduced(kept, weights, reduction, batch if denominator is None else denominator)
    plain = weights is None and building and reduction != "none"
    return (UnweightedLoss if plain else ScoredLoss)(loss, kept.detach(), score, mean_grad)


def _reduced(
    losses: Tensor, weights: Tensor | None, reduction: str, denominator: float | Tensor
) -> Tensor:
    weighted = losses if weights is None else losses * weights
    return weighted if reduction == "none" else weighted.sum() / denominator


class _Outputs(NamedTuple):
    """A network's output, one tensor or several, taken apart into what the loss is derived by."""

    chosen: Sequence[Tensor]  # by which it is
    like: Tensor  # one of them, whose rows, dtype and device count
    building: bool  # a graph that leads back to them?
    rebuilt: Callable[[Sequence[Tensor]], Any] | None  # the output with others in their places


def _tensor(logits: Tensor) -> _Outputs:
    check.logits("logits", logits, "[B, ...]", _DIMENSIONS)
    check.tensor("logits", logits)
    return _Outputs((logits,), logits, logits.requires_grad and _is_grad_enabled(), None)


def _several(logits: Any) -> _Outputs:
    paths, spec = pytree.tree_flatten_with_path(logits)
    leaves = [leaf for _, leaf in paths]
    places = [at for at, leaf in enumerate(leaves) if _is_floating(leaf)]
    if not places:
        raise TypeError(
            "logits must be a tensor of floats, or a tuple, list or dict with some, got "
            f"{check.describe(logits)}"
        )
    needed = [at for at in places if leaves[at].requires_grad]
    building = bool(needed) and _is_grad_enabled()
    if building:
        places = needed
    chosen = [leaves[at] for at in places]
    like = max(chosen, key=lambda leaf: leaf.dtype is torch.float64)
    for at, leaf in zip(places, chosen, strict=True):
        name = f"logits{pytree.keystr(paths[at][0])}"
        check.logits(name, leaf, "[B, ...]", _DIMENSIONS)
        check.tensor(name, leaf)
        if len(leaf) != len(like):
            raise ValueError(
                f"{name} must have {len(like)} rows, as another output has, got shape "
                f"{list(leaf.shape)}"
            )

    def rebuilt(seen: Sequence[Tensor]) -> Any:
        found = list(leaves)
        for at, tensor in zip(places, seen, strict=True):
            found[at] = tensor
        return pytree.tree_unflatten(found, spec)

    return _Outputs(chosen, like, building, rebuilt)


def _losses_and_gradients(
    loss_fn: Callable[[Any, Any], Tensor], outputs: _Outputs, target: Any
) -> tuple[Tensor, Sequence[Tensor]]:
    """``loss_fn``'s ``[B]`` losses, in the graph when one is being built, and the gradients."""
    chosen, like, building, rebuilt = outputs

    def sum_and_losses(*seen: Tensor) -> tuple[Tensor, Tensor]:
        losses = loss_fn(seen[0] if rebuilt is None else rebuilt(seen), target)
        if not isinstance(losses, Tensor) or losses.shape != like.shape[:1]:
            raise ValueError(
                f"loss_fn must return one loss per sample, shape [{len(like)}], got "
                f"{check.describe(losses)}; if it takes a reduction, pass reduction='none' and "
                "average over all but the first dimension; if it always returns the mean, call it "
                "for each sample: torch.func.vmap(lambda z, t: loss_fn(z[None], t[None]))"
            )
        if not losses.requires_grad:
            raise ValueError("loss_fn must return losses that are differentiable in the logits")
        return losses.sum(), losses

    if functorch_active() or in_forward_mode():  # torch.func keeps tangents and outer transforms
        arguments = tuple(range(len(chosen)))
        grads, losses = torch.func.grad(sum_and_losses, arguments, has_aux=True)(*chosen)
        return losses, grads
    with torch.inference_mode(False), torch.enable_grad():
        if isinstance(target, Tensor) and target.is_inference():
            target = target.clone()
        seen = chosen if building else [_as_leaf(tensor) for tensor in chosen]
        total, losses = sum_and_losses(*seen)
        grads = torch.autograd.grad(total, seen, retain_graph=building, allow_unused=True)
    if grads[0] is None or len(grads) > 1:
        grads = _without_gaps(grads, seen)
    return losses if building else losses.detach(), grads


def _without_gaps(grads: Sequence[Tensor | None], seen: Sequence[Tensor]) -> list[Tensor]:
    """Zeros for outputs that have no part in the loss."""
    if all(g is None for g in grads):
        raise ValueError("loss_fn must return losses that depend on the logits")
    pairs = zip(grads, seen, strict=True)
    return [torch.zeros_like(tensor) if g is None else g for g, tensor in pairs]


def _is_floating(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.dtype.is_floating_point


def _as_leaf(tensor: Tensor) -> Tensor:
    return (tensor.clone() if tensor.is_inference() else tensor).detach().requires_grad_()
