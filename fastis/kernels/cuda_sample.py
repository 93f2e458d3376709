"""Draws on a GPU: csrc/cuda/sampler.cu, one launch, no host synchronisation.

Flattening by power comes before it, in PyTorch operations: O(N), as it moves every weight at every
step.
"""

from __future__ import annotations

from torch import Tensor

from fastis.kernels import _C
from fastis.kernels.cuda_launch import launch
from fastis.kernels.cuda_power import draw_by_power
from fastis.kernels.cuda_weights import (
    alias_build,
    alias_draw,
    alias_resolve,
    draw_points,
    integers,
    search,
    weigh,
)
from fastis.kernels.reference_sample import locate
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
    if table.constants.flatten == _POWER:
        # The launch then overwrites this in the warm-up, leaves it after that, and ticks.
        draw_by_power(table, indices, weights)
    addresses = table.device_handle, indices.data_ptr(), weights.data_ptr()
    launch(_C.cuda_draw, table.device, *addresses)
