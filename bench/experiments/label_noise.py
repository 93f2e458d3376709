"""Wrong labels, as the literature makes them: symmetric, class-dependent, instance-dependent.

Each takes images ``[N, ...]``, right labels int64 ``[N]``, the expected share of wrong ones and a
generator, and returns labels ``[N]``.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Generator, Tensor

Noise = Callable[[Tensor, Tensor, float, Generator], Tensor]
SPREAD = 0.1  # of the flip rates of instance-dependent noise


def symmetric(x: Tensor, y: Tensor, share: float, generator: Generator) -> Tensor:
    """To any other class, each alike."""
    shift = torch.randint(1, int(y.max()) + 1, y.shape, generator=generator)
    return _flipped(y, shift, share, generator)


def pair(x: Tensor, y: Tensor, share: float, generator: Generator) -> Tensor:
    """Class-dependent: class c to c + 1 (Han et al. 2018, "pair flipping")."""
    return _flipped(y, torch.ones_like(y), share, generator)


def instance(x: Tensor, y: Tensor, share: float, generator: Generator) -> Tensor:
    """Instance-dependent (Xia et al. 2020, "Part-dependent label noise", algorithm 2).

    Each image has a flip rate q of its own, from N(share, 0.1^2) truncated to [0, 1], and goes to
    another class with probabilities q softmax(x W_y), W_y a random linear map for each class.
    """
    num_classes, n = int(y.max()) + 1, len(y)
    rates = torch.empty(n)
    torch.nn.init.trunc_normal_(rates, share, SPREAD, 0.0, 1.0, generator=generator)
    features, logits = x.flatten(1), torch.empty(n, num_classes)
    for c in range(num_classes):
        projection = torch.randn(features.shape[1], num_classes, generator=generator)
        logits[y == c] = features[y == c] @ projection
    logits.scatter_(1, y[:, None], float("-inf"))
    p = rates[:, None] * logits.softmax(1)
    p.scatter_(1, y[:, None], 1 - rates[:, None])
    return torch.multinomial(p, 1, generator=generator).squeeze(1)


KINDS: dict[str, Noise] = {"symmetric": symmetric, "pair": pair, "instance": instance}


def _flipped(y: Tensor, shift: Tensor, share: float, generator: Generator) -> Tensor:
    flips = torch.rand(y.shape, generator=generator) < share
    return torch.where(flips, (y + shift) % (int(y.max()) + 1), y)
