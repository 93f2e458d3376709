"""Codes of integer weights in PyTorch: csrc/code.h, the same on every backend."""

from __future__ import annotations

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


def floor_of(total: int, seen: int, e0: int, eps: float) -> float:
    """eps times the mean importance of the seen samples, as a float32 value."""
    if seen == 0 or total == 0:
        return 0.0
    value = float(total) / float(seen) * 2.0 ** (e0 - 15) * eps
    return float(torch.tensor(value, dtype=torch.float64, device="cpu").float())
