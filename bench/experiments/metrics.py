"""Ranking metrics of multi-label classification, in plain torch and float64."""

from __future__ import annotations

import torch
from torch import Tensor


def average_precision(scores: Tensor, target: Tensor) -> Tensor:
    """Average precision of every label.

    ``AP = sum_k (R_k - R_(k-1)) P_k`` over the distinct scores in falling order, with precision P
    and recall R of "score at least the k-th": samples of equal score enter together, so that the
    order of the data plays no role. Equal to scikit-learn's ``average_precision_score``.

    Parameters
    ----------
    scores : Tensor ``[N, L]``
    target : Tensor ``[N, L]`` of zeros and ones

    Returns
    -------
    Tensor ``[L]``, float64; NaN for a label that no sample has.
    """
    scores, order = scores.double().sort(dim=0, descending=True)
    hits = target.double().gather(0, order).cumsum(0)
    position = torch.arange(1, len(scores) + 1, dtype=torch.float64, device=scores.device)
    is_last = torch.ones_like(scores, dtype=torch.bool)  # of its group of equal scores
    is_last[:-1] = scores[1:] != scores[:-1]
    # Within a group every hit counts with the precision at the group's end: carried backwards.
    ends = torch.where(is_last, position[:, None], float("inf")).flip(0).cummin(0).values.flip(0)
    precision = hits.gather(0, ends.long() - 1) / ends
    gained = torch.diff(hits, dim=0, prepend=torch.zeros_like(hits[:1]))
    return (gained * precision).sum(0) / hits[-1]


def area_under_roc(scores: Tensor, target: Tensor) -> Tensor:
    """Area under the ROC curve of every label: the probability that a random positive scores above
    a random negative, ties counting one half (Mann and Whitney).

    Parameters
    ----------
    scores : Tensor ``[N, L]``
    target : Tensor ``[N, L]`` of zeros and ones

    Returns
    -------
    Tensor ``[L]``, float64; NaN for a label that all or no samples have.
    """
    areas = []
    for score, label in zip(scores.double().unbind(1), target.bool().unbind(1), strict=True):
        positive, negative = score[label], score[~label].sort().values
        below = torch.searchsorted(negative, positive, right=False)
        not_above = torch.searchsorted(negative, positive, right=True)
        areas.append((below + not_above).double().sum() / (2 * len(positive) * len(negative)))
    return torch.stack(areas)
