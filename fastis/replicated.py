"""One sampler in several processes: tables alike, the minibatch shared out, the scores exchanged.

Every process of a torch.distributed group has the whole table and draws the whole global minibatch,
which takes microseconds, and trains on a part of its own (:class:`LocalBatch`). The parts, in the
order of ranks, are what one process draws that has them all in one. What they show goes round in
one all-gather a step (:mod:`fastis.exchange`), and every table learns from all of it: the tables
stay alike bit for bit, and with them the traces and the learning rate's factor.

The all-gather begins in :meth:`Replicated.update` and is waited for when the table is needed next,
as a rule by the next ``sample()``: what is between them, ``backward`` above all, goes on meanwhile.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fastis.batch import Scored, observe, with_coefficients
from fastis.exchange import Exchange
from fastis.kernels import kernels_for
from fastis.kernels.layout import Table
from fastis.kernels.table import Batch, Observation
from fastis.misuse import check_returned
from fastis.sampler import Sampler
from fastis.variance import Variance


class LocalBatch(Batch):
    """A process's part of a global minibatch: a :class:`fastis.Batch` that knows the whole.

    :meth:`to` keeps that. What has other coefficients (:meth:`mix`, or weights that were written
    to) is a minibatch of the process's own to :meth:`fastis.Sampler.update`.
    """

    global_batch: Batch  # int64 [W B] and float32 [W B], on the sampler's device
    _versions: tuple[int, int]

    @classmethod
    def of(cls, part: Batch, global_batch: Batch) -> LocalBatch:
        local = cls(*part)
        local.global_batch, local._versions = global_batch, _versions(part)
        return local

    @property
    def is_as_drawn(self) -> bool:
        """Whether nobody has written to its tensors."""
        return _versions(self) == self._versions

    def to(self, device: torch.device | str | int, non_blocking: bool = False) -> Batch:
        moved = super().to(device, non_blocking)
        return LocalBatch.of(moved, self.global_batch) if self.is_as_drawn else moved


def _versions(batch: Batch) -> tuple[int, int]:
    """How often the tensors were written to; 0 where that is not counted (inference mode)."""
    indices, weights = (0 if tensor.is_inference() else tensor._version for tensor in batch)
    return indices, weights


def global_batch_of(batch: Batch) -> Batch:
    """The global minibatch; of a process on its own, its minibatch."""
    return batch.global_batch if isinstance(batch, LocalBatch) else batch


class Replicated(Sampler):
    """What ``fastis.Sampler(..., group=group)`` makes: one process's sampler of a group.

    ``batch_size`` is this process's. The table, its traces and its state are those of the global
    minibatch.
    """

    _exchange: Exchange

    def _join(self, group: Any, arguments: Mapping[str, Any], seed: int) -> int:
        self._exchange = Exchange(group)
        self._processes = self._exchange.size
        self._place = f", group=<rank {self._exchange.rank} of {self._processes}>"
        return self._exchange.agree(arguments, seed)

    def _use(self, table: Table) -> None:
        if getattr(self._method, "score_fn", None) is not None:
            raise ValueError(
                f"method must have no score_fn in a group, got {self._method!r}: every process "
                "would have to score all candidates, and to the same bits"
            )
        super()._use(table)
        begin = self._exchange.rank * self.batch_size
        self._part = slice(begin, begin + self.batch_size)
        self._exchange.use(table, self.batch_size, 1 if self._observed_of is None else 2)
        self._variance = _Settled(table, self._exchange.finish)

    @property
    def _table(self) -> Table:  # type: ignore[override]
        """The table, once it has learnt from what is under way."""
        self._exchange.finish()
        return self._exchange.table

    @_table.setter
    def _table(self, table: Table) -> None:
        self._exchange.table = table

    # The step ------------------------------------------------------------------------------------

    def sample(self) -> Batch:
        return self._part_of(super().sample())

    def _part_of(self, global_batch: Batch) -> LocalBatch:
        """This process's part of a minibatch that was drawn, whose tensors may be anywhere."""
        indices, weights = global_batch
        part = Batch(indices[self._part], weights[self._part])
        on_device = global_batch if indices.device == self.device else global_batch.to(self.device)
        return LocalBatch.of(part, on_device)

    def update(
        self,
        batch: Batch,
        out: Scored | Sequence[Scored] | Tensor,
        *,
        indices: Tensor | Sequence[int] | None = None,
    ) -> None:
        observation = observe(self.device, self._observed_of, batch, out)
        if indices is not None:
            check_returned(batch, indices)
        global_batch = (
            batch.global_batch if isinstance(batch, LocalBatch) and batch.is_as_drawn else None
        )
        self._exchange.begin(global_batch, observation, self._correction, self._learn)
        self._watch.updated()
        self._watch.not_surely_weighted(batch, out)

    def update_and_sample(self, batch: Batch, out: Scored | Sequence[Scored] | Tensor) -> Batch:
        self.update(batch, out)
        return self.sample()

    def fold(self, indices: Tensor, scores: Tensor, iteration: int) -> None:
        raise RuntimeError(
            "fold() is for a process on its own: each process's scores would make tables that "
            "differ; in a group, refresh(indices, scores) takes in what every process brings"
        )

    def _fold(self, observation: Observation, iteration: int | None) -> None:
        """From what every process brings."""
        fold = super()._fold
        self._exchange.begin(None, observation, 1.0, lambda seen, _: fold(seen, iteration))

    def _learn(self, observation: Observation, correction: float) -> None:
        """From the global minibatch."""
        if correction != 1.0:
            observation = with_coefficients(observation, correction)
        table, kernels = self._exchange.table, kernels_for("table", self._device_type)
        if self._method.fused and kernels.IS_ATOMIC:
            kernels.update(table, observation)
        else:
            with table.lock:
                self._method.update(table, observation)

    # Its state -----------------------------------------------------------------------------------

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        settings = state.get("settings") if isinstance(state, Mapping) else None
        theirs = settings.get("batch_size") if isinstance(settings, Mapping) else None
        ours = self._processes * self.batch_size
        if type(theirs) is int and theirs != ours:
            raise ValueError(
                f"state_dict must be of a global minibatch of {ours} samples "
                f"({self._processes} processes, batch_size={self.batch_size}), got {theirs}: "
                "choose batch_size so that the product is the same"
            )
        super().load_state_dict(state)

    def __reduce__(self) -> tuple[Any, ...]:
        """In a pickle: a sampler on its own with the global minibatch, for a group is none's but
        its processes'."""
        state = self.__getstate__()
        alone = {"batch_size": self._processes * self.batch_size, "group": False}
        state["arguments"].update(alone)
        return _alone, (), state


def _alone() -> Sampler:
    """Of the class of a process on its own, its state to come."""
    return Sampler.__new__(Sampler)


class _Settled(Variance):
    """Traces that wait for what is under way."""

    def __init__(self, table: Table, finish: Callable[[], None]) -> None:
        super().__init__(table)
        self._finish = finish

    def _read(self, position: int) -> Tensor:
        self._finish()
        return super()._read(position)


Sampler._replicated = Replicated
