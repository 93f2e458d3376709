"""Exact gradients of single samples with respect to all parameters, by torch.func.

What a score, the gradient norm at the logits, stands in for while training; public as
:mod:`fastis.estimators`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn.modules.batchnorm import _BatchNorm

from fastis import check
from fastis.kernels.formats import compute_dtype
from fastis.scored import ScoredLoss

# Without chunk_size: a chunk's gradients, and convolutions' workspaces beside them, shall stay in
# the caches; a few hundred samples are enough to pay for the overhead of a call.
GRADIENTS_AT_ONCE = 2**22
SAMPLES_AT_ONCE = 256

Gradients = dict[str, Tensor]
Loss = Callable[[Any, Any], "Tensor | ScoredLoss"]


def gradient_norms(
    model: nn.Module, loss_fn: Loss, x: Tensor, y: Tensor, *, chunk_size: int | None = None
) -> Tensor:
    """Exact norm of every sample's gradient with respect to all parameters.

    The quantity whose proportional probabilities have the least variance (Kutsuna 2025, eq. 5),
    for which a score, the norm at the logits, stands in while training. Equal::

        for i in range(n):
            loss = loss_fn(model(x[i : i + 1]), y[i : i + 1])
            grads = torch.autograd.grad(loss, trainable)
            norms[i] = torch.cat([g.flatten() for g in grads]).norm()

    Computed by ``torch.func``'s vmap of grad, in chunks; no more than a chunk's gradients exist
    at a time. Modules that vmap can't take (``nn.GRU``, ``nn.RNN``) fail with torch's own error.

    Parameters
    ----------
    model : torch.nn.Module
        called with one sample at a time, ``[1, ...]``. Its parameters that require grad are the
        ones differentiated. Dropout in training mode draws anew for every sample.
    loss_fn : callable
        ``loss_fn(logits [1, ...], target [1, ...])`` -> one value, 0-d or ``[1]``; or a
        :class:`fastis.ScoredLoss`, so that ``fastis.cross_entropy`` serves as it is.
    x : Tensor
        ``[n, ...]``, inputs.
    y : Tensor
        ``[n, ...]``, targets.
    chunk_size : int, optional
        samples at a time; by default as many as fit 16 MiB of float32 gradients, 256 at most.

    Returns
    -------
    Tensor
        ``[n]``, float32 (float64 for float64 parameters), summed in float64; no graph.

    Raises
    ------
    TypeError, ValueError
        for wrong arguments; ValueError also for a model without parameters that require grad, for
        batch normalisation in training mode (a sample alone has no gradient then: call
        ``model.eval()``), and when ``loss_fn`` returns anything but one value.
    """

    def norm(gradients: Gradients) -> Tensor:
        parts = [torch.linalg.vector_norm(g, dtype=torch.float64) for g in gradients.values()]
        return torch.stack(parts).square().sum().sqrt()

    parameters = _trainable(model)
    dtype = compute_dtype(next(iter(parameters.values())).dtype)
    norms = _for_each_sample(norm, model, parameters, loss_fn, x, y, chunk_size)
    return x.new_empty(0, dtype=dtype) if norms is None else norms.to(dtype)


def per_sample_gradients(
    model: nn.Module, loss_fn: Loss, x: Tensor, y: Tensor, *, chunk_size: int | None = None
) -> Tensor:
    """Every sample's gradient with respect to all parameters, as rows.

    Equal::

        for i in range(n):
            loss = loss_fn(model(x[i : i + 1]), y[i : i + 1])
            grads = torch.autograd.grad(loss, trainable)
            rows[i] = torch.cat([g.flatten() for g in grads])

    Parameters
    ----------
    model, loss_fn, x, y, chunk_size
        as in :func:`gradient_norms`.

    Returns
    -------
    Tensor
        ``[n, P]``, P the number of parameters that require grad, in the order of
        ``model.parameters()``; in their dtype; no graph.

    Raises
    ------
    TypeError, ValueError
        as :func:`gradient_norms`.
    """

    def row(gradients: Gradients) -> Tensor:
        return torch.cat([g.flatten() for g in gradients.values()])

    parameters = _trainable(model)
    rows = _for_each_sample(row, model, parameters, loss_fn, x, y, chunk_size)
    if rows is None:
        return row(parameters).new_empty(0, _size(parameters))
    return rows


def _for_each_sample(
    reduce: Callable[[Gradients], Tensor],
    model: nn.Module,
    parameters: Gradients,
    loss_fn: Loss,
    x: Tensor,
    y: Tensor,
    chunk_size: int | None,
) -> Tensor | None:
    """``reduce`` of every sample's gradients, stacked; None when there is no sample."""
    for name, value in (("x", x), ("y", y)):
        if check.tensor(name, value).dim() == 0:
            raise ValueError(f"{name} must have shape [n, ...], got []")
    if len(x) != len(y):
        raise ValueError(f"y must have as many samples as x, {len(x)}, got {len(y)}")
    if chunk_size is None:
        chunk_size = max(1, min(SAMPLES_AT_ONCE, GRADIENTS_AT_ONCE // _size(parameters)))
    check.integer("chunk_size", chunk_size, 1)
    if len(x) == 0:
        return None

    def loss(parameters: Gradients, sample: Tensor, target: Tensor) -> Tensor:
        logits = functional_call(model, parameters, (sample[None],))
        return _one_value(loss_fn(logits, target[None]))

    def reduced(sample: Tensor, target: Tensor) -> Tensor:
        return reduce(grad(loss)(parameters, sample, target))

    with torch.no_grad():  # of the caller's graph; grad works within
        return vmap(reduced, chunk_size=chunk_size, randomness="different")(x, y)


def _trainable(model: nn.Module) -> Gradients:
    """Detached parameters that require grad, by name; or why there is no per-sample gradient."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    for name, module in model.named_modules():
        if isinstance(module, _BatchNorm) and (module.training or not module.track_running_stats):
            raise ValueError(
                "model must not normalise over the minibatch, because then a sample alone has no "
                f"gradient: call model.eval() first (or use group normalisation), got {name!r}, "
                f"{type(module).__name__} with training={module.training}, "
                f"track_running_stats={module.track_running_stats}"
            )
    parameters = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    if not parameters:
        raise ValueError("model must have parameters that require grad, got none")
    return parameters


def _size(parameters: Gradients) -> int:
    return sum(p.numel() for p in parameters.values())


def _one_value(loss: Tensor | ScoredLoss) -> Tensor:
    if isinstance(loss, ScoredLoss):
        loss = loss.loss
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        got = f"shape {list(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        raise ValueError(
            f"loss_fn must return one value for one sample, a tensor 0-d or [1], got {got}"
        )
    return loss.reshape(())
