"""Draws from given weights: ``sample``, the drop-in for ``torch.multinomial``, and ``AliasTable``.

Weights become integers with a total T of about 2^61 (each is off by at most one unit); a draw is
floor(R T / 2^128) of 128 random bits R. So there is no limit of 2^24 categories, a zero weight is
never drawn, and the probability reported is the one drawn.
"""

from __future__ import annotations

from fractions import Fraction
from typing import NamedTuple

import torch
from torch import Tensor

from fastis import check
from fastis.kernels import kernels_for
from fastis.kernels.reference_sample import coefficients
from fastis.kernels.reference_weights import quantise, water_level

_FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


class Batch(NamedTuple):
    """A minibatch: ``indices`` int64 [B]; ``weights`` float32 [B], the coefficients 1/(N p)."""

    indices: Tensor
    weights: Tensor


class MinibatchSource:
    """What ``fastis.sample`` takes a next minibatch from; :class:`fastis.Sampler` is one."""

    def sample(self) -> Batch:
        raise NotImplementedError


class AliasTable:
    """Static weights, drawn with replacement in O(1) a draw (Walker 1977; integer exact).

    Parameters
    ----------
    weights : float tensor [N]
        finite and non-negative, at least one positive; need not sum to 1. CPU or CUDA.
    max_prob : float, optional
        no probability exceeds it: p = min(c w, max_prob) (water filling). At least 1/N.

    Raises
    ------
    TypeError, ValueError
        naming the argument, what was expected and what came.

    Equivalent to::

        indices = torch.multinomial(weights, num_samples, replacement=True)
        weights = 1 / (N * (weights / weights.sum())[indices])
    """

    def __init__(self, weights: Tensor, *, max_prob: float | None = None) -> None:
        integers = _integer_weights(weights)
        if max_prob is not None:
            integers = _capped(integers, max_prob, "max_prob")
        self._weights = integers
        self._total = int(integers.sum())
        kernels = kernels_for("sample", integers.device.type)
        self._own, self._alias = kernels.alias_build(integers, self._total)

    def __len__(self) -> int:
        return self._weights.numel()

    def __repr__(self) -> str:
        return f"AliasTable({len(self)} weights, device={self._weights.device})"

    @property
    def probabilities(self) -> Tensor:
        """float64 [N]: exactly what is drawn."""
        return self._weights.double() / float(self._total)

    def sample(self, num_samples: int, generator: torch.Generator | None = None) -> Batch:
        """``num_samples`` independent draws; ``generator`` as in torch (None: the global one)."""
        count = check.integer("num_samples", num_samples, 0)
        seed = _seed_from(generator, self._weights.device)
        kernels = kernels_for("sample", self._weights.device.type)
        indices, r = kernels.alias_draw(
            self._weights, self._total, self._own, self._alias, seed, 0, count
        )
        return Batch(indices, r)


def sample(
    source: MinibatchSource | AliasTable | Tensor,
    num_samples: int | None = None,
    *,
    replacement: bool = True,
    max_duplicates: float | None = None,
    generator: torch.Generator | None = None,
) -> Batch:
    """Draws a minibatch of indices with their importance-sampling coefficients.

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
        at most so many expected copies of any index among ``num_samples`` (water filling); None: no
        flattening. Only with replacement.
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
    count = check.integer("num_samples", num_samples, 0)
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
    integers = _integer_weights(source, name="source")
    if max_duplicates is not None:
        least = count / integers.numel()
        most = check.number("max_duplicates", max_duplicates, least)
        if most < count:
            integers = _capped(integers, most / count, "max_duplicates / num_samples")
    return _sample_by_search(integers, count, generator)


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


def _sample_by_search(integers: Tensor, count: int, generator: torch.Generator | None) -> Batch:
    ends = torch.cumsum(integers, 0)
    total = int(ends[-1])
    seed = _seed_from(generator, integers.device)
    kernels = kernels_for("sample", integers.device.type)
    points = kernels.draw_points(total, seed, 0, count, integers.device)
    indices = torch.searchsorted(ends, points, right=True)
    return Batch(indices, coefficients(integers, total, indices))


def _race(weights: Tensor, count: int, generator: torch.Generator | None) -> Batch:
    """Item i arrives after an exponential time of rate w_i; the first ``count`` win."""
    checked = _checked(weights, "source").double()
    rates = checked / checked.max()
    possible = int((rates > 0).sum())
    if count > possible:
        raise ValueError(
            "num_samples must be at most the number of positive weights without replacement, "
            f"{possible}, got {count}"
        )
    arrivals = torch.empty_like(rates).exponential_(generator=generator) / rates
    first = torch.topk(arrivals, min(count + 1, rates.numel()), largest=False, sorted=True)
    indices = first.indices[:count]
    if count == possible:
        inclusion = torch.ones(count, dtype=torch.float64, device=rates.device)
    elif bool((rates[rates > 0] == 1).all()):
        inclusion = torch.full_like(rates[:count], count / possible)
    else:
        inclusion = -torch.expm1(-rates[indices] * first.values[count])
    return Batch(indices, (1 / (rates.numel() * inclusion)).float())


def _checked(weights: Tensor, name: str) -> Tensor:
    """A usable float vector of weights, or an error; reads one flag from the device."""
    device = weights.device if isinstance(weights, Tensor) else torch.device("cpu")
    weights = check.vector(name, weights, None, _FLOATS, device).detach()
    if weights.numel() == 0:
        raise ValueError(f"{name} must have at least one weight, got shape [0]")
    least, most = (float(v) for v in torch.aminmax(weights))
    if not (least >= 0 and 0 < most < float("inf")):
        raise ValueError(
            f"{name} must be finite and non-negative with a positive weight among them, "
            f"got weights from {least} to {most}"
        )
    return weights


def _integer_weights(weights: Tensor, name: str = "weights") -> Tensor:
    return quantise(_checked(weights, name).double())


def _capped(integers: Tensor, max_prob: float, name: str) -> Tensor:
    n = integers.numel()
    most = check.number(name, max_prob, 0.0)
    ratio = Fraction(most).limit_denominator(1 << 40)
    if ratio * n < 1:
        raise ValueError(f"{name} must be at least 1/N = {1 / n:.6g}, got {most!r}")
    if ratio >= 1:
        return integers
    theta = water_level(integers, 1, ratio.numerator, ratio.denominator)
    return integers.clamp(max=theta)


def _seed_from(generator: torch.Generator | None, device: torch.device) -> int:
    """The key of one call's stream: 63 bits from torch's generator."""
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(f"generator must be a torch.Generator, got {type(generator).__name__}")
    place = device if generator is None else generator.device
    return int(torch.randint(2**63 - 1, (), generator=generator, device=place))
