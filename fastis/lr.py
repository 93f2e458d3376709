"""The learning rate that goes with the reduced variance (Kutsuna 2025, eq. 8; AdaScale).

A wrapper around any torch scheduler; it needs of the sampler only ``lr_factor(optimizer, rule)``.
"""

from __future__ import annotations

from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from fastis import check
from fastis.methods.base import OPTIMIZERS, RULES

_LINEAR = {"SGD", "ASGD"}
_SQUARE_ROOT = {
    *("Adam", "AdamW", "Adamax", "NAdam", "RAdam", "SparseAdam"),
    *("Adagrad", "Adadelta", "RMSprop", "Adafactor"),
}


class HasFactor(Protocol):
    """What the scheduler needs of a sampler."""

    def lr_factor(self, optimizer: str = "sgd", rule: str = "linear") -> Tensor: ...


class HasProgress(HasFactor, Protocol):
    """What a scheduler by effective iterations needs of a sampler."""

    @property
    def effective_iterations(self) -> Tensor: ...


class EffectiveBatchLR:
    """Multiplies a scheduler's learning rate by what the sampler's reduced variance allows.

    Parameters
    ----------
    scheduler : torch.optim.lr_scheduler.LRScheduler
        any, also a chained or recursive one: it always sees the learning rate without the factor.
    sampler : fastis.Sampler
        or anything with ``lr_factor(optimizer, rule) -> 0-d tensor``.
    rule : "linear" or "gain"
        the factor: N_ems / B (Kutsuna 2025, eq. 8), or the gain of a larger minibatch, which is
        nearer to 1 where noise does not dominate; see :meth:`fastis.Sampler.lr_factor`.
    optimizer : "sgd", "adam" or None
        whose rate it is: for Adam and its family the factor's square root. None: by the class of
        the scheduler's optimizer.
    max_factor : float, optional
        upper bound on the factor.
    max_lr : float, optional
        upper bound on the scaled rate: the largest that trains stably. Rates of the inner scheduler
        beyond it stay as they are.

    Raises
    ------
    TypeError, ValueError
        for an optimizer whose family is not known (name it), or a bad argument.

    The factor is renewed at every :meth:`step`: once an epoch for a scheduler that steps once an
    epoch. A rate that is a float needs the factor on the host: with a sampler on a GPU every step
    then waits until the device has done all that came before. Where that counts, make the rate a
    tensor on the sampler's device, as for capturable optimizers
    (``Adam(..., lr=torch.tensor(1e-3, device="cuda"))``): it is changed where it lies, and nothing
    is read.

    Equivalent to::

        for group, lr in zip(optimizer.param_groups, unscaled): group["lr"] = lr
        scheduler.step()
        unscaled = [group["lr"] for group in optimizer.param_groups]
        for group in optimizer.param_groups: group["lr"] *= sampler.lr_factor("sgd", rule)
    """

    _saved: ClassVar[tuple[str, ...]] = ("scheduler", "unscaled", "scaled")  # in a state_dict

    def __init__(
        self,
        scheduler: Any,
        sampler: HasFactor,
        rule: str = "linear",
        *,
        optimizer: str | None = None,
        max_factor: float | None = None,
        max_lr: float | None = None,
    ) -> None:
        if not hasattr(scheduler, "optimizer") or not hasattr(scheduler, "step"):
            raise TypeError(
                f"scheduler must be a torch LR scheduler, got {type(scheduler).__name__}"
            )
        if not hasattr(sampler, "lr_factor"):
            raise TypeError(f"sampler must be a fastis.Sampler, got {type(sampler).__name__}")
        self.scheduler = scheduler
        self.sampler = sampler
        self.optimizer = scheduler.optimizer
        self.rule = check.choice("rule", rule, RULES)
        if optimizer is None:
            self._family = _family(self.optimizer)
        else:
            self._family = check.choice("optimizer", optimizer, OPTIMIZERS)
        for name, limit in (("max_factor", max_factor), ("max_lr", max_lr)):
            if limit is not None:
                check.number(name, limit, 0.0, interval="(]")
        self.max_factor, self.max_lr = max_factor, max_lr
        self._unscaled = [_kept(group["lr"]) for group in self.optimizer.param_groups]

    def step(self, *args: Any, **kwargs: Any) -> None:
        """The inner scheduler's step, on unscaled rates; then the present factor."""
        groups = self.optimizer.param_groups
        for group, lr in zip(groups, self._unscaled, strict=False):
            _put(group, lr)
        self._advance(*args, **kwargs)
        self._unscaled = [_kept(group["lr"]) for group in groups]
        self._scale()

    def _advance(self, *args: Any, **kwargs: Any) -> None:
        self.scheduler.step(*args, **kwargs)

    def _scale(self) -> None:
        factor = self.sampler.lr_factor(self._family, self.rule)
        if self.max_factor is not None:
            factor = factor.clamp(max=self.max_factor)
        on_host = None
        for group, lr in zip(self.optimizer.param_groups, self._unscaled, strict=True):
            if isinstance(lr, float):
                on_host = factor.item() if on_host is None else on_host
                group["lr"] = self._limited(lr, lr * on_host)
            else:
                scaled = lr * factor
                if self.max_lr is not None:
                    scaled = torch.minimum(scaled, lr.clamp(min=self.max_lr))
                group["lr"].copy_(scaled)

    def _limited(self, lr: float, scaled: float) -> float:
        return scaled if self.max_lr is None else min(scaled, max(lr, self.max_lr))

    def get_last_lr(self) -> list[float]:
        """The rates in force, factor included."""
        return [float(group["lr"]) for group in self.optimizer.param_groups]

    def get_unscaled_lr(self) -> list[float]:
        """The inner scheduler's rates, without the factor."""
        return [float(lr) for lr in self._unscaled]

    def state_dict(self) -> dict[str, Any]:
        """The inner scheduler's state, its rates, and those in force."""
        unscaled = [_kept(lr) for lr in self._unscaled]
        scaled = [_kept(group["lr"]) for group in self.optimizer.param_groups]
        return {"scheduler": self.scheduler.state_dict(), "unscaled": unscaled, "scaled": scaled}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes :meth:`state_dict` over, and the rates in force with it.

        Whether the sampler and the optimizer are loaded before or after makes no difference.

        Raises
        ------
        ValueError
            naming what is missing or differs; nothing has changed then.
        """
        groups = self.optimizer.param_groups
        missing = [name for name in self._saved if name not in state]
        if missing:
            got = ", ".join(map(str, state)) or "nothing"
            raise ValueError(f"state_dict must have {', '.join(self._saved)}, got {got}")
        for name in ("unscaled", "scaled"):
            if len(state[name]) != len(groups):
                raise ValueError(
                    f"state_dict must have {len(groups)} parameter groups, "
                    f"got {len(state[name])} ({name})"
                )
        self.scheduler.load_state_dict(state["scheduler"])
        self._unscaled = [_kept(lr) for lr in state["unscaled"]]
        for group, lr in zip(groups, state["scaled"], strict=True):
            _put(group, lr)


class EffectiveIterationsLR(EffectiveBatchLR):
    """Scales the rate, and advances the schedule, by the sampler's effective iterations.

    For RAIS (Johnson & Guestrin 2018): lr = gain eta(t_eff), t_eff the sum of the gains so far. The
    inner scheduler has taken ``floor(sampler.effective_iterations)`` steps, so that a step of the
    training may take several of them, or none; the run is over when :attr:`finished`. Reads the
    sampler on the host at every step.

    Parameters
    ----------
    scheduler, sampler, rule, optimizer, max_factor, max_lr
        as in :class:`EffectiveBatchLR`.
    total_iterations : int, optional
        length of the run in effective iterations; the inner scheduler does not go beyond it.

    Raises
    ------
    TypeError, ValueError
        as :class:`EffectiveBatchLR`; ValueError also for a total that is not positive.

    Equivalent to::

        while steps < int(sampler.effective_iterations): scheduler.step(); steps += 1
        for group in optimizer.param_groups: group["lr"] = unscaled_lr * sampler.lr_factor()
    """

    _saved: ClassVar[tuple[str, ...]] = (*EffectiveBatchLR._saved, "steps")

    def __init__(
        self,
        scheduler: Any,
        sampler: HasProgress,
        rule: str = "linear",
        *,
        optimizer: str | None = None,
        max_factor: float | None = None,
        max_lr: float | None = None,
        total_iterations: int | None = None,
    ) -> None:
        if not hasattr(sampler, "effective_iterations"):
            raise TypeError(f"sampler must be a fastis.Sampler, got {type(sampler).__name__}")
        if total_iterations is not None:
            check.number("total_iterations", total_iterations, 0.0, interval="(]")
        limits = {"max_factor": max_factor, "max_lr": max_lr}
        super().__init__(scheduler, sampler, rule, optimizer=optimizer, **limits)
        self._progress = sampler
        self.total_iterations = total_iterations
        self._steps = 0

    @property
    def finished(self) -> bool:
        """Whether the effective iterations have reached the total; False without a total."""
        reached = float(self._progress.effective_iterations)
        return self.total_iterations is not None and reached >= self.total_iterations

    def _advance(self, *args: Any, **kwargs: Any) -> None:
        due = int(self._progress.effective_iterations)
        if self.total_iterations is not None:
            due = min(due, self.total_iterations)
        for _ in range(due - self._steps):
            self.scheduler.step(*args, **kwargs)
        self._steps = max(self._steps, due)

    def state_dict(self) -> dict[str, Any]:
        """That of :class:`EffectiveBatchLR`, and how many steps the inner scheduler has taken."""
        return {**super().state_dict(), "steps": self._steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """As that of :class:`EffectiveBatchLR`."""
        super().load_state_dict(state)
        self._steps = state["steps"]


def _family(optimizer: torch.optim.Optimizer) -> str:
    """The family of an optimizer's class, or of the nearest torch class that it derives from."""
    for cls in type(optimizer).__mro__:
        if cls.__name__ in _LINEAR:
            return "sgd"
        if cls.__name__ in _SQUARE_ROOT:
            return "adam"
    raise ValueError(
        "optimizer must be given as 'sgd' (the factor itself) or 'adam' (its square root) for a "
        f"{type(optimizer).__name__}, whose family is not known"
    )


def _put(group: dict[str, Any], lr: float | Tensor) -> None:
    """A parameter group's rate; tensors in place, since captured graphs hold their address."""
    if isinstance(group["lr"], Tensor):
        group["lr"].copy_(torch.as_tensor(lr))
    else:
        group["lr"] = float(lr)


def _kept(lr: float | Tensor) -> float | Tensor:
    """A rate to go back to: a float, or a copy of a tensor that is changed in place."""
    if isinstance(lr, float):  # asked first: asking a float whether it is a Tensor is slow
        return lr
    return lr.clone() if isinstance(lr, Tensor) else float(lr)
