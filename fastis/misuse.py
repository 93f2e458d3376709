"""Misuse of a sampler that would go on in silence: heard once, at little cost.

What is certain is an error. What may be meant is a warning, once a sampler: draws that nothing is
learnt from, and losses that leave the coefficients out.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed
from torch import Tensor

from fastis import check
from fastis.kernels.layout import Table
from fastis.kernels.table import Batch

LEAST_PATIENCE = 100  # draws: a loader may be so many ahead
_LOOK_EVERY = 32  # losses without coefficients until the next look, which waits for a device


class Watch:
    """What one sampler has heard so far.

    Attributes
    ----------
    silent : bool
        No update so far: every draw is counted.
    """

    def __init__(self, table: Table, group: Any) -> None:
        self.silent = True
        self._group = group
        learns = table.states is not None or bool(table.memory)
        patience = max(table.constants.batches_per_epoch, LEAST_PATIENCE)
        self._patience = patience if learns else None
        self._draws = self._unweighted = 0
        self._may_lack_weights = True

    def drawn(self) -> None:
        """One more draw, and no update so far."""
        if self._draws == 0:
            check_group(self._group)  # which may have come after the sampler
        self._draws += 1
        if self._draws == self._patience:
            warnings.warn(
                f"{self._draws} minibatches drawn and no update so far: the sampler learns nothing "
                "until every minibatch's scored loss goes to sampler.update(batch, out)",
                stacklevel=3,
            )

    def not_surely_weighted(self, batch: Batch, out: Any) -> None:
        """An update whose loss may have been computed without the coefficients.

        Warns if it was, and they are not all 1: that is looked up now and then.
        """
        if isinstance(out, Tensor):  # the scores
            return
        parts = out if isinstance(out, Sequence) and not hasattr(out, "weighted") else (out,)
        if not self._may_lack_weights or all(getattr(p, "weighted", True) for p in parts):
            return
        self._unweighted += 1
        if self._unweighted % _LOOK_EVERY != 1 or _is_capturing(batch.weights):
            return
        if bool((batch.weights != 1).any()):
            self._may_lack_weights = False
            warnings.warn(
                "out was computed without the coefficients of the minibatch, and trains on another "
                "objective: pass batch.weights to the loss, fastis.cross_entropy(logits, target, "
                "batch.weights)",
                stacklevel=3,
            )


def _is_capturing(weights: Tensor) -> bool:
    return weights.is_cuda and torch.cuda.is_current_stream_capturing()


def check_group(group: Any) -> None:
    """Refuses what would make several processes draw the same samples.

    Raises
    ------
    TypeError
        for anything but a process group, None and False.
    ValueError
        for None where a process group of several ranks is initialised.
    """
    if group is False or is_group(group):
        return
    if group is not None:
        raise TypeError(
            "group must be a torch.distributed process group that this process is in, None or "
            f"False, got {check.describe(group)}"
        )
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        ranks = torch.distributed.get_world_size()
        if ranks > 1:
            raise ValueError(
                f"group must be given where torch.distributed has {ranks} processes, or each of "
                "them draws on its own: group=<process group> for one global minibatch of all "
                "(torch.distributed.group.WORLD, say), or group=False for a process on its own, "
                "with seed=rank"
            )


def is_group(group: Any) -> bool:
    """Whether it is a torch.distributed process group."""
    available = torch.distributed.is_available()
    return available and isinstance(group, torch.distributed.ProcessGroup)


def check_returned(batch: Batch, indices: Any) -> None:
    """Refuses ``indices`` of a data set that are not those drawn. Waits for a device.

    Raises
    ------
    TypeError, ValueError
        naming what was expected, and the first that differs.
    """
    found = torch.as_tensor(indices)
    if found.dtype.is_floating_point or found.dtype.is_complex or found.dtype == torch.bool:
        raise TypeError(f"indices must hold integers, got {found.dtype}")
    drawn, found = batch.indices.cpu(), found.detach().cpu().long()
    if found.shape != drawn.shape:
        raise ValueError(
            f"indices must have shape {list(drawn.shape)}, as batch.indices, got "
            f"{list(found.shape)}"
        )
    if not torch.equal(found, drawn):
        at = int((found != drawn).nonzero()[0])
        raise ValueError(
            f"indices[{at}] must be {int(drawn[at])}, as drawn, got {int(found[at])}: batch and "
            "data are not those of one draw"
        )
