"""Random calls of everything public, checked against plain oracles: ``python tests/fuzz.py``.

A case is one object (a sampler, weights, a loss, a state) and what is done with it; all of it
follows from (seed, what, number of the case). Cases run in a child process, so that one that
crashes or hangs is a failure among others: it is named, and the next one starts in a new child.
Prints one line of JSON: calls by kind, errors that were expected, failures. To repeat a failure::

    python tests/fuzz.py --what sampler --seed 0 --only 123
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import mmap
import os
import random
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

import fastis

WHATS = ("sampler", "sample", "losses", "states")
KINDS = (
    "init", "draw", "update", "update_and_sample", "save", "copy", "wrong", "read", "change",
    "sweep", "renew", "weights", "alias", "race", "cross_entropy", "soft_targets", "bce", "mse",
    "tampered",
)  # fmt: skip
CASE, CALLS, EXPECTED, FAILURES, FIRST_KIND = range(5)
HERE = Path(__file__).resolve().parent
ERRORS = (ValueError, TypeError, IndexError)


class Case:
    """The randomness of one case, and the counts that all cases share."""

    def __init__(self, what: str, seed: int, number: int, counts: memoryview) -> None:
        self.random = random.Random(f"{what} {seed} {number}")
        self.generator = torch.Generator().manual_seed(self.random.getrandbits(62))
        self._counts = counts

    def count(self, kind: str) -> None:
        """To be said before a call, so that a crash is counted too."""
        self._counts[CALLS] += 1
        self._counts[FIRST_KIND + KINDS.index(kind)] += 1

    def count_error(self) -> None:
        self._counts[EXPECTED] += 1

    def chance(self, probability: float) -> bool:
        return self.random.random() < probability

    def pick(self, *choices: Any) -> Any:
        return self.random.choice(choices)

    def size(self, most: int) -> int:
        """From 1 to ``most``, every order of magnitude alike."""
        return max(1, min(most, round(2 ** self.random.uniform(0, most.bit_length()))))

    def must_raise(self, call: Callable[[], Any], kind: str = "wrong") -> None:
        self.count(kind)
        try:
            call()
        except ERRORS:
            self.count_error()
        else:
            raise AssertionError("no error was raised")

    @contextlib.contextmanager
    def may_raise(self) -> Iterator[None]:
        """For arguments that may be out of the documented range."""
        try:
            yield
        except ERRORS:
            self.count_error()


def run_cases(what: str, seed: int, first: int, counts: memoryview, out: int, limits: Any) -> None:
    """In the child: cases until the limits; what fails goes to the parent, a line of JSON each."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    run = importlib.import_module(f"fuzz_{what}").run
    number = first
    while not limits(counts):
        counts[CASE] = number
        before = counts[CALLS]
        try:
            run(Case(what, seed, number, counts))
        except Exception as error:
            frames = traceback.extract_tb(error.__traceback__)
            where = [f for f in frames if Path(f.filename).resolve().parent == HERE][-1]
            failure = {
                "what": what,
                "seed": seed,
                "case": number,
                "call": counts[CALLS] - before,
                "error": f"{type(error).__name__}: {str(error)[:300]}",
                "where": f"{Path(where.filename).name}:{where.lineno} {where.line}",
            }
            os.write(out, (json.dumps(failure) + "\n").encode())
            counts[FAILURES] += 1
        if counts[CALLS] == before:
            counts[CALLS] += 1  # so that cases without a call come to an end
        number += 1


def watch(pid: int, counts: memoryview, patience: float) -> int:
    """Waits for the child and returns its status; kills it when no call ends for too long."""
    last, since = -1, time.monotonic()
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return status
        if counts[CALLS] != last:
            last, since = counts[CALLS], time.monotonic()
        elif time.monotonic() - since > patience:
            os.kill(pid, signal.SIGKILL)
            return os.waitpid(pid, 0)[1]
        time.sleep(0.02)


def fuzz(what: str, arguments: argparse.Namespace, limits: Any) -> dict[str, Any]:
    """All cases of one kind; a child that dies is replaced."""
    shared = mmap.mmap(-1, 8 * (FIRST_KIND + len(KINDS)))
    counts = memoryview(shared).cast("q")
    failures: list[dict[str, Any]] = []
    first = arguments.only if arguments.only is not None else 0
    while not limits(counts):
        reading, writing = os.pipe()
        before = counts[CALLS]
        pid = os.fork()
        if pid == 0:
            os.close(reading)
            try:
                run_cases(what, arguments.seed, first, counts, writing, limits)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
            os._exit(0)
        os.close(writing)
        status = watch(pid, counts, arguments.patience)
        with os.fdopen(reading) as lines:
            failures += [json.loads(line) for line in lines]
        if status == 0:
            break
        code = os.waitstatus_to_exitcode(status)
        error = f"exit status {code}" if code > 0 else signal.Signals(-code).name
        counts[FAILURES] += 1
        failures.append(
            {"what": what, "seed": arguments.seed, "case": counts[CASE], "error": error}
        )
        if counts[CALLS] == before:
            counts[CALLS] += 1
        first = counts[CASE] + 1
    calls = {kind: counts[FIRST_KIND + i] for i, kind in enumerate(KINDS)}
    return {
        "calls": {kind: n for kind, n in calls.items() if n},
        "cases": counts[CASE] + 1 - (arguments.only or 0),
        "expected_errors": counts[EXPECTED],
        "failures": failures,
    }


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--what", choices=WHATS, action="append", help="default: all of them")
    parser.add_argument("--calls", type=int, default=100_000, help="shared by all kinds")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="likewise")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, help="one case, by its number")
    parser.add_argument("--failures", type=int, default=10, help="of a kind, after which it ends")
    parser.add_argument("--patience", type=float, default=300, help="seconds a call may take")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> dict[str, Any]:
    arguments = parse(argv)
    whats = arguments.what or list(WHATS)
    results: dict[str, Any] = {}
    start = time.monotonic()
    for what in whats:
        begin = time.monotonic()

        def limits(counts: memoryview, begin: float = begin) -> bool:
            if arguments.only is not None:
                return counts[CALLS] > 0
            if counts[FAILURES] >= arguments.failures:
                return True
            late = time.monotonic() - begin > arguments.seconds / len(whats)
            return late or counts[CALLS] >= arguments.calls / len(whats)

        results[what] = fuzz(what, arguments, limits)
    failures = [f for result in results.values() for f in result.pop("failures")]
    return {
        "seed": arguments.seed,
        "isa": fastis._C.isa() if fastis._C is not None else None,
        "calls": sum(sum(result["calls"].values()) for result in results.values()),
        "seconds": round(time.monotonic() - start, 1),
        **results,
        "failures": failures,
    }


if __name__ == "__main__":
    found = main()
    print(json.dumps(found))
    sys.exit(bool(found["failures"]))
