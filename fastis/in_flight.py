"""Minibatches between their draw and the training loop: drawn, with a worker, not yet handed out.

A :class:`Minibatch` travels to the worker that loads it and comes back with its data. The record of
those under way, :class:`InFlight`, serves to send them again and to save them; data are never
paired with a minibatch by their place in it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from fastis import check
from fastis.kernels.table import Batch
from fastis.replicated import LocalBatch, global_batch_of
from fastis.sampler import Sampler


class Minibatch:
    """A :class:`fastis.Batch` on the host, numbered in the order of the draws."""

    __slots__ = ("batch", "number")

    def __init__(self, number: int, batch: Batch) -> None:
        self.number, self.batch = number, batch

    def pin_memory(self) -> Minibatch:
        """For the thread of torch's loader that pins what the workers send."""
        return Minibatch(self.number, Batch(*(tensor.pin_memory() for tensor in self.batch)))

    def __reduce__(self) -> tuple[Callable[..., Minibatch], tuple[Any, ...]]:
        # As bytes: each tensor would take a file of shared memory to the worker and one back, and
        # an array twice the time of its bytes.
        return _from_bytes, (self.number, *(tensor.numpy().tobytes() for tensor in self.batch))


def _from_bytes(number: int, indices: bytes, weights: bytes) -> Minibatch:
    # Of bytearrays, which unlike bytes may be written to.
    batch = Batch(
        torch.frombuffer(bytearray(indices), dtype=torch.int64),
        torch.frombuffer(bytearray(weights), dtype=torch.float32),
    )
    return Minibatch(number, batch)


class InFlight:
    """The minibatches drawn and not yet handed out, in order.

    It is the iterator that torch's loader takes its tasks from: first those already drawn, which
    workers of an earlier pass may have had, then whatever :meth:`fill` has drawn since.
    """

    def __init__(self, sampler: Sampler) -> None:
        self._sampler = sampler
        # With the event after which a GPU's minibatch is on the host.
        self._drawn: deque[tuple[Minibatch, torch.cuda.Event | None]] = deque()
        self._number = 0  # of the next draw
        self.sent = 0  # so many of the first are with the workers of this pass
        self.to_send = 0  # so many more belong to this pass

    def __len__(self) -> int:
        return len(self._drawn)

    def begin(self, count: int) -> None:
        """A pass of ``count`` minibatches, whose workers have none yet."""
        self.sent, self.to_send = 0, count

    def fill(self, count: int) -> None:
        """Draws until ``count`` are under way."""
        while len(self._drawn) < count:
            batch, on_host = _to_host(self._sampler.sample())
            self._drawn.append((Minibatch(self._number, batch), on_host))
            self._number += 1

    def __iter__(self) -> InFlight:
        return self

    def can_send(self) -> bool:
        return self.to_send > 0 and self.sent < len(self._drawn)

    def __next__(self) -> Minibatch:
        """The next task for a worker. Waits until a GPU's indices are on the host."""
        if not self.can_send():
            raise StopIteration
        minibatch, on_host = self._drawn[self.sent]
        if on_host is not None:
            on_host.synchronize()
        self.sent, self.to_send = self.sent + 1, self.to_send - 1
        return minibatch

    def hand_out(self, minibatch: Minibatch) -> Batch:
        """The Batch of the first one, which has come back; it is no longer under way."""
        expected = self._drawn[0][0].number
        if minibatch.number != expected:
            raise RuntimeError(
                f"minibatch {expected} must come back first, got {minibatch.number}: something "
                "between fastis.DataLoader and its workers has changed the order"
            )
        drawn = self._drawn.popleft()[0].batch
        self.sent -= 1
        if isinstance(drawn, LocalBatch):  # the worker has not seen the whole
            return LocalBatch.of(minibatch.batch, drawn.global_batch)
        return minibatch.batch

    # Saving --------------------------------------------------------------------------------------

    def _arrived(self) -> list[Minibatch]:
        for _, on_host in self._drawn:
            if on_host is not None:
                on_host.synchronize()
        return [minibatch for minibatch, _ in self._drawn]

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles: events can't be copied."""
        return {**self.__dict__, "_drawn": deque((m, None) for m in self._arrived())}

    def state_dict(self) -> dict[str, Tensor]:
        """``indices`` int64 [n, B] and ``weights`` float32 [n, B] of the n under way, in order.

        In a group those of the global minibatches, so that any number of processes may go on.
        """
        shape = (len(self._drawn), self._sampler.global_batch_size)
        indices = torch.empty(shape, dtype=torch.int64, device="cpu")
        weights = torch.empty(shape, dtype=torch.float32, device="cpu")
        for i, minibatch in enumerate(self._arrived()):
            indices[i], weights[i] = global_batch_of(minibatch.batch)
        return {"indices": indices, "weights": weights}

    def checked(self, state: Mapping[str, Any]) -> list[Batch]:
        """The minibatches of a state, when the sampler can have drawn them."""
        n, b = self._sampler.num_samples, self._sampler.global_batch_size
        indices = _matrix("indices", state.get("indices"), torch.int64, b)
        weights = _matrix("weights", state.get("weights"), torch.float32, b)
        if len(indices) != len(weights):
            raise ValueError(
                f"state_dict must have as many indices as weights, got {len(indices)} minibatches "
                f"of indices and {len(weights)} of weights"
            )
        if bool(((indices < 0) | (indices >= n)).any()):
            raise ValueError(
                f"state_dict['indices'] must be in [0, {n}), got values from "
                f"{int(indices.min())} to {int(indices.max())}"
            )
        if not bool(((weights >= 0) & weights.isfinite()).all()):
            raise ValueError("state_dict['weights'] must be finite and at least 0")
        return [Batch(i.clone(), w.clone()) for i, w in zip(indices, weights, strict=True)]

    def replace(self, batches: list[Batch]) -> None:
        """Has these under way instead."""
        self._drawn.clear()
        self.begin(0)
        for batch in batches:
            part = self._sampler._part_of(batch)
            self._drawn.append((Minibatch(self._number, part), None))
            self._number += 1


def _to_host(batch: Batch) -> tuple[Batch, torch.cuda.Event | None]:
    """The minibatch on the host, and the event before which it must not be read."""
    if batch.indices.is_cpu:
        return batch, None
    on_host = batch.to("cpu", non_blocking=batch.indices.is_cuda)  # into pinned memory
    if not batch.indices.is_cuda:
        return on_host, None
    return on_host, torch.cuda.current_stream(batch.indices.device).record_event()


def _matrix(name: str, value: Any, dtype: torch.dtype, batch_size: int) -> Tensor:
    """``value`` on the host, when it is ``dtype`` [n, B]."""
    label = f"state_dict[{name!r}]"
    found = check.readable(label, value).detach().cpu()
    if found.dtype != dtype or found.dim() != 2 or found.shape[1] != batch_size:
        raise ValueError(
            f"{label} must be {dtype} of shape [n, {batch_size}], got {check.describe(value)}"
        )
    return found
