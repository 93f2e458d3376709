"""Weights as integers: floor(w 2^shift) of floats w, with a power of two for a fixed sum."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from fastis.kernels.constants import SUM_BITS
from fastis.kernels.formats import FORMAT_CODES


class IntegerWeights(NamedTuple):
    """Weights that add up to an integer, as csrc/integer_weights.h has them."""

    values: Tensor  # float [N], whose integers are those of quantized(); or int64 [N], the integers
    shift: int
    total: int
    prefix: Tensor  # int64: prefix sums of the integers, over groups as the backend likes


def arguments(
    values: Tensor, shift: int, total: int, prefix: Tensor
) -> tuple[int, int, int, int, int, int]:
    """What an entry point of the extension takes of IntegerWeights, by position."""
    code = FORMAT_CODES[values.dtype]
    return code, values.data_ptr(), values.numel(), shift, total, prefix.data_ptr()


def quantized(values: Tensor, shift: int) -> Tensor:
    """floor(w 2^shift) as int64, but at least 1 where w > 0."""
    w = values.double()
    half = shift // 2  # in two factors, since 2^shift itself may overflow
    return torch.where(w > 0, (w * 2.0**half * 2.0 ** (shift - half)).long().clamp(min=1), 0)


def shift_of(values: Tensor) -> int:
    """The shift with which the integers of ``values``, not all 0, add up to about 2^61.

    A power of two alone, so that every backend gets the same integers. With it the bit length of
    the sum, were nothing cut off, is 61.
    """
    n = values.numel()
    _, exponent = math.frexp(float(values.max()))  # max < 2^exponent
    first = SUM_BITS - (n - 1).bit_length() - exponent
    at_most = int(quantized(values, first).sum()) + n  # each integer is off by less than 1
    return first + SUM_BITS - at_most.bit_length()


def coefficients(weights: Tensor, total: int, indices: Tensor, number: int) -> Tensor:
    """r = 1 / (N p) = total / (N W), float32 [n], for the drawn ``indices`` int64 [n] of N, the
    ``number`` of items that can be drawn."""
    return (float(total) / (float(number) * weights[indices].double())).float()
