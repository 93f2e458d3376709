"""Draws flattened by power on a GPU: PyTorch operations, O(N), no host synchronisation."""

from __future__ import annotations

import torch
from torch import Tensor

from fastis.kernels.reference_power import flatten_by_power
from fastis.kernels.reference_random import STREAM_DRAW, random_words, scale
from fastis.kernels.reference_sample import slice_points
from fastis.kernels.reference_weights import weight_of
from fastis.table import DRAWS, EXPONENT, FLATTEN, LAST, SCHEMES, SEEN, TOTAL, UNIFORM_WEIGHT, Table


def draws_by_power(table: Table) -> bool:
    """Is flattening by power what past the warm-up the table's draws need?"""
    return table.records is not None and table.constants.flatten == FLATTEN["power"]


def draw_by_power(table: Table, indices: Tensor, weights: Tensor) -> None:
    """What :func:`fastis.kernels.reference_sample.draw` gives past the warm-up; ticks nothing.

    The weights are those that :func:`fastis.kernels.reference_weights.distribution` gives on the
    same device, bit for bit.
    """
    constants, scalars = table.constants, table.scalars
    n, b = constants.num_samples, constants.batch_size
    is_seen = table.column(LAST) >= 0
    mean_weight = torch.where(
        scalars[SEEN] == 0, UNIFORM_WEIGHT, scalars[TOTAL] // scalars[SEEN].clamp(min=1)
    )
    present = torch.where(is_seen, weight_of(table.codes(), scalars[EXPONENT]), mean_weight)
    drawn, at_cap = flatten_by_power(present, constants)
    # Heavy items come first in the order of the points, all others follow by their indices.
    heavy = at_cap & is_seen
    ranks = torch.where(heavy, heavy.cumsum(0) - 1, heavy.sum() + (~heavy).cumsum(0) - 1)
    order = torch.empty_like(ranks).scatter_(0, ranks, torch.arange(n, device=ranks.device))
    ends = drawn[order].cumsum(0)
    total = ends[-1]
    positions = torch.arange(b, device=indices.device)
    same = constants.scheme == SCHEMES["systematic"]
    own = torch.zeros_like(positions) if same else positions
    points = scale(random_words(constants.seed, STREAM_DRAW, scalars[DRAWS], own), total)
    if constants.scheme != SCHEMES["multinomial"]:
        points = slice_points(positions, points, total, b)
    indices.copy_(order[torch.searchsorted(ends, points, right=True)])
    weights.copy_((total.double() / (float(n) * drawn[indices].double())).float())
