"""Ranks of a sharded sampler without a process group: each is a thread of this process."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from fastis.ranks import Ranks


def in_threads(ranks: int, run: Callable[[Ranks], Any]) -> list[Any]:
    """What ``run(exchange)`` returns on each rank, in order; the first error is raised."""
    barrier = threading.Barrier(ranks, timeout=60)
    board: list[torch.Tensor | None] = [None] * ranks

    def of_rank(rank: int) -> Any:
        def gather(message: torch.Tensor) -> torch.Tensor:
            board[rank] = message
            barrier.wait()
            found = torch.stack(board)
            barrier.wait()  # nobody writes before all have read
            return found

        try:
            return run(Ranks(rank, ranks, gather))
        except BaseException:
            barrier.abort()
            raise

    with ThreadPoolExecutor(ranks) as pool:
        futures = [pool.submit(of_rank, rank) for rank in range(ranks)]
    errors = [f.exception() for f in futures if f.exception() is not None]
    for error in errors:
        if not isinstance(error, threading.BrokenBarrierError):
            raise error
    return [f.result() for f in futures]
