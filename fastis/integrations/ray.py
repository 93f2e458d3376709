"""Distributed scoring through Ray: a mailbox actor in the place of a store.

For scorers that Ray places and restarts, anywhere in its cluster (``pip install fastis[ray]``)::

    inbox = fastis.scoring.Inbox(sampler, RayChannel(serve=True))  # in the trainer

    @ray.remote(max_retries=-1)
    def score():
        Scorer(model, score_fn, len(x), store=RayChannel()).run()

    tasks = [score.remote() for _ in range(4)]
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

import ray
from ray.exceptions import RayActorError
from torch.distributed import DistNetworkError  # type: ignore[attr-defined]

from fastis.scoring.channel import ENDED, WINDOW


class RayChannel:
    """A :class:`fastis.scoring.Channel` in an actor, which lives and dies with the trainer.

    Parameters
    ----------
    name : str
        of the actor, in the namespace of the job (or "namespace/name").
    serve : bool
        whether this process makes it: the trainer.

    Raises
    ------
    ValueError
        from Ray: where there is no such actor; with ``serve`` where there is one already.
    """

    def __init__(self, name: str = "fastis.scoring", *, serve: bool = False) -> None:
        namespace, _, name = name.rpartition("/")
        where = {"namespace": namespace} if namespace else {}
        if serve:
            self._mailbox = ray.remote(_Mailbox).options(name=name, num_cpus=0, **where).remote()
        else:
            self._mailbox = ray.get_actor(name, **where)
        self._number = 0  # of this scorer

    def publish(self, parameters: bytes) -> None:
        self._ask("publish", parameters)

    def newest(self, than: int) -> tuple[int, bytes] | None:
        found: tuple[int, bytes] | None = self._ask("newest", than)
        return found

    def next_position(self, count: int) -> int:
        return int(self._ask("next_position", count))

    def send(self, message: bytes) -> bool:
        if self._number == 0:
            self._number = self._ask("join")
        return bool(self._ask("send", self._number, message))

    def receive(self) -> list[tuple[int, bytes]]:
        found: list[tuple[int, bytes]] = self._ask("receive")
        return found

    def beat(self) -> None:
        self._ask("beat")

    def beats(self) -> int:
        return int(self._ask("count_beats"))

    def end(self) -> None:
        self._ask("end")

    def _ask(self, what: str, *arguments: Any) -> Any:
        request: Callable[..., Any] = getattr(self._mailbox, what).remote
        try:
            return ray.get(request(*arguments))
        except RayActorError as error:
            raise DistNetworkError(str(error)) from error


class _Mailbox:
    """What the actor keeps."""

    def __init__(self) -> None:
        self.parameters: tuple[int, bytes] | None = None
        self.waiting: dict[int, deque[bytes]] = {}
        self.position = self.beats = 0

    def publish(self, parameters: bytes) -> None:
        self.parameters = (self.parameters[0] + 1 if self.parameters else 1, parameters)

    def newest(self, than: int) -> tuple[int, bytes] | None:
        return self.parameters if self.parameters and self.parameters[0] > than else None

    def next_position(self, count: int) -> int:
        self.position += count
        return self.position - count

    def join(self) -> int:
        self.waiting[len(self.waiting) + 1] = deque()
        return len(self.waiting)

    def send(self, number: int, message: bytes) -> bool:
        if len(self.waiting[number]) == WINDOW:
            return False
        self.waiting[number].append(message)
        return True

    def receive(self) -> list[tuple[int, bytes]]:
        found = [(number, raw) for number, queue in self.waiting.items() for raw in queue]
        for queue in self.waiting.values():
            queue.clear()
        return found

    def beat(self) -> None:
        self.beats += 1

    def count_beats(self) -> int:
        return self.beats

    def end(self) -> None:
        self.beats = ENDED
