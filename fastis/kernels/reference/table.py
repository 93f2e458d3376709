"""The table in plain PyTorch: updates and draws, the oracle of every other backend, bit for bit.

Integer cumulative sums and searchsorted: O(N), obvious. Reads counts on the host.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastis.kernels.code import code_of, exponent_of, floor_of, mantissa_of, weight_of
from fastis.kernels.flatten import Distribution, distribution
from fastis.kernels.layout import (
    CODE,
    DRAWS,
    EXPONENT,
    LAST,
    MEAN,
    SCHEMES,
    SEEN,
    SKIPPED,
    TOTAL,
    UPDATES,
    VALID,
    VAR,
    Table,
)
from fastis.kernels.quantize import coefficients
from fastis.kernels.reference.philox import STREAM_DRAW, permute, random_words, scale
from fastis.kernels.state import (
    LARGEST_SCORE,
    clock_of,
    first_positions,
    importance_of,
    interval,
    smoothed,
)
from fastis.kernels.variance import minibatch_moments, smooth


def update(
    table: Table,
    indices: Tensor,
    observed: Tensor,
    weights: Tensor,
    score: Tensor,
    mean_grad: Tensor | None,
) -> bool:
    """One iteration of the sampler's clock of updates; an empty one is none.

    False when an index is out of range: nothing has changed then. (A backend that would have to
    wait for the device to know says True, and leaves such indices out.)

    Parameters
    ----------
    indices : int64 [n]; duplicates are legal, the first usable position wins
    observed : float32 [n], what the table keeps averages of (the score, or the loss)
    weights, score : float32 [n], for the variance traces
    mean_grad : float32 [C] or None, minibatch mean of r g
    """
    if bool(((indices < 0) | (indices >= table.constants.num_samples)).any()):
        return False
    if indices.numel() == 0:
        return True
    if table.records is not None:
        _update_state(table, indices, observed)
    else:
        table.scalars[SKIPPED] += (~(observed.abs() < LARGEST_SCORE)).sum()
    _update_variance(table, weights, score, mean_grad)
    table.scalars[UPDATES] += 1
    return True


def _update_state(table: Table, indices: Tensor, observed: Tensor) -> None:
    """Kutsuna 2025, Algorithm 1, with weights as integers (math: state table, exactness)."""
    constants, scalars = table.constants, table.scalars
    updates = int(scalars[UPDATES])
    total, seen, e0 = (int(scalars[at]) for at in (TOTAL, SEEN, EXPONENT))
    usable = observed.abs() < LARGEST_SCORE
    scalars[SKIPPED] += (~usable).sum()
    keep = first_positions(indices, usable)
    keep = keep[interval(table.column(LAST)[indices[keep]], updates) > 0]
    i, x = indices[keep], observed[keep]

    fresh = table.column(LAST)[i] < 0
    new_mean, new_var = smoothed(table, i, x, updates)
    importance = importance_of(new_mean, new_var, constants.importance)
    codes = code_of(importance, floor_of(total, seen, e0, constants.floor))

    old_codes = table.codes()[i]
    table.column(MEAN)[i], table.column(VAR)[i] = new_mean, new_var
    table.column(LAST)[i] = clock_of(updates)
    table.column(CODE)[i] = codes
    scalars[VALID] = 0
    shift = exponent_of(codes) - e0
    if bool(((shift < 0) | (shift > _max_shift(indices.numel()))).any()):
        return rescale(table)
    total += int(weight_of(codes, e0).sum())
    total -= int(weight_of(old_codes, e0).sum()) if seen else 0
    scalars[TOTAL] = total
    scalars[SEEN] += fresh.sum()
    if _exceeds_limit(table):
        rescale(table)


def _exceeds_limit(table: Table) -> bool:
    """Is the sum of all weights, those of the unseen included, more than the draw has room for?"""
    total, seen = int(table.scalars[TOTAL]), int(table.scalars[SEEN])
    of_unseen = (table.constants.num_samples - seen) * (total // seen) if seen else 0
    return total + of_unseen > table.constants.total_limit


def _max_shift(n: int) -> int:
    """The largest shift of a mantissa that n new weights can have without overflowing a sum."""
    return 61 - 16 - (n - 1).bit_length()


def rescale(table: Table) -> None:
    """Codes, e0 and totals anew from the states, with the floor at the present mean. O(N)."""
    constants, scalars = table.constants, table.scalars
    scalars[VALID] = 0
    is_seen = table.column(LAST) >= 0
    seen = int(is_seen.sum())
    scalars[SEEN] = seen
    if seen == 0:
        return
    mean, var = table.column(MEAN)[is_seen], table.column(VAR)[is_seen]
    importance = importance_of(mean, var, constants.importance)
    codes = code_of(importance, 0.0)
    # The mean, in integers relative to the largest weight: the same on every backend.
    largest = int(exponent_of(codes).max())
    spare = 62 - 16 - (constants.num_samples - 1).bit_length()
    below = (largest - exponent_of(codes)).clamp(max=63)
    relative_total = int(((mantissa_of(codes) << spare) >> below).sum())
    floor = floor_of(relative_total, seen, largest - spare, constants.floor)
    floor_code = code_of(torch.tensor(floor, dtype=torch.float32, device="cpu"), 0.0)
    e0 = int(exponent_of(floor_code)) - constants.headroom
    codes = code_of(importance, floor)
    table.column(CODE)[is_seen] = codes
    scalars[EXPONENT] = e0
    scalars[TOTAL] = weight_of(codes, e0).sum()


def _update_variance(
    table: Table, weights: Tensor, score: Tensor, mean_grad: Tensor | None
) -> None:
    """Kutsuna 2025, Proposition 4.1: moments of one minibatch, smoothed before any ratio."""
    smooth(table, minibatch_moments(weights.double(), score.double(), mean_grad), score.numel())


def update_and_draw(
    table: Table,
    indices: Tensor,
    observed: Tensor,
    weights: Tensor,
    score: Tensor,
    mean_grad: Tensor | None,
    next_indices: Tensor,
    next_weights: Tensor,
) -> bool:
    """An update, then the next draw, into ``next_indices`` [B] and ``next_weights`` [B].

    False when an index is out of range: nothing has changed then, and nothing was drawn. Arguments
    as for :func:`fastis.kernels.reference.table.update`.
    """
    if not update(table, indices, observed, weights, score, mean_grad):
        return False
    draw(table, next_indices, next_weights)
    return True


def draw(table: Table, indices: Tensor, weights: Tensor) -> None:
    """The next minibatch, into ``indices`` int64 [B] and ``weights`` float32 [B]; ticks DRAWS."""
    constants = table.constants
    iteration = int(table.scalars[DRAWS])
    table.scalars[DRAWS] += 1
    positions = torch.arange(constants.batch_size, device=indices.device)
    if iteration < constants.warmup_draws:
        epoch, batch = divmod(iteration, constants.batches_per_epoch)
        first = batch * constants.batch_size
        indices.copy_(permute(constants.seed, epoch, constants.num_samples, first + positions))
        weights.fill_(1.0)
    elif table.records is None:
        words = random_words(constants.seed, STREAM_DRAW, iteration, positions)
        indices.copy_(scale(words, constants.num_samples))
        weights.fill_(1.0)
    else:
        _draw_by_importance(table, iteration, positions, indices, weights)


def _draw_by_importance(
    table: Table, iteration: int, positions: Tensor, indices: Tensor, weights: Tensor
) -> None:
    constants = table.constants
    drawn = distribution(table)
    if constants.scheme == SCHEMES["systematic"]:
        words = random_words(constants.seed, STREAM_DRAW, iteration, torch.zeros_like(positions))
    else:
        words = random_words(constants.seed, STREAM_DRAW, iteration, positions)
    points = scale(words, drawn.total)
    if constants.scheme != SCHEMES["multinomial"]:
        points = _slice_points(positions, points, drawn.total, constants.batch_size)
    _inverse_cdf(drawn, points, indices, weights)


def _inverse_cdf(drawn: Distribution, points: Tensor, indices: Tensor, weights: Tensor) -> None:
    """The items at ``points`` (int64 [n], below the total): capped ones first, then the others."""
    light = torch.ones_like(drawn.weights, dtype=torch.bool)
    light[drawn.capped] = False
    order = torch.cat([drawn.capped, torch.nonzero(light).flatten()])
    ends = torch.cumsum(drawn.weights[order], 0)
    indices.copy_(order[torch.searchsorted(ends, points, right=True)])
    weights.copy_(coefficients(drawn.weights, drawn.total, indices))


def _slice_points(positions: Tensor, offsets: Tensor, total: int, batch_size: int) -> Tensor:
    """floor((b total + u_b) / B): one point in every slice of the cumulative distribution."""
    quotient, remainder = total // batch_size, total % batch_size
    return positions * quotient + (positions * remainder + offsets) // batch_size
