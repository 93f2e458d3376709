"""Draws in plain PyTorch: integer cumulative sums and searchsorted. O(N), obvious, the oracle."""

from __future__ import annotations

import torch
from torch import Tensor

from fastis.kernels import reference_update, reference_weights
from fastis.kernels.reference_random import (
    STREAM_DRAW,
    STREAM_WEIGHTS,
    permute,
    random_words,
    scale,
)
from fastis.kernels.reference_weights import Distribution, Weights, distribution
from fastis.table import DRAWS, SCHEMES, Table


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
    as for :func:`fastis.kernels.reference_update.update`.
    """
    if not reference_update.update(table, indices, observed, weights, score, mean_grad):
        return False
    draw(table, next_indices, next_weights)
    return True


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
        points = slice_points(positions, points, drawn.total, constants.batch_size)
    _find(drawn, points, indices, weights)


def locate(table: Table, points: Tensor, indices: Tensor, weights: Tensor) -> None:
    """The items at ``points`` (int64 [n], below the total of the distribution as it stands).

    What a draw does, with points of the caller's. Capped items come first in the order of the
    points, then all others in the order of their indices.
    """
    _find(distribution(table), points, indices, weights)


def _find(drawn: Distribution, points: Tensor, indices: Tensor, weights: Tensor) -> None:
    light = torch.ones_like(drawn.weights, dtype=torch.bool)
    light[drawn.capped] = False
    order = torch.cat([drawn.capped, torch.nonzero(light).flatten()])
    ends = torch.cumsum(drawn.weights[order], 0)
    indices.copy_(order[torch.searchsorted(ends, points, right=True)])
    weights.copy_(coefficients(drawn.weights, drawn.total, indices))


def slice_points(positions: Tensor, offsets: Tensor, total: int, batch_size: int) -> Tensor:
    """floor((b total + u_b) / B): one point in every slice of the cumulative distribution."""
    quotient, remainder = total // batch_size, total % batch_size
    return positions * quotient + (positions * remainder + offsets) // batch_size


def coefficients(weights: Tensor, total: int, indices: Tensor) -> Tensor:
    """r = 1 / (N p) = total / (N W), float32 [n], for the drawn ``indices`` int64 [n]."""
    return (float(total) / (float(weights.numel()) * weights[indices].double())).float()


def draw_points(total: int, seed: int, first: int, count: int, device: torch.device) -> Tensor:
    """int64 [count]: points below ``total`` of draws ``first`` ... of the stream of ``seed``."""
    positions = torch.arange(first, first + count, device=device)
    return scale(random_words(seed, STREAM_WEIGHTS, 0, positions), total)


def capacities(total: int, n: int, device: torch.device) -> Tensor:
    """int64 [n]: the units of each bucket: the first total mod n hold one more than the others."""
    return total // n + (torch.arange(n, device=device) < total % n).long()


def weigh(values: Tensor) -> Weights | None:
    """The weights ``values`` (float [N], or int64 [N] with 0 < sum < 2^62) as integers, and sums.

    None: a weight is negative or not finite, or all of them are 0.
    """
    shift = 0
    if values.is_floating_point():
        least, most = (float(v) for v in torch.aminmax(values))
        if not (least >= 0 and 0 < most < float("inf")):
            return None
        shift = reference_weights.shift_of(values)
    weights = Weights(values, shift, 0, values)
    ends = torch.cumsum(integers(weights), 0)
    return weights._replace(total=int(ends[-1]), ends=ends)


def integers(weights: Weights) -> Tensor:
    """int64 [N], of sum ``weights.total``."""
    if weights.values.dtype == torch.int64:
        return weights.values
    return reference_weights.integers(weights.values, weights.shift)


def search(weights: Weights, seed: int, first: int, count: int) -> tuple[Tensor, Tensor]:
    """Draws ``first`` ... of the stream of ``seed``: indices int64 and r float32, [count]."""
    points = draw_points(weights.total, seed, first, count, weights.values.device)
    indices = torch.searchsorted(weights.ends, points, right=True)
    return indices, coefficients(integers(weights), weights.total, indices)


def alias_build(weights: Weights) -> Tensor:
    """The alias table of the weights, int64 [N, 2]: 16 bytes a bucket (csrc/alias.h).

    A bucket's first number is ``own << bits | alias``: bucket i gives its first ``own`` units to
    item i and the rest to item ``alias``. The second holds r of item i and of ``alias`` (float32).

    Huebschle-Schneider & Sanders 2019: sweep light items (weight below their bucket's capacity) and
    heavy ones in order; the heavy item fills light buckets until what is left of it fits its own.
    Where the sweep stands follows from prefix sums of deficits and surpluses.
    """
    w, total = integers(weights), weights.total
    n = w.numel()
    capacity = capacities(total, n, w.device)
    light = torch.nonzero(w < capacity).flatten()
    heavy = torch.nonzero(w >= capacity).flatten()
    deficit = torch.cumsum((capacity - w)[light], 0)
    surplus = torch.cumsum((w - capacity)[heavy], 0)
    own, alias = w.clone(), torch.arange(n, device=w.device)
    before = deficit - (capacity - w)[light]
    alias[light] = heavy[torch.searchsorted(surplus, before, right=True)]
    # A heavy item leaves its own bucket short by what the last light bucket took too much.
    reached = torch.cat([deficit.new_zeros(1), deficit])
    given = reached[torch.searchsorted(reached, surplus)]
    own[heavy] = capacity[heavy] + surplus - given
    alias[heavy[:-1]] = heavy[1:]
    r = coefficients(w, total, torch.arange(n, device=w.device))
    second = torch.stack([r, r[alias]], dim=1).view(torch.int64)
    return torch.cat([(own << index_bits(n) | alias)[:, None], second], dim=1)


def index_bits(n: int) -> int:
    """How many bits the index of one of ``n`` items needs."""
    return (n - 1).bit_length()


def alias_contents(table: Tensor, total: int) -> Tensor:
    """int64 [N]: what every item gets over all buckets of the table: its integer weight."""
    n = len(table)
    own, alias = table[:, 0] >> index_bits(n), table[:, 0] & ((1 << index_bits(n)) - 1)
    return own.index_add(0, alias, capacities(total, n, table.device) - own)


def alias_draw(
    table: Tensor, total: int, seed: int, first: int, count: int
) -> tuple[Tensor, Tensor]:
    """Draws ``first`` ... of the stream of ``seed``: indices int64 and r float32, [count]."""
    return alias_resolve(table, total, draw_points(total, seed, first, count, table.device))


def alias_resolve(table: Tensor, total: int, points: Tensor) -> tuple[Tensor, Tensor]:
    """The items (and their r) that ``points`` below ``total``, int64 [n], fall on."""
    n = len(table)
    larger, capacity = total % n, total // n
    border = larger * (capacity + 1)
    in_larger = points < border
    unit = torch.where(in_larger, capacity + 1, max(capacity, 1))
    base = torch.where(in_larger, 0, border)
    bucket = torch.div(points - base, unit, rounding_mode="floor")
    offset = points - base - bucket * unit
    bucket = bucket + torch.where(in_larger, 0, larger)
    word = table[bucket, 0]
    is_alias = offset >= word >> index_bits(n)
    indices = torch.where(is_alias, word & ((1 << index_bits(n)) - 1), bucket)
    return indices, table.view(torch.float32)[bucket, 2 + is_alias.long()]
