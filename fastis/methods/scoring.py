"""Scores from a forward pass of the user's: calls of ``score_fn``, checked."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fastis import check
from fastis.batch import Scored
from fastis.kernels.layout import Table
from fastis.methods.base import ScoreFn

_FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_CHUNK = 1000  # samples a call, when all are scored


def score(score_fn: ScoreFn, indices: Tensor, pick: Callable[[Scored], Tensor]) -> Tensor:
    """float32 [n]: what ``score_fn`` says of the samples ``indices`` int64 [n].

    ``pick`` chooses the column of a ScoredLoss; a tensor is taken as it is.

    Raises
    ------
    TypeError, ValueError
        when what it returns is neither, or has another shape, dtype or device.
    """
    with torch.no_grad():
        found = score_fn(indices)
        if not isinstance(found, Tensor):
            if not hasattr(found, "score"):
                raise TypeError(
                    "score_fn must return a ScoredLoss or a tensor of scores, "
                    f"got {type(found).__name__}"
                )
            found = pick(found)
        checked = check.vector(
            "score_fn(indices)", found.detach(), len(indices), _FLOATS, indices.device
        )
        return checked.float()


def score_all(score_fn: ScoreFn, table: Table, pick: Callable[[Scored], Tensor]) -> Tensor:
    """float32 [N]: the same of all samples, in calls of at most 1000; 0 of excluded ones."""
    everything = torch.arange(table.constants.num_samples, device=table.device)
    wanted = everything[table.is_active()] if table.excludes else everything
    found = torch.cat([score(score_fn, part, pick) for part in wanted.split(_CHUNK)])
    return found.new_zeros(len(everything)).index_copy_(0, wanted, found)
