"""Weighted batch normalisation by torch's own operators, on any device.

The moments are those of a mixture: within each sample, and between the samples' means. Each
function but the first two reads its tensors once; these are the pieces that torch's fused forward
and backward passes consist of, with the coefficients between them.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastis.kernels.batch_norm import Merge, Running


def forward(
    x: Tensor,  # [B, C, *]
    share: Tensor,  # [B], sums to 1; float64 for float64, else float32, like all that follow
    weight: Tensor | None,  # [C]
    bias: Tensor | None,  # [C]
    eps: float,
    running: Running | None = None,
    merge: Merge | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """``y``, mean ``[C]`` and (biased) variance ``[C]``; moves what is ``running``."""
    mean, var = _moments(x, share)
    if merge is not None:
        mean, var = merge(mean, var)
    if running is not None:
        running.move(mean, var)
    return F.batch_norm(x, mean, var, weight, bias, False, 0.0, eps), mean, var


def backward(
    grad_output: Tensor,
    x: Tensor,
    share: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    var: Tensor,
    eps: float,
    with_input: bool,
    merge: Merge | None = None,
) -> tuple[Tensor | None, Tensor, Tensor]:
    """Gradients in ``x`` (None unless ``with_input``), ``weight`` and ``bias``."""
    rstd = torch.rsqrt(var + eps)
    _, grad_weight, grad_bias = torch.ops.aten.native_batch_norm_backward(
        grad_output, x, weight, None, None, mean, rstd, True, eps, [False, True, True]
    )
    if not with_input:
        return None, grad_weight, grad_bias
    sums = grad_bias.to(mean.dtype), grad_weight.to(mean.dtype)
    sum_dy, sum_dy_xhat = sums if merge is None else merge(*sums)
    # dx = scale dy - share / S scale (sum_dy + xhat sum_dy_xhat), as scale dy + slope x + offset.
    scale = rstd if weight is None else weight * rstd
    spatial, after = x.shape[2:].numel(), (1,) * (x.dim() - 2)
    slope = torch.outer(share / -spatial, scale * rstd * sum_dy_xhat)
    offset = torch.outer(share / -spatial, scale * sum_dy) - slope * mean
    grad = torch.addcmul(offset.view(*offset.shape, *after), slope.view(*slope.shape, *after), x)
    return grad.addcmul_(scale.view(-1, *after), grad_output).to(x.dtype), grad_weight, grad_bias


def _moments(x: Tensor, share: Tensor) -> tuple[Tensor, Tensor]:
    values = x.to(share.dtype).reshape(*x.shape[:2], x.shape[2:].numel())
    within, means = torch.var_mean(values, 2, correction=0)
    by_sample = share[:, None]
    mean = (by_sample * means).sum(0)
    return mean, (by_sample * (within + (means - mean).square())).sum(0)
