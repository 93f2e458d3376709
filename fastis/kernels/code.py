"""Codes of integer weights in PyTorch: csrc/code.h, the same on every backend."""

from __future__ import annotations

from ctypes import c_float
from typing import NamedTuple

import torch
from torch import Tensor

TINIEST = 2.0**-100


def exponent_of(code: Tensor) -> Tensor:
    """Binary exponent of a code (int32 or int64) as int64."""
    return ((code.long() >> 23) & 0xFF) - 127


def mantissa_of(code: Tensor) -> Tensor:
    """The 16 significant bits of a code as int64."""
    return ((code.long() >> 8) & 0x7FFF) | 0x8000


def code_of(importance: Tensor, floor: float) -> Tensor:
    """float32 -> int32: floored, and rounded half-even to 16 significant bits."""
    floored = importance.clamp(min=max(floor, TINIEST))
    bits = floored.view(torch.int32)
    return (bits + 0x7F + ((bits >> 8) & 1)) & ~0xFF


def weight_of(code: Tensor, e0: int) -> Tensor:
    """mantissa16 << (exponent - e0) as int64; 0 for code 0 (unseen)."""
    shift = torch.where(code == 0, 0, exponent_of(code) - e0)
    return torch.where(code == 0, 0, mantissa_of(code) << shift)


class Floors(NamedTuple):
    """Two float32 values: the least importance of an item, eps times the mean of all, and what e0
    is chosen by. The same but for a shard of a larger table."""

    wanted: float
    base: float

    def above(self, e0: int) -> float:
        """The floor of new codes under an e0 in force; far below a shard's mean: what e0 allows."""
        return max(self.wanted, min(_float32(2.0**e0), self.base))


def floors_of(total: int, seen: int, e0: int, eps: float, others: tuple[float, int]) -> Floors:
    """From a table's own total of weights (in units of 2^(e0 - 15)) and number of seen samples, and
    from the sum of the importances in ``others``, the shards beside it, and their number there."""
    own_sum = float(total) * 2.0 ** (e0 - 15)
    everything = seen + others[1]
    own = own_sum / float(seen) * eps if seen > 0 else 0.0
    wanted = (own_sum + others[0]) / float(everything) * eps if everything > 0 else 0.0
    return Floors(_float32(wanted), _float32(own + eps * wanted if wanted > own else own))


def _float32(value: float) -> float:
    return c_float(value).value
