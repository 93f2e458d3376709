"""Which means of torch.distributed carries scores past a peer that dies, hangs, or comes late.

    python bench/bench_scoring_transport.py [--json bench/results/scoring_transport.jsonl]

A trainer sends parameters to two peers and gets messages back: by a gloo group a peer (broadcasts),
by send/recv in one gloo group, or by a store (the channel of fastis.scoring). After two seconds one
peer is killed, and a second later started again; or it is stopped (SIGSTOP), for longer than the
timeout of two seconds, and goes on; or a third one comes. What counts: how long the longest call
holds its caller up from then on, and which peers are heard in the last two of eight seconds.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections import defaultdict
from datetime import timedelta
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1]))

import torch
import torch.distributed as dist

from bench.report import Report, make_parser
from fastis.scoring import StoreChannel

TIMEOUT = 2.0  # of the groups; of a hung peer's stop it is two thirds
EVENT, AGAIN, TO_GO_ON, END = 2.0, 3.0, 5.0, 8.0
PEERS = 2
FORK = multiprocessing.get_context("fork")
NUMBERS = 300  # of a message


def store_at(port: int, serve: bool = False) -> dist.TCPStore:
    wait = timedelta(seconds=TIMEOUT)
    return dist.TCPStore("127.0.0.1", port, None, serve, wait, wait_for_workers=False)


def join(port: int, rank: int) -> list[Any]:
    """The gloo world, and a group with each peer."""
    options = {"world_size": 1 + PEERS, "timeout": timedelta(seconds=TIMEOUT)}
    dist.init_process_group("gloo", store=store_at(port), rank=rank, **options)
    wait = timedelta(seconds=TIMEOUT)
    return [dist.new_group([0, peer], timeout=wait) for peer in range(1, 1 + PEERS)]


class Groups:
    """Parameters and scores by broadcasts in a group of two."""

    def __init__(self, port: int, rank: int) -> None:
        self.rank, self.groups = rank, join(port, rank)

    def exchange(self, peer: int) -> list[dist.Work]:
        group, numbers = self.groups[peer - 1], torch.zeros(NUMBERS)
        return [dist.broadcast(numbers, src, group, async_op=True) for src in (0, peer)]


class SendRecv:
    """... by isend and irecv."""

    def __init__(self, port: int, rank: int) -> None:
        self.rank = rank
        join(port, rank)

    def exchange(self, peer: int) -> list[dist.Work]:
        other = 0 if self.rank else peer
        sent, received = torch.zeros(NUMBERS), torch.zeros(NUMBERS)
        works = [dist.isend(sent, other), dist.irecv(received, other)]
        return works if self.rank == 0 else works[::-1]


MEANS: dict[str, Any] = {"groups": Groups, "send/recv": SendRecv, "store": None}


def peer(means: str, port: int, rank: int) -> None:
    """Sends until it is killed, or nothing can be sent any more."""
    torch.set_num_threads(1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # the stack traces of what is to be expected
    if MEANS[means] is None:
        channel = StoreChannel(store_at(port))
        while True:
            channel.newest(0)
            channel.send(str(rank).encode() + bytes(4 * NUMBERS))
            time.sleep(0.01)
    end = MEANS[means](port, rank)
    while True:
        for work in end.exchange(rank):
            work.wait()
        time.sleep(0.01)


class Trainer:
    """When which peer was heard, and how long the longest call took. One thread a connection, since
    gloo's isend and irecv can only be waited for."""

    def __init__(self, means: str, port: int) -> None:
        self.heard: dict[int, list[float]] = defaultdict(list)
        self.lost: dict[int, str] = {}
        self.longest = 0.0
        if MEANS[means] is None:
            loops = [(self.serve, StoreChannel(store_at(port)))]
        else:
            end = MEANS[means](port, 0)
            loops = [(self.serve_peer, end, p) for p in range(1, 1 + PEERS)]
        self.start = time.monotonic()
        for function, *arguments in loops:
            threading.Thread(target=function, args=arguments, daemon=True).start()

    def serve(self, channel: StoreChannel) -> None:
        while True:
            before = time.perf_counter()
            channel.publish(bytes(4 * NUMBERS))
            for _, raw in channel.receive():
                self.heard[int(raw[:1])].append(self.now())
            self.longest = max(self.longest, time.perf_counter() - before)
            time.sleep(0.01)

    def serve_peer(self, end: Groups | SendRecv, p: int) -> None:
        try:
            while True:
                before = time.perf_counter()
                for work in end.exchange(p):
                    work.wait()
                self.heard[p].append(self.now())
                self.longest = max(self.longest, time.perf_counter() - before)
        except RuntimeError as error:
            self.longest = max(self.longest, time.perf_counter() - before)
            self.lost[p] = str(error).splitlines()[0].rpartition("] ")[2][:80]

    def now(self) -> float:
        return time.monotonic() - self.start

    def until(self, moment: float) -> None:
        time.sleep(max(0.0, moment - self.now()))

    def row(self) -> dict[str, Any]:
        late = {p: sum(t > END - 2 for t in times) for p, times in self.heard.items()}
        return {
            "longest_call_ms": 1e3 * self.longest,
            "heard_at_the_end": {str(p): late[p] for p in sorted(late) if late[p]},
            "lost": {str(p): why for p, why in sorted(self.lost.items())},
        }


def run(say: Any, means: str, event: str, port: int, pids: list[int]) -> None:
    torch.set_num_threads(1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    trainer = Trainer(means, port)
    trainer.until(EVENT)
    trainer.longest = 0.0
    if event == "hung":
        os.kill(pids[0], signal.SIGSTOP)
        trainer.until(TO_GO_ON)
        os.kill(pids[0], signal.SIGCONT)
    elif event == "killed":
        os.kill(pids[0], signal.SIGKILL)
        trainer.until(AGAIN)
    say.send("next")  # may come
    trainer.until(END)
    say.send(trainer.row())
    os._exit(0)


def measure(means: str, event: str) -> dict[str, Any]:
    store = store_at(0, serve=True)
    peers = [FORK.Process(target=peer, args=(means, store.port, r)) for r in range(1, 1 + PEERS)]
    for process in peers:
        process.start()
    ours, theirs = FORK.Pipe(duplex=False)
    arguments = theirs, means, event, store.port, [process.pid for process in peers]
    trainer = FORK.Process(target=run, args=arguments)
    trainer.start()
    ours.recv()
    if event != "hung":
        rank = 1 if event == "killed" else 1 + PEERS
        peers.append(FORK.Process(target=peer, args=(means, store.port, rank)))
        peers[-1].start()
    found = ours.recv()
    for process in (*peers, trainer):
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        process.join()
    return found


def main(argv: list[str] | None = None) -> int:
    args = make_parser(__doc__, "a measurement").parse_args(argv)
    torch.set_num_threads(1)
    head = ("means", "peer 1", "longest call, ms", "heard at the end", "lost")
    report = Report("scoring_transport", head, args.json)
    for means in MEANS:
        for event in ("killed", "hung", "late"):
            found = measure(means, event)
            heard = ", ".join(found["heard_at_the_end"]) or "none"
            lost = "; ".join(f"{p}: {why}" for p, why in found["lost"].items()) or "-"
            report.line(means, event, f"{found['longest_call_ms']:.1f}", heard, lost)
            report.store({"means": means, "event": event, **found})
    report.show()
    return 0


if __name__ == "__main__":
    sys.exit(main())
