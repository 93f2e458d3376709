"""Losses that give loss, per-sample losses, score and gradient from one pass over the logits.

The score of a sample is ``|g_i|``, the L2 norm of its gradient with respect to the logits: the
quantity whose running mean and variance make the sampling probabilities (Kutsuna 2025, section 7;
the bound of Katharopoulos and Fleuret 2018, eq. 19). All of it is computed in the forward pass; the
backward pass multiplies the saved gradient by the incoming one, and not even that where it is 1.

First of the three operations of a step: loss -> update -> sample. A :class:`fastis.ScoredLoss` is
all that passes on.
"""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor

from fastis import check
from fastis.autograd import attach, needs_operator
from fastis.kernels import kernels_for
from fastis.kernels.loss import CrossEntropyOptions, Denominator, ElementwiseOptions, Wanted
from fastis.scored import MAX_MEAN_GRAD, ScoredLoss, UnweightedLoss

__all__ = ["binary_cross_entropy_with_logits", "cross_entropy", "mse_loss"]

_DEFAULTS = CrossEntropyOptions()
_LOGITS = frozenset(check.LOGITS)
_is_grad_enabled = torch.is_grad_enabled
_new_tuple = tuple.__new__
_float32, _float64, _int64 = torch.float32, torch.float64, torch.int64


def cross_entropy(
    logits: Tensor,
    target: Tensor,
    weights: Tensor | None = None,
    *,
    class_weights: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
    denominator: float | Tensor | None = None,
    **unknown: NoReturn,
) -> ScoredLoss:
    """Cross-entropy with the score of every sample, from one pass over the logits.

    Without ``weights`` the loss, its gradient and its denominator are those of
    :func:`torch.nn.functional.cross_entropy`. The score is ``|softmax(z_i) - onehot(y_i)|``
    (Katharopoulos and Fleuret 2018, eq. 19; Kutsuna 2025, section 7), without the cancellation of
    that form: it stays right to 1e-6 for samples with a margin of 88. Equal, for ``[B, C]``::

        losses = F.cross_entropy(logits, target, weight=class_weights, reduction="none")
        (g,) = torch.autograd.grad(losses.sum(), logits)
        score = g.norm(dim=1)
        mean_grad = (weights[:, None] * g).mean(0)
        loss = (weights * losses).sum() / (denominator or B)

    Parameters
    ----------
    logits : Tensor
        ``[B, C]``, or ``[B, T, C]`` for sequences: the class dimension is the last one. float32,
        float64, bfloat16 or float16, any strides (rows that are not contiguous are copied).
    target : Tensor
        class indices (int64, ``logits.shape[:-1]``), or class probabilities (floating, the shape
        of the logits).
    weights : Tensor, optional
        ``[B]``: the coefficients ``r_i = 1/(N p_i)`` of the draws, ``batch.weights``.
    class_weights : Tensor, optional
        ``[C]``: torch's ``weight``.
    ignore_index : int
        a target of this index is a zero term: loss, score and gradient 0.
    label_smoothing : float
        in [0, 1].
    reduction : str
        ``"mean"``, ``"sum"`` or ``"none"`` (``[B]``: ``r_i loss_i``; for sequences a sample's loss
        is the sum over its unignored tokens).
    denominator : float or Tensor, optional
        of the mean. Default without ``weights``: torch's, from the labels of the batch. Default
        with ``weights``: the constant B (B T for sequences), because a denominator that depends on
        the batch would bias the estimate. A tensor must hold one number.

    Returns
    -------
    ScoredLoss
        ``loss``, ``losses`` ``[B]``, ``score`` ``[B]`` (for sequences the root of the sum over
        tokens of ``|g_t|^2``), ``mean_grad`` ``[C]`` or None.

    Raises
    ------
    TypeError, ValueError
        for a wrong type, dtype, shape, device or option, naming the argument; ValueError also for
        a tensor other than the logits that requires grad.
    IndexError
        for a class index out of range, before anything is computed (CPU). On other devices the
        sample's loss, score and gradient become NaN instead.
    """
    if unknown:
        check.unknown_arguments("cross_entropy", unknown)
    if (
        not isinstance(logits, Tensor)
        or logits.dtype not in _LOGITS
        or not 2 <= len(shape := logits.shape) <= 3
        or shape[-1] == 0
    ):
        check.logits("logits", logits, "[B, C] or [B, T, C] with C >= 1", (2, 3))
    on_cpu = logits.is_cpu
    if (
        type(target) is not Tensor
        or target.dtype is not _int64
        or target.shape != ((shape[0],) if len(shape) == 2 else (shape[0], shape[1]))
        or not (target.is_cpu if on_cpu else _on_one_gpu(logits, target))
    ):
        target = check.class_target(logits, target)
    options = _DEFAULTS
    if class_weights is not None or label_smoothing != 0.0 or ignore_index != -100:
        options = check.class_options(logits, class_weights, ignore_index, label_smoothing)
    if weights is not None or denominator is not None or reduction != "mean":
        if not (  # a sampler's coefficients, the common case, need no conversion
            denominator is None
            and reduction == "mean"
            and type(weights) is Tensor
            and weights.dtype is _float32
            and logits.dtype is not _float64
            and weights.shape == (shape[0],)
            and (weights.is_cpu if on_cpu else _on_one_gpu(logits, weights))
            and weights.is_contiguous()
            and not weights.requires_grad
        ):
            weights, denominator = check.weighting(logits, weights, reduction, denominator)
        if denominator is None:
            denominator = float(shape[0] if len(shape) == 2 else shape[0] * shape[1])
    wanted = (
        denominator,
        reduction != "none",
        logits.requires_grad and _is_grad_enabled(),
        len(shape) == 2 and shape[1] <= MAX_MEAN_GRAD,
    )
    if needs_operator("cross_entropy", logits, target, weights, options[0]):
        return _by_operator("cross_entropy", logits, target, weights, options, Wanted(*wanted))
    kernels = kernels_for("loss", "cpu" if on_cpu else logits.device.type)
    loss, losses, score, mean_grad, grad = kernels.cross_entropy(
        logits, target, weights, options, _new_tuple(Wanted, wanted)
    )
    made: type[ScoredLoss] = ScoredLoss
    if grad is not None:
        loss = attach(logits, loss, grad, kernels)
        if weights is None and wanted[1]:
            made = UnweightedLoss
    return _new_tuple(made, (loss, losses, score, mean_grad))


def binary_cross_entropy_with_logits(
    logits: Tensor,
    target: Tensor,
    weights: Tensor | None = None,
    *,
    pos_weight: Tensor | None = None,
    label_reduction: str | None = None,
    reduction: str = "mean",
    denominator: float | Tensor | None = None,
    **unknown: NoReturn,
) -> ScoredLoss:
    """Binary cross-entropy with the score of every sample, from one pass over the logits.

    Without ``weights`` equal to :func:`torch.nn.functional.binary_cross_entropy_with_logits`.
    Loss and score of a sample follow one convention: the mean over its L outputs, or the sum
    (Kutsuna 2025, section 7, with ``g = (1-y) sigmoid(z) - pos_weight y sigmoid(-z)``). Equal::

        losses = F.binary_cross_entropy_with_logits(
            logits, target, pos_weight=pos_weight, reduction="none").mean(1)
        (g,) = torch.autograd.grad(losses.sum(), logits)
        score = g.norm(dim=1)
        loss = (weights * losses).sum() / (denominator or B)

    Parameters
    ----------
    logits : Tensor
        ``[B, L]``, ``[B]`` (one output) or ``[B, ...]`` (outputs of any shape).
    target : Tensor
        the shape of the logits, in [0, 1]; any real dtype.
    weights : Tensor, optional
        ``[B]``: the coefficients ``r_i`` of the draws.
    pos_weight : Tensor, optional
        one weight per output (``logits.shape[1:]``) or a single one.
    label_reduction : str, optional
        ``"mean"`` or ``"sum"`` over the outputs of a sample. Default: as torch, ``"sum"`` under
        ``reduction="sum"`` and ``"mean"`` otherwise.
    reduction, denominator
        over samples, as in :func:`cross_entropy`; the denominator of the mean is B.

    Returns
    -------
    ScoredLoss
        ``mean_grad`` is ``[L]`` for ``[B, L]`` and ``[1]`` for ``[B]`` logits, else None.

    Raises
    ------
    TypeError, ValueError
        for a wrong type, dtype, shape, device or option, naming the argument.
    """
    if unknown:
        check.unknown_arguments("binary_cross_entropy_with_logits", unknown)
    check.logits("logits", logits, "[B], [B, L] or [B, ...]", tuple(range(1, 9)))
    return _elementwise(
        "binary_cross_entropy_with_logits", logits, target, weights,
        check.pos_weight(logits, pos_weight), label_reduction, reduction, denominator,
    )  # fmt: skip


def mse_loss(
    prediction: Tensor,
    target: Tensor,
    weights: Tensor | None = None,
    *,
    label_reduction: str | None = None,
    reduction: str = "mean",
    denominator: float | Tensor | None = None,
    **unknown: NoReturn,
) -> ScoredLoss:
    """Squared error with the score of every sample, from one pass over the prediction.

    Without ``weights`` equal to :func:`torch.nn.functional.mse_loss`. ``g = 2 (z - y)``, and loss
    and score of a sample follow one convention: the mean over its L outputs, or the sum. Equal::

        losses = F.mse_loss(prediction, target, reduction="none").mean(1)
        score = (2 * (prediction - target) / L).norm(dim=1)
        loss = (weights * losses).sum() / (denominator or B)

    Parameters
    ----------
    prediction : Tensor
        ``[B, L]``, ``[B]`` or ``[B, ...]``.
    target : Tensor
        exactly the shape of the prediction: nothing is broadcast.
    weights, label_reduction, reduction, denominator
        as in :func:`binary_cross_entropy_with_logits`.

    Returns
    -------
    ScoredLoss
        as :func:`binary_cross_entropy_with_logits`.

    Raises
    ------
    TypeError, ValueError
        for a wrong type, dtype, shape, device or option, naming the argument.
    """
    if unknown:
        check.unknown_arguments("mse_loss", unknown)
    check.logits("prediction", prediction, "[B], [B, L] or [B, ...]", tuple(range(1, 9)))
    return _elementwise(
        "mse_loss", prediction, target, weights, None, label_reduction, reduction, denominator
    )


def _on_one_gpu(logits: Tensor, other: Tensor) -> bool:
    return logits.is_cuda and other.is_cuda and logits.get_device() == other.get_device()


def _elementwise(
    name: str,
    logits: Tensor,
    target: Tensor,
    weights: Tensor | None,
    pos_weight: Tensor | None,
    label_reduction: str | None,
    reduction: str,
    denominator: Denominator,
) -> ScoredLoss:
    """The losses that are sums over the outputs of a sample, on logits seen as ``[B, L]``."""
    target = check.elementwise_target(logits, target)
    weights, denominator = check.weighting(logits, weights, reduction, denominator)
    if label_reduction is None:
        label_reduction = "sum" if reduction == "sum" else "mean"
    check.choice("label_reduction", label_reduction, ("mean", "sum"))
    shape = logits.shape
    batch, outputs = shape[0], shape[1:].numel()
    options = ElementwiseOptions(pos_weight, float(outputs) if label_reduction == "mean" else 1.0)
    wanted = Wanted(
        float(batch) if denominator is None else denominator,
        reduction != "none",
        logits.requires_grad and _is_grad_enabled(),
        len(shape) <= 2 and outputs <= MAX_MEAN_GRAD,
    )
    by_operator = needs_operator(name, logits, target, weights, pos_weight)
    flat = (logits if by_operator else logits.detach()).reshape(batch, outputs)
    target = target.reshape(batch, outputs)
    if by_operator:
        return _by_operator(name, flat, target, weights, options, wanted)
    kernels = kernels_for("loss", logits.device.type)
    loss, losses, score, mean_grad, grad = getattr(kernels, name)(
        flat, target, weights, options, wanted
    )
    made: type[ScoredLoss] = ScoredLoss
    if grad is not None:
        loss = attach(logits, loss, grad.view(shape), kernels)
        if weights is None and wanted.reduce:
            made = UnweightedLoss
    return _new_tuple(made, (loss, losses, score, mean_grad))


def _by_operator(name: str, *arguments: Any) -> ScoredLoss:
    from fastis import operators

    return ScoredLoss(*operators.call(name, *arguments))
