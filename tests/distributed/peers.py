"""Processes for the tests of several: forked early, since a new interpreter takes seconds, and told
later what to do."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from typing import Any

import torch

FORK = multiprocessing.get_context("fork")


class Idle:
    """A process that waits for a function, runs it, and ends."""

    def __init__(self) -> None:
        self._orders, ours = FORK.Pipe()
        self.answers, self._theirs = FORK.Pipe(duplex=False)
        self.process = FORK.Process(target=self._run, args=(ours,), daemon=True)
        self.process.start()
        ours.close()
        self._theirs.close()

    def _run(self, orders: Any) -> None:
        self._orders.close()
        torch.set_num_threads(1)
        with contextlib.suppress(EOFError):  # never asked for
            function, arguments = orders.recv()
            function(self._theirs.send, *arguments)

    def start(self, function: Callable[..., None], *arguments: Any) -> Idle:
        """Runs ``function(say, *arguments)``, of a module; what it says is in ``answers``."""
        self._orders.send((function, arguments))
        return self

    def signal(self, number: signal.Signals) -> None:
        os.kill(self.process.pid, number)

    def kill(self) -> None:
        self.process.kill()
        self.process.join(10)

    def ends_within(self, seconds: float) -> bool:
        self.process.join(seconds)
        return self.process.exitcode is not None


def wait_for(condition: Callable[[], Any], seconds: float = 20.0) -> Any:
    """What ``condition()`` gives, once it is true."""
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.005)
    return found
