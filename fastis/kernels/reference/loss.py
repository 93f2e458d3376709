"""Losses and scores in plain PyTorch: the oracle that every other backend is tested against.

Any device, float64 or float32 arithmetic, written to be read. One forward pass gives the loss, the
per-sample losses, the score ``|g_i|`` and the gradient (Kutsuna 2025, section 7; Katharopoulos and
Fleuret 2018, eq. 19). The papers' formulas were rebuilt in a form without cancellation: a sample
with a margin of 88 keeps its score, where ``1 - 2 p_y + sum p_j^2`` or ``p_y - 1`` is exactly 0.

Shapes and results: :mod:`fastis.kernels.loss`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastis.kernels.formats import compute_dtype, grad_dtype
from fastis.kernels.loss import (
    CrossEntropyOptions,
    ElementwiseOptions,
    Scored,
    Wanted,
    raise_bad_label,
    scaled,
)


def cross_entropy(
    logits: Tensor,
    target: Tensor,
    weights: Tensor | None,
    options: CrossEntropyOptions,
    wanted: Wanted,
) -> Scored:
    """Cross-entropy against class indices or probabilities."""
    class_weights, ignore_index, label_smoothing = options
    denominator = wanted.denominator
    num_classes = logits.shape[-1]
    z = logits.detach().to(compute_dtype(logits.dtype)).reshape(-1, num_classes)
    if target.dtype == torch.int64:
        y = target.reshape(-1)
        kept = y != ignore_index
        outside = kept & ((y < 0) | (y >= num_classes))
        if y.device.type == "cpu" and bool(outside.any()):
            raise_bad_label(y, int(outside.nonzero()[0]), num_classes)
        label = torch.where(kept & ~outside, y, 0)
        label_weight = z.new_ones(y.shape) if class_weights is None else class_weights[label]
        if label_smoothing == 0:
            loss, norm, g = _label_rows(z, label, label_weight)
        else:
            share = torch.nn.functional.one_hot(label, num_classes).to(z.dtype)
            loss, norm, g = _soft_target_rows(z, share, class_weights, label_smoothing)
        loss = torch.where(outside, math.nan, torch.where(kept, loss, 0))
        norm = torch.where(outside, math.nan, torch.where(kept, norm, 0))
        g = torch.where(outside[:, None], math.nan, torch.where(kept[:, None], g, 0))
        if denominator is None:
            denominator = torch.where(kept, label_weight, 0).sum()
    else:
        share = target.reshape(-1, num_classes)
        loss, norm, g = _soft_target_rows(z, share, class_weights, label_smoothing)
        if denominator is None:
            denominator = float(len(z))
    batch = logits.shape[0]
    losses, score = loss, norm
    if logits.dim() == 3:
        losses = loss.reshape(batch, logits.shape[1]).sum(1)
        score = _norm(norm.reshape(batch, logits.shape[1]))
    g = g.reshape(logits.shape)
    return _reduced(logits, losses, score, g, weights, wanted._replace(denominator=denominator))


def binary_cross_entropy_with_logits(
    logits: Tensor,
    target: Tensor,
    weights: Tensor | None,
    options: ElementwiseOptions,
    wanted: Wanted,
) -> Scored:
    """``loss = (1-y) softplus(z) + w y softplus(-z)``, ``g = (1-y) sigmoid(z) - w y sigmoid(-z)``.

    A sample's sum over its outputs is divided by the divisor.
    """
    pos_weight, divisor = options
    z = logits.detach().to(compute_dtype(logits.dtype))
    on = target if pos_weight is None else target * pos_weight
    off = 1 - target
    tail = torch.exp(-z.abs()).log1p()
    loss = off * (z.clamp(min=0) + tail) + on * ((-z).clamp(min=0) + tail)
    g = (off * torch.sigmoid(z) - on * torch.sigmoid(-z)) / divisor
    return _reduced(logits, loss.sum(1) / divisor, _norm(g), g, weights, wanted)


def mse_loss(
    prediction: Tensor,
    target: Tensor,
    weights: Tensor | None,
    options: ElementwiseOptions,
    wanted: Wanted,
) -> Scored:
    """Squared error: ``loss = (z - y)^2``, ``g = 2 (z - y)``, both divided by the divisor."""
    d = prediction.detach().to(compute_dtype(prediction.dtype)) - target
    g = 2 * d / options.divisor
    return _reduced(prediction, d.square().sum(1) / options.divisor, _norm(g), g, weights, wanted)


def scale_grad(grad: Tensor, grad_output: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """See :func:`fastis.kernels.loss.scaled`."""
    return scaled(grad, grad_output, dtype)


def _label_rows(z: Tensor, y: Tensor, w: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """loss, |g| ``[R]`` and g ``[R, C]`` for labels: sums over ``j != y``, two closed forms."""
    column = y[:, None]
    z_y = z.gather(1, column).squeeze(1)
    others = z.scatter(1, column, -math.inf)
    m = others.amax(1)
    m = torch.where(m == -math.inf, z_y, m)  # only y is possible: loss 0, norm 0
    e = torch.exp(others - m[:, None]).scatter(1, column, 0)
    s = e.sum(1)
    root = torch.sqrt(s.square() + e.square().sum(1))
    d = z_y - m
    u, v = torch.exp(-d), torch.exp(d)
    leads = d >= 0
    loss = torch.where(leads, torch.log1p(s * u), torch.log1p((s - 1) + v) - d)
    p_scale = torch.where(leads, u / (1 + s * u), 1 / (s + v))
    certain = z_y == math.inf  # NaN, as in torch, not certainty
    loss = torch.where(certain, math.nan, loss)
    p_scale = torch.where(certain, math.nan, p_scale)
    g = (e * p_scale[:, None]).scatter(1, column, (-s * p_scale)[:, None])
    return loss * w, root * p_scale * w.abs(), g * w[:, None]


def _soft_target_rows(
    z: Tensor, share: Tensor, class_weights: Tensor | None, label_smoothing: float
) -> tuple[Tensor, Tensor, Tensor]:
    """loss, |g| and g against ``t_j = w_j ((1-a) T_j + a/C)``; the largest logit stays out of sums.

    ``loss = -sum t_j log p_j``, ``g = p sum(t) - t``.
    """
    t = share * (1 - label_smoothing) + label_smoothing / z.shape[1]
    if class_weights is not None:
        t = t * class_weights
    top = z.argmax(1, keepdim=True)
    x = z - z.gather(1, top)
    e = torch.exp(x)
    s = e.scatter(1, top, 0).sum(1)
    t_top = t.gather(1, top).squeeze(1)
    t_rest = t.scatter(1, top, 0).sum(1)
    total = t_rest + t_top
    s = s + 0 * x.gather(1, top).squeeze(1)  # NaN where the maximum is not finite
    loss = (t * -x).sum(1) + total * torch.log1p(s)
    g = e * (total / (1 + s))[:, None] - t
    g = g.scatter(1, top, ((t_rest - t_top * s) / (1 + s))[:, None])
    return loss, _norm(g), g


def _norm(g: Tensor) -> Tensor:
    """Row norms of ``[R, C]``, of numbers as small as exp(-88) too, whose squares are 0."""
    if g.shape[1] == 0:
        return g.new_zeros(len(g))
    largest = g.abs().amax(1)
    unit = torch.where((largest > 0) & largest.isfinite(), largest, 1)
    return torch.where(largest == 0, 0, unit * (g / unit[:, None]).square().sum(1).sqrt())


def _reduced(
    logits: Tensor,
    losses: Tensor,
    score: Tensor,
    g: Tensor,
    weights: Tensor | None,
    wanted: Wanted,
) -> Scored:
    """The weighted loss, mean gradient and gradient from per-sample losses and gradients."""
    denominator, reduce, with_grad, with_mean_grad = wanted
    weighted = losses if weights is None else losses * weights
    if weights is not None:
        g = g * weights.reshape(-1, *[1] * (g.dim() - 1))
    # Not by .mean(): an empty batch has no elements to divide by either way.
    mean_grad = g.sum(0) / g.shape[0] if with_mean_grad and len(g) else None
    if with_mean_grad and mean_grad is None:
        mean_grad = g.new_full(g.shape[1:], math.nan)
    if denominator is None or not reduce:
        loss, denominator = weighted.clone(), 1.0
    else:
        loss = weighted.sum() / denominator
    grad = None
    if with_grad:
        rows = g if isinstance(denominator, float) and denominator == 1 else g / denominator
        # 0 / 0 where torch's denominator is that of no rows at all: such rows are zero terms.
        grad = torch.where(g == 0, 0, rows).to(grad_dtype(logits.dtype)).contiguous()
    return loss, losses, score, mean_grad, grad
