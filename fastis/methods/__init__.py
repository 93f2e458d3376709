"""Sampling methods, each selectable by name or as an object that carries its options.

==============  =============================================  ============  ======================
method          samples by                                     coefficients  source
==============  =============================================  ============  ======================
EMAIS           moving statistics of the gradient norm         1/(N p)       Kutsuna 2025
Loss            the same of the loss                           1/(N p)       as EMAIS
Presampling     a score of M candidates, now                   1/(M q)       Katharopoulos & Fleuret
RAIS            a regression on past squared norms             1/(N p)       Johnson & Guestrin
Confidence      1 - mean probability of the label              none          Chang et al. 2017
ConfVar         its standard deviation                         none          Chang et al. 2017
SelfPaced       uniform; losses below a threshold count        0 or equal    Kumar et al. 2010
OnlineBatch     the rank of the last loss                      none          Loshchilov & Hutter
Prioritized     a power of the last loss                       in part       Schaul et al. 2015
Distributed     the last score, also of scorer processes       1/(N p)       Alain et al. 2016
Scan, Uniform   uniform, without and with replacement          1
==============  =============================================  ============  ======================

Methods that need a forward pass of the user's take a ``score_fn``; none owns the model or the data.
"""

from __future__ import annotations

from fastis.methods.base import Method
from fastis.methods.confidence import Confidence, ConfVar
from fastis.methods.distributed import Distributed
from fastis.methods.emais import EMAIS, Loss
from fastis.methods.online_batch import OnlineBatch
from fastis.methods.presampling import Presampling
from fastis.methods.prioritized import Prioritized
from fastis.methods.rais import RAIS
from fastis.methods.self_paced import SelfPaced
from fastis.methods.uniform import Scan, Uniform

BY_NAME: dict[str, type[Method]] = {
    m.name: m
    for m in (
        *(EMAIS, Scan, Uniform, Loss, Presampling, RAIS),
        *(Confidence, ConfVar, SelfPaced, OnlineBatch, Prioritized, Distributed),
    )
}

__all__ = [
    "BY_NAME",
    "EMAIS",
    "RAIS",
    "ConfVar",
    "Confidence",
    "Distributed",
    "Loss",
    "Method",
    "OnlineBatch",
    "Presampling",
    "Prioritized",
    "Scan",
    "SelfPaced",
    "Uniform",
    "from_name",
]


def from_name(method: str | Method) -> Method:
    """``method`` itself, or the method of that name with its default options."""
    if isinstance(method, Method):
        return method
    if not isinstance(method, str):
        raise TypeError(
            "method must be a name or an object from fastis.methods, "
            f"got {type(method).__name__} {method!r}"
        )
    if method not in BY_NAME:
        raise ValueError(f"method must be one of {', '.join(map(repr, BY_NAME))}, got {method!r}")
    if BY_NAME[method] is Presampling:
        raise ValueError(
            "method='presampling' needs a score_fn: pass fastis.methods.Presampling(score_fn), "
            "with score_fn(indices) -> the ScoredLoss of these samples"
        )
    return BY_NAME[method]()
