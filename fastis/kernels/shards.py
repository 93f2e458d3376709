"""Shards of one large table: what ranks tell each other of theirs, and what follows from it.

Every rank owns a contiguous shard of the samples and a table of them, with an e0 of its own. The
weights of all shards are integers on one scale, that of the least e0: a shard's own are shifted to
the left by ``e0 - least``. With a cap theta on that scale, known to all ranks, the total is

    T = sum over ranks of (uncapped_r << shift_r) + capped_r theta

and rank r owns the points from the sum over the ranks before it on, ``(uncapped_r << shift_r) +
capped_r theta`` of them. So 13 bytes a rank (two integers and e0) make every rank know T and its
own interval exactly; draw b of a minibatch of all ranks is the rank's whose interval has

    x_b = floor(R_b T / 2^128),   R_b the 128 bits of the counter-based stream

and there is no draw that two ranks make, or none. Integers are Python's here: of any size.

theta lags: a step draws with the theta that followed from the totals of the step before. What is
drawn, min(W, theta) / T, is known exactly all the same, and so are the coefficients; only the bound
B p <= D may be missed for some steps, by as much as theta would have had to fall.

A shard of which nothing has been seen tells so; its samples weigh as much as the mean of all
others.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastis.kernels.code import floors_of
from fastis.kernels.constants import SCHEMES
from fastis.kernels.flatten import others_of, unflattened
from fastis.kernels.layout import EXPONENT, LAST, SEEN, TOTAL, UNIFORM_WEIGHT, Table
from fastis.kernels.table import ShardTotal, Share

_LEAST_EXPONENT = -300  # below any e0
_LARGEST_THETA = 1 << 62  # of a table: no cap
_FAR = 6  # powers of two that the mean may rise before a shard's floor follows
_STEEPEST = 4  # theta rises by no more than a quarter a step


class Theta(NamedTuple):
    """The weight that capped items are drawn with: ``integer`` on the scale of ``exponent``."""

    integer: int
    exponent: int

    def on_scale(self, e0: int) -> int:
        """On the scale of another e0, rounded down."""
        shift = self.exponent - e0
        return self.integer << shift if shift >= 0 else self.integer >> -shift

    def of_table(self, e0: int) -> int:
        """What a shard's own integers are compared with: an item above it is capped.

        All weigh at least 2^15. Less would leave nothing to the unseen.
        """
        return min(max(self.on_scale(e0), UNIFORM_WEIGHT - 1), _LARGEST_THETA)


NO_CAP = Theta(1, 2000)


class Message(NamedTuple):
    """What a rank tells the others in a step, in 16 bytes."""

    total: ShardTotal  # with the theta that all know
    exponent: int | None  # e0; None: nothing seen
    moment: float  # some sum over the minibatch that ranks add up, in 24 bits: 2^-17 off at most

    def packed(self) -> Tensor:
        """int64 [2]: 63 bits of the uncapped sum, 32 of the count, 9 of e0, 24 of the moment."""
        exponent = 0 if self.exponent is None else self.exponent - _LEAST_EXPONENT
        single = int(np.float32(self.moment).view(np.uint32))
        moment = min((single + 0x80) >> 8, 0xFFFFFF)
        words = (
            self.total.uncapped | (exponent >> 8) << 63,
            self.total.capped | moment << 32 | (exponent & 0xFF) << 56,
        )
        return torch.from_numpy(np.array(words, np.uint64).view(np.int64))


class _Messages:
    """The messages of all ranks, a column each."""

    def __init__(self, words: Tensor, sizes: np.ndarray[Any, Any]) -> None:
        self.sizes = sizes
        low, high = np.ascontiguousarray(words.numpy()).view(np.uint64).T
        self.uncapped = low & np.uint64((1 << 63) - 1)
        self.capped = (high & np.uint64(0xFFFFFFFF)).astype(np.int64)
        code = (low >> np.uint64(63)) << np.uint64(8) | high >> np.uint64(56)
        self.seen = code > 0
        self.exponent = code.astype(np.int64) + _LEAST_EXPONENT
        singles = ((high >> np.uint64(32)) & np.uint64(0xFFFFFF)).astype(np.uint32) << np.uint32(8)
        self.moment = singles.view(np.float32)

    def total(self, ranks: np.ndarray[Any, Any], least: int, theta: int, unseen_weight: int) -> int:
        """Of the ranks of a mask, on the scale of ``least``: exact."""
        seen, unseen = ranks & self.seen, ranks & ~self.seen
        total = int(self.capped[seen].sum()) * theta + int(self.sizes[unseen].sum()) * unseen_weight
        for exponent in set(self.exponent[seen].tolist()):
            part = self.uncapped[seen & (self.exponent == exponent)]
            high, low = part >> np.uint64(32), part & np.uint64(0xFFFFFFFF)
            total += ((int(high.sum()) << 32) + int(low.sum())) << exponent - least
        return total


class Gathered(NamedTuple):
    """What follows from the messages of all ranks in a step."""

    share: Share  # this rank's draws
    theta: Theta  # of the next step
    others: tuple[float, int]  # of the other ranks: the sum of the importances, of how many samples
    moment: float  # sum over the ranks; NaN if one has none


@dataclass(frozen=True)
class Shards:
    """Who owns what, and how minibatches of all ranks are drawn: the same on all of them."""

    rank: int
    sizes: np.ndarray[Any, Any]  # int64 [R]: samples of each rank, all above 0
    batch_size: int  # of all ranks
    scheme: int
    seed: int
    cap: Fraction | None  # the most expected copies of a sample, a ratio; None: no cap

    def gather(self, words: Tensor, theta: Theta) -> Gathered:
        """From the messages of all ranks, int64 [R, 2], sent with this theta."""
        messages = _Messages(words, self.sizes)
        seen, everybody = messages.seen, np.ones_like(messages.seen)
        first_ranks = np.arange(len(seen)) < self.rank
        least = int(messages.exponent[seen].min()) if seen.any() else 0
        capped_weight = max(theta.on_scale(least), 1)
        unseen_weight = UNIFORM_WEIGHT
        if seen.any():
            mean = messages.total(seen, least, capped_weight, 0) // int(self.sizes[seen].sum())
            unseen_weight = min(max(mean, 1), capped_weight)

        def total_of(ranks: np.ndarray[Any, Any]) -> int:
            return messages.total(ranks, least, capped_weight, unseen_weight)

        own_rank = np.arange(len(seen)) == self.rank
        total, before, own = total_of(everybody), total_of(first_ranks), total_of(own_rank)
        share = self._share(messages, least, theta, (total, before, own), unseen_weight)
        finite = bool(np.isfinite(messages.moment).all())
        others = total_of(seen & ~own_rank), int(self.sizes[seen & ~own_rank].sum())
        return Gathered(
            share,
            self._next_theta(theta, capped_weight, least, total, int(messages.capped[seen].sum()))
            if seen.any()
            else theta,
            (math.ldexp(float(others[0]), least - 15), others[1]),
            math.fsum(messages.moment.tolist()) if finite else math.nan,
        )

    def _share(
        self,
        messages: _Messages,
        least: int,
        theta: Theta,
        totals: tuple[int, int, int],
        unseen_weight: int,
    ) -> Share:
        total, before, own = totals
        first, end = 0, self.batch_size
        if self.scheme != SCHEMES["multinomial"]:  # slice b has the points from b T / B on
            first = before * self.batch_size // total
            end = -(-(before + own) * self.batch_size // total)
        exponent = int(messages.exponent[self.rank])
        alike = not messages.seen[self.rank]
        return Share(
            seed=self.seed,
            first=first,
            end=end,
            batch_size=self.batch_size,
            num_samples=int(self.sizes.sum()),
            total=total,
            before=before,
            own=own,
            # Without a cap nothing is capped: any number serves that is not too long.
            theta=unseen_weight if alike else min(max(theta.on_scale(least), 1), total),
            own_theta=theta.of_table(exponent),
            shift=0 if alike else exponent - least,
        )

    def _next_theta(self, theta: Theta, weight: int, least: int, total: int, capped: int) -> Theta:
        """Newton's step towards the root of g(theta) = T(theta) - theta B / D (csrc/flatten.h).

        From above it never passes the root. From below it may shoot far beyond; theta then rises by
        a quarter at most.
        """
        if self.cap is None:
            return NO_CAP
        divisor = self.batch_size * self.cap.denominator - capped * self.cap.numerator
        highest = weight + weight // _STEEPEST + 1
        level = highest
        if divisor > 0:
            level = self.cap.numerator * (total - capped * weight) // divisor
        integer = max(min(level, highest), 1)
        if integer == weight and least <= theta.exponent:
            return theta
        too_long = max(0, integer.bit_length() - 62)
        return Theta(integer >> too_long, least + too_long)


def shard_sizes(num_samples: int, batch_size: int, ranks: int) -> np.ndarray[Any, Any]:
    """int64 [R]: samples of each rank, as ``torch.chunk`` and DTensor divide rows.

    Raises
    ------
    ValueError
        for shards that are too large, or smaller than a rank's minibatch.
    """
    most = -(-num_samples // ranks)
    sizes = np.diff(np.minimum(np.arange(ranks + 1, dtype=np.int64) * most, num_samples))
    if most > 2**32 - 1:
        raise ValueError(
            f"num_samples must be below 2^32 a rank, got {num_samples} on {ranks} ranks"
        )
    if sizes.min() < batch_size:
        raise ValueError(
            f"batch_size must be at most {sizes.min()}, the size of the smallest shard of "
            f"{num_samples} samples on {ranks} ranks, got {batch_size}"
        )
    return sizes


def floor_is_late(table: Table) -> bool:
    """Whether the mean of all shards has risen far beyond what it was at this one's last rescale,
    which its own total would not tell: a rescale, O(N), raises the floor."""
    own, others = exponent_of_shard(table), others_of(table)
    if own is None or others[1] == 0:
        return False
    constants, scalars = table.constants, table.scalars
    total, seen = int(scalars[TOTAL]), int(scalars[SEEN])
    base = floors_of(total, seen, own, constants.floor, others).base
    return math.frexp(base)[1] - 1 - constants.headroom > own + _FAR


def shard_probabilities(table: Table, share: Share) -> Tensor:
    """float64 [N]: with what probability a draw of all ranks is each of this shard's samples."""
    total, theta = float(share.total), float(share.theta)
    if table.states is None or int(table.scalars[SEEN]) == 0:
        n = table.constants.num_samples
        return torch.full((n,), theta / total, dtype=torch.float64, device=table.device)
    weights = unflattened(table)
    capped = (table.column(LAST) >= 0) & (weights > share.own_theta)
    drawn = weights.clamp(max=share.own_theta).double() * 2.0**share.shift
    return torch.where(capped, theta, drawn) / total


def exponent_of_shard(table: Table) -> int | None:
    """e0; None where nothing has been seen."""
    if table.states is None or int(table.scalars[SEEN]) == 0:
        return None
    return int(table.scalars[EXPONENT])
