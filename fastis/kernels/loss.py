"""The contract of the loss column: what every backend's losses take and return.

``cross_entropy``, ``binary_cross_entropy_with_logits`` and ``mse_loss`` of
``fastis/kernels/{reference,cpu,triton}/loss.py`` take ``(logits, target, weights, options,
wanted)`` (shapes: B samples, T tokens, C classes, L outputs):

- ``logits`` ``[B, C]`` or ``[B, T, C]``, any strides; ``target`` int64 ``[B]`` or ``[B, T]``, or
  probabilities in the compute dtype shaped as the logits; the elementwise losses have ``[B, L]``
  for both. ``weights`` ``[B]``, the coefficients ``r_i``, in the compute dtype, or None.
- Results, in :func:`fastis.kernels.formats.compute_dtype`: ``(loss, losses, score, mean_grad,
  grad)``. ``loss`` is ``sum_i r_i loss_i / denominator`` when ``reduce``, else ``[B]``,
  ``r_i loss_i``; ``losses`` and ``score`` ``[B]``; ``mean_grad`` ``(1/B) sum_i r_i g_i`` or None
  when it was not asked for; ``grad`` d loss / d logits, contiguous, in
  :func:`fastis.kernels.formats.grad_dtype`, or None.
- Nothing here waits for the device. A label out of range raises IndexError on the CPU; elsewhere
  its row becomes NaN.
"""

from __future__ import annotations

from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

Denominator: TypeAlias = "float | Tensor | None"
Scored: TypeAlias = "tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]"


class CrossEntropyOptions(NamedTuple):
    """Options of cross-entropy."""

    class_weights: Tensor | None = None  # [C], in the compute dtype
    ignore_index: int = -100
    label_smoothing: float = 0.0


class ElementwiseOptions(NamedTuple):
    """Options of the losses that are sums over the outputs of a sample."""

    pos_weight: Tensor | None = None  # [L], in the compute dtype; binary cross-entropy only
    divisor: float = 1.0  # of a sample's sum: 1 or L


class Wanted(NamedTuple):
    """What is to be computed of a loss."""

    denominator: Denominator  # None: torch's own, from the labels (cross-entropy only)
    reduce: bool
    with_grad: bool
    with_mean_grad: bool


def scaled(grad: Tensor, grad_output: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """``grad`` times the 0-d or ``[B]`` ``grad_output``, in ``dtype`` (default: that of ``grad``).

    Every backend's ``scale_grad`` returns this. It may return ``grad`` itself, but must not change
    it where a second backward pass may read it again: only a backend that knows that the graph is
    being freed scales in place.
    """
    scale = grad_output.reshape(grad_output.shape + (1,) * (grad.dim() - grad_output.dim()))
    return (grad * scale).to(grad.dtype if dtype is None else dtype)


def raise_bad_label(labels: Tensor, row: int, num_classes: int) -> None:
    """Raises the IndexError for the flat ``labels[row]``."""
    raise IndexError(
        f"target must hold class indices in [0, {num_classes}) or ignore_index, "
        f"got {int(labels[row])} at flat position {row}"
    )
