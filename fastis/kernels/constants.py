"""What stays the same for a sampler's life, and what follows from it in exact arithmetic."""

from __future__ import annotations

from dataclasses import dataclass, field
from fractions import Fraction
from math import ceil, floor

MANTISSA_BITS = 16
SUM_BITS = 61  # of integer weights that are made from floats
FLATTEN = {"none": 0, "cap": 1, "mix": 2}
SCHEMES = {"multinomial": 0, "stratified": 1, "systematic": 2}
IMPORTANCE = {"rms": 0, "sum": 1}


@dataclass(frozen=True)
class Constants:
    """What stays the same for a sampler's life. Names and meanings are those of csrc/layout.h."""

    num_samples: int
    batch_size: int
    seed: int
    warmup_draws: int
    batches_per_epoch: int
    max_duplicates: float
    flatten: int
    scheme: int
    has_states: bool
    floor: float = 1e-3
    tau: float = 0.0  # 0: linear; below 0: the state is the last observation
    tau_scale: float = 1.0  # linear: tau = max(tau_scale t, 1)
    importance: int = 0
    smoothing: float = 0.99
    least_gain: float = 0.0  # importance sampling pauses below it
    unbiased: bool = True
    shard: bool = False  # of a larger table: theta is held, not found
    keeps_moments: bool = True  # in an update; else they are kept for several tables elsewhere
    cap_numerator: int = field(init=False)
    cap_denominator: int = field(init=False)
    total_limit: int = field(init=False)
    headroom: int = field(init=False)

    def __post_init__(self) -> None:
        ratio = cap_ratio(self.max_duplicates, self.batch_size, self.num_samples)
        object.__setattr__(self, "cap_numerator", ratio.numerator)
        object.__setattr__(self, "cap_denominator", ratio.denominator)
        limit = self._limit_bits()
        object.__setattr__(self, "total_limit", 1 << limit)
        # Half of the spare bits below the floor, half above the present total. Raised to the floor
        # the mean is at most 1 / floor + 1 times it, and rounding adds less than another floor.
        spread = MANTISSA_BITS + _bits(ceil(1 / self.floor) + 2) + _bits(self.num_samples)
        object.__setattr__(self, "headroom", (limit - spread) // 2)
        if self.has_states and limit < spread:
            raise ValueError(
                f"num_samples={self.num_samples} with batch_size={self.batch_size}, "
                f"max_duplicates={self.max_duplicates}, floor={self.floor} needs sums of {spread} "
                f"bits, but {limit} can be had; raise floor or max_duplicates, or use flatten='cap'"
            )

    def _limit_bits(self) -> int:
        """log2 of the largest total whose products stay below 2^62 in the draw."""
        if self.flatten != FLATTEN["mix"]:
            return 62 - _bits(ceil(self.max_duplicates))
        batch = self.batch_size * self.cap_denominator
        slack = self.cap_numerator * self.num_samples - batch
        return 61 - _bits(batch) - _bits(ceil(self.cap_numerator * self.num_samples / slack))

    @property
    def max_capped(self) -> int:
        """How many items can be above the cap at once: ceil(B/D) - 1."""
        return max(0, ceil(self._most_uniform) - 1)

    @property
    def max_alike(self) -> int:
        """So many active items, or fewer, are drawn alike: no other probabilities meet the cap.

        floor(B/D); 0 without a cap.
        """
        return 0 if self.flatten == FLATTEN["none"] else floor(self._most_uniform)

    @property
    def _most_uniform(self) -> Fraction:
        return Fraction(self.batch_size * self.cap_denominator, self.cap_numerator)


def _bits(n: int) -> int:
    """ceil(log2 n)."""
    return (n - 1).bit_length()


def is_uniform(max_duplicates: float, batch_size: int, num_samples: int) -> bool:
    """Whether the cap leaves no other probabilities than 1/N (or others within 2e-6 of it).

    A cap above that stays above B/N when :func:`cap_ratio` takes up to 1e-6 of it away: "mix" needs
    that difference.
    """
    return max_duplicates * num_samples <= batch_size * (1 + 2e-6)


def cap_ratio(max_duplicates: float, batch_size: int, num_samples: int) -> Fraction:
    """D as the simplest ratio within 1e-6 below it (or the rounding of a float above).

    Never below B/N, which could not be met: items would be capped without end.
    """
    least = Fraction(batch_size, num_samples)
    if is_uniform(max_duplicates, batch_size, num_samples):
        return least
    exact = Fraction(max_duplicates)
    return simplest_between(
        max(least, exact * (1 - Fraction(1, 10**6))), exact * (1 + Fraction(1, 2**50))
    )


def simplest_between(low: Fraction, high: Fraction) -> Fraction:
    """The ratio of least denominator in [low, high], 0 < low <= high: by continued fractions."""
    integer = ceil(low)
    if integer <= high:
        return Fraction(integer)
    below = integer - 1
    return below + 1 / simplest_between(1 / (high - below), 1 / (low - below))
