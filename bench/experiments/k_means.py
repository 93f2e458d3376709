"""Clusters of numbers, as scikit-learn's KMeans finds them."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def k_means(values: Tensor, k: int, generator: torch.Generator) -> Tensor:
    """The cluster of each of ``values`` (float64 ``[N]``, on the CPU), int64 ``[N]``; 0 has the
    least mean, k - 1 the largest.

    Greedy k-means++ with 2 + ln k candidates a centre (Arthur & Vassilvitskii 2007), then at most
    300 of Lloyd's iterations, each O(k log N): in one dimension a cluster is a slice of the sorted
    values.
    """
    centres = values[torch.randint(len(values), (1,), generator=generator)]
    distances = (values - centres).square()
    for _ in range(k - 1):
        # Equal values leave no distance: any one will do.
        odds = distances + torch.finfo(distances.dtype).tiny
        drawn = torch.multinomial(odds, 2 + int(math.log(k)), True, generator=generator)
        candidates = torch.minimum(distances, (values - values[drawn, None]).square())
        best = candidates.sum(1).argmin()
        centres = torch.cat([centres, values[drawn[best], None]])
        distances = candidates[best]

    centres, ordered = centres.sort().values, values.sort().values
    sums = torch.cat([ordered.new_zeros(1), ordered.cumsum(0)])
    borders = torch.tensor([0, len(values)])
    for _ in range(300):
        middles = (centres[1:] + centres[:-1]) / 2
        inner = torch.searchsorted(ordered, middles, right=True)
        before, borders = borders, torch.cat([borders[:1], inner, borders[-1:]])
        if torch.equal(before, borders):
            break
        means = sums[borders].diff() / borders.diff()
        centres = torch.where(borders.diff() > 0, means, centres)
    return torch.bucketize(values, middles)
