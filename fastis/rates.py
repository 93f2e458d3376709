"""The learning rates of an optimizer: without the factor, in force, and by which rule they scale.

``optimizer.param_groups`` has the rates in force, ``unscaled * factor``. A scheduler is shown the
unscaled ones, since many go on from the rate that they find. :class:`Rates` keeps both, and tells a
rate that it wrote itself from one that the user has set.
"""

from __future__ import annotations

from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.optim import Optimizer

from fastis import check

Groups = list[dict[str, Any]]

_LINEAR = {"SGD", "ASGD", "SGDW", "SGDP", "FusedSGD"}
_SQUARE_ROOT = {"Adagrad", "Adadelta", "RMSprop", "RMSpropTF", "Adafactor", "AdafactorBigVision"}


def family_of(optimizer: Optimizer) -> str:
    """Returns "sgd" or "adam", by the names of an optimizer's class and of its base classes.

    Raises
    ------
    ValueError
        for any other, for which no rule is known.
    """
    for cls in type(optimizer).__mro__:
        if cls.__name__ in _LINEAR:
            return "sgd"
        if cls.__name__ in _SQUARE_ROOT or "Adam" in cls.__name__:
            return "adam"
    raise ValueError(
        "optimizer must be given as 'sgd' (the factor itself) or 'adam' (its square root) for a "
        f"{type(optimizer).__name__}, whose family is not known"
    )


def innermost(optimizer: Any) -> Any:
    """The optimizer inside of Accelerate's and Lightning's wrappers, which show its groups."""
    inner = getattr(optimizer, "optimizer", None)
    if isinstance(inner, Optimizer) and inner.param_groups is optimizer.param_groups:
        return innermost(inner)
    return optimizer


class _Written(NamedTuple):
    """A rate that is a tensor as :class:`Rates` left it."""

    tensor: Tensor
    version: int
    value: Tensor


class Rates:
    """The rates of an optimizer's parameter groups, and the last factor.

    Use: :meth:`restore`, then whatever sets the unscaled rates, then :meth:`scale`. Rates that are
    tensors are changed in place, since captured graphs hold their address, and never read.
    """

    def __init__(self, groups: Groups) -> None:
        self.start(groups)

    def start(self, groups: Groups) -> None:
        """The rates in the groups are unscaled ones: the factor is 1."""
        self.factor: float | Tensor = 1.0
        self._max_lr: float | None = None
        self._unscaled = [_copy(group["lr"]) for group in groups]
        self._written = [_written(group["lr"]) for group in groups]

    def unscaled(self, groups: Groups) -> list[float | Tensor]:
        """The rates that give those in the groups with the last factor.

        They are remembered, except for a rate that somebody else has written: that one is divided
        by the factor. A group added since has an unscaled rate.
        """
        rates: list[float | Tensor] = []
        for i, group in enumerate(groups):
            lr = group["lr"]
            if i >= len(self._written):
                rates.append(_copy(lr))
            elif _is_as_written(lr, self._written[i]):
                rates.append(self._unscaled[i])
            elif isinstance(lr, Tensor):
                rates.append(self._unscaled_tensor(i, lr))
            else:
                factor, largest = float(self.factor), self._max_lr
                limited = largest is not None and lr > largest and factor > 1
                rates.append(float(lr) if limited else float(lr) / factor)
        return rates

    def _unscaled_tensor(self, i: int, lr: Tensor) -> Tensor:
        """That of a tensor that may differ from what was written: another object may be equal."""
        factor = self.factor.to(lr.device) if isinstance(self.factor, Tensor) else self.factor
        unscaled = lr / factor
        if self._max_lr is not None:
            unscaled = torch.where((lr > self._max_lr) & (factor > 1), lr, unscaled)
        written, known = self._written[i], self._unscaled[i]
        if isinstance(written, _Written) and isinstance(known, Tensor):
            unscaled = torch.where(lr == written.value.to(lr), known.to(lr), unscaled)
        return unscaled.to(lr.dtype)

    def restore(self, groups: Groups) -> None:
        """Puts the unscaled rates into the groups."""
        for group, lr in zip(groups, self.unscaled(groups), strict=True):
            if isinstance(lr, float):  # asked first: asking a float whether it is a Tensor is slow
                group["lr"] = lr
            else:
                group["lr"].copy_(lr)

    def scale(self, groups: Groups, factor: Tensor, max_lr: float | None) -> None:
        """Multiplies the rates in the groups, which are unscaled ones, up to ``max_lr``.

        Unscaled rates beyond ``max_lr`` stay as they are. Reads the factor if a rate is a float.
        """
        self._max_lr = max_lr
        self._unscaled, self._written = [], []
        on_host = None
        for group in groups:
            lr = _copy(group["lr"])
            self._unscaled.append(lr)
            if isinstance(lr, float):
                if on_host is None:
                    on_host = float(factor)
                scaled = lr * on_host
                if max_lr is not None:
                    scaled = min(scaled, max(lr, max_lr))
                group["lr"] = scaled
                self._written.append(scaled)
            else:
                value = lr * factor
                if max_lr is not None:
                    value = torch.minimum(value, lr.clamp(min=max_lr))
                group["lr"].copy_(value)
                self._written.append(_Written(group["lr"], group["lr"]._version, value))
        self.factor = factor if on_host is None else on_host

    def are_in_force(self, groups: Groups) -> bool:
        """Whether the groups have the rates that :meth:`scale` gave them. Reads tensors."""
        return len(groups) == len(self._written) and all(
            _is_as_written(group["lr"], written) or _is_equal(group["lr"], written)
            for group, written in zip(groups, self._written, strict=True)
        )

    def load(self, groups: Groups, state: dict[str, Any]) -> None:
        """Takes "unscaled", "scaled" and, where it is there, "factor" of a state over."""
        for group, lr in zip(groups, state["scaled"], strict=True):
            group["lr"] = _like(group["lr"], lr)
        self._unscaled = [
            _like(_copy(group["lr"]), lr)
            for group, lr in zip(groups, state["unscaled"], strict=True)
        ]
        self._written = [_written(group["lr"]) for group in groups]
        self.factor = _copy(state["factor"]) if "factor" in state else _quotient(state)

    def state(self, groups: Groups) -> dict[str, Any]:
        """What :meth:`load` takes."""
        return {
            "unscaled": [_copy(lr) for lr in self.unscaled(groups)],
            "scaled": [_copy(group["lr"]) for group in groups],
            "factor": _copy(self.factor),
        }


_RATES: WeakKeyDictionary[Optimizer, Rates] = WeakKeyDictionary()


def rates_of(optimizer: Optimizer) -> Rates:
    """The rates of an optimizer: one object, so that schedulers can take turns on it.

    A rate that has the factor in it already keeps it; any other is taken for an unscaled one.
    """
    groups = optimizer.param_groups
    rates = _RATES.get(optimizer)
    if rates is None:
        rates = _RATES[optimizer] = Rates(groups)
    elif not rates.are_in_force(groups):
        rates.start(groups)
    return rates


def _copy(lr: Any) -> float | Tensor:
    """A rate to go back to: a float, or a copy of a tensor that is changed in place."""
    if isinstance(lr, float):
        return lr
    return lr.clone() if isinstance(lr, Tensor) else check.number("lr", lr)


def _written(lr: Any) -> float | _Written:
    return _Written(lr, lr._version, lr.clone()) if isinstance(lr, Tensor) else float(lr)


def _is_as_written(lr: Any, written: float | _Written) -> bool:
    """Whether nobody has touched a rate since. Tensors are not read: their version tells."""
    if isinstance(written, _Written):
        return lr is written.tensor and lr._version == written.version
    return not isinstance(lr, Tensor) and bool(lr == written)


def _is_equal(lr: Any, written: float | _Written) -> bool:
    """Whether a tensor that was written to again, or another one, has the same value."""
    if not (isinstance(lr, Tensor) and isinstance(written, _Written)):
        return False
    return bool(lr == written.value.to(lr))


def _like(present: float | Tensor, lr: float | Tensor) -> float | Tensor:
    """``lr`` as what is there: a float, or the tensor itself, changed in place."""
    return present.copy_(torch.as_tensor(lr)) if isinstance(present, Tensor) else float(lr)


def _quotient(state: dict[str, Any]) -> float | Tensor:
    """The factor of a state that was saved without it."""
    pairs = zip(state["scaled"], state["unscaled"], strict=True)
    return next((scaled / lr for scaled, lr in pairs if lr != 0), 1.0)
