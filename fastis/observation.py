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
from fastis.check import readable
from fastis.kernels.layout import Table
from fastis.methods import Method
from fastis.methods.base import Observation, Scored
from fastis.sampling import Batch

_int64, _float32, _cpu = torch.int64, torch.float32, torch.device("cpu")
_FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_observe_score = Method.observed
_new_tuple = tuple.__new__  # half the time of a named tuple's own


def observation(
    table: Table, method: Method, batch: Batch, out: Scored | Sequence[Scored]
) -> Observation:
    """What the method is to learn from.

    Raises
    ------
    TypeError, ValueError
        naming the argument of ``Sampler.update``, what was expected and what came.
    """
    try:
        indices, weights = batch
    except (TypeError, ValueError):
        raise TypeError(f"batch must be a Batch, got {type(batch).__name__}") from None
    try:
        score, mean_grad = out.score, out.mean_grad  # type: ignore[union-attr]
        if type(method).observed is _observe_score:
            observed = score
        else:
            observed = _observed(method, "out", cast(Scored, out))
    except AttributeError:
        observed, score, mean_grad = _join(method, out)
    seen = _new_tuple(Observation, (indices, weights, observed, score, mean_grad))
    return seen if _is_ready(table.device, seen) else _made_ready(table.device, seen)


def _observed(method: Method, name: str, out: Scored) -> Tensor:
    """``method.observed``, which may compute with the losses."""
    readable(f"{name}.losses", out.losses)
    return method.observed(out)


def _join(method: Method, parts: Scored | Sequence[Scored]) -> tuple[Tensor, Tensor, Tensor | None]:
    """Parts of one minibatch, in order: concatenated, mean gradients weighted by their sizes."""
    if not isinstance(parts, Sequence) or not all(hasattr(part, "score") for part in parts):
        raise TypeError(
            "out must be a ScoredLoss (of fastis.cross_entropy and the like) or a sequence of "
            f"them, got {type(parts).__name__}"
        )
    if not parts:
        raise ValueError("out must have at least one part, got an empty sequence")
    scores, all_observed, shares = [], [], []
    for i, part in enumerate(parts):
        name = f"out[{i}]"
        scores.append(_vector(f"{name}.score", part.score))
        all_observed.append(_vector(f"{name}.losses", _observed(method, name, part)))
        if part.mean_grad is not None:
            mean_grad = _vector(f"{name}.mean_grad", part.mean_grad)
            shares.append(mean_grad * part.score.numel())
    observed, score = torch.cat(all_observed), torch.cat(scores)
    if len(shares) < len(parts):
        return observed, score, None
    if len({len(share) for share in shares}) > 1:
        lengths = [len(share) for share in shares]
        raise ValueError(f"out.mean_grad must have one length in all parts, got {lengths}")
    return observed, score, torch.stack(shares).sum(0) / score.numel()


def _vector(name: str, value: object) -> Tensor:
    """A floating vector without graph, whose memory can be read."""
    tensor = readable(name, value).detach()
    if tensor.dtype not in _FLOATS and not tensor.is_complex():
        tensor = tensor.float()
    return check.vector(name, tensor, None, _FLOATS, tensor.device)


def _is_ready(device: torch.device, seen: Observation) -> bool:
    """Whether the kernels can take it as it is; what fails here may still be legal.

    Wrappers of other tensors have no address.
    """
    indices, weights, observed, score, mean_grad = seen
    try:
        shape = score.shape
        return (
            len(shape) == 1
            and shape == indices.shape == weights.shape
            and indices.dtype is _int64
            and weights.dtype is score.dtype is _float32
            and (
                indices.is_cpu and weights.is_cpu and score.is_cpu
                if device == _cpu
                else indices.device == weights.device == score.device == device
            )
            and indices.is_contiguous()
            and weights.is_contiguous()
            and score.is_contiguous()
            and not score.requires_grad
            and indices.data_ptr() != 0
            and weights.data_ptr() != 0
            and score.data_ptr() != 0
            and not (weights.is_neg() or score.is_neg())  # only floats are negated lazily
            and (observed is score or _is_vector(device, observed, shape))
            and (mean_grad is None or _is_vector(device, mean_grad))
        )
    except (AttributeError, RuntimeError):  # no tensor, or one without memory
        return False


def _is_vector(device: torch.device, tensor: Tensor, shape: torch.Size | None = None) -> bool:
    """float32, as the kernels read it."""
    return (
        (tensor.dim() == 1 if shape is None else tensor.shape == shape)
        and tensor.dtype is _float32
        and tensor.device == device
        and tensor.is_contiguous()
        and not tensor.requires_grad
        and tensor.data_ptr() != 0
        and not tensor.is_neg()
    )


def _made_ready(device: torch.device, seen: Observation) -> Observation:
    """Converts what is legal and explains what is not."""
    ready: dict[str, Tensor] = {}
    length: int | None = None
    for field, name, dtype in (
        ("indices", "batch.indices", _int64),
        ("weights", "batch.weights", _float32),
        ("score", "out.score", None),
        ("observed", "out.losses", None),
    ):
        tensor = readable(name, getattr(seen, field)).detach()  # a memory must not hold graphs
        if dtype is None and not tensor.is_complex():
            tensor = tensor.float()
        check.vector(name, tensor, length, (dtype or _float32,), device)
        if not tensor.is_contiguous():
            raise ValueError(f"{name} must be contiguous, got strides {tensor.stride()}")
        length = len(tensor)
        ready[field] = tensor
    if seen.mean_grad is not None:
        mean_grad = readable("out.mean_grad", seen.mean_grad).detach()
        ready["mean_grad"] = check.vector("out.mean_grad", mean_grad, None, _FLOATS, device).float()
    return seen._replace(**ready)
