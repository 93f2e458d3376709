"""Arithmetic that the Triton losses share: exp and log1p that keep digits, a row's closed form.

What is done once a row is written short as well: at 1000 classes it is a third of the instructions,
and those, not the memory, are then what limits. So division and square root are the approximate
ones, 2 ulp off. The polynomial of log1p is that of the C++ kernels (Cephes logf).
"""

from __future__ import annotations

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
LOG2_E = tl.constexpr(1.4426950408889634)
LOG2_E_LOW = tl.constexpr(1.9259629911e-8)  # what float32 leaves of it
LN_2 = tl.constexpr(0.6931471805599453)
LOWER_64 = tl.constexpr(2.0**-64)
RAISE = tl.constexpr(2.0**80)
LOWER = tl.constexpr(2.0**-80)


@triton.jit
def to_float32(z):
    """Logits as float32. A bfloat16 is the upper half of a float32: two of them are widened by two
    instructions, where the compiler takes three. (The interpreter knows no assembly.)"""
    if z.dtype == tl.bfloat16 and not INTERPRETED:
        z = tl.inline_asm_elementwise(
            "shl.b32 $0, $2, 16; and.b32 $1, $2, 0xffff0000;", "=f,=f,r", [z],
            dtype=tl.float32, is_pure=True, pack=2,
        )  # fmt: skip
    return z.to(tl.float32)


@triton.jit
def exp_term(x):
    """exp(x), x <= 0, for the terms of a sum that has a term 1: one instruction, subnormals are 0.

    The argument is rounded at |x| 2^-24, where exp(x) is small by as much.
    """
    return tl.exp2(x * LOG2_E)


@triton.jit
def rounded_product(x, y):
    """x y. A plain product may be contracted with a later addition into an fma that does not round
    it, and a correction for the rounding would then add an error."""
    return tl.fma(x, y, 0.0)


@triton.jit
def unit_of(m):
    """log2(e), the factor from logits to powers of 2; 1 where m is so far from 0 that logits that
    differ at all differ by 64, and the one e^-64 of the other: masks like -1e9 are."""
    return tl.where(tl.abs(m) > 536870912.0, 1.0, LOG2_E)


@triton.jit
def exp2_term(z, unit, top):
    """2^(unit z - top), in two instructions: with top = unit m rounded it is exp(z - m) but for a
    factor that all z share, :func:`correction`. The product itself is not rounded."""
    z, unit = tl.broadcast(z, unit)
    z, top = tl.broadcast(z, top)
    return tl.exp2(tl.fma(z, unit, -top))


@triton.jit
def correction(m, unit, top):
    """exp(z - m) / exp2_term(z, unit, top), at most 2^32 either way; once a row."""
    return tl.exp2(tl.fma(-m, unit, top))


@triton.jit
def exp_full(x):
    """exp(x), x <= 0 or NaN, within 3 ulp down to the smallest subnormal: exp(-88) is 6e-39."""
    x = tl.where(x < -105.0, -105.0, x)
    n = rounded_product(x, LOG2_E)
    lost = tl.fma(x, LOG2_E, -n) + x * LOG2_E_LOW  # what the product rounded away
    # exp2 makes a subnormal result 0: raised by 2^64 on the way, it is none.
    deep = n < -100.0
    e = tl.exp2(n + tl.where(deep, 64.0, 0.0))
    return (e + e * (lost * LN_2)) * tl.where(deep, LOWER_64, 1.0)


@triton.jit
def log1p(y, inverse):
    """log(1 + y), y >= 0 or NaN, right to the last ulps for tiny y; ``inverse`` is 1 / (1 + y)."""
    w = 1.0 + y
    lost = (y - (w - 1.0)) * inverse  # what 1 + y rounded away
    bits = w.to(tl.int32, bitcast=True)
    exponent = (bits - 0x3F3504F3) >> 23  # the mantissa is then in [sqrt(1/2), sqrt(2))
    e = exponent.to(tl.float32)
    f = (bits - (exponent << 23)).to(tl.float32, bitcast=True) - 1.0
    p = 7.0376836292e-2 * f - 1.1514610310e-1
    p = p * f + 1.1676998740e-1
    p = p * f - 1.2420140846e-1
    p = p * f + 1.4249322787e-1
    p = p * f - 1.6668057665e-1
    p = p * f + 2.0000714765e-1
    p = p * f - 2.4999993993e-1
    p = p * f + 3.3333331174e-1
    g = f * f
    small = p * f * g + (e * -2.12194440e-4 + lost)
    return e * 0.693359375 + (f + (g * -0.5 + small))


@triton.jit
def root_of_squares(large, raised):
    """sqrt(sum x^2) from ``large = sum x^2`` and ``raised = sum (2^80 x)^2``.

    Of numbers as small as exp(-88) too, whose squares are 0; where ``raised`` overflows, ``large``
    is far from that.
    """
    return tl.where(large < 1e-30, tl.sqrt(raised) * LOWER, tl.sqrt(large))


@triton.jit
def solve_label_row(z_y, m, s, q):
    """loss, ``|g|`` and the softmax's factor of rows with a class label (Kutsuna 2025, section 7).

    ``m`` is the largest logit but that of the label (or z_y where there is none above -inf),
    ``s = sum exp(z_j - m)`` and ``q = sum exp(z_j - m)^2`` over ``j != y``. Then
    ``p_j = exp(z_j - m) factor`` and ``g_y = -s factor``: nothing is subtracted from 1.
    """
    d = z_y - m
    leads = d >= 0
    x = exp_full(-tl.abs(d))
    a = tl.where(leads, x, 1.0)
    inverse = 1.0 / (s * a + tl.where(leads, 1.0, x))
    excess = tl.where(leads, s * x, (s - 1.0) + x)
    loss = log1p(excess, inverse) + tl.where(leads, 0.0, -d)
    factor = a * inverse
    # +inf at the label would look like certainty; torch has NaN there.
    factor = tl.where(z_y == float("inf"), float("nan"), factor)
    loss = tl.where(z_y == float("inf"), float("nan"), loss)
    return loss, tl.sqrt(s * s + q) * factor, factor
