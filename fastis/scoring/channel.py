"""What goes between a trainer and its scorers: parameters one way, scores the other.

A channel carries bytes and knows what neither end means by them. :class:`StoreChannel` keeps them
in a store of torch.distributed: unlike a process group's peers, the clients of a store come and go
as they like, and one that is dead or stopped is nobody else's trouble. (Process groups and
send/recv were tried as well: bench/results/SCORING.md.)
"""

from __future__ import annotations

import os
import zlib
from datetime import timedelta
from typing import Protocol

from torch.distributed import (  # type: ignore[attr-defined]
    PrefixStore,
    Store,
    TCPStore,
    rendezvous,
)

from fastis import check

# A TCPStore drops the connection of whoever sends more than 8 MiB at a time.
CHUNK = 4 << 20
# Messages of a scorer that wait in the store; then the scorer does.
WINDOW = 16
ENDED = -1


class Channel(Protocol):
    """What the two ends need. Where the other one, or what is between, is gone, a call may raise a
    ``torch.distributed.DistError``."""

    # The trainer's
    def publish(self, parameters: bytes) -> None:
        """Puts these in the place of the last ones."""

    def receive(self) -> list[tuple[int, bytes]]:
        """What has arrived, each message with the number of its scorer, from 1 on."""

    def beat(self) -> None:
        """A sign of life for the scorers."""

    def end(self) -> None:
        """Tells the scorers that the training is over."""

    # A scorer's
    def newest(self, than: int) -> tuple[int, bytes] | None:
        """Number and bytes of the newest parameters if they are newer, and whole."""

    def next_position(self, count: int) -> int:
        """Where the next ``count`` samples begin in the sweep that all scorers share."""

    def send(self, message: bytes) -> bool:
        """False: the trainer is too far behind; nothing was sent."""

    def beats(self) -> int:
        """The trainer's signs of life so far, or ``ENDED``."""


class StoreChannel:
    """A channel in a store of torch.distributed.

    Parameters
    ----------
    store : torch.distributed.Store or str
        a store; "host:port", where the trainer serves one (a ``TCPStore``) and scorers connect to
        it; or "env://", the store of torchrun (or of whatever else sets ``MASTER_ADDR``, ``RANK``,
        ...).
    serve : bool
        whether "host:port" is this process's: port 0 takes a free one. See ``address``.
    seconds : float
        how long to try to connect.

    Raises
    ------
    TypeError, ValueError
        naming the argument, what was expected and what came.
    torch.distributed.DistError
        when nobody serves that address, or somebody does already.
    """

    def __init__(self, store: Store | str, *, serve: bool = False, seconds: float = 60.0) -> None:
        if isinstance(store, str):
            self._store: Store = _connect(store, serve, seconds)
        elif isinstance(store, Store):
            # A connection of its own: what others wait for through theirs must not stop it.
            self._store = store.clone() if hasattr(store, "clone") else store
        else:
            raise TypeError(
                "store must be a torch.distributed.Store, 'host:port' or 'env://', got "
                f"{check.describe(store)}"
            )
        server = self._store
        self.address = f"{server.host}:{server.port}" if isinstance(server, TCPStore) else ""
        self._store = PrefixStore("fastis.scoring", server)
        self._number, self._sent = 0, 0  # of this scorer, and its messages
        self._received: dict[int, int] = {}  # messages by scorer

    def publish(self, parameters: bytes) -> None:
        number = self._store.add("published", 1)
        chunks = [parameters[at : at + CHUNK] for at in range(0, len(parameters), CHUNK)]
        for i, chunk in enumerate(chunks):
            self._put(f"parameters/{number % 2}/{i}", chunk)
        head = f"{number} {len(chunks)} {zlib.crc32(parameters)}"
        self._store.set("newest", head)

    def newest(self, than: int) -> tuple[int, bytes] | None:
        if not self._store.check(["newest"]):
            return None
        number, chunks, checksum = map(int, self._store.get("newest").split())
        if number <= than:
            return None
        parts = [self._store.get(f"parameters/{number % 2}/{i}") for i in range(chunks)]
        parameters = b"".join(parts)
        # The next but one may have been written meanwhile, to the same place.
        return (number, parameters) if zlib.crc32(parameters) == checksum else None

    def next_position(self, count: int) -> int:
        return int(self._store.add("position", count)) - count

    def send(self, message: bytes) -> bool:
        if self._number == 0:
            self._number = int(self._store.add("scorers", 1))
        if self._store.check([self._key(self._number, self._sent - WINDOW)]):
            return False
        self._put(self._key(self._number, self._sent), message)
        self._sent += 1
        return True

    def receive(self) -> list[tuple[int, bytes]]:
        found: list[tuple[int, bytes]] = []
        for number in range(1, int(self._store.add("scorers", 0)) + 1):
            at = self._received.get(number, 0)
            while self._store.check([self._key(number, at)]):
                found.append((number, self._store.get(self._key(number, at))))
                self._store.delete_key(self._key(number, at))
                at += 1
            self._received[number] = at
        return found

    def beat(self) -> None:
        self._store.add("beats", 1)

    def beats(self) -> int:
        return ENDED if self._store.check(["ended"]) else int(self._store.add("beats", 0))

    def end(self) -> None:
        self._store.set("ended", "")

    def _put(self, key: str, value: bytes) -> None:
        self._store.set(key, value)  # type: ignore[arg-type]  # takes bytes, whatever its stub says

    @staticmethod
    def _key(scorer: int, message: int) -> str:
        return f"scores/{scorer}/{message}"


def _connect(address: str, serve: bool, seconds: float) -> Store:
    if address == "env://":
        if "MASTER_ADDR" not in os.environ:
            raise ValueError("store='env://' needs MASTER_ADDR and its like, as torchrun sets them")
        found: Store = next(rendezvous(address, timeout=timedelta(seconds=seconds)))[0]
        return found
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():
        raise ValueError(f"store must be 'host:port' or 'env://', got {address!r}")
    return TCPStore(
        host, int(port), None, serve, timedelta(seconds=seconds), wait_for_workers=False
    )
