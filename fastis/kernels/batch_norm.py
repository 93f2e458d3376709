"""The contract of the batch_norm column: what ``forward`` and ``backward`` of a backend take.

``forward(x, share, weight, bias, eps, running, merge)`` gives ``(y, mean, var)``, and
``backward(grad_output, x, share, weight, mean, var, eps, with_input, merge)`` the gradients in
``x``, ``weight`` and ``bias``; shapes in :mod:`fastis.kernels.reference.batch_norm`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, TypeAlias

from torch import Tensor

# Two [C] of this process's samples into those of all processes'.
Merge: TypeAlias = "Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]"


class Running(NamedTuple):
    """Running statistics and how they move."""

    mean: Tensor  # [C]
    var: Tensor  # [C]
    momentum: float | Tensor
    correction: Tensor  # n / (n - 1)

    def move(self, mean: Tensor, var: Tensor) -> None:
        """Towards a minibatch's mean and (biased) variance."""
        self.mean.lerp_(mean.to(self.mean.dtype), self.momentum)
        self.var.lerp_((var * self.correction).to(self.var.dtype), self.momentum)
