"""Variance traces, effective minibatch size and efficiency from the minibatch alone.

Kutsuna 2025, Proposition 4.1 and eqs. 7, 10-12, with B draws of probability p, r = 1/(N p), g the
logit gradients, E the minibatch mean::

    G = E[r g]     A = E[r^2 |g|^2]     U = E[r |g|^2]     O = E[r |g|]

              plug-in (the paper)      unbiased (ours, the default)
    tr V_is   A - |G|^2                B/(B-1) (A - |G|^2)
    tr V_uni  U - |G|^2                U - (B |G|^2 - A)/(B-1)
    tr V_opt  O^2 - |G|^2              B/(B-1) (O^2 - |G|^2)

    N_ems = B tr V_uni / tr V_is       S = (tr V_is - tr V_opt) / (tr V_uni - tr V_opt)
"""

from __future__ import annotations

from torch import Tensor

from fastis.kernels.layout import (
    EFFECTIVE_BATCH_SIZE,
    EFFICIENCY,
    TRACE_IS,
    TRACE_OPTIMAL,
    TRACE_UNIFORM,
    Table,
)


class Variance:
    """A sampler's smoothed traces: 0-d float64 tensors on its device, NaN before the first update.

    Reading one starts no host synchronisation; ``float(...)`` of it does on CUDA. A, U, O^2 and
    |G|^2 are smoothed over iterations, and ratios formed after that. A loss without ``mean_grad``
    counts as G = 0. With stratified draws the traces are those of independent draws, so that the
    effective minibatch size is a lower bound.
    """

    def __init__(self, table: Table) -> None:
        self._values = table.variance

    def _read(self, position: int) -> Tensor:
        return self._values[position].clone()

    @property
    def trace_is(self) -> Tensor:
        """tr V_is: variance of r g under the sampling in force, of one draw."""
        return self._read(TRACE_IS)

    @property
    def trace_uniform(self) -> Tensor:
        """tr V_uni: variance of g under uniform draws."""
        return self._read(TRACE_UNIFORM)

    @property
    def trace_optimal(self) -> Tensor:
        """tr V_opt: the least variance that any probabilities could reach."""
        return self._read(TRACE_OPTIMAL)

    @property
    def effective_batch_size(self) -> Tensor:
        """N_ems: the uniform minibatch size of the same variance (eq. 7); can exceed B."""
        return self._read(EFFECTIVE_BATCH_SIZE)

    @property
    def efficiency(self) -> Tensor:
        """S: 0 optimal, 1 as good as uniform, above 1 worse; NaN where not defined (yet)."""
        return self._read(EFFICIENCY)

    def __repr__(self) -> str:
        names = ("trace_is", "trace_uniform", "trace_optimal", "effective_batch_size", "efficiency")
        return f"Variance({', '.join(f'{n}={float(getattr(self, n)):.4g}' for n in names)})"
