"""Draws on the CPU: csrc/cpu/sample.cpp and csrc/cpu/alias.cpp."""

from __future__ import annotations

import torch
from torch import Tensor

from fastis.kernels import _C, reference_sample
from fastis.table import FLATTEN, Table

_POWER = FLATTEN["power"]


def draw(table: Table, indices: Tensor, weights: Tensor) -> None:
    """See :func:`fastis.kernels.reference_sample.draw`."""
    if table.constants.flatten == _POWER:  # it moves every weight at every step: O(N) anyway
        reference_sample.draw(table, indices, weights)
    else:
        _C.draw(table.handle, indices.data_ptr(), weights.data_ptr())


def locate(table: Table, points: Tensor, indices: Tensor, weights: Tensor) -> None:
    """See :func:`fastis.kernels.reference_sample.locate`."""
    if table.constants.flatten == _POWER:
        reference_sample.locate(table, points, indices, weights)
    else:
        count = points.numel()
        addresses = points.data_ptr(), count, indices.data_ptr(), weights.data_ptr()
        _C.locate(table.handle, *addresses)


def alias_build(weights: Tensor, total: int) -> tuple[Tensor, Tensor]:
    """See :func:`fastis.kernels.reference_sample.alias_build`."""
    own, alias = torch.empty_like(weights), torch.empty_like(weights)
    _C.alias_build(weights.data_ptr(), weights.numel(), total, own.data_ptr(), alias.data_ptr())
    return own, alias


def alias_draw(
    weights: Tensor, total: int, own: Tensor, alias: Tensor, seed: int, first: int, count: int
) -> tuple[Tensor, Tensor]:
    """See :func:`fastis.kernels.reference_sample.alias_draw`."""
    indices = torch.empty(count, dtype=torch.int64)
    coefficients = torch.empty(count, dtype=torch.float32)
    _C.alias_draw(
        weights.data_ptr(),
        own.data_ptr(),
        alias.data_ptr(),
        weights.numel(),
        total,
        seed,
        first,
        count,
        indices.data_ptr(),
        coefficients.data_ptr(),
    )
    return indices, coefficients


def draw_points(total: int, seed: int, first: int, count: int, device: torch.device) -> Tensor:
    """See :func:`fastis.kernels.reference_sample.draw_points`."""
    points = torch.empty(count, dtype=torch.int64, device=device)
    _C.draw_points(total, seed, first, count, points.data_ptr())
    return points
