"""Draws on a GPU: csrc/cuda/sampler.cu, one launch, no host synchronisation.

Given weights and alias tables are served by the reference's integer-exact PyTorch operations.
"""

from __future__ import annotations

from torch import Tensor

from fastis.kernels import _C, reference_sample
from fastis.kernels.cuda_launch import launch
from fastis.kernels.reference_sample import (
    alias_build,
    alias_draw,
    alias_resolve,
    draw_points,
    integers,
    locate,
    search,
    weigh,
)
from fastis.table import FLATTEN, Table

__all__ = [
    "alias_build",
    "alias_draw",
    "alias_resolve",
    "draw",
    "draw_points",
    "integers",
    "locate",
    "search",
    "weigh",
]

_POWER = FLATTEN["power"]


def draw(table: Table, indices: Tensor, weights: Tensor) -> None:
    """See :func:`fastis.kernels.reference_sample.draw`."""
    if table.constants.flatten == _POWER:  # it moves every weight at every step: O(N) anyway
        reference_sample.draw(table, indices, weights)
    else:
        launch(_C.cuda_draw, table, indices.data_ptr(), weights.data_ptr())
