"""What a loss hands on: to the optimiser, and to a sampler."""

from __future__ import annotations

from typing import Any, NamedTuple, NoReturn

from torch import Tensor
from torch.utils import _pytree as pytree

_new_tuple = tuple.__new__
# The mean gradient costs a read and a write per class and batch; above this it is left out.
MAX_MEAN_GRAD = 4096


class ScoredLoss(NamedTuple):
    """What a loss hands to the optimiser and to :meth:`fastis.Sampler.update`.

    Attributes
    ----------
    loss : Tensor
        0-d (``[B]`` for ``reduction="none"``), differentiable in the logits.
    losses : Tensor
        ``[B]``, detached: per-sample losses, class weights included, coefficients not.
    score : Tensor
        ``[B]``, detached: ``|g_i|``, the norm of each sample's gradient ``d loss_i / d logits_i``.
    mean_grad : Tensor or None
        ``(1/B) sum_i r_i g_i``, ``[C]``, detached, for ``[B, C]`` logits with C <= 4096; else None,
        and the variance traces take ``|G|^2 = 0``.

    float32 for float32, bfloat16 and float16 logits; float64 for float64. Make one yourself for a
    loss that was computed elsewhere, or let :func:`fastis.from_losses` do it.
    """

    loss: Tensor
    losses: Tensor
    score: Tensor
    mean_grad: Tensor | None = None

    @property
    def weighted(self) -> bool:
        """False for a mean or sum to be differentiated that was computed without coefficients."""
        return True

    def backward(self, *args: Any, **kwargs: Any) -> None:
        """``loss.backward``, with its arguments."""
        self.loss.backward(*args, **kwargs)

    def item(self) -> float:
        """``loss.item()``. Waits for the device."""
        return self.loss.item()

    def __getattr__(self, name: str) -> Any:
        hint = f": use out.loss.{name}" if hasattr(Tensor, name) else ""
        raise AttributeError(f"a ScoredLoss has no attribute {name!r}{hint}")


class UnweightedLoss(ScoredLoss):
    """A mean or sum to be differentiated that was computed without coefficients.

    In everything else a :class:`ScoredLoss`. A sampler whose minibatches have coefficients warns of
    it.
    """

    __slots__ = ()

    @property
    def weighted(self) -> bool:
        """False."""
        return False


def _no_arithmetic(self: ScoredLoss, other: object) -> NoReturn:
    raise TypeError("a ScoredLoss is no tensor: compute with out.loss")


# Those of tuples would repeat it, or join two.
for _name in ("add", "radd", "mul", "rmul", "sub", "rsub", "truediv"):
    setattr(ScoredLoss, f"__{_name}__", _no_arithmetic)

# As named tuples are themselves, their subclasses are not.
pytree.register_pytree_node(
    UnweightedLoss,
    lambda out: (list(out), None),
    lambda parts, _: _new_tuple(UnweightedLoss, parts),
)
