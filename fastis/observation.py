"""What a minibatch has shown: a loss's output, checked and made ready for the table.

Between the user's loop and :meth:`fastis.methods.Method.update`. The checks come before anything
changes; where all is as it should be they are a handful of comparisons.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor

from fastis import check
from fastis.methods import Method
from fastis.methods.base import Observation, Scored
from fastis.sampling import Batch
from fastis.table import Table

_int64, _float32 = torch.int64, torch.float32
_FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def observation(
    table: Table, method: Method, batch: Batch, out: Scored | Sequence[Scored]
) -> Observation:
    """What the method is to learn from.

    Raises
    ------
    TypeError, ValueError
        naming the argument of ``Sampler.update``, what was expected and what came.
    """
    indices, weights = batch
    try:
        score, mean_grad = out.score, out.mean_grad  # type: ignore[union-attr]
        observed = method.observed(cast(Scored, out))
    except AttributeError:
        observed, score, mean_grad = _join(method, out)
    if score.dtype is not _float32:
        for name, value in (("out.losses", observed), ("out.score", score)):
            if not isinstance(value, Tensor):
                raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
        observed, score = observed.float(), score.float()
    if score.requires_grad or observed.requires_grad:  # a memory must not hold graphs
        observed, score = observed.detach(), score.detach()
    if mean_grad is not None:
        mean_grad = _check_mean_grad(table, mean_grad)
    _check_update(table, indices, weights, observed, score)
    return Observation(indices, weights, observed, score, mean_grad)


def _join(method: Method, parts: Scored | Sequence[Scored]) -> tuple[Tensor, Tensor, Tensor | None]:
    """Parts of one minibatch, in order: concatenated, mean gradients weighted by their sizes."""
    if not isinstance(parts, Sequence) or not all(hasattr(part, "score") for part in parts):
        raise TypeError(
            "out must be a ScoredLoss (of fastis.cross_entropy and the like) or a sequence of "
            f"them, got {type(parts).__name__}"
        )
    if not parts:
        raise ValueError("out must have at least one part, got an empty sequence")
    observed = torch.cat([method.observed(part) for part in parts])
    score = torch.cat([part.score for part in parts])
    shares = [
        part.mean_grad * (part.score.numel() / score.numel())
        for part in parts
        if part.mean_grad is not None
    ]
    mean_grad = torch.stack(shares).sum(0) if len(shares) == len(parts) else None
    return observed, score, mean_grad


def _check_mean_grad(table: Table, mean_grad: Tensor) -> Tensor:
    """float32 [C], contiguous, on the table's device."""
    if (
        isinstance(mean_grad, Tensor)
        and mean_grad.dtype is _float32
        and mean_grad.dim() == 1
        and mean_grad.device == table.device
        and mean_grad.is_contiguous()
        and not mean_grad.requires_grad
    ):
        return mean_grad
    return check.vector("out.mean_grad", mean_grad, None, _FLOATS, table.device).detach().float()


def _check_update(
    table: Table, indices: Tensor, weights: Tensor, observed: Tensor, score: Tensor
) -> None:
    """Shapes, dtypes, devices; the happy path is a handful of comparisons."""
    shape = indices.shape
    if (
        len(shape) == 1
        and shape == score.shape == weights.shape == observed.shape
        and indices.dtype is _int64
        and weights.dtype is score.dtype is observed.dtype is _float32
        and indices.device == score.device == weights.device == observed.device == table.device
        and indices.is_contiguous()
        and weights.is_contiguous()
        and score.is_contiguous()
        and observed.is_contiguous()
    ):
        return
    check.vector("batch.indices", indices, None, (_int64,), table.device)
    for name, tensor, dtype in (
        ("batch.indices", indices, _int64),
        ("batch.weights", weights, _float32),
        ("out.score", score, _float32),
        ("out.losses", observed, _float32),
    ):
        check.vector(name, tensor, shape[0], (dtype,), table.device)
        if not tensor.is_contiguous():
            raise ValueError(f"{name} must be contiguous, got strides {tensor.stride()}")
