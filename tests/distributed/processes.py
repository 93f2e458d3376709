"""Processes of a gloo group, forked from the test: what they return, or the first error."""

from __future__ import annotations

import os
import pickle
import signal
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

SECONDS = 60  # of a run; a rank that waits for one that is lost ends by then


class Process:
    """A forked process, whose result comes through a file."""

    def __init__(self, file: Path, function: Callable[[], Any]) -> None:
        self._file = file
        self.pid = os.fork()
        if self.pid == 0:
            try:
                found = True, function()
            except BaseException as error:
                found = False, (type(error).__name__, str(error), traceback.format_exc())
            file.write_bytes(pickle.dumps(found))
            os._exit(0)

    def result(self, until: float) -> tuple[bool, Any]:
        """Whether it returned, and what; or its error's name, message and trace."""
        while os.waitpid(self.pid, os.WNOHANG) == (0, 0):
            if time.monotonic() > until:
                os.kill(self.pid, signal.SIGKILL)
                os.waitpid(self.pid, 0)
                return False, ("TimeoutError", f"process {self.pid} did not end", "")
            time.sleep(0.002)
        if not self._file.exists():
            return False, ("Killed", "", "")
        return pickle.loads(self._file.read_bytes())


def start(folder: Path, size: int, function: Callable[..., Any], *arguments: Any) -> list[Process]:
    """``function(group, *arguments)`` in each of the ``size`` processes of a new group."""
    assert not dist.is_initialized()
    torch.optim.SGD([torch.ones(1, requires_grad=True)]).step()  # whose imports take seconds
    number = len(list(folder.glob("store*")))
    store = folder / f"store{number}"
    store.touch()

    def run(rank: int) -> Any:
        torch.set_num_threads(1)
        torch.manual_seed(rank)
        dist.init_process_group(
            "gloo",
            store=dist.FileStore(str(store), size),
            rank=rank,
            world_size=size,
            timeout=timedelta(seconds=SECONDS),
        )
        found = function(dist.group.WORLD, *arguments)
        dist.destroy_process_group()
        return found

    return [
        Process(folder / f"result{number}.{rank}", lambda rank=rank: run(rank))
        for rank in range(size)
    ]


def results(processes: list[Process]) -> list[Any]:
    """Of all ranks, in order; raises when one has failed."""
    until = time.monotonic() + SECONDS
    found = [process.result(until) for process in processes]
    for rank, (returned, value) in enumerate(found):
        assert returned, f"rank {rank}: {value[1]}\n{value[2]}"
    return [value for _, value in found]


def errors(processes: list[Process]) -> list[tuple[str, str]]:
    """Names and messages of all ranks' errors."""
    until = time.monotonic() + SECONDS
    found = [process.result(until) for process in processes]
    assert not any(returned for returned, _ in found), found
    return [(value[0], value[1]) for _, value in found]


def run(folder: Path, size: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    return results(start(folder, size, function, *arguments))
