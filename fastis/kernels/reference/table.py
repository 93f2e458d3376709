"""The table in plain PyTorch: updates and draws, the oracle of every other backend, bit for bit.

Integer cumulative sums and searchsorted: O(N), obvious. Reads counts on the host.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastis.kernels.code import code_of, exponent_of, floors_of, mantissa_of, weight_of
from fastis.kernels.constants import SCHEMES
from fastis.kernels.flatten import Distribution, distribution, others_of, unflattened
from fastis.kernels.layout import (
    CODE,
    DRAWS,
    EXCLUDED,
    EXPONENT,
    LAST,
    LAST_EXCLUDED,
    MEAN,
    NO_EXPONENT,
    SEEN,
    SKIPPED,
    TOTAL,
    UNIFORM_FROM,
    UPDATES,
    VALID,
    VAR,
    Table,
    active,
    without_replacement,
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
from fastis.kernels.table import Batch, Observation, ShardTotal, Share
from fastis.kernels.variance import minibatch_moments, smooth

IS_ATOMIC = False  # many operations: steps of other threads have to wait


def update(table: Table, observation: Observation) -> None:
    """One iteration of the clock of updates; an empty observation is none.

    Raises
    ------
    IndexError
        for an index out of range, before anything has changed. (A backend that would have to wait
        for the device to know leaves such rows out.)
    """
    indices, weights, observed, score, mean_grad = observation
    table.check_indices(indices)
    if indices.numel() == 0:
        return
    if table.states is not None:
        _update_state(table, indices, observed, int(table.scalars[UPDATES]))
    else:
        table.scalars[SKIPPED] += (~(observed.abs() < LARGEST_SCORE)).sum()
    if table.constants.keeps_moments:
        moments = minibatch_moments(weights.double(), score.double(), mean_grad)
        smooth(table, moments, score.numel())
    table.scalars[UPDATES] += 1


def fold(table: Table, observation: Observation, iteration: int | None) -> None:
    """The part of an update that concerns the states, as of a possibly past ``iteration`` (None:
    the present one): neither moments nor clock.

    A sample that was observed in that iteration or later stays as it is. The weights, the score and
    the mean gradient of the observation are not read; the table has states.

    Raises
    ------
    IndexError
        as :func:`update`.
    """
    table.check_indices(observation.indices)
    if observation.indices.numel() > 0:
        at = int(table.scalars[UPDATES]) if iteration is None else iteration
        _update_state(table, observation.indices, observation.observed, at)


def clear(table: Table, indices: Tensor, last: int) -> None:
    """These samples have no score any more: they are unseen or excluded, as ``last`` says, which is
    ``LAST_UNSEEN`` or ``LAST_EXCLUDED``. The table has states.

    Raises
    ------
    IndexError
        as :func:`update`.
    """
    assert table.states is not None
    table.check_indices(indices, "indices")
    scalars, i = table.scalars, torch.unique(indices)
    before, had_seen = table.column(LAST)[i], int(scalars[SEEN]) > 0
    if had_seen:
        scalars[TOTAL] -= weight_of(table.codes()[i], int(scalars[EXPONENT])).sum()
    scalars[SEEN] -= (before >= 0).sum()
    scalars[EXCLUDED] += len(i) * (last == LAST_EXCLUDED) - (before == LAST_EXCLUDED).sum()
    table.states[i] = table.states.new_tensor([0, 0, last, 0])
    scalars[VALID] = 0
    if had_seen and int(scalars[SEEN]) == 0:  # as in the beginning
        scalars[EXPONENT] = NO_EXPONENT
    elif _exceeds_limit(table):
        rescale(table)


def _update_state(table: Table, indices: Tensor, observed: Tensor, updates: int) -> None:
    """Kutsuna 2025, Algorithm 1, with weights as integers (math: state table, exactness), in
    iteration ``updates``."""
    constants, scalars = table.constants, table.scalars
    total, seen, e0 = (int(scalars[at]) for at in (TOTAL, SEEN, EXPONENT))
    usable, is_active = observed.abs() < LARGEST_SCORE, table.is_active(indices)
    scalars[SKIPPED] += (~usable & is_active).sum()
    keep = first_positions(indices, usable & is_active)
    keep = keep[interval(table.column(LAST)[indices[keep]], updates) > 0]
    i, x = indices[keep], observed[keep]

    fresh = table.column(LAST)[i] < 0
    new_mean, new_var = smoothed(table, i, x, updates)
    importance = importance_of(new_mean, new_var, constants.importance)
    floors = floors_of(total, seen, e0, constants.floor, others_of(table))
    codes = code_of(importance, floors.above(e0))

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
    """Is the sum of all weights, those of the unseen included, more than a draw can take?"""
    total, seen = int(table.scalars[TOTAL]), int(table.scalars[SEEN])
    of_unseen = (active(table) - seen) * (total // seen) if seen else 0
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
    floors = floors_of(relative_total, seen, largest - spare, constants.floor, others_of(table))
    base_code = code_of(torch.tensor(floors.base, dtype=torch.float32, device="cpu"), 0.0)
    e0 = int(exponent_of(base_code)) - constants.headroom
    codes = code_of(importance, max(floors.wanted, 2.0**e0))
    table.column(CODE)[is_seen] = codes
    scalars[EXPONENT] = e0
    scalars[TOTAL] = weight_of(codes, e0).sum()


def update_and_draw(table: Table, observation: Observation, next_batch: Batch) -> None:
    """An update, then the next draw; when the update raises, nothing was drawn."""
    update(table, observation)
    draw(table, next_batch)


def draw(table: Table, batch: Batch) -> None:
    """The next minibatch, into ``indices`` int64 [B] and ``weights`` float32 [B]; ticks DRAWS.

    Raises
    ------
    ValueError
        where all samples are excluded, before anything has changed. (A backend that would have to
        wait for the device to know draws any sample, with weights of 0.)
    """
    table.check_active()
    indices, weights = batch
    constants = table.constants
    iteration = int(table.scalars[DRAWS])
    table.scalars[DRAWS] += 1
    positions = torch.arange(constants.batch_size, device=indices.device)
    if without_replacement(table, iteration):
        epoch, first = _in_epoch(table, iteration)
        items = active(table)
        found = permute(constants.seed, epoch, items, (first + positions) % items)
        excludes = items < constants.num_samples
        indices.copy_(torch.nonzero(table.is_active()).flatten()[found] if excludes else found)
        weights.fill_(1.0)
    elif table.states is None:
        words = random_words(constants.seed, STREAM_DRAW, iteration, positions)
        indices.copy_(scale(words, constants.num_samples))
        weights.fill_(1.0)
    else:
        _draw_by_importance(table, iteration, positions, indices, weights)


# A shard of a larger table (fastis.kernels.shards) ------------------------------------------------


def shard_total(table: Table, theta: int) -> ShardTotal:
    """A shard's integers with capped items at ``theta``. O(N)."""
    if table.states is None or int(table.scalars[SEEN]) == 0:
        return ShardTotal(0, table.constants.num_samples)
    drawn = _held_at(table, theta)
    return ShardTotal(drawn.total - theta * len(drawn.capped), len(drawn.capped))


def draw_share(table: Table, share: Share, batch: Batch) -> int:
    """The rank's part of the next minibatch of all shards, after :func:`shard_total`, into the
    first rows of ``batch``, which has room for all; how many these are. Ticks DRAWS."""
    iteration = int(table.scalars[DRAWS])
    table.scalars[DRAWS] += 1
    points = [x - share.before for x in _points_of_all(table, share, iteration)]
    own = [x for x in points if 0 <= x < share.own]
    if table.states is None or int(table.scalars[SEEN]) == 0:  # all weigh theta
        found = [(x // share.theta, share.theta) for x in own]
    else:
        found = _find_in_shard(_held_at(table, share.own_theta), share, own)
    for b, (index, weight) in enumerate(found):
        batch.indices[b] = index
        batch.weights[b] = float(share.total) / (float(share.num_samples) * float(weight))
    return len(found)


def _held_at(table: Table, theta: int) -> Distribution:
    """The flattened weights where capped items weigh ``theta``, wherever that belongs."""
    raw = unflattened(table)
    capped = torch.nonzero((table.column(LAST) >= 0) & (raw > theta)).flatten()
    weights = raw.clamp(max=theta)
    return Distribution(weights, int(weights.sum()), len(weights), capped)


def _points_of_all(table: Table, share: Share, iteration: int) -> list[int]:
    """The points of the draws from ``share.first`` on, below the total of all shards."""
    positions = torch.arange(share.first, share.end, device="cpu")
    scheme = table.constants.scheme
    numbers = torch.zeros_like(positions) if scheme == SCHEMES["systematic"] else positions
    words = torch.stack(random_words(share.seed, STREAM_DRAW, iteration, numbers)).T.tolist()
    points = [
        (w0 | w1 << 32 | w2 << 64 | w3 << 96) * share.total >> 128 for w0, w1, w2, w3 in words
    ]
    if scheme == SCHEMES["multinomial"]:
        return points
    sliced = zip(positions.tolist(), points, strict=True)
    return [(b * share.total + offset) // share.batch_size for b, offset in sliced]


def _find_in_shard(drawn: Distribution, share: Share, points: list[int]) -> list[tuple[int, int]]:
    """Index and weight in the units of the total: capped items first, then the others."""
    capped_total = len(drawn.capped) * share.theta
    uncapped = torch.ones_like(drawn.weights, dtype=torch.bool)
    uncapped[drawn.capped] = False
    others = torch.nonzero(uncapped).flatten()
    prefix = torch.cumsum(drawn.weights[others], 0)
    found = []
    for x in points:
        if x < capped_total:
            found.append((int(drawn.capped[x // share.theta]), share.theta))
        else:
            own_point = torch.tensor((x - capped_total) >> share.shift, device=prefix.device)
            index = int(others[torch.searchsorted(prefix, own_point, right=True)])
            found.append((index, int(drawn.weights[index]) << share.shift))
    return found


def _in_epoch(table: Table, draw: int) -> tuple[int, int]:
    """Of a minibatch without replacement: the epoch, which keys the permutation, and its first
    position there.

    Epochs of the warm-up are counted; later ones have the number of their first minibatch, which is
    no epoch's of the warm-up. Those that the user asks for are whole. An epoch is one of the active
    samples; of fewer than B it is a minibatch, which begins again where it ends.
    """
    constants, uniform_from = table.constants, int(table.scalars[UNIFORM_FROM])
    length, items = constants.batches_per_epoch, active(table)
    if items < constants.num_samples:
        length = max(1, items // constants.batch_size)
    since = draw - uniform_from if draw >= uniform_from else draw
    epoch, minibatch = divmod(since, length)
    in_warmup = draw < constants.warmup_draws
    return epoch if in_warmup else draw - minibatch, minibatch * constants.batch_size


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
    uncapped = torch.ones_like(drawn.weights, dtype=torch.bool)
    uncapped[drawn.capped] = False
    order = torch.cat([drawn.capped, torch.nonzero(uncapped).flatten()])
    prefix = torch.cumsum(drawn.weights[order], 0)
    indices.copy_(order[torch.searchsorted(prefix, points, right=True)])
    weights.copy_(coefficients(drawn.weights, drawn.total, indices, drawn.active))


def _slice_points(positions: Tensor, offsets: Tensor, total: int, batch_size: int) -> Tensor:
    """floor((b total + u_b) / B): one point in every slice of the cumulative distribution."""
    quotient, remainder = total // batch_size, total % batch_size
    return positions * quotient + (positions * remainder + offsets) // batch_size
