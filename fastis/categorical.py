"""Draws from fixed weights: ``sample``, the drop-in for ``torch.multinomial``, and ``AliasTable``.

Weights become integers with a total T of about 2^61 (each is off by at most one unit); a draw is
floor(R T / 2^128) of 128 random bits R. So there is no limit of 2^24 categories, a zero weight is
never drawn, and the probability reported is the one drawn.
"""

from __future__ import annotations

import math
from fractions import Fraction
from types import ModuleType

import torch
from torch import Tensor

from fastis import check
from fastis.kernels import kernels_for
from fastis.kernels.alias import alias_contents
from fastis.kernels.flatten import water_level
from fastis.kernels.quantize import IntegerWeights
from fastis.kernels.table import Batch

_FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
# In a race: of the largest rate; smaller positive weights count as that.
_LEAST_RATE = 2.0**-1000
_MOST_DRAWS = 1 << 60
_COARSE = 1 << 58  # integers that a cap leaves with a smaller sum are made anew, larger
_ROUNDING = Fraction(1, 10**12)  # what a least cap may have lost: 1/3 is a little below a third
_RACE_CHUNK = (1 << 18, 1 << 26)  # items at once: what stays in a CPU's cache; on other devices


class MinibatchSource:
    """What ``fastis.sample`` takes a next minibatch from; :class:`fastis.Sampler` is one."""

    def sample(self) -> Batch:
        raise NotImplementedError


class AliasTable:
    """Static weights, drawn with replacement in O(1) a draw (Walker 1977; integer exact).

    16 bytes a weight, and one random access a draw. The weights are not kept: changing them later
    changes nothing here. Copies and pickles.

    Parameters
    ----------
    weights : float tensor [N]
        finite and non-negative, at least one positive; need not sum to 1. CPU or CUDA.
    max_prob : float, optional
        no probability exceeds it: p = min(c w, max_prob) (water filling). At least 1/K, K the
        number of positive weights: with that these are equal.

    Raises
    ------
    TypeError, ValueError
        naming the argument, what was expected and what came.

    Equivalent to::

        indices = torch.multinomial(weights, num_samples, replacement=True)
        weights = 1 / (N * (weights / weights.sum())[indices])
    """

    def __init__(self, weights: Tensor, *, max_prob: float | None = None) -> None:
        quantized = _quantize(weights, "weights")
        if max_prob is not None:
            most = check.number("max_prob", max_prob, 0.0)
            quantized = _capped(quantized, most, "max_prob", 1)
        self._total = quantized.total
        self._table = _kernels(quantized.values.device).alias_build(quantized)

    def __len__(self) -> int:
        return len(self._table)

    def __repr__(self) -> str:
        return f"AliasTable({len(self)} weights, device={self._table.device})"

    @property
    def probabilities(self) -> Tensor:
        """float64 [N]: exactly what is drawn, added up from the table. O(N)."""
        return alias_contents(self._table, self._total).double() / float(self._total)

    def sample(self, num_samples: int, generator: torch.Generator | None = None) -> Batch:
        """``num_samples`` independent draws; ``generator`` as in torch (None: the global one)."""
        count = check.integer("num_samples", num_samples, 0, _MOST_DRAWS)
        device = self._table.device
        seed = seed_from(generator, device)
        kernels = kernels_for("categorical", device.type)
        drawn: Batch = kernels.alias_draw(self._table, self._total, seed, 0, count)
        return drawn


def sample(
    source: MinibatchSource | AliasTable | Tensor,
    num_samples: int | None = None,
    *,
    replacement: bool = True,
    max_duplicates: float | None = None,
    generator: torch.Generator | None = None,
) -> Batch:
    """Draws a minibatch of indices with their importance-sampling coefficients.

    From weights it takes one pass over them (two for float64) and a search for each draw; for many
    draws from weights that stay the same, build an :class:`AliasTable`.

    Parameters
    ----------
    source : Sampler, AliasTable or float tensor [N]
        a ``Sampler`` gives its next minibatch (no other argument may be set); weights need not sum
        to 1.
    num_samples : int
        how many indices.
    replacement : bool
        without replacement the indices are distinct, in the order of successive draws (exponential
        races, Efraimidis & Spirakis 2006).
    max_duplicates : float, optional
        at most so many expected copies of any index among ``num_samples`` (water filling), at least
        num_samples / K with K positive weights; None: no flattening. Only with replacement.
    generator : torch.Generator, optional
        as in torch; None: the global one.

    Returns
    -------
    Batch
        ``indices`` int64 [num_samples]; ``weights`` float32 [num_samples]: 1/(N p) with
        replacement. Without replacement 1/(N pi), pi the probability that the index is among those
        drawn: exact where all weights are equal or all indices are drawn; otherwise pi given the
        race's threshold, the next arrival (as in priority sampling, Duffield et al. 2007), which
        makes ``(weights * x[indices]).sum()`` an unbiased estimate of ``x.mean()`` all the same.

    Raises
    ------
    TypeError, ValueError
        naming the argument, what was expected and what came.

    Equivalent to (and without the limit of 2^24 categories)::

        indices = torch.multinomial(source, num_samples, replacement, generator=generator)
    """
    if isinstance(source, MinibatchSource):
        return _sample_from_sampler(source, num_samples, replacement, max_duplicates, generator)
    if num_samples is None:
        raise TypeError("num_samples must be an int unless source is a Sampler, got None")
    count = check.integer("num_samples", num_samples, 0, _MOST_DRAWS)
    if isinstance(source, AliasTable):
        if not replacement:
            raise ValueError("replacement must be True for an AliasTable, got False")
        if max_duplicates is not None:
            raise ValueError(
                "max_duplicates must be None for an AliasTable (its weights are static: "
                f"use AliasTable(weights, max_prob=...)), got {max_duplicates!r}"
            )
        return source.sample(count, generator)
    if not replacement:
        if max_duplicates is not None:
            raise ValueError(
                f"max_duplicates must be None without replacement, got {max_duplicates!r}"
            )
        return _race(source, count, generator)
    quantized = _quantize(source, "source")
    if max_duplicates is not None:
        most = check.number("max_duplicates", max_duplicates, 0.0)
        quantized = _capped(quantized, most, "max_duplicates", count)
    seed = seed_from(generator, source.device)
    kernels = kernels_for("categorical", source.device.type)
    drawn: Batch = kernels.draw(quantized, seed, 0, count)
    return drawn


def _sample_from_sampler(
    source: MinibatchSource,
    num_samples: int | None,
    replacement: bool,
    max_duplicates: float | None,
    generator: torch.Generator | None,
) -> Batch:
    for name, value, default in (
        ("num_samples", num_samples, None),
        ("replacement", replacement, True),
        ("max_duplicates", max_duplicates, None),
        ("generator", generator, None),
    ):
        if value is not default:
            raise ValueError(
                f"{name} must be left out when source is a Sampler, which has its own, "
                f"got {value!r}"
            )
    return source.sample()


def _race(weights: Tensor, count: int, generator: torch.Generator | None) -> Batch:
    """Item i arrives after an exponential time of rate w_i; the first ``count`` win."""
    values = _vector(weights, "source")
    least, most = (float(v) for v in torch.aminmax(values))
    if not (least >= 0 and 0 < most < float("inf")):
        raise _unusable(values, "source")
    possible = int(torch.count_nonzero(values))
    if count > possible:
        raise ValueError(
            "num_samples must be at most the number of positive weights without replacement, "
            f"{possible}, got {count}"
        )
    seed = seed_from(generator, values.device)
    n, chunk = values.numel(), _RACE_CHUNK[values.device.type != "cpu"]
    heats = [
        _heat(values[begin : begin + chunk], most, count + 1, seed, begin)
        for begin in range(0, n, chunk)
    ]
    arrivals, candidates = (torch.cat(part) for part in zip(*heats, strict=True))
    first = torch.topk(arrivals, min(count + 1, len(arrivals)), largest=False, sorted=True)
    indices = candidates[first.indices[:count]]
    rates = _rates(values[indices], most)
    if count == possible:
        inclusion = torch.ones_like(rates)
    elif bool((rates == 1).all()) and bool(((values == most) | (values == 0)).all()):
        inclusion = torch.full_like(rates, count / possible)
    else:
        inclusion = -torch.expm1(-rates * first.values[count])
    return Batch(indices, (1 / (n * inclusion)).float())


def _rates(values: Tensor, most: float) -> Tensor:
    rates = values.double() / most
    return torch.where(values > 0, rates.clamp(min=_LEAST_RATE), 0.0)


def _heat(
    values: Tensor, most: float, winners: int, seed: int, begin: int
) -> tuple[Tensor, Tensor]:
    """The first arrivals among some items, the first of them item ``begin``: times and items."""
    n, device = values.numel(), values.device
    numbers = _kernels(device).random_below(1 << 62, seed, begin, n, device)
    # -log(1 - u), 0 < u < 1: of full precision near 0, where the winners are; neither 0 nor
    # infinite, so that a rate of 0 comes after all others.
    u = numbers.double().add_(0.5).mul_(2.0**-62 * (1 - 2.0**-53))
    arrivals = u.neg_().log1p_().neg_().div_(_rates(values, most))
    first = torch.topk(arrivals, min(winners, n), largest=False, sorted=False)
    return first.values, first.indices + begin


def _kernels(device: torch.device) -> ModuleType:
    return kernels_for("categorical", device.type)


def _vector(weights: Tensor, name: str) -> Tensor:
    device = weights.device if isinstance(weights, Tensor) else torch.device("cpu")
    weights = check.vector(name, weights, None, _FLOATS, device)
    if weights.is_meta:
        raise TypeError(f"{name} must be a tensor with memory, got one on meta")
    if weights.numel() == 0:
        raise ValueError(f"{name} must have at least one weight, got shape [0]")
    return weights


def _quantize(weights: Tensor, name: str) -> IntegerWeights:
    """The integer weights of a usable float vector, or an error; reads them from the device."""
    values = _vector(weights, name)
    kernels = kernels_for("categorical", values.device.type)
    quantized: IntegerWeights | None = kernels.quantize(values)
    if quantized is None:
        raise _unusable(values, name)
    return quantized


def _unusable(weights: Tensor, name: str) -> ValueError:
    least, most = (float(v) for v in torch.aminmax(weights))
    return ValueError(
        f"{name} must be finite and non-negative with a positive weight among them, "
        f"got weights from {least} to {most}"
    )


def _capped(weights: IntegerWeights, most: float, name: str, draws: int) -> IntegerWeights:
    """The weights as integers of which none is drawn more than ``most`` times in ``draws``."""
    if most >= draws:
        return weights
    positive = int(torch.count_nonzero(weights.values))
    ratio, least = Fraction(most) / draws, Fraction(1, positive)
    if ratio < least * (1 - _ROUNDING):
        raise ValueError(
            f"{name} must be at least {draws} / {positive} = {draws / positive:.6g} (the number of "
            f"positive weights is {positive}), got {most!r}"
        )
    ratio = max(ratio, least)
    capped = _cut_to_level(weights, ratio)
    if capped.total >= _COARSE:
        return capped
    values = _without_peaks(weights.values, ratio)
    return _cut_to_level(_kernels(values.device).quantize(values), ratio)


def _cut_to_level(weights: IntegerWeights, ratio: Fraction) -> IntegerWeights:
    """min(W, theta) of the integers W, theta the largest for which none exceeds its share."""
    kernels = _kernels(weights.values.device)
    integer_weights = kernels.integer_weights(weights)
    theta = water_level(integer_weights, 1, ratio.numerator, ratio.denominator)
    capped: IntegerWeights = kernels.quantize(integer_weights.clamp(max=theta))
    return capped


def _without_peaks(values: Tensor, ratio: Fraction) -> Tensor:
    """The weights, cut to a power of two that is not below the water level.

    The level stays where it is; but integers of the same sum then resolve what is below it, of
    which beside one weight of 1e30 nothing would be left.
    """
    capped = (
        math.ceil(1 / ratio) - 1
    )  # at most so many, and theta = ratio rest / (1 - capped ratio)
    largest = torch.topk(values, capped)
    rest = values.double().index_fill(0, largest.indices, 0.0).sum()
    # From the smallest on, so that nothing cancels: rest and divisor with capped, capped - 1, ...
    peaks = largest.values.double().flip(0)
    rests = rest + torch.cat([peaks.new_zeros(1), peaks.cumsum(0)])
    fewer = torch.arange(capped + 1, dtype=rests.dtype, device=rests.device)
    divisors = float(1 - capped * ratio) + float(ratio) * fewer
    level = float((rests / divisors).min()) * float(ratio) * (1 + float(_ROUNDING))
    if level == math.inf or math.frexp(level)[1] >= math.frexp(float(peaks[-1]))[1]:
        return values
    return values.clamp(max=math.ldexp(1.0, math.frexp(level)[1]))


def seed_from(generator: torch.Generator | None, device: torch.device) -> int:
    """The key of one call's stream: 63 bits from torch's generator."""
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(f"generator must be a torch.Generator, got {type(generator).__name__}")
    place = device if generator is None else generator.device
    return int(torch.randint(2**63 - 1, (), generator=generator, device=place))
