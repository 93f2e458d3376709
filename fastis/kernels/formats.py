"""Formats of numbers in memory: their codes, and the dtypes of a loss's results and gradient."""

from __future__ import annotations

from typing import TypeAlias

import torch
from torch import Tensor

# Codes of the formats that entry points of ``fastis._C`` take, as csrc/format.h has them.
FORMAT_CODES = {
    torch.float32: 0,
    torch.float64: 1,
    torch.bfloat16: 2,
    torch.float16: 3,
    torch.int64: 4,
}

Scored: TypeAlias = "tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]"


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of losses and scores: float64 for float64 logits, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def grad_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which the gradient waits for the backward pass.

    float32 for float16 logits: divided by the batch size it would underflow before a GradScaler's
    factor arrives. Otherwise the logits' own.
    """
    return torch.float32 if dtype == torch.float16 else dtype


def raise_bad_label(labels: Tensor, row: int, num_classes: int) -> None:
    """Raises the IndexError for the flat ``labels[row]``."""
    raise IndexError(
        f"target must hold class indices in [0, {num_classes}) or ignore_index, "
        f"got {int(labels[row])} at flat position {row}"
    )
