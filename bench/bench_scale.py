"""What several processes cost a step, in time and bytes, and DDP's steps per second.

    python bench/bench_scale.py [--json FILE] [--quick] [--what step shards model ddp]

``step``: a sampler's part of a training step, ``sample`` and ``update``, of every process; in
microseconds of processor time (all threads of the process, so that gloo's count) and of the clock,
with no network to compute in between, so that the clock shows the exchange at its worst. Bytes are
counted at the collective. First it is checked that the processes' parts make up the minibatch.

``shards``: the same of a sharded sampler's rank, by :mod:`bench.sharded_step`, once every sample
has a score.

``model``: what a sharded step costs one of up to 1,024 ranks that own 1e10 samples together. The
rank's own work is measured, on a table of its real size and with the messages of all those ranks
made up; the exchange is extrapolated from that of 16 bytes between 2 processes of this machine, a
latency that doubles the number of ranks reached: log2(R) of them (recursive doubling). A network's
own latency belongs in its place. That draws stay exact with as many shards is tested:
``test_a_thousand_shards_of_ten_billion_samples``.

``ddp``: LeNet-5, and the small CNN of CIFAR-10, on Fashion-MNIST under DistributedDataParallel, the
gradients of a global minibatch of 128: against the same loop with uniform draws and PyTorch's loss;
also with the scores waited for in ``update`` (``waiting``) instead of after ``backward``, and that
uniform loop with an all-gather of as many bytes, which nobody reads, in the same place (``bare``):
what a second collective costs, whatever is in it. Cases take turns; ratios are of one round: of
steps per second, and of steps per second of processor time, which other programs disturb less.

Processes are forked, gloo on one machine, one thread each.
"""

from __future__ import annotations

import math
import multiprocessing
import sys
import tempfile
import time
from collections.abc import Callable
from itertools import product
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
from bench.sharded_step import StepCost, made_up, step_cost
from bench.timing import Times, spread
from fastis import exchange
from fastis.exchange import Message
from fastis.ranks import Ranks

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


# ---- shards


def shard_steps(group: Any, num_samples: int, strategy: str, count: int) -> StepCost:
    return step_cost(
        Ranks.over(group), num_samples, WHOLE // group.size(), strategy=strategy, steps=count
    )


def measure_shards(report: Report, sizes: list[int], quick: bool) -> None:
    for strategy in ("global", "stratified"):
        for num_samples in sizes:
            for processes in (1, 2, 4):
                count = 50 if quick else 1000
                found = in_processes(processes, shard_steps, num_samples, strategy, count)
                times = [1e6 * (one.sample_seconds + one.update_seconds) for one in found]
                row = {
                    "what": "shards",
                    "strategy": strategy,
                    "processes": processes,
                    "num_samples": num_samples,
                    "batch_size": WHOLE,
                    "bytes": found[0].bytes_sent,
                    "clock_us": median(times),
                }
                report.store(row)
                report.line(
                    f"{strategy}, N = {num_samples:.0e}",
                    processes,
                    f"{row['bytes']:g} bytes",
                    None,
                    f"{row['clock_us']:.0f} us",
                )


def exchanges(group: Any, rounds: int, calls: int) -> float:
    """Seconds of an exchange of 16 bytes a rank: the median over rounds."""
    gather, message, found = Ranks.over(group).gather, torch.zeros(2, dtype=torch.int64), []
    for _ in range(rounds):
        dist.barrier(group)
        begin = time.perf_counter()
        for _ in range(calls):
            gather(message)
        found.append((time.perf_counter() - begin) / calls)
    return median(found)


def measure_model(report: Report, quick: bool) -> None:
    latency = in_processes(2, exchanges, *((3, 20) if quick else (15, 200)))[0]
    each = 10_000 if quick else 9_765_625  # samples a rank: 1e10 in 1,024
    for ranks in (4, 1024) if quick else (1, 4, 16, 64, 256, 1024):
        cost = step_cost(made_up(ranks), ranks * each, 128, steps=20 if quick else 300)
        row = {
            "what": "model",
            "ranks": ranks,
            "num_samples": ranks * each,
            "batch_size": 128 * ranks,
            "sample_us": 1e6 * cost.sample_seconds,
            "update_us": 1e6 * cost.update_seconds,
            "exchange_us": 1e6 * latency * math.log2(ranks),
            "latency_us": 1e6 * latency,
        }
        report.store(row)
        report.line(
            f"modelled, N = {row['num_samples']:.1e}",
            ranks,
            f"{cost.bytes_sent:g} bytes",
            f"{row['sample_us'] + row['update_us']:.0f} us",
            f"+ {row['exchange_us']:.0f} us",
        )


# ---- steps per second under DDP


def ddp_cases(group: Any, model: str) -> dict[str, Callable[[], None]]:
    data = load_dataset()
    x, y, size = data.x_train, data.y_train, WHOLE // group.size()
    sampler = fastis.Sampler(len(y), size, group=group, method=EMAIS, seed=0)
    message = Message(sampler._exchange.table, group.size(), size, 1)
    generator = torch.Generator().manual_seed(group.rank())
    cases: dict[str, Callable[[], None]] = {}
    for name in ("fastis", "waiting", "bare", "uniform"):
        torch.manual_seed(0)
        network = DistributedDataParallel(build_model(model, data.image_shape, 10))
        optimizer = torch.optim.SGD(network.parameters(), lr=0.01, momentum=0.9)

        def step(
            name: str = name,
            network: torch.nn.Module = network,
            optimizer: torch.optim.Optimizer = optimizer,
        ) -> None:
            work = None
            if name in ("bare", "uniform"):
                i = torch.randint(len(y), (size,), generator=generator)
                out = F.cross_entropy(network(x[i]), y[i])
                if name == "bare":
                    arguments = message.everyone, message.ours, group
                    work = exchange._all_gather(*arguments, async_op=True)
            else:
                batch = sampler.sample()
                i, weights = batch
                out = fastis.cross_entropy(network(x[i]), y[i], weights)
                sampler.update(batch, out)
                if name == "waiting":
                    _ = sampler.step
            out.backward()
            if work is not None:
                work.wait()
            optimizer.step()
            optimizer.zero_grad()

        cases[name] = step
    return cases


def ddp(group: Any, model: str, rounds: int, calls: int) -> dict[str, Times]:
    """Seconds a step of each case, in each round: of the clock, and of the processor."""
    cases = ddp_cases(group, model)
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
    rounds, calls = (2, 2) if quick else (30, 10)
    for model, processes in [("lenet5", 2)] if quick else product(("lenet5", "cnn"), (2, 4)):
        found = in_processes(processes, ddp, model, rounds, calls)[0]
        for name in ("fastis", "waiting", "bare"):
            row = {
                "what": "ddp",
                "network": model,
                "case": name,
                "processes": processes,
                "batch_size": WHOLE,
            }
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
            report.line(f"{model}: uniform / {name}", processes, None, *ratios)


def main(argv: list[str] | None = None) -> int:
    parser = make_parser(__doc__, "a measurement")
    parser.add_argument("--quick", action="store_true", help="N = 1e5 and a few rounds only")
    parts = ["step", "shards", "model", "ddp"]
    parser.add_argument("--what", nargs="+", choices=parts, default=parts)
    parser.add_argument("--sizes", nargs="+", type=positive(int), help="N of the samplers")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    head = ("a step", "processes", "sent by each", "processor time", "clock")
    report = Report("scale", head, args.json)
    sizes = args.sizes or ([10**5] if args.quick else [10**5, 10**6, 10**7, 10**8])
    if "step" in args.what:
        measure_steps(report, sizes, args.quick)
    if "shards" in args.what:
        measure_shards(report, sizes, args.quick)
    if "model" in args.what:
        measure_model(report, args.quick)
    if "ddp" in args.what:
        measure_ddp(report, args.quick)
    report.show()
    return 0


if __name__ == "__main__":
    sys.exit(main())
