"""How a rank reaches the others: a few integers from every rank to every rank."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed
from torch import Tensor

from fastis import check


class Ranks(NamedTuple):
    """``gather(int64 [k]) -> int64 [R, k]``, in the order of the ranks, on the CPU: collective."""

    rank: int
    ranks: int
    gather: Callable[[Tensor], Tensor]
    group: Any = None

    @classmethod
    def over(cls, group: Any) -> Ranks:
        """Over a process group of torch.distributed; None: the default one.

        Raises
        ------
        TypeError, ValueError
            for anything else, and before a group is initialised.
        """
        dist = torch.distributed
        if not dist.is_available() or not dist.is_initialized():
            raise ValueError(
                "group must be a torch.distributed process group, or None after "
                f"torch.distributed.init_process_group(), got {check.describe(group)} before it"
            )
        group = dist.group.WORLD if group is None else group
        if not isinstance(group, dist.ProcessGroup):
            raise TypeError(
                f"group must be a torch.distributed process group, got {check.describe(group)}"
            )
        ranks = dist.get_world_size(group)
        device = "cuda" if dist.get_backend(group) == "nccl" else "cpu"

        # Its name from torch 2.13 on.
        all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor

        def gather(message: Tensor) -> Tensor:
            found = torch.empty(ranks * len(message), dtype=message.dtype, device=device)
            all_gather(found, message.to(device), group=group)
            return found.view(ranks, -1).cpu()

        return cls(dist.get_rank(group), ranks, gather if ranks > 1 else _alone, group)


def _alone(message: Tensor) -> Tensor:
    return message[None]


def agreed_seed(exchange: Ranks, seed: int, shown: dict[str, Any]) -> int:
    """The first rank's seed, once all ranks have shown the same arguments. Collective.

    Raises
    ------
    ValueError
        on every rank, where one has been given others.
    """
    words = np.array([seed, zlib.crc32(repr(shown).encode())], np.uint64).view(np.int64)
    found = exchange.gather(torch.from_numpy(words))
    differing = torch.nonzero(found[:, 1] != found[0, 1]).flatten().tolist()
    if differing:
        raise ValueError(
            f"arguments must be the same on all ranks, got others on ranks {differing} than on "
            f"rank 0; on rank {exchange.rank}: {shown}"
        )
    return int(found[0, 0]) & (2**64 - 1)
