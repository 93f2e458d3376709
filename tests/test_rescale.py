"""Rescaling against an oracle in Python's integers, from the formulas and not from the code.

A rescale gives every seen sample the code of max(importance, floor), rounded half to even to 16
significant bits, with the floor eps times the mean importance; e0 is the floor's exponent less the
headroom, and the total is the exact sum of mantissa * 2^(exponent - e0).
"""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch

import fastis
from fastis import kernels
from fastis.kernels.layout import CODE, EXPONENT, LAST, MEAN, SEEN, TOTAL, VALID, VAR
from fastis.methods import EMAIS

TINIEST = 2.0**-100


def rounded(value: float) -> tuple[int, int]:
    """(mantissa of 16 bits, exponent) of a positive float: value ~ mantissa 2^(exponent - 15)."""
    fraction, power = math.frexp(value)  # in [1/2, 1)
    exact = Fraction(fraction) * 2**16
    mantissa = round(exact)  # half to even
    return (mantissa // 2, power) if mantissa == 2**16 else (mantissa, power - 1)


def as_float32(value: float) -> float:
    return float(torch.tensor(value, dtype=torch.float64).float())


def oracle(mean, var, seen, kind, eps, headroom, n):
    """Codes of all samples, e0 and the total."""
    importance = {}
    for i in seen:
        m, v = mean[i], var[i]
        w = math.sqrt(m * m + v) if kind == "rms" else m + math.sqrt(v)
        importance[i] = rounded(max(as_float32(w), TINIEST))
    # The mean of the rounded weights, from integers relative to the largest of them.
    top = max(exponent for _, exponent in importance.values())
    spare = 62 - 16 - (n - 1).bit_length()
    total = sum(
        (mantissa << spare) >> min(63, top - exponent) for mantissa, exponent in importance.values()
    )
    floor = as_float32(total / len(seen) * math.ldexp(1.0, top - spare - 15) * eps)
    least = rounded(max(floor, TINIEST))
    e0 = least[1] - headroom
    codes, whole = [0] * n, 0
    for i, weight in importance.items():
        mantissa, exponent = max(weight, least, key=lambda w: Fraction(w[0]) * Fraction(2) ** w[1])
        codes[i] = (exponent + 127) << 23 | (mantissa & 0x7FFF) << 8
        whole += mantissa << (exponent - e0)
    return codes, e0, whole


@pytest.mark.parametrize("kind", ["rms", "sum"])
@pytest.mark.parametrize("floor", [1e-6, 1e-3, 0.37, 1.0])
@pytest.mark.parametrize("spread", [0.0, 1.0, 12.0, 40.0])
@pytest.mark.parametrize("n", [1, 5, 64, 700])
def test_a_rescale_follows_the_formulas(any_backend, n, spread, floor, kind):
    generator = torch.Generator().manual_seed(n)
    sampler = fastis.Sampler(n, 1, method=EMAIS(warmup_epochs=0, floor=floor, importance=kind))
    table = sampler._table
    mean = (spread * torch.randn(n, generator=generator)).exp().clamp(max=2.0**59)
    var = (spread * torch.randn(n, generator=generator)).exp().clamp(max=2.0**100)
    mean[torch.rand(n, generator=generator) < 0.1] = 0.0
    var[torch.rand(n, generator=generator) < 0.3] = 0.0
    unseen = torch.rand(n, generator=generator) < 0.2
    unseen[0] = False
    table.column(MEAN)[:], table.column(VAR)[:] = mean, var
    table.column(LAST)[:] = torch.where(unseen, -1, 0)
    kernels.kernels_for("table", "cpu").rescale(table)
    seen = (~unseen).nonzero().flatten().tolist()
    headroom = table.constants.headroom
    codes, e0, total = oracle(mean.tolist(), var.tolist(), seen, kind, floor, headroom, n)
    assert table.column(CODE).tolist() == codes
    assert int(table.scalars[SEEN]) == len(seen)
    assert int(table.scalars[EXPONENT]) == e0
    assert int(table.scalars[TOTAL]) == total
    assert int(table.scalars[VALID]) == 0
    # The invariant of all sums: those of the unseen have room as well.
    assert total + (n - len(seen)) * (total // len(seen)) <= table.constants.total_limit
