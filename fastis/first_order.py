"""Where the derivatives of a loss end: the first comes from the forward pass, others are errors.

A gradient that came out of a kernel has no graph. Left so, what is differentiated through it would
be 0 without a word: a second derivative, a tangent.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def refuse_derivative(ctx: Any = None, *_: Any) -> Any:
    """The end of every path on which a derivative would otherwise be silently 0."""
    raise RuntimeError(
        "fastis losses have a first derivative only, by the backward pass: their gradient was "
        "computed in the forward pass; for second derivatives and forward mode use scored_loss"
    )


class FirstOrderOnly(torch.autograd.Function):
    """``grad``, whose derivative in what it was computed from is an error."""

    @staticmethod
    def forward(ctx: Any, grad: Tensor, *depends_on: Tensor) -> Tensor:
        return grad.view_as(grad)

    backward = staticmethod(refuse_derivative)
    jvp = staticmethod(refuse_derivative)
