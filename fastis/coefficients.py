"""The coefficients of a minibatch on their way to the layers: a context, one for each thread."""

from __future__ import annotations

import contextlib
import threading
import warnings
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

is_compiling = torch.compiler.is_dynamo_compiling
backward_number = torch._C._current_graph_task_id  # of the backward pass that runs here; else -1


class _Local(threading.local):
    """The innermost context of each thread."""

    active: batch_weights | None = None


local = _Local()


class batch_weights:
    """Give the coefficients of a minibatch to the model's weighted BatchNorm layers.

    ::

        batch = sampler.sample()
        with fastis.batch_weights(batch.weights):
            logits = model(x[batch.indices])

    Layers in training mode take their statistics from the innermost context of their thread, and
    raise an error without one: coefficients of an earlier step are never used. Activation
    checkpointing runs a forward pass again within the backward pass, outside of the context: see
    :meth:`for_checkpoint`.

    Parameters
    ----------
    weights : Tensor or None
        ``[B]``, float32 or float64, on the model's device: ``batch.weights``, not negative and not
        all 0. None for a minibatch that was drawn uniformly: torch's own statistics, bit for bit.

    Raises
    ------
    TypeError, ValueError
        for anything else. From a layer: ValueError for as many samples as there are no
        coefficients for, and for another device; RuntimeError without a context.

    Warns
    -----
    UserWarning
        where no layer saw the coefficients: the model was not converted, or its layers have been
        replaced since.
    """

    def __init__(self, weights: Tensor | None) -> None:
        self.weights = weights
        self.used = False
        self._outer: list[batch_weights | None] = []  # of each time that this one is entered
        if weights is None:
            return
        if not isinstance(weights, Tensor):
            raise TypeError(f"weights must be a tensor or None, got {type(weights).__name__}")
        if weights.dim() != 1:
            raise ValueError(f"weights must have shape [B], got {list(weights.shape)}")
        if weights.dtype not in (torch.float32, torch.float64):
            raise TypeError(f"weights must be float32 or float64, got {weights.dtype}")
        if weights.requires_grad:
            raise ValueError("weights must be constants, got a tensor that requires grad")
        self._parts: dict[tuple[torch.dtype, int, int], tuple[Tensor, Tensor]] = {}

    def shares(self, dtype: torch.dtype, spatial: int) -> tuple[Tensor, Tensor]:
        """``r / R`` and the correction of the variance over ``spatial`` positions of each sample.

        Computed once for all layers of a kind, but in a graph that is to see other coefficients.
        """
        weights = self.weights
        assert weights is not None
        if is_compiling() or (weights.is_cuda and torch.cuda.is_current_stream_capturing()):
            return _shares(weights.to(dtype), spatial)
        version = 0 if weights.is_inference() else weights._version
        key = dtype, spatial, version
        found = self._parts.get(key)
        if found is None:
            found = self._parts[key] = _shares(weights.to(dtype), spatial)
        return found

    def __enter__(self) -> batch_weights:
        self.backward = -1 if is_compiling() else backward_number()
        self._outer.append(local.active)
        local.active = self
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        local.active = self._outer.pop()
        if kind is None and self.weights is not None and not self.used and not is_compiling():
            warnings.warn(
                "no weighted BatchNorm layer saw the coefficients of batch_weights: convert the "
                "model by fastis.weighted_batch_norm (after convert_sync_batchnorm, not before)",
                stacklevel=2,
            )

    @staticmethod
    def for_checkpoint() -> tuple[Any, Any]:
        """The ``context_fn`` of ``torch.utils.checkpoint.checkpoint(..., use_reentrant=False)``.

        What is computed again in the backward pass then has the coefficients of the minibatch that
        it was computed with first, whichever context is open by then.
        """
        active = local.active
        again = contextlib.nullcontext() if active is None else batch_weights(active.weights)
        return contextlib.nullcontext(), again


def _shares(weights: Tensor, spatial: int) -> tuple[Tensor, Tensor]:
    share = weights / weights.sum()
    return share, correction(spatial / share.square().sum())


def correction(count: Tensor) -> Tensor:
    """n / (n - 1), where n is ``count``, at least 2."""
    count = count.clamp(min=2)
    return count / (count - 1)
