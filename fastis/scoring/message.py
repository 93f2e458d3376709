"""The scores of one minibatch, as they go from a scorer to the trainer.

Bytes, little-endian: iteration (int64), squared mean gradient (float64), then n indices (int64) and
n scores (float32). They may come from anybody: nothing in them is believed before it was checked.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

import torch
from torch import Tensor

_HEAD = struct.Struct("<qd")
_ROW = 8 + 4


class Message(NamedTuple):
    """Scores of n samples with the parameters of one iteration.

    ``squared_mean`` is an unbiased estimate of the squared norm of the mean gradient over the data
    (NaN: not known); it may be negative.
    """

    iteration: int
    squared_mean: float
    indices: Tensor  # int64 [n]
    scores: Tensor  # float32 [n]

    def to_bytes(self) -> bytes:
        head = _HEAD.pack(self.iteration, self.squared_mean)
        return head + self.indices.numpy().tobytes() + self.scores.numpy().tobytes()

    @classmethod
    def from_bytes(cls, raw: bytes) -> Message | None:
        """None where the bytes can't be a message, or one of no samples."""
        n, rest = divmod(len(raw) - _HEAD.size, _ROW)
        if n < 1 or rest != 0:
            return None
        iteration, squared_mean = _HEAD.unpack_from(raw)
        own = bytearray(raw)  # that can be written to, as memory of tensors should be
        indices = torch.frombuffer(own, dtype=torch.int64, count=n, offset=_HEAD.size)
        scores = torch.frombuffer(own, dtype=torch.float32, offset=_HEAD.size + 8 * n)
        return cls(iteration, squared_mean, indices, scores)


def squared_mean(mean_grad: Tensor | None, scores: Tensor) -> float:
    """Of n gradients g, whose mean is ``mean_grad`` and whose norms are ``scores`` [n]::

        (n |G|^2 - mean |g|^2) / (n - 1)

    NaN for an unknown mean or a single gradient.
    """
    n = len(scores)
    if mean_grad is None or n < 2:
        return float("nan")
    of_mean, mean_of = mean_grad.double().square().sum(), scores.double().square().mean()
    return float((n * of_mean - mean_of) / (n - 1))
