"""The learning rate that goes with the reduced variance (Kutsuna 2025, eq. 8; AdaScale).

A scheduler around any other, or around an optimizer; it needs of the sampler only
``lr_factor(optimizer, rule)``. What a rate is without the factor is kept in :mod:`fastis.rates`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, Protocol

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from fastis import check
from fastis.methods.base import DEFAULT_RULE, OPTIMIZERS, RULES
from fastis.rates import family_of, innermost, rates_of


class HasFactor(Protocol):
    """What the scheduler needs of a sampler."""

    def lr_factor(self, optimizer: str = "sgd", rule: str = DEFAULT_RULE) -> Tensor: ...


class HasProgress(HasFactor, Protocol):
    """What a scheduler by effective iterations needs of a sampler."""

    @property
    def effective_iterations(self) -> Tensor: ...


def _of_inner(name: str) -> Any:
    """An attribute that is the inner scheduler's own, to read and to set."""
    return property(
        lambda self: getattr(self._inner, name),
        lambda self, value: setattr(self._inner, name, value),
    )


class EffectiveBatchLR(LRScheduler):
    """Multiplies a scheduler's learning rate by what the sampler's reduced variance allows.

    Parameters
    ----------
    scheduler : torch.optim.lr_scheduler.LRScheduler, or an optimizer
        any of torch's, also a chained or recursive one: it always sees the learning rate without
        the factor. Or one of timm's, or a wrapper of Accelerate around one, which steps as it does
        alone. An optimizer stands for a constant rate.
    sampler : fastis.Sampler
        or anything with ``lr_factor(optimizer, rule) -> 0-d tensor``.
    rule : "linear" or "gain"
        the factor: N_ems / B (Kutsuna 2025, eq. 8), or the gain of a larger minibatch, which is
        nearer to 1 where noise does not dominate; see :meth:`fastis.Sampler.lr_factor`.
    optimizer : "sgd", "adam" or None
        whose rate it is: for Adam and its family the factor's square root. None: by the class of
        the optimizer, inside of the wrappers of Accelerate and Lightning.
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
    epoch, unless :meth:`renew` is called in between. A rate that is a float needs the factor on the
    host: with a sampler on a GPU every step then waits until the device has done all that came
    before. Where that counts, make the rate a tensor on the sampler's device, as for capturable
    optimizers (``Adam(..., lr=torch.tensor(1e-3, device="cuda"))``): it is changed where it lies,
    and nothing is read.

    A rate set by hand, by ``group["lr"] *= 0.1`` as well as by ``group["lr"] = 0.01``, is the one
    in force. Without the factor it is ``group["lr"]`` divided by the last factor, and from there
    the inner scheduler goes on, as it would alone: one that computes its rates from ``base_lrs``,
    as LambdaLR does, replaces it. The rate of a group that is added later has no factor in it.

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
        rule: str = DEFAULT_RULE,
        *,
        optimizer: str | None = None,
        max_factor: float | None = None,
        max_lr: float | None = None,
    ) -> None:
        if not hasattr(sampler, "lr_factor"):
            raise TypeError(f"sampler must be a fastis.Sampler, got {type(sampler).__name__}")
        inner = _without_wrappers(scheduler)
        self.optimizer = innermost(inner if isinstance(inner, Optimizer) else inner.optimizer)
        self.sampler = sampler
        self.rule = check.choice("rule", rule, RULES)
        if optimizer is None:
            self._family = family_of(self.optimizer)
        else:
            self._family = check.choice("optimizer", optimizer, OPTIMIZERS)
        for name, limit in (("max_factor", max_factor), ("max_lr", max_lr)):
            if limit is not None:
                check.number(name, limit, 0.0, interval="(]")
        self.max_factor, self.max_lr = max_factor, max_lr
        self._rates = rates_of(self.optimizer)
        if inner is scheduler and isinstance(scheduler, Optimizer):
            scheduler = inner = _ConstantLR(self.optimizer)
        self.scheduler, self._inner = scheduler, inner

    def step(self, *args: Any, **kwargs: Any) -> None:
        """The inner scheduler's step, on unscaled rates; then the present factor.

        Takes the arguments of the inner scheduler's: a metric (ReduceLROnPlateau), an epoch (timm).
        """
        self._scaling(self._advance, *args, **kwargs)

    def renew(self) -> None:
        """Scales the rates by the present factor, without a step of the inner scheduler.

        For after every update, where that one steps once an epoch.
        """
        self._scaling(lambda: None)

    def step_update(self, *args: Any, **kwargs: Any) -> None:
        """As :meth:`step`, for a scheduler of timm's after every update."""
        if not hasattr(self._inner, "step_update"):
            raise TypeError(
                f"scheduler must be one of timm's to step_update, got {type(self._inner).__name__}"
            )
        self._scaling(self._inner.step_update, *args, **kwargs)

    def _advance(self, *args: Any, **kwargs: Any) -> None:
        self.scheduler.step(*args, **kwargs)

    def _scaling(self, advance: Callable[..., None], *args: Any, **kwargs: Any) -> None:
        """Calls ``advance`` on unscaled rates. Whether it fails or not, they are scaled after."""
        factor = self.sampler.lr_factor(self._family, self.rule)
        if self.max_factor is not None:
            factor = factor.clamp(max=self.max_factor)
        groups = self.optimizer.param_groups
        self._rates.restore(groups)
        try:
            advance(*args, **kwargs)
        except (ValueError, KeyError, IndexError) as error:
            made_for = len(getattr(self._inner, "base_lrs", groups))
            if made_for == len(groups):
                raise
            raise ValueError(
                f"scheduler must be made for the optimizer's {len(groups)} parameter groups, got "
                f"{type(self._inner).__name__} for {made_for}: make it again after add_param_group"
            ) from error
        finally:
            self._rates.scale(groups, factor, self.max_lr)

    # SequentialLR steps its parts by these two as well.

    def _initial_step(self) -> None:
        self._inner._initial_step()  # on rates that have just been reset
        self._rates.start(self.optimizer.param_groups)

    def _update_lr(self, epoch: int | None = None) -> None:
        self._scaling(self._inner._update_lr, epoch)

    # What others read and set on schedulers is the inner one's.

    last_epoch: int = _of_inner("last_epoch")
    base_lrs: list[float | Tensor] = _of_inner("base_lrs")
    _step_count: int = _of_inner("_step_count")

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or "_inner" not in self.__dict__:  # being unpickled, or copied
            raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")
        if hasattr(self.scheduler, name):
            return getattr(self.scheduler, name)
        return getattr(self._inner, name)

    def get_last_lr(self) -> list[float | Tensor]:
        """The rates in force, factor included, as floats: rates that are tensors are read."""
        return [float(group["lr"]) for group in self.optimizer.param_groups]

    def get_unscaled_lr(self) -> list[float]:
        """The inner scheduler's rates, without the factor, as floats."""
        return [float(lr) for lr in self._rates.unscaled(self.optimizer.param_groups)]

    def state_dict(self) -> dict[str, Any]:
        """The inner scheduler's state, its rates, those in force, and the factor between them."""
        rates = self._rates.state(self.optimizer.param_groups)
        return {"scheduler": self.scheduler.state_dict(), **rates}

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
        self._rates.load(groups, state)


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
        rule: str = DEFAULT_RULE,
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


class _ConstantLR(LRScheduler):
    """Leaves the rates as they are. Its steps take what those of any other do."""

    def step(self, *args: Any, **kwargs: Any) -> None:
        self.last_epoch += 1
        self._step_count += 1

    step_update = step

    def _update_lr(self, epoch: int | None = None) -> None:
        self.step()


def _without_wrappers(scheduler: Any) -> Any:
    """The scheduler inside of Accelerate's wrappers, or the optimizer that is there instead."""
    inner = scheduler
    while not hasattr(inner, "optimizer") and hasattr(inner, "scheduler"):
        inner = inner.scheduler
    if isinstance(inner, EffectiveBatchLR):
        raise TypeError(
            "scheduler must be one whose rates have no factor yet, got an EffectiveBatchLR"
        )
    is_scheduler = hasattr(inner, "step") and hasattr(
        getattr(inner, "optimizer", None), "param_groups"
    )
    if not (is_scheduler or isinstance(inner, Optimizer)):
        raise TypeError(
            "scheduler must be a torch LR scheduler, one of timm's or an optimizer, "
            f"got {check.describe(scheduler)}"
        )
    return inner
