"""What scores say of the variance: of ideal, present and uniform draws (Alain et al. 2016, sec. 4).

Scorers see samples in an order that has nothing to do with their importance, so that plain means
over what they send are means over the data. With x the norm of a sample's gradient now, w' the
weight that it is drawn with, and mu2 the squared norm of the mean gradient, the traces of the
covariance of one draw's gradient estimate are::

    ideal = mean(x)^2 - mu2
    stale = mean(w') mean(x^2 / w') - mu2
    uniform = mean(x^2) - mu2
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastis.kernels.layout import CODE, Table
from fastis.methods import Method
from fastis.methods.base import PHASES
from fastis.methods.distributed import mean_weight

_SPAN = 0.1  # of the data: what the averages are over, about


class Traces:
    """The three traces, from averages over about a tenth of a sweep.

    0-d float64 tensors on the sampler's device; NaN before the first message. The weight in force
    is that of the table, before flattening; 1 for all while draws are uniform. Scores without a
    mean gradient count as mu2 = 0.
    """

    def __init__(self, num_samples: int, device: torch.device) -> None:
        self._span = _SPAN * num_samples
        self._sums = torch.zeros(6, dtype=torch.float64, device=device)

    def add(self, x: Tensor, weights: Tensor, squared_mean: float) -> None:
        """Scores of n samples and the weights in force before they come in, float [n] both.

        ``squared_mean`` is an unbiased estimate of mu2, or no number.
        """
        x, w, keep = x.double(), weights.double(), math.exp(-len(x) / self._span)
        squares = x.square()
        terms = torch.stack([torch.ones_like(x), x, squares, w, squares / w])
        self._sums *= keep
        self._sums[:5] += (1 - keep) * terms.mean(1)
        if math.isfinite(squared_mean):
            self._sums[5] += (1 - keep) * squared_mean

    def _means(self) -> tuple[Tensor, ...]:
        return (self._sums[1:] / self._sums[0]).unbind()

    @property
    def ideal(self) -> Tensor:
        """With each sample drawn in proportion to its present score."""
        first, _, _, _, mu2 = self._means()
        return first.square() - mu2

    @property
    def stale(self) -> Tensor:
        """With the weights in force, which are of earlier parameters."""
        _, _, w, ratio, mu2 = self._means()
        return w * ratio - mu2

    @property
    def uniform(self) -> Tensor:
        """With all samples alike."""
        _, second, _, _, mu2 = self._means()
        return second - mu2


def weights_in_force(table: Table, method: Method, indices: Tensor) -> Tensor:
    """float64 [n]: the weights of samples ``indices`` int64 [n] in the table, before flattening."""
    codes = table.column(CODE)[indices] & 0x7FFFFFFF
    weights = codes.view(torch.float32).double()
    weights = torch.where(codes == 0, mean_weight(table), weights)
    return torch.where(method.phase(table) == PHASES.index("importance"), weights, 1.0)
