"""Variance traces of the gradient estimate: of a sampler, of minibatches, of a whole data set.

Kutsuna 2025, Proposition 4.1 and eqs. 5-7, 10-12, with B draws of probability p, r = 1/(N p), g the
gradients, E the minibatch mean::

    G = E[r g]     A = E[r^2 |g|^2]     U = E[r |g|^2]     O = E[r |g|]

              plug-in (the paper)      unbiased (ours, the default)
    tr V_is   A - |G|^2                B/(B-1) (A - |G|^2)
    tr V_uni  U - |G|^2                U - (B |G|^2 - A)/(B-1)
    tr V_opt  O^2 - |G|^2              B/(B-1) (O^2 - |G|^2)

    N_ems = B tr V_uni / tr V_is       S = (tr V_is - tr V_opt) / (tr V_uni - tr V_opt)

:class:`Variance` reads what a sampler keeps of it, with the gradients at the logits and smoothed
over iterations. :func:`estimate_traces` takes minibatches of gradients of any kind, and
:func:`population_traces` all gradients of a data set under any probabilities: exact, nothing is
drawn. The latter two are public as :mod:`fastis.estimators`.
"""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from fastis import check
from fastis.kernels.layout import (
    EFFECTIVE_BATCH_SIZE,
    EFFICIENCY,
    TRACE_IS,
    TRACE_OPTIMAL,
    TRACE_UNIFORM,
    Table,
)
from fastis.kernels.variance import ESTIMATORS, Moments, minibatch_moments, traces_of


class Variance:
    """A sampler's smoothed traces: 0-d float64 tensors on its device, NaN before the first update.

    Of the gradients at the logits. Reading one starts no host synchronisation; ``float(...)`` of it
    does on CUDA. A, U, O^2 and |G|^2 are smoothed over iterations, and ratios formed after that. A
    loss without ``mean_grad`` counts as G = 0. With stratified draws the traces are those of
    independent draws, so that the effective minibatch size is a lower bound.
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


class Traces(NamedTuple):
    """Traces of the covariance of one draw's r g, and what follows from them.

    Attributes
    ----------
    trace_is : Tensor
        tr V_is, ``[...]`` float64: under the sampling in force.
    trace_uniform : Tensor
        tr V_uni: under uniform sampling.
    trace_optimal : Tensor
        tr V_opt: under probabilities proportional to the norms, the least there is.
    batch_size : int
        B. The trace of the minibatch gradient is ``trace_is / B``.

    Names and properties are those of :class:`fastis.variance.Variance`. Traces of many minibatches
    (``[...]`` not empty) are averaged by :meth:`mean` before a ratio is formed: ratios of single
    minibatches are biased whatever the estimator.
    """

    trace_is: Tensor
    trace_uniform: Tensor
    trace_optimal: Tensor
    batch_size: int

    @property
    def effective_batch_size(self) -> Tensor:
        """N_ems = B tr V_uni / tr V_is (Kutsuna 2025, eq. 7); for B = 1 the factor N_ems / B."""
        return self.batch_size * self.trace_uniform / self.trace_is

    @property
    def efficiency(self) -> Tensor:
        """S (section 6.1): 0 optimal, 1 as good as uniform, above 1 worse; NaN where not defined.

        Not defined where tr V_uni does not exceed tr V_opt: nothing is to be gained there, or an
        estimate has lost its sign.
        """
        gain = self.trace_uniform - self.trace_optimal
        ratio = (self.trace_is - self.trace_optimal) / gain
        return torch.where(gain > 0, ratio, torch.nan)

    def mean(self) -> Traces:
        """Means over all minibatches, 0-d: take ``.efficiency`` and the like of these."""
        return Traces(
            self.trace_is.mean(),
            self.trace_uniform.mean(),
            self.trace_optimal.mean(),
            self.batch_size,
        )


def estimate_traces(
    norms: Tensor | None,
    weights: Tensor,
    mean_grad: Tensor | None = None,
    *,
    grads: Tensor | None = None,
    estimator: str = "unbiased",
) -> Traces:
    """Variance traces under sampling, uniform and optimal probabilities from minibatches alone.

    Holds for gradients of any kind: at the logits (``out.score``, ``out.mean_grad`` of a
    :class:`fastis.ScoredLoss`) or of all parameters (:func:`fastis.estimators.gradient_norms`, with
    the ``.grad`` of the weighted mean loss as ``mean_grad``). Equal, for one minibatch::

        A = (r * x).square().mean()
        U = (r * x * x).mean()
        O = (r * x).mean()
        G2 = mean_grad.square().sum()
        # Kutsuna 2025, eqs. 10-12: estimator="plugin"
        trace_is, trace_uniform, trace_optimal = A - G2, U - G2, O**2 - G2
        # estimator="unbiased": expectations are exact
        trace_is = B / (B - 1) * (A - G2)
        trace_uniform = U - (B * G2 - A) / (B - 1)
        trace_optimal = B / (B - 1) * (O**2 - G2)

    The plug-in traces fall short by ``trace_is / B`` (tr V_is and tr V_uni) and by
    ``trace_optimal / B`` (tr V_opt).

    Parameters
    ----------
    norms : Tensor or None
        x, ``[..., B]``: gradient norms of independent draws; None: those of ``grads``.
    weights : Tensor
        r, ``[..., B]``: coefficients 1/(N p), ``batch.weights``.
    mean_grad : Tensor, optional
        ``[..., P]``: minibatch mean of r g. Without it and ``grads`` the mean counts as 0, as in a
        sampler; the traces then have the same excess, which leaves S as it is.
    grads : Tensor, optional
        g, ``[..., B, P]``, in place of ``mean_grad``.
    estimator : "unbiased" or "plugin"

    Returns
    -------
    Traces
        ``[...]`` float64, on the device of the weights. Unbiased ones of B = 1 are not finite.

    Raises
    ------
    TypeError, ValueError
        for wrong types or shapes, an empty minibatch, an unknown estimator, neither norms nor
        grads, or both mean_grad and grads.
    """
    check.choice("estimator", estimator, ESTIMATORS)
    r = _floating("weights", weights, "[..., B]").double()
    x, mean = _norms_and_mean(norms, mean_grad, grads, r.shape, r)
    moments = minibatch_moments(r, x, mean)
    batch_size = r.shape[-1]
    return Traces(*traces_of(moments, batch_size, estimator == "unbiased"), batch_size)


def population_traces(
    norms: Tensor | None,
    probabilities: Tensor,
    mean_grad: Tensor | None = None,
    *,
    grads: Tensor | None = None,
    batch_size: int = 1,
) -> Traces:
    """Exact traces over a data set, for any probabilities.

    Equal::

        G2 = mean_grad.square().sum()
        trace_is = (x.square() / (N * N * p)).sum() - G2  # E |r g|^2 - |E r g|^2
        trace_uniform = x.square().mean() - G2
        trace_optimal = x.mean() ** 2 - G2  # Kutsuna 2025, eq. 6: p = x / x.sum()

    Parameters
    ----------
    norms : Tensor or None
        x, ``[N]``: gradient norms of every sample; None: those of ``grads``.
    probabilities : Tensor
        p, ``[..., N]``, each row with sum 1; 0 only where the gradient is.
    mean_grad : Tensor, optional
        ``[P]``: mean gradient over the data set. Without it and ``grads`` it counts as 0.
    grads : Tensor, optional
        g, ``[N, P]``, in place of ``mean_grad``.
    batch_size : int
        B of ``effective_batch_size``; with the default, 1, that is the factor N_ems / B.

    Returns
    -------
    Traces
        ``[...]`` float64, on the device of the probabilities.

    Raises
    ------
    TypeError, ValueError
        for wrong types or shapes, probabilities that are negative, don't sum to 1 (within 1e-5)
        or are 0 where a gradient isn't (the estimate has no expectation then).
    """
    check.integer("batch_size", batch_size, 1)
    p = _floating("probabilities", probabilities, "[..., N]").double()
    total = p.sum(-1)
    if bool((p < 0).any()) or not bool(((total - 1).abs() <= 1e-5).all()):
        raise ValueError(
            f"probabilities must be at least 0 and sum to 1, got a least of {float(p.min()):g} and "
            f"sums from {float(total.min()):g} to {float(total.max()):g}"
        )
    x, mean = _norms_and_mean(norms, mean_grad, grads, p.shape[-1:], p.new_ones(p.shape[-1:]))
    if bool(((p == 0) & (x != 0)).any()):
        raise ValueError("probabilities must be above 0 where gradients aren't 0, got 0 there")
    # The moments in expectation: those of the data set, each sample once with coefficient r.
    exact = minibatch_moments(torch.ones_like(x), x, mean)
    second = torch.where(x == 0, 0.0, x.square() / (p * p.shape[-1])).mean(-1)
    moments = Moments(*torch.broadcast_tensors(second, *exact[1:]))
    return Traces(*traces_of(moments, batch_size, unbiased=False), batch_size)


def _norms_and_mean(
    norms: Tensor | None,
    mean_grad: Tensor | None,
    grads: Tensor | None,
    shape: torch.Size,
    coefficients: Tensor,
) -> tuple[Tensor, Tensor | None]:
    """x like ``shape`` and the mean of r g, in float64, from what the caller gave."""
    if mean_grad is not None and grads is not None:
        raise ValueError("mean_grad must be None with grads, which it follows from, got both")
    if norms is None and grads is None:
        raise ValueError("norms must be given where grads aren't, got neither")
    if mean_grad is not None:
        mean_grad = _floating("mean_grad", mean_grad, "[..., P]")
        if mean_grad.shape[:-1] != shape[:-1]:
            wanted = ", ".join([*map(str, shape[:-1]), "P"])
            raise ValueError(f"mean_grad must have shape [{wanted}], got {list(mean_grad.shape)}")
    if grads is not None:
        grads = _floating("grads", grads, "[..., B, P]")
        if grads.shape[:-1] != shape:
            wanted = ", ".join([*map(str, shape), "P"])
            raise ValueError(f"grads must have shape [{wanted}], got {list(grads.shape)}")
        mean_grad = (coefficients[..., None] * grads).mean(-2)
        if norms is None:
            norms = torch.linalg.vector_norm(grads, dim=-1, dtype=torch.float64)
    assert norms is not None
    norms = _floating("norms", norms, "[..., B]")
    if norms.shape != shape:
        raise ValueError(f"norms must have shape {list(shape)}, got {list(norms.shape)}")
    return norms.double(), mean_grad


def _floating(name: str, value: Any, shape: str) -> Tensor:
    """``value``, a floating tensor with at least one entry; detached."""
    if not check.tensor(name, value).dtype.is_floating_point:
        raise TypeError(f"{name} must be floating, got {value.dtype}")
    if value.dim() == 0 or value.numel() == 0:
        raise ValueError(f"{name} must have shape {shape}, not empty, got {list(value.shape)}")
    return cast(Tensor, value).detach()
