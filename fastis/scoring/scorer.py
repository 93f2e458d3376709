"""The scorer's end: a process that scores samples with parameters that come from a trainer."""

from __future__ import annotations

import io
import time
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.distributed import DistError, Store  # type: ignore[attr-defined]

from fastis import check
from fastis.batch import Scored
from fastis.methods.base import ScoreFn
from fastis.methods.scoring import score
from fastis.scoring.channel import ENDED, Channel, StoreChannel
from fastis.scoring.message import Message, squared_mean

_NAP = 0.02  # seconds
_T = TypeVar("_T")


class _TrainerGone(Exception):
    pass


class Scorer:
    """Scores the data again and again with the newest parameters, until the trainer ends.

    All scorers share one sweep: each takes the samples that none has taken for longest, so that any
    number may come and go. What one dies with is scored in the next sweep.

    Parameters
    ----------
    model : torch.nn.Module
        the network, of which parameters and buffers are overwritten. It stays in the mode that it
        is in: ``model.eval()`` first, where that makes a difference.
    score_fn : callable
        indices int64 [n] -> the ScoredLoss of these samples by ``model`` (called under
        ``torch.no_grad()``), or float [n], their scores: what the trainer's method observes.
    num_samples : int
        N.
    store : torch.distributed.Store or str
        where the trainer's :class:`Inbox` is; see :class:`StoreChannel`. Or another channel.
    batch_size : int
        samples a minibatch and message.
    refresh_every : int
        minibatches that are scored with the same parameters.
    patience : float
        seconds without a sign of life of the trainer's after which :meth:`run` ends.

    Raises
    ------
    TypeError, ValueError
        naming the argument, what was expected and what came.
    torch.distributed.DistError
        when there is no trainer within a minute.
    """

    def __init__(
        self,
        model: nn.Module,
        score_fn: ScoreFn,
        num_samples: int,
        *,
        store: Store | str | Channel,
        batch_size: int = 256,
        refresh_every: int = 4,
        patience: float = 10.0,
    ) -> None:
        check.function("score_fn", score_fn)
        self.num_samples = check.integer("num_samples", num_samples, 1, 2**32 - 1)
        self.batch_size = min(check.integer("batch_size", batch_size, 1), self.num_samples)
        self.refresh_every = check.integer("refresh_every", refresh_every, 1)
        self.patience = check.number("patience", patience, 0.0, float("inf"), "(]")
        self.model, self.score_fn = model, score_fn
        is_store = isinstance(store, (str, Store))
        self._channel: Channel = StoreChannel(store) if is_store else store  # type: ignore
        self._version, self.iteration = 0, -1  # of the parameters
        self._mean_grad: Tensor | None = None
        self._beats, self._beat_at, self._asked_at = 0, time.monotonic(), float("-inf")

    def run(self, max_minibatches: int | None = None) -> int:
        """Scores until the trainer ends, dies or is silent; the minibatches that were sent.

        Parameters
        ----------
        max_minibatches : int, optional
            end after so many.
        """
        sent = 0
        try:
            while self._trainer_lives() and (max_minibatches is None or sent < max_minibatches):
                if sent % self.refresh_every == 0 and not self._refresh():
                    time.sleep(_NAP)
                elif self._send(self._scored()):
                    sent += 1
        except _TrainerGone:
            pass
        return sent

    def _ask(self, request: Callable[..., _T], *arguments: Any) -> _T:
        """The channel's answer; it goes with the trainer, or with what it was in."""
        try:
            return request(*arguments)
        except DistError as error:
            raise _TrainerGone from error

    def _trainer_lives(self) -> bool:
        now = time.monotonic()
        if now - self._asked_at >= self.patience / 20:
            self._asked_at, beats = now, self._ask(self._channel.beats)
            if beats != self._beats:
                self._beats, self._beat_at = beats, now
        return self._beats != ENDED and now - self._beat_at < self.patience

    def _refresh(self) -> bool:
        """The newest parameters into the model; False while there are none at all."""
        found = self._ask(self._channel.newest, self._version)
        if found is not None:
            self._version, parameters = found
            state = torch.load(io.BytesIO(parameters), weights_only=True, map_location="cpu")
            self.model.load_state_dict(state["model"])
            self.iteration = state["iteration"]
        return self.iteration >= 0

    def _scored(self) -> bytes:
        """The message with the scores of the next samples."""
        start = self._ask(self._channel.next_position, self.batch_size)
        indices = (start + torch.arange(self.batch_size)) % self.num_samples
        device = next((p.device for p in self.model.parameters()), indices.device)
        self._mean_grad = None
        scores = score(self.score_fn, indices.to(device), self._picked)
        mean = squared_mean(self._mean_grad, scores)
        return Message(self.iteration, mean, indices, scores.cpu()).to_bytes()

    def _picked(self, out: Scored) -> Tensor:
        self._mean_grad = out.mean_grad
        return out.score

    def _send(self, message: bytes) -> bool:
        """Waits while the trainer is behind; False if it ends meanwhile."""
        while not self._ask(self._channel.send, message):
            if not self._trainer_lives():
                return False
            time.sleep(_NAP)
        return True
