"""Importance sampling in Lightning's loop: a callback.

It stands between three parts that don't know each other: the user's ``training_step``, whose scored
loss goes to the sampler; the Trainer, whose checkpoints hold the loader; and the schedulers that
``configure_optimizers`` has returned, whose rates follow the sampler.
"""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from fastis import check
from fastis.data import DataLoader
from fastis.kernels.table import Batch
from fastis.lr import EffectiveBatchLR
from fastis.methods.base import DEFAULT_RULE
from fastis.sampler import Sampler
from fastis.scored import ScoredLoss

try:
    from lightning.pytorch import Callback  # type: ignore[import-not-found]
    from lightning.pytorch.utilities.types import (  # type: ignore[import-not-found]
        LRSchedulerConfig,
    )
except ModuleNotFoundError:  # the same library by its older name
    from pytorch_lightning import Callback  # type: ignore[import-not-found]
    from pytorch_lightning.utilities.types import (  # type: ignore[import-not-found]
        LRSchedulerConfig,
    )

_FIT = "fit"


class ImportanceSampling(Callback):  # type: ignore[misc]
    """Has a ``Trainer`` train on the minibatches of a :class:`fastis.Sampler`.

    The module's training data are a :class:`fastis.DataLoader`, ``training_step`` gets a
    :class:`fastis.Batch` with its data, and returns the :class:`fastis.ScoredLoss` (or a dict that
    has it as ``"loss"``). The callback hands it to ``sampler.update``, once for every minibatch and
    before the backward pass, and its ``loss`` to the Trainer. A ``training_step`` that calls
    ``sampler.update(batch, out)`` itself returns a tensor, ``out.loss``, as ever.

    Checkpoints of the Trainer hold the loader's state: the sampler's, and the minibatches that are
    under way. With the callback a run that was stopped anywhere and goes on by
    ``trainer.fit(..., ckpt_path=...)`` has the same minibatches, coefficients and rates, bit for
    bit. (Lightning alone loads the loader's state in the middle of an epoch only.)

    Parameters
    ----------
    adjust_lr : bool or dict
        True: each scheduler of ``configure_optimizers`` goes into a
        :class:`fastis.EffectiveBatchLR`, and so does an optimizer that has none; the factor is
        renewed after every minibatch, whatever the interval of the schedule. A dict: the arguments
        of these, e.g. ``{"max_factor": 2.0}``.
    log_every_n_steps : int, optional
        ``sampler.stats()`` goes to the Trainer's loggers, as ``fastis/gain`` and so on, and the
        gain to the progress bar. None: the Trainer's number; 0: never.
    uniform_from : float, optional
        the part of all steps, in [0, 1], after which draws are uniform
        (:attr:`fastis.Sampler.uniform`).

    Raises
    ------
    TypeError, ValueError
        for a bad argument, and at ``fit``: for training data without a ``fastis.DataLoader``, and
        for arguments of the Trainer that would choose other samples (``overfit_batches``) or throw
        away what was learnt (``reload_dataloaders_every_n_epochs``).
    RuntimeError
        at the first minibatch, for a ``training_step`` that both updates the sampler and returns
        the scored loss, which would count twice.

    Attributes
    ----------
    loader : fastis.DataLoader
        the one found in the Trainer's training data, once training has begun.

    Example
    -------
    >>> class Module(lightning.LightningModule):
    ...     def train_dataloader(self):
    ...         return fastis.DataLoader(train, fastis.Sampler(len(train), batch_size=128))
    ...
    ...     def training_step(self, minibatch, batch_idx):
    ...         batch, (x, y) = minibatch
    ...         return fastis.cross_entropy(self(x), y, batch.weights)
    >>> lightning.Trainer(callbacks=[ImportanceSampling(adjust_lr=True)]).fit(Module())
    """

    loader: DataLoader

    def __init__(
        self,
        *,
        adjust_lr: bool | Mapping[str, Any] = False,
        log_every_n_steps: int | None = None,
        uniform_from: float | None = None,
    ) -> None:
        if not isinstance(adjust_lr, (bool, Mapping)):
            raise TypeError(f"adjust_lr must be a bool or a dict, got {check.describe(adjust_lr)}")
        if log_every_n_steps is not None:
            check.integer("log_every_n_steps", log_every_n_steps, 0)
        if uniform_from is not None:
            check.number("uniform_from", uniform_from, 0.0, 1.0)
        self.adjust_lr = adjust_lr
        self.log_every_n_steps = log_every_n_steps
        self.uniform_from = uniform_from
        self._schedulers: list[EffectiveBatchLR] = []
        self._of_loader: Mapping[str, Any] | None = None  # states, in a checkpoint
        self._of_callback: Mapping[str, Any] | None = None
        self._stands_behind = False  # the module's training_step

    @property
    def sampler(self) -> Sampler:
        """The loader's."""
        return self.loader.sampler

    # Before training -----------------------------------------------------------------------------

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Refuses what would go wrong in silence."""
        self._of_loader = self._of_callback = None
        if stage != _FIT:
            return
        connector = trainer._accelerator_connector
        if trainer.world_size > 1 and getattr(connector, "use_distributed_sampler", False):
            raise ValueError(
                f"use_distributed_sampler must be False in {trainer.world_size} processes, got "
                "True: the Trainer would put a sampler of its own in place of the fastis.Sampler"
            )
        if trainer.overfit_batches > 0:
            raise ValueError(
                f"overfit_batches must be 0, got {trainer.overfit_batches}: the sampler chooses "
                "the samples; to overfit on some, train on a torch.utils.data.Subset of them"
            )
        if trainer.reload_dataloaders_every_n_epochs > 0:
            raise ValueError(
                "reload_dataloaders_every_n_epochs must be 0, got "
                f"{trainer.reload_dataloaders_every_n_epochs}: what the sampler has learnt would "
                "be lost with its loader"
            )

    def state_dict(self) -> dict[str, Any]:
        """How schedulers are saved: with the factor, or without. The rest is in the loader's."""
        return {"adjust_lr": self.adjust_lr is not False}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Takes :meth:`state_dict`, which is checked when training begins."""
        self._of_callback = state_dict

    def on_load_checkpoint(
        self, trainer: Any, pl_module: Any, checkpoint: Mapping[str, Any]
    ) -> None:
        """Finds the loader's state, which the Trainer itself loads within an epoch only."""
        fit_loop = checkpoint.get("loops", {}).get("fit_loop", {}).get("state_dict", {})
        for state in fit_loop.get("combined_loader", []):
            if isinstance(state, Mapping) and {"sampler", "ahead", "position"} <= state.keys():
                self._of_loader = state
        if self._of_loader is None and trainer.state.fn == _FIT:
            warnings.warn(
                "the checkpoint has no state of a fastis.DataLoader: the sampler has yet to learn "
                "how important each sample is",
                stacklevel=2,
            )

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Wraps the schedulers, before they are given their states of a checkpoint."""
        self._schedulers = []
        if self._of_callback is not None and self._of_callback != self.state_dict():
            raise ValueError(
                f"adjust_lr must be as in the run that wrote the checkpoint, which had "
                f"{self._of_callback['adjust_lr']}, got {self.adjust_lr!r}: the schedulers' states "
                "differ"
            )
        if self.adjust_lr is False:
            return
        options = self.adjust_lr if isinstance(self.adjust_lr, Mapping) else {}
        configs = trainer.lr_scheduler_configs
        scheduled = [config.scheduler.optimizer for config in configs]
        for optimizer in trainer.optimizers:
            if not any(optimizer is other for other in scheduled):
                configs.append(LRSchedulerConfig(optimizer, interval="step"))
        for config in configs:
            # It asks this callback for the factor, since the sampler is not known yet.
            config.scheduler = EffectiveBatchLR(config.scheduler, self, **options)
            self._schedulers.append(config.scheduler)

    def lr_factor(self, optimizer: str = "sgd", rule: str = DEFAULT_RULE) -> Tensor:
        """That of the sampler: :meth:`fastis.Sampler.lr_factor`."""
        return self.sampler.lr_factor(optimizer, rule)

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Finds the loader, gives it its state, and stands behind ``training_step``."""
        self.loader = _loader_in(trainer.train_dataloader)
        group = self.sampler._arguments["group"]
        if self._schedulers and trainer.world_size > 1 and group is False:
            raise ValueError(
                "adjust_lr must be False for samplers of their own (group=False) in "
                f"{trainer.world_size} processes: their factors differ, and so would the replicas"
            )
        self._uniform_at = math.inf
        if self.uniform_from is not None:
            total = trainer.estimated_stepping_batches
            if total == math.inf:
                raise ValueError(
                    f"uniform_from must be None, got {self.uniform_from!r}, for a Trainer without "
                    "max_epochs and max_steps"
                )
            self._uniform_at = self.uniform_from * total
        if self._of_loader is not None:
            self.loader.load_state_dict({**self._of_loader, "position": _position(trainer)})
            self._of_loader = None  # O(N) memory
        self._is_first = True  # of the steps to come
        self._seen: Batch | None = None  # the last minibatch that the sampler has learnt from
        self._step = trainer.global_step
        self._own_step = vars(pl_module).get("training_step")
        pl_module.training_step = self._learning(pl_module.training_step)
        self._stands_behind = True

    # The step ------------------------------------------------------------------------------------

    def _learning(self, training_step: Callable[..., Any]) -> Callable[..., Any]:
        """``training_step``, the scored loss of which goes to the sampler."""

        @functools.wraps(training_step)  # Lightning looks for the arguments of the wrapped one
        def step(*args: Any, **kwargs: Any) -> Any:
            is_first, self._is_first = self._is_first, False
            updates = self.sampler.step if is_first else 0  # once, since it waits for a device
            result = training_step(*args, **kwargs)
            out = result.get("loss") if isinstance(result, Mapping) else result
            if not isinstance(out, ScoredLoss):
                return result
            if is_first and self.sampler.step != updates:
                raise RuntimeError(
                    "training_step must either return the ScoredLoss or call sampler.update(), not "
                    "both: the minibatch would count twice; to update yourself, return out.loss"
                )
            self._learn(_batch_in((args, kwargs)), out)
            return {**result, "loss": out.loss} if isinstance(result, Mapping) else out.loss

        return step

    def _learn(self, batch: Batch, out: ScoredLoss) -> None:
        if batch.weights.dtype != torch.float32:
            raise TypeError(
                "precision must leave the coefficients as they are (32-true, 16-mixed, bf16-mixed),"
                f" got one that makes them {batch.weights.dtype}"
            )
        if batch is not self._seen:  # else the optimizer has called its closure again
            self.sampler.update(batch, out)
            self._seen = batch

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """After a step of the optimizer: the factor, the numbers, whether draws are uniform."""
        step = trainer.global_step
        if step == self._step:  # gradients are being accumulated
            return
        self._step = step
        for scheduler in self._schedulers:
            scheduler.renew()
        if step >= self._uniform_at and not self.sampler.uniform:
            self.sampler.uniform = True
        every = self.log_every_n_steps
        every = trainer.log_every_n_steps if every is None else every
        if every > 0 and step % every == 0:
            self._log(trainer, pl_module)

    def _log(self, trainer: Any, pl_module: Any) -> None:
        if not trainer.loggers and trainer.progress_bar_callback is None:
            return
        stats = self.sampler.stats()
        for logger in trainer.loggers:
            # Lightning counts the steps of its own metrics from 0.
            metrics = {f"fastis/{name}": value for name, value in stats.items()}
            logger.log_metrics(metrics, step=trainer.global_step - 1)
        if trainer.progress_bar_callback is not None:
            pl_module.log("gain", stats["gain"], prog_bar=True, logger=False)

    # After training ------------------------------------------------------------------------------

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Leaves the module as it was."""
        if not self._stands_behind:
            return
        self._stands_behind = False
        del pl_module.training_step
        if self._own_step is not None:
            pl_module.training_step = self._own_step

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """As :meth:`on_train_end`."""
        self.on_train_end(trainer, pl_module)


def _loader_in(loaders: Any) -> DataLoader:
    """The fastis.DataLoader among the Trainer's, which may be a collection of them."""
    leaves = pytree.tree_leaves(loaders)
    found = [loader for loader in leaves if isinstance(loader, DataLoader)]
    if len(found) != 1:
        names = ", ".join(type(loader).__name__ for loader in leaves)
        raise TypeError(
            f"train_dataloader must have one fastis.DataLoader, got {names}: return "
            "fastis.DataLoader(dataset, sampler, ...) from it"
        )
    return found[0]


def _batch_in(arguments: Any) -> Batch:
    """The Batch among the arguments of ``training_step``."""
    leaves = pytree.tree_leaves(arguments, is_leaf=lambda value: isinstance(value, Batch))
    found = [leaf for leaf in leaves if isinstance(leaf, Batch)]
    if len(found) != 1:
        raise TypeError(
            "training_step must get the fastis.Batch with its data, (batch, data), as the "
            f"fastis.DataLoader gives them, got {len(found)} of them"
        )
    return found[0]


def _position(trainer: Any) -> int | None:
    """Where the loader's next pass is to begin; None for a whole one.

    The Trainer counts its minibatches itself. In a checkpoint of the end of an epoch the loader
    stands behind its last one, and the next pass would be empty.
    """
    done = trainer.fit_loop.epoch_loop.batch_progress.current
    if not trainer.fit_loop.restarting or done.ready >= trainer.num_training_batches:
        return None
    position: int = done.completed
    return position
