"""Which loss a model of transformers means by its logits and labels, as one of fastis.

A model says so in two ways: by its configuration, and by the loss that it computes itself when it
gets labels. The second is what :func:`find_shift` asks for.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastis.check import describe
from fastis.integrations.parts import InParts
from fastis.loss import binary_cross_entropy_with_logits, cross_entropy, mse_loss
from fastis.scored import ScoredLoss

IGNORED = -100  # the label of what has no loss
_COUNTED = 1024  # samples
OVERRIDE = "override scored_loss(outputs, labels, weights)"


def logits_of(outputs: Any) -> Tensor:
    """The logits of a model's output; in a tuple they come first, after a loss.

    Raises
    ------
    TypeError
        where there are none.
    """
    if isinstance(outputs, Mapping):
        logits = outputs.get("logits")
    else:
        logits = next((t for t in outputs if isinstance(t, Tensor) and t.dim() > 0), None)
    if not isinstance(logits, Tensor):
        raise TypeError(f"model must return logits, got {describe(logits)}: {OVERRIDE}")
    return logits


def aligned(labels: Tensor, shift: bool | None) -> Tensor:
    """Labels ``[b, T]`` in the place of the logits that predict them: shifted, one earlier."""
    return F.pad(labels, (0, 1), value=IGNORED)[:, 1:] if shift else labels


def mean_tokens(dataset: Any, in_parts: InParts, shift: bool | None) -> float:
    """Mean number of labels of a sample that have a loss.

    A constant divisor of the sum over tokens; a minibatch's own number would bias the estimate
    (transformers issue 34198). Counted over 1024 samples at equal distances, at most.

    Parameters
    ----------
    dataset : torch.utils.data.Dataset
        map-style.
    in_parts : InParts
        the collator, which makes ``"labels"`` ``[b, T]``.
    shift : bool
        as in :func:`model_loss`.

    Raises
    ------
    ValueError
        where there are none.
    """
    total, size = len(dataset), in_parts.size
    chosen, count = range(0, total, math.ceil(total / _COUNTED)), 0
    for start in range(0, len(chosen), size):
        inputs = in_parts.collate([dataset[i] for i in chosen[start : start + size]])
        count += int((aligned(inputs["labels"], shift) != IGNORED).sum())
    if count == 0:
        raise ValueError(f"train_dataset must have labels other than {IGNORED}, got none")
    return count / len(chosen)


def model_loss(
    config: Any,
    logits: Tensor,
    labels: Tensor,
    weights: Tensor | None,
    *,
    shift: bool | None = False,
    label_smoothing: float = 0.0,
    denominator: float | None = None,
) -> ScoredLoss:
    """Cross-entropy, squared error or binary cross-entropy, chosen as transformers does.

    Parameters
    ----------
    config : PretrainedConfig or None
        whose ``problem_type`` decides, if it is set.
    logits : Tensor
        ``[b, C]``, ``[b, T, C]``, or ``[b, L]`` for the other two losses.
    labels : Tensor
        ``[b]``, ``[b, 1]`` or ``[b, T]`` of class indices, or of the logits' shape.
    weights : Tensor or None
        ``[b]``.
    shift : bool
        whether logits predict the label after their own.
    label_smoothing, denominator
        of the cross-entropy.

    Raises
    ------
    ValueError
        for label smoothing with another loss.
    """
    kind = _problem_type(config, logits, labels)
    if kind == "single_label_classification":
        if labels.dim() == 2 and logits.dim() == 2:
            labels = labels.squeeze(1)
        return cross_entropy(
            logits, aligned(labels, shift).long(), weights, ignore_index=IGNORED,
            label_smoothing=label_smoothing, denominator=denominator,
        )  # fmt: skip
    if label_smoothing:
        raise ValueError(f"label_smoothing_factor must be 0 for {kind}, got {label_smoothing}")
    labels = labels.to(logits.dtype)
    if kind == "regression":
        return mse_loss(logits.reshape(labels.shape), labels, weights)
    return binary_cross_entropy_with_logits(logits, labels, weights)


def _problem_type(config: Any, logits: Tensor, labels: Tensor) -> str:
    if stated := getattr(config, "problem_type", None):
        return str(stated)
    if logits.dim() == 2 and logits.shape[1] == 1:
        return "regression"
    is_class = not labels.is_floating_point()
    return "single_label_classification" if is_class else "multi_label_classification"


def find_shift(model: Any, outputs: Any, labels: Tensor) -> bool | None:
    """Whether labels are shifted, by the loss that the model itself computed with them.

    Parameters
    ----------
    model : torch.nn.Module
        for its ``config`` and its name.
    outputs : ModelOutput, dict or tuple
        of the model, called with ``labels``.
    labels : Tensor
        ``[b, ...]``.

    Returns
    -------
    bool or None
        None where it can't be told, because no label has a loss.

    Raises
    ------
    ValueError
        where its loss is neither: it has further terms, or is another one.
    """
    logits = logits_of(outputs)
    loss = outputs["loss"] if isinstance(outputs, Mapping) else outputs[0]
    theirs, ours = float(loss), []
    if not math.isfinite(theirs):
        return None
    tolerance = 1e-3 if loss.dtype == torch.float32 else 2e-2  # bfloat16 has 8 bits
    for shift in (False, True) if logits.dim() == 3 else (False,):
        found = model_loss(getattr(model, "config", None), logits, labels, None, shift=shift)
        ours.append(found.item())
        if math.isclose(theirs, ours[-1], rel_tol=tolerance, abs_tol=1e-5):
            return shift
    raise ValueError(
        "model must have the cross-entropy (or squared error) of its logits for a loss, "
        f"{' or, shifted, '.join(f'{value:.6g}' for value in ours)} here, got {theirs:.6g} from "
        f"{type(model).__name__}: {OVERRIDE}"
    )
