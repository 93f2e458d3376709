"""The trainer's end: parameters go out, scores come in, and the training waits for neither."""

from __future__ import annotations

import io
import threading
import time
import warnings
from collections import Counter, deque
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import Store  # type: ignore[attr-defined]

from fastis import check
from fastis.kernels.layout import LATE, may_read
from fastis.kernels.state import LARGEST_SCORE
from fastis.sampler import Sampler
from fastis.scoring.channel import Channel, StoreChannel
from fastis.scoring.message import Message
from fastis.scoring.traces import Traces, weights_in_force

_NAP = 0.02  # seconds between looks for messages
_WAITING = 64  # messages to be folded; then they wait in the store, and then the scorers do


class Inbox:
    """Publishes a trainer's parameters, and folds the scores that come back into its sampler.

    A thread of its own does the sending and receiving. Whatever happens to the scorers, or to the
    store, :meth:`publish` and :meth:`fold` return at once; the training goes on with the scores
    that there are, and a warning says so, once for each scorer.

    Parameters
    ----------
    sampler : fastis.Sampler
        of a method that averages scores: "distributed", "emais", "loss".
    store : torch.distributed.Store or str
        "host:port", where this process serves a store for the scorers (port 0: any; see
        ``address``); or a store, or "env://" for that of torchrun. See :class:`StoreChannel`.
        Or another channel.
    patience : float
        seconds after which a scorer that sends nothing is said to be silent.

    Raises
    ------
    TypeError, ValueError
        naming the argument, what was expected and what came.
    torch.distributed.DistError
        when the address can't be served, or nobody serves the store.

    Attributes
    ----------
    address : str
        "host:port" of the store that scorers connect to.
    traces : Traces
        the variance of ideal, present and uniform draws, from the scores that were folded.
    """

    def __init__(
        self,
        sampler: Sampler,
        store: Store | str | Channel = "127.0.0.1:0",
        *,
        patience: float = 10.0,
    ) -> None:
        if not sampler.method.folds:
            raise ValueError(
                "sampler must have a method whose table is one of scores (distributed, emais, "
                f"loss), got {sampler.method.name!r}"
            )
        self.patience = check.number("patience", patience, 0.0, float("inf"), "(]")
        is_store = isinstance(store, (str, Store))
        self._channel: Channel = StoreChannel(store, serve=True) if is_store else store  # type: ignore
        self.address = getattr(self._channel, "address", "")
        self.traces = Traces(sampler.num_samples, sampler.device)
        self._sampler = sampler
        self._iteration = -1  # of the parameters published last
        self._counts: Counter[str] = Counter()
        self._arrived: deque[bytes] = deque()
        # Seconds of listening since a scorer was heard; 0: any of them.
        self._quiet: dict[int, float] = {0: 0.0}
        self._looked = time.monotonic()
        self._said: set[int] = set()  # of which scorers; -1: of the store
        self._parcel: dict[str, Any] | None = None
        self._failure: Exception | None = None
        self._closed, self._wake = False, threading.Event()
        self._thread = threading.Thread(target=self._run, name="fastis.scoring", daemon=True)
        self._thread.start()

    # The trainer's thread ------------------------------------------------------------------------

    def publish(self, model: nn.Module, step: int | None = None) -> bool:
        """Offers the scorers a copy of parameters and buffers; False if the last ones are still on
        the way, and then nothing happens.

        Costs the copy, to the host. Wrappers keep their names: pass ``model.module`` of a
        DistributedDataParallel.

        Parameters
        ----------
        step : int, optional
            ``sampler.step``: that many updates have gone into these parameters. None: it is asked,
            which waits for a CUDA device.

        Raises
        ------
        TypeError, ValueError
            for a step that is not the sampler's (looked at where the sampler is on the host).
        """
        if step is None or may_read(self._sampler.device):
            now = self._sampler.step
            if step is not None and check.integer("step", step, 0) != now:
                raise ValueError(f"step must be sampler.step, {now}, got {step}")
            step = now
        if self._parcel is not None or self._failure is not None or self._closed:
            return False
        self._iteration = step
        state = model.state_dict()
        gpus = {t.device for t in state.values() if isinstance(t, Tensor) and t.is_cuda}
        copies = {name: _copied(value) for name, value in state.items()}
        events = [torch.cuda.current_stream(gpu).record_event() for gpu in gpus]
        self._parcel = {"model": copies, "iteration": step, "events": events}
        self._wake.set()
        return True

    def fold(self) -> int:
        """Folds the scores that have arrived into the sampler's table; how many those were.

        What can't be right is refused, and counted in :meth:`stats`: bytes that are no message,
        samples that are not there, an iteration that was not published; scores that are no finite,
        non-negative numbers.

        Warns
        -----
        UserWarning
            once for each scorer that has been silent for ``patience`` seconds, and when the store
            is gone or does not answer.
        """
        by_iteration: dict[int, list[Message]] = {}
        for _ in range(len(self._arrived)):
            message = self._checked(self._arrived.popleft())
            if message is not None:
                by_iteration.setdefault(message.iteration, []).append(message)
        folded = sum(self._fold(t, by_iteration[t]) for t in sorted(by_iteration))
        self._counts["folded"] += folded
        self._complain()
        return folded

    def _checked(self, raw: bytes) -> Message | None:
        """A scorer's message, unless it is refused."""
        message, why = Message.from_bytes(raw), None
        now = newest = self._iteration
        if may_read(self._sampler.device):  # a state that was loaded may have set it back
            now = self._sampler.step
            newest = min(newest, now)
        if message is None:
            why = "malformed"
        elif int(message.indices.min()) < 0 or (
            int(message.indices.max()) >= self._sampler.num_samples
        ):
            why = "index"
        # One that long ago can't be told from one to come.
        elif not max(0, now - LATE + 1) <= message.iteration <= newest:
            why = "iteration"
        if why is not None:
            self._counts[f"refused_{why}"] += 1
            return None
        return message

    def _fold(self, iteration: int, messages: list[Message]) -> int:
        """Those of one iteration; the scores that were good."""
        sampler = self._sampler
        indices = torch.cat([message.indices for message in messages])
        scores = torch.cat([message.scores for message in messages])
        good = (scores >= 0) & (scores < LARGEST_SCORE)  # false for NaN
        self._counts["not_finite"] += len(scores) - int(good.sum())
        self._counts["age"] = self._iteration - iteration
        indices, scores = (t[good].to(sampler.device) for t in (indices, scores))
        if len(indices) > 0:
            weights = weights_in_force(sampler._table, sampler.method, indices)
            self.traces.add(scores, weights, fmean(m.squared_mean for m in messages))
            sampler.fold(indices, scores, iteration)
        return len(indices)

    def _complain(self) -> None:
        """Says what has gone wrong since it was asked last."""
        wrong = {}
        if self._failure is not None:
            wrong[-1] = f"the scorers' store is gone ({self._failure})"
        elif time.monotonic() - self._looked > self.patience:
            wrong[-1] = f"the scorers' store has not answered for {self.patience:g} s"
        for number, seconds in self._quiet.items():
            if seconds > self.patience and (number > 0 or len(self._quiet) == 1):
                who = f"scorer {number}" if number else "any scorer"
                wrong[number] = f"nothing was heard of {who} for {self.patience:g} s"
        for number, what in wrong.items():
            if number not in self._said:
                self._said.add(number)
                warnings.warn(f"{what}: training goes on with the scores there are", stacklevel=3)

    def stats(self) -> dict[str, float]:
        """Where the scoring stands, as plain numbers for any logger. One wait for a CUDA device.

        ``scorers``: heard of within ``patience``. ``folded``: scores. ``age``: iterations between
        the parameters of the last scores and those published last. ``refused_malformed``,
        ``refused_index``, ``refused_iteration``: messages. ``not_finite``: scores left out.
        ``ideal``, ``stale``, ``uniform``: the :class:`Traces`.
        """
        lately = sum(quiet < self.patience for n, quiet in self._quiet.items() if n > 0)
        names = ("folded", "age", *(f"refused_{why}" for why in _REASONS), "not_finite")
        traces = self.traces.ideal, self.traces.stale, self.traces.uniform
        values = zip(("ideal", "stale", "uniform"), torch.stack(traces).tolist(), strict=True)
        return {"scorers": lately, **{name: self._counts[name] for name in names}, **dict(values)}

    def close(self) -> None:
        """Tells the scorers to end. Without it they end when this process does."""
        self._closed = True
        self._wake.set()
        self._thread.join(timeout=5.0)

    def __enter__(self) -> Inbox:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # The other thread ----------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while not self._closed:
                self._channel.beat()
                if self._parcel is not None:
                    self._channel.publish(_packed(self._parcel))
                    self._parcel = None
                self._listen()
                self._wake.wait(_NAP)
                self._wake.clear()
            self._channel.end()
        except Exception as error:  # whatever a channel may raise: the training must not know it
            self._failure, self._parcel = error, None

    def _listen(self) -> None:
        """Takes what has arrived, unless there is enough to be folded."""
        now = time.monotonic()
        passed, self._looked = now - self._looked, now
        if len(self._arrived) >= _WAITING:
            return
        messages = self._channel.receive()
        quiet = {number: seconds + passed for number, seconds in self._quiet.items()}
        # Another dict, since the trainer's thread reads it meanwhile.
        self._quiet = quiet | dict.fromkeys((number for number, _ in messages), 0.0)
        self._arrived.extend(raw for _, raw in messages)


_REASONS = ("malformed", "index", "iteration")


def _copied(value: Any) -> Any:
    """A copy on the host; of a GPU's tensor one that is there when the stream has come to it."""
    if not isinstance(value, Tensor):
        return value
    copy = torch.empty_like(value, device="cpu", pin_memory=value.is_cuda)
    return copy.copy_(value.detach(), non_blocking=True)


def _packed(parcel: dict[str, Any]) -> bytes:
    for event in parcel.pop("events"):
        event.synchronize()
    file = io.BytesIO()
    torch.save(parcel, file)
    return file.getvalue()
