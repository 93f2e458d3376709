"""The one timer: cases take turns in one process, so that a slow moment of the machine hits all.

A turn is as many calls of a case as fill a given time, found beforehand; the case that begins
changes from round to round. What is reported are medians over rounds with their quartiles; a ratio
is taken within a round. Threads are torch's, and every row states them (bench/provenance.py).
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from statistics import median, quantiles
from typing import NamedTuple

import torch
from tqdm import tqdm

Call = Callable[[], object]
# Seconds that some calls of a function take, one after the other.
Clock = Callable[[Call, int], float]


def host(function: Call, calls: int, now: Callable[[], float] = time.perf_counter) -> float:
    start = now()
    for _ in range(calls):
        function()
    return now() - start


def thread(function: Call, calls: int) -> float:
    """Of this thread alone: what other processes take does not count."""
    return host(function, calls, time.thread_time)


def host_and_device(function: Call, calls: int) -> float:
    """From the first call's begin on the host to the last one's end on the GPU."""
    torch.cuda.synchronize()

    def finish() -> float:
        torch.cuda.synchronize()
        return time.perf_counter()

    return host(function, calls, finish)


def device(function: Call, calls: int) -> float:
    """On the GPU's own clock, which waits for the host where it must."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(calls):
        function()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


def clock_of(device: torch.device) -> Clock:
    return host_and_device if device.type == "cuda" else host


class Spread(NamedTuple):
    """Quartiles over rounds."""

    low: float
    median: float
    high: float

    @property
    def quartiles(self) -> list[float]:
        return [self.low, self.high]

    def text(self, form: str = ".1f") -> str:
        return f"{self.median:{form}} ({self.low:{form}} to {self.high:{form}})"


def spread(values: Sequence[float]) -> Spread:
    if len(values) < 2:
        return Spread(*values * 3)
    return Spread(*quantiles(values, n=4, method="inclusive"))


class Times(dict[str, list[float]]):
    """Seconds per call of every case, in every round."""

    def us(self, name: str) -> float:
        """The median, in microseconds."""
        return 1e6 * median(self[name])

    def spread_us(self, name: str) -> Spread:
        return spread([1e6 * seconds for seconds in self[name]])

    def ratio(self, name: str, peer: str) -> Spread:
        """Of the times of two cases within a round."""
        return spread([a / b for a, b in zip(self[name], self[peer], strict=True)])


def calls_in(function: Call, turn: float, clock: Clock = host) -> int:
    """How many calls fill ``turn`` seconds; the first ones, which import and allocate, are left
    out."""
    function()
    calls = 1
    while (seconds := clock(function, calls)) < turn / 4:
        calls *= 4
    return max(1, round(calls * turn / seconds))


def interleaved(
    cases: Mapping[str, Call],
    *,
    rounds: int = 5,
    seconds: float = 0.0,
    turn: float = 1e-3,
    calls: int | None = None,
    clock: Clock = host,
) -> Times:
    """At least ``rounds`` rounds, and as many as begin within ``seconds``.

    Parameters
    ----------
    cases : mapping
        functions by name, that take turns.
    turn : float
        the least time of a case's turn, in seconds.
    calls : int, optional
        of a turn, instead of as many as fill it.
    """
    counts = {name: calls or calls_in(case, turn, clock) for name, case in cases.items()}
    times, names = Times({name: [] for name in cases}), list(cases)
    end, done = time.perf_counter() + seconds, 0
    with tqdm(total=rounds, leave=False, unit="round", disable=not sys.stderr.isatty()) as bar:
        while done < rounds or time.perf_counter() < end:
            first = done % len(names)
            for name in names[first:] + names[:first]:
                times[name].append(clock(cases[name], counts[name]) / counts[name])
            done += 1
            bar.update()
    return times


# ---- calls in CUDA graphs: nothing of a replay runs on the host


def captured(calls: Sequence[Call], warmups: int = 3) -> torch.cuda.CUDAGraph:
    """The calls, one after the other, as a CUDA graph, after eager ones on a side stream, which
    compile, and let allocators and libraries settle."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(warmups):
            for call in calls:
                call()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return graph


def device_us(calls: Sequence[Call], rounds: int) -> float:
    """Median time of one of the calls on the device. Calls on different data keep the cache cold.

    One case a run: graphs of the largest shapes would not fit into the memory side by side.
    """
    graph = captured(calls)
    device(graph.replay, 2)
    times = interleaved({"graph": graph.replay}, rounds=rounds, calls=1, clock=device)
    return times.us("graph") / len(calls)
