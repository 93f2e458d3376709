"""What an alias table holds: csrc/alias.h."""

from __future__ import annotations

import torch
from torch import Tensor


def index_bits(n: int) -> int:
    """How many bits the index of one of ``n`` items needs."""
    return (n - 1).bit_length()


def capacities(total: int, n: int, device: torch.device) -> Tensor:
    """int64 [n]: the units of each bucket: the first total mod n hold one more than the others."""
    return total // n + (torch.arange(n, device=device) < total % n).long()


def alias_contents(table: Tensor, total: int) -> Tensor:
    """int64 [N]: what every item gets over all buckets of the table: its integer weight."""
    n = len(table)
    own, alias = table[:, 0] >> index_bits(n), table[:, 0] & ((1 << index_bits(n)) - 1)
    return own.index_add(0, alias, capacities(total, n, table.device) - own)
