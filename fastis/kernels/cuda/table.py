"""The table on a GPU: csrc/cuda/table.cu, one launch, no host synchronisation."""

from __future__ import annotations

import torch
from torch import Tensor

from fastis.kernels.cuda.launch import launch
from fastis.kernels.extension import _C
from fastis.kernels.layout import LATE, UPDATES, Table
from fastis.kernels.reference import table as reference
from fastis.kernels.table import Batch, Observation, ShardTotal, Share

IS_ATOMIC = False  # the host may be interrupted between two launches


def update(table: Table, observation: Observation) -> None:
    """See :func:`fastis.kernels.reference.table.update`. Indices out of range are left out."""
    if observation.indices.numel() > 0:
        launch(_C.cuda_update, table.device, table.device_handle, *_addresses(observation))


def fold(table: Table, observation: Observation, iteration: int | None) -> None:
    """See :func:`fastis.kernels.reference.table.fold`. Indices out of range are left out, and all
    scores, as if they were no numbers, where the iteration is still to come or ``LATE`` ago.

    The update's kernel without weights and score; the clock, which it leaves as it is, stands at
    ``iteration`` meanwhile. All of it in the order of the stream, for which nothing waits.
    """
    if iteration is None:
        return _learn(table, observation.indices, observation.observed)
    clock = table.scalars[UPDATES]
    present = clock.clone()
    age = present - iteration
    observed = observation.observed.masked_fill((age < 0) | (age >= LATE), torch.nan)
    clock.fill_(iteration)
    _learn(table, observation.indices, observed)
    clock.copy_(present)


def _learn(table: Table, indices: Tensor, observed: Tensor) -> None:
    """The part of an update that concerns the states."""
    if indices.numel() > 0:
        addresses = indices.data_ptr(), 0, observed.data_ptr(), 0
        launch(_C.cuda_update, table.device, table.device_handle, *addresses, len(indices), 0, 0)


def clear(table: Table, indices: Tensor, last: int) -> None:
    """See :func:`fastis.kernels.reference.table.clear`. Indices out of range are left out."""
    if indices.numel() > 0:
        arguments = indices.data_ptr(), indices.numel(), last
        launch(_C.cuda_clear, table.device, table.device_handle, *arguments)


def rescale(table: Table) -> None:
    """See :func:`fastis.kernels.reference.table.rescale`."""
    launch(_C.cuda_rescale, table.device, table.device_handle)


def draw(table: Table, batch: Batch) -> None:
    """See :func:`fastis.kernels.reference.table.draw`."""
    indices, weights = batch
    addresses = indices.data_ptr(), weights.data_ptr()
    launch(_C.cuda_draw, table.device, table.device_handle, *addresses)


def shard_total(table: Table, theta: int) -> ShardTotal:
    """That of the reference, in PyTorch's operations on the device: O(N), and waits for it.

    It leaves the tree and its flags as they are; draws of a shard don't use them.
    """
    return reference.shard_total(table, theta)


def draw_share(table: Table, share: Share, batch: Batch) -> int:
    """That of the reference, as :func:`shard_total`."""
    return reference.draw_share(table, share, batch)


def update_and_draw(table: Table, observation: Observation, next_batch: Batch) -> None:
    """See :func:`fastis.kernels.reference.table.update_and_draw`: one launch.

    Indices out of range are left out.
    """
    if observation.indices.numel() == 0:
        draw(table, next_batch)
        return
    indices, weights = next_batch
    addresses = (*_addresses(observation), indices.data_ptr(), weights.data_ptr())
    launch(_C.cuda_update_and_draw, table.device, table.device_handle, *addresses)


def _addresses(observation: Observation) -> tuple[int, ...]:
    indices, weights, observed, score, mean_grad = observation
    return (
        indices.data_ptr(),
        weights.data_ptr(),
        observed.data_ptr(),
        score.data_ptr(),
        indices.numel(),
        0 if mean_grad is None else mean_grad.data_ptr(),
        0 if mean_grad is None else mean_grad.numel(),
    )
