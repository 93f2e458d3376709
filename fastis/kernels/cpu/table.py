"""The table on the CPU: csrc/cpu/{table_update,update_cap,table_draw}.cpp."""

from __future__ import annotations

import torch
from torch import Tensor

from fastis.kernels.extension import _C
from fastis.kernels.layout import Table
from fastis.kernels.reference import table as reference
from fastis.kernels.table import Batch, Observation, ShardTotal, Share

_WORD = 2**64 - 1
_PRESENT = -1  # the iteration of a fold
IS_ATOMIC = True  # an update or a draw is one call, which holds the GIL


def update(table: Table, observation: Observation) -> None:
    """See :func:`fastis.kernels.reference.table.update`."""
    indices, weights, observed, score, mean_grad = observation
    _C.update(
        table.handle,
        indices.data_ptr(),
        weights.data_ptr(),
        observed.data_ptr(),
        score.data_ptr(),
        indices.numel(),
        0 if mean_grad is None else mean_grad.data_ptr(),
        0 if mean_grad is None else mean_grad.numel(),
    )


def fold(table: Table, observation: Observation, iteration: int | None) -> None:
    """See :func:`fastis.kernels.reference.table.fold`."""
    indices, _, observed, _, _ = observation
    addresses = indices.data_ptr(), 0, observed.data_ptr(), 0, indices.numel(), 0, 0
    _C.fold(table.handle, *addresses, _PRESENT if iteration is None else iteration)


def clear(table: Table, indices: Tensor, last: int) -> None:
    """See :func:`fastis.kernels.reference.table.clear`."""
    _C.clear(table.handle, indices.data_ptr(), indices.numel(), last)


def rescale(table: Table) -> None:
    """See :func:`fastis.kernels.reference.table.rescale`."""
    _C.rescale(table.handle)


def draw(table: Table, batch: Batch) -> None:
    """See :func:`fastis.kernels.reference.table.draw`."""
    indices, weights = batch
    _C.draw(table.handle, indices.data_ptr(), weights.data_ptr())


def shard_total(table: Table, theta: int) -> ShardTotal:
    """See :func:`fastis.kernels.reference.table.shard_total`."""
    found = torch.empty(2, dtype=torch.int64, device="cpu")
    _C.shard_total(table.handle, theta, found.data_ptr())
    return ShardTotal(*found.tolist())


def draw_share(table: Table, share: Share, batch: Batch) -> int:
    """See :func:`fastis.kernels.reference.table.draw_share`, which also serves the rare totals
    of 127 bits or more: shards whose weights lie 2^50 and more apart."""
    if share.total >> 127:
        return reference.draw_share(table, share, batch)
    wide = (share.total, share.before, share.own, share.theta)
    words = (word for value in wide for word in (value & _WORD, value >> 64))
    plain = (
        share.seed,
        share.first,
        share.end - share.first,
        share.batch_size,
        float(share.num_samples),
    )
    addresses = batch.indices.data_ptr(), batch.weights.data_ptr()
    return _C.draw_share(table.handle, *plain, share.shift, *words, *addresses)


def update_and_draw(table: Table, observation: Observation, next_batch: Batch) -> None:
    """See :func:`fastis.kernels.reference.table.update_and_draw`."""
    update(table, observation)
    draw(table, next_batch)
