"""What several processes cost: processor time and bytes a step, and DDP's steps per second.

    python bench/bench_scale.py [--json FILE] [--quick] [--what step ddp]

``step``: a sampler's part of a training step, ``sample`` and ``update``, of every process; in
microseconds of processor time (all threads of the process, so that gloo's count) and of the clock,
with no network to compute in between, so that the clock shows the exchange at its worst. Bytes are
counted at the collective. First it is checked that the processes' parts make up the minibatch.

``ddp``: LeNet-5 on Fashion-MNIST under DistributedDataParallel, the gradients of a global minibatch
of 128: against the same loop with uniform draws and PyTorch's loss, and with the scores waited for
in ``update`` (``waiting``) instead of after ``backward``. Cases take turns; ratios are of one
round: of steps per second, and of steps per second of processor time, which other programs of the
machine disturb less.

Processes are forked, gloo on one machine, one thread each.
"""

from __future__ import annotations

import multiprocessing
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any
from unittest import mock

sys.path.append(str(Path(__file__).resolve().parents[1]))

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel

import fastis
from bench.experiments.datasets import load_dataset
from bench.experiments.models import build_model
from bench.report import Report, make_parser, positive
from bench.timing import Times, spread
from fastis import exchange

WHOLE = 128  # of all processes
TARGET = 0.97
EMAIS = fastis.methods.EMAIS(warmup_epochs=0)


# ---- processes


def in_processes(size: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """``function(group, *arguments)`` in each of ``size`` processes; what they return."""
    context = multiprocessing.get_context("fork")
    answers: Any = context.Queue()

    def run(rank: int, store: str) -> None:
        torch.set_num_threads(1)
        dist.init_process_group(
            "gloo", store=dist.FileStore(store, size), rank=rank, world_size=size
        )
        found = function(dist.group.WORLD, *arguments)
        dist.destroy_process_group()
        answers.put((rank, found))

    with tempfile.TemporaryDirectory() as folder:
        store = f"{folder}/store"
        processes = [context.Process(target=run, args=(rank, store)) for rank in range(size)]
        for process in processes:
            process.start()
        found = dict(answers.get() for _ in processes)
        for process in processes:
            process.join()
    return [found[rank] for rank in range(size)]


def replicated(group: Any, num_samples: int) -> fastis.Sampler:
    """All samples seen, by every process its share of them."""
    sampler = fastis.Sampler(num_samples, WHOLE // group.size(), group=group, method=EMAIS, seed=0)
    mine = torch.arange(group.rank(), num_samples, group.size())
    for part in mine.split(1 << 20):
        score = torch.empty(len(part)).log_normal_(generator=torch.Generator().manual_seed(1))
        sampler.update(fastis.Batch(part, torch.ones(len(part))), score)
    return sampler


KINDS = {"replicated": replicated}


# ---- a step of the sampler alone


def validate(sampler: fastis.Sampler, group: Any) -> None:
    """The parts make up the minibatch, and the tables are alike."""
    batch = sampler.sample()
    parts = [torch.empty_like(batch.indices) for _ in range(group.size())]
    dist.all_gather(parts, batch.indices, group=group)
    assert torch.equal(torch.cat(parts), batch.global_batch.indices), "parts of another minibatch"
    total = sampler._table.scalars[:8].clone()
    dist.all_reduce(total, op=dist.ReduceOp.MAX, group=group)
    assert torch.equal(total, sampler._table.scalars[:8]), "tables differ"


def steps(group: Any, kind: str, num_samples: int, rounds: int, calls: int) -> dict[str, Any]:
    """Seconds a step, processor and clock, in each round, and bytes sent in one step."""
    sampler = KINDS[kind](group, num_samples)
    validate(sampler, group)
    score = torch.rand(sampler.batch_size) + 0.1
    gather, sent = exchange._all_gather, []

    def counted(everyone: Any, ours: Any, **arguments: Any) -> Any:
        sent.append(ours.nbytes)
        return gather(everyone, ours, **arguments)

    with mock.patch.object(exchange, "_all_gather", counted):
        sampler.update(sampler.sample(), score)
        sampler.sample()
    found: dict[str, list[float]] = {"processor": [], "clock": []}
    for _ in range(rounds):
        dist.barrier(group)
        clock, processor = time.perf_counter(), time.process_time()
        for _ in range(calls):
            sampler.update(sampler.sample(), score)
        _ = sampler.step
        found["processor"].append((time.process_time() - processor) / calls)
        found["clock"].append((time.perf_counter() - clock) / calls)
    return {**found, "bytes": sum(sent)}


def measure_steps(report: Report, sizes: list[int], quick: bool) -> None:
    for kind in KINDS:
        for num_samples in sizes:
            for processes in (1, 2, 4):
                rounds, calls = (3, 20) if quick else (15, 200)
                found = in_processes(processes, steps, kind, num_samples, rounds, calls)
                each = {
                    name: spread([1e6 * median(part[name]) for part in found])
                    for name in ("processor", "clock")
                }
                row = {
                    "what": "step",
                    "kind": kind,
                    "processes": processes,
                    "num_samples": num_samples,
                    "batch_size": WHOLE,
                    "bytes": found[0]["bytes"],
                    "processor_us": each["processor"].median,
                    "clock_us": each["clock"].median,
                }
                report.store(row)
                report.line(
                    f"{kind}, N = {num_samples:.0e}",
                    processes,
                    f"{row['bytes']} bytes",
                    f"{row['processor_us']:.0f} us",
                    f"{row['clock_us']:.0f} us",
                )


# ---- steps per second under DDP


def ddp_cases(group: Any) -> dict[str, Callable[[], None]]:
    data = load_dataset()
    x, y, size = data.x_train, data.y_train, WHOLE // group.size()
    sampler = fastis.Sampler(len(y), size, group=group, method=EMAIS, seed=0)
    generator = torch.Generator().manual_seed(group.rank())
    cases: dict[str, Callable[[], None]] = {}
    for name in ("fastis", "waiting", "uniform"):
        torch.manual_seed(0)
        network = DistributedDataParallel(build_model("lenet5", data.image_shape, 10))
        optimizer = torch.optim.SGD(network.parameters(), lr=0.01, momentum=0.9)

        def step(
            name: str = name,
            network: torch.nn.Module = network,
            optimizer: torch.optim.Optimizer = optimizer,
        ) -> None:
            if name == "uniform":
                i = torch.randint(len(y), (size,), generator=generator)
                F.cross_entropy(network(x[i]), y[i]).backward()
            else:
                batch = sampler.sample()
                i, weights = batch
                out = fastis.cross_entropy(network(x[i]), y[i], weights)
                sampler.update(batch, out)
                if name == "waiting":
                    _ = sampler.step
                out.backward()
            optimizer.step()
            optimizer.zero_grad()

        cases[name] = step
    return cases


def ddp(group: Any, rounds: int, calls: int) -> dict[str, Times]:
    """Seconds a step of each case, in each round: of the clock, and of the processor."""
    cases = ddp_cases(group)
    names = list(cases)
    for step in cases.values():
        for _ in range(3):
            step()
    clock, processor = (Times({name: [] for name in names}) for _ in range(2))
    for number in range(rounds):
        for name in names[number % len(names) :] + names[: number % len(names)]:
            dist.barrier(group)
            begin = time.perf_counter(), time.process_time()
            for _ in range(calls):
                cases[name]()
            clock[name].append((time.perf_counter() - begin[0]) / calls)
            processor[name].append((time.process_time() - begin[1]) / calls)
    return {"clock": clock, "processor": processor}


def measure_ddp(report: Report, quick: bool) -> None:
    rounds = 2 if quick else 80
    for processes in (2,) if quick else (2, 4):
        found = in_processes(processes, ddp, rounds, 2)[0]
        for name in ("fastis", "waiting"):
            row = {"what": "ddp", "case": name, "processes": processes, "batch_size": WHOLE}
            for measure, times in found.items():
                ratio = times.ratio("uniform", name)
                row |= {
                    f"{measure}_us": times.us(name),
                    f"{measure}_peer_us": times.us("uniform"),
                    f"{measure}_ratio": ratio.median,
                    f"{measure}_quartiles": ratio.quartiles,
                    f"{measure}_ratio_of_medians": times.us("uniform") / times.us(name),
                    f"{measure}_ratio_of_least": min(times["uniform"]) / min(times[name]),
                }
            report.store({**row, "target": TARGET})
            ratios = (
                found[measure].ratio("uniform", name).text(".3f")
                for measure in ("processor", "clock")
            )
            report.line(f"uniform / {name}", processes, None, *ratios)


def main(argv: list[str] | None = None) -> int:
    parser = make_parser(__doc__, "a measurement")
    parser.add_argument("--quick", action="store_true", help="N = 1e5 and a few rounds only")
    parser.add_argument("--what", nargs="+", choices=["step", "ddp"], default=["step", "ddp"])
    parser.add_argument("--sizes", nargs="+", type=positive(int), help="N of the samplers")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    head = ("a step", "processes", "sent by each", "processor time", "clock")
    report = Report("scale", head, args.json)
    sizes = args.sizes or ([100_000] if args.quick else [100_000, 1_000_000, 10_000_000])
    if "step" in args.what:
        measure_steps(report, sizes, args.quick)
    if "ddp" in args.what:
        measure_ddp(report, args.quick)
    report.show()
    return 0


if __name__ == "__main__":
    sys.exit(main())
