"""What a step of a sharded sampler costs a rank, and what it sends: for bench_scale.py.

Over a process group as it is, or for one rank of many whose other ranks are made up: all have the
messages of this one, so that its arithmetic is that of so many ranks and nothing goes over a wire.
"""

from __future__ import annotations

import time
from statistics import median
from typing import Any, NamedTuple

import torch

import fastis
from fastis.methods import EMAIS
from fastis.ranks import Ranks

WARMUP_STEPS = 20  # theta comes to rest, memory is touched


class StepCost(NamedTuple):
    """Medians over the steps, on this rank."""

    sample_seconds: float
    update_seconds: float
    bytes_sent: float  # given to the exchange, a step
    rows: float  # of its own


def step_cost(
    exchange: Ranks,
    num_samples: int,
    batch_size: int,
    *,
    strategy: str = "global",
    steps: int = 200,
    seed: int = 0,
) -> StepCost:
    """Of training steps without a network, all samples scored before; collective.

    ``exchange`` is ``Ranks.over(group)`` or :func:`made_up`.
    """
    sent: list[int] = []

    def counted(message: torch.Tensor) -> torch.Tensor:
        sent.append(message.numel() * message.element_size())
        return exchange.gather(message)

    sampler = fastis.ShardedSampler(
        num_samples,
        batch_size,
        group=exchange._replace(gather=counted),
        strategy=strategy,
        method=EMAIS(warmup_epochs=0),
        seed=seed,
    )
    generator = torch.Generator().manual_seed(exchange.rank)
    _score_all(sampler, generator)
    times: list[tuple[float, float]] = []
    rows = []
    for step in range(WARMUP_STEPS + steps):
        if step == WARMUP_STEPS:
            sent.clear()
        begin = time.perf_counter()
        batch = sampler.sample()
        drawn = time.perf_counter()
        score = torch.empty(len(batch.indices)).log_normal_(generator=generator)
        scored = time.perf_counter()
        sampler.update(batch, score)
        times.append((drawn - begin, time.perf_counter() - scored))
        rows.append(float((batch.weights > 0).sum()))
    kept = times[WARMUP_STEPS:]
    return StepCost(
        median(draw for draw, _ in kept),
        median(update for _, update in kept),
        sum(sent) / steps,
        median(rows[WARMUP_STEPS:]),
    )


def made_up(ranks: int) -> Ranks:
    """The middle one of so many ranks, all of which say the same."""
    return Ranks(ranks // 2, ranks, lambda message: message[None].repeat(ranks, 1))


def _score_all(sampler: Any, generator: torch.Generator, size: int = 1 << 20) -> None:
    for begin in range(sampler.shard.start, sampler.shard.stop, size):
        indices = torch.arange(begin, min(begin + size, sampler.shard.stop))
        score = torch.empty(len(indices)).log_normal_(generator=generator)
        sampler.update(fastis.Batch(indices, torch.ones(len(indices))), score)
