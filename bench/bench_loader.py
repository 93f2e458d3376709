"""Steps per second with ``fastis.DataLoader`` against torch's with a ``RandomSampler``, and memory.

    python bench/bench_loader.py [--json FILE] [--rounds 20] [--workers 2] [--threads 1]

Images as those of CIFAR-10 (uint8, 3 x 32 x 32) with crop and flip in the workers. First whether
every minibatch comes with its own data; then both loaders take turns, with workers that stay:
``loading`` alone, and a ``step`` of a small convolutional network (fastis: loss with scores, and
``update``). The ratio is of steps per second, within a round; once more by the processor time of
the main thread alone, which other processes on a busy machine have less of a part in.

``memory`` is what the main process grows by, in bytes a sample, when a pass over a large data set
begins: of the sampler's table, and of all else. torch's loader keeps a list of all indices.
"""

from __future__ import annotations

import multiprocessing
import resource
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1]))

import torch
import torch.nn.functional as F
from torch import Tensor

import fastis
from bench.experiments.models import build_model
from bench.report import Report, make_parser, positive
from bench.timing import Times, host, interleaved, thread

TARGET = 0.97
PADDING = 4


class Images(torch.utils.data.Dataset):
    """Random images; the label is the index."""

    def __init__(self, num_samples: int) -> None:
        generator = torch.Generator().manual_seed(0)
        shape = (num_samples, 3, 32, 32)
        self.x = torch.randint(256, shape, dtype=torch.uint8, generator=generator)

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        padded = F.pad(self.x[index], (PADDING,) * 4)
        top, left, flip = torch.randint(2 * PADDING + 1, (3,)).tolist()
        image = padded[:, top : top + 32, left : left + 32]
        if flip % 2:
            image = image.flip(2)
        return image.float().mul_(1 / 255), index


class Range(torch.utils.data.Dataset):
    def __init__(self, num_samples: int) -> None:
        self.num_samples = num_samples

    def __len__(self) -> int:
        return self.num_samples

    def __getitem__(self, index: int) -> int:
        return index


def without_end(loader: torch.utils.data.DataLoader) -> Iterator[Any]:
    while True:
        yield from loader


def loaders(
    images: Images, batch_size: int, workers: int
) -> dict[str, torch.utils.data.DataLoader]:
    options = {"num_workers": workers, "persistent_workers": workers > 0}
    sampler = fastis.Sampler(len(images), batch_size, method=fastis.methods.EMAIS(warmup_epochs=0))
    everything = fastis.Batch(torch.arange(len(images)), torch.ones(len(images)))
    sampler.update(everything, torch.empty(len(images)).log_normal_())
    return {
        "torch": torch.utils.data.DataLoader(
            images, batch_size, shuffle=True, drop_last=True, **options
        ),
        "fastis": fastis.DataLoader(images, sampler, **options),
    }


def validate(loader: fastis.DataLoader) -> None:
    for number, (batch, (_, index)) in enumerate(loader):
        assert torch.equal(batch.indices, index), "data of another minibatch"
        assert batch.weights.unique().numel() > 1, "uniform draws"
        if number == 10:
            break


def loading(made: dict[str, torch.utils.data.DataLoader]) -> dict[str, Callable[[], Any]]:
    return {name: without_end(loader).__next__ for name, loader in made.items()}


def steps(made: dict[str, torch.utils.data.DataLoader], model: str) -> dict[str, Callable[[], Any]]:
    """A step of each on its own copy of the network."""
    cases: dict[str, Callable[[], Any]] = {}
    for name, loader in made.items():
        torch.manual_seed(0)
        network = build_model(model, (3, 32, 32), 10)
        optimizer = torch.optim.SGD(network.parameters(), lr=0.01, momentum=0.9)
        minibatches = without_end(loader)

        def step(
            name: str = name,
            network: torch.nn.Module = network,
            optimizer: torch.optim.Optimizer = optimizer,
            minibatches: Iterator[Any] = minibatches,
            sampler: Any = loader.sampler,
        ) -> None:
            if name == "fastis":
                batch, (x, index) = next(minibatches)
                out = fastis.cross_entropy(network(x), index % 10, batch.weights)
                sampler.update(batch, out)
                out.backward()
            else:
                x, index = next(minibatches)
                F.cross_entropy(network(x), index % 10).backward()
            optimizer.step()
            optimizer.zero_grad()

        cases[name] = step
    return cases


# ---- memory


def resident() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


def growth(name: str, num_samples: int, workers: int, answer: Any) -> None:
    """Bytes of the sampler's table with its tree, and of all else when 10 minibatches have come."""
    data, before = Range(num_samples), resident()
    if name == "fastis":
        sampler = fastis.Sampler(num_samples, 128, method=fastis.methods.EMAIS(warmup_epochs=0))
        sampler.update(fastis.Batch(torch.arange(128), torch.ones(128)), torch.ones(128))
        sampler.sample()
        loader = fastis.DataLoader(data, sampler, num_workers=workers)
    else:
        loader = torch.utils.data.DataLoader(data, 128, shuffle=True, num_workers=workers)
    table, passing = resident(), iter(loader)
    for _ in range(10):
        next(passing)
    answer.put((table - before, resident() - table))


def memory(name: str, num_samples: int, workers: int) -> tuple[int, int]:
    """In a process of its own, so that nothing is left of another measurement."""
    context = multiprocessing.get_context("fork")
    answer = context.Queue()
    process = context.Process(target=growth, args=(name, num_samples, workers, answer))
    process.start()
    found: tuple[int, int] = answer.get()
    process.join()
    return found


def main(argv: list[str] | None = None) -> int:
    parser = make_parser(__doc__, "a measurement")
    parser.add_argument("--num-samples", type=positive(int), default=50_000)
    parser.add_argument("--batch-size", type=positive(int), default=128)
    parser.add_argument("--model", default="lenet5")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--threads", type=positive(int), default=1, help="of the main process")
    parser.add_argument("--rounds", type=positive(int), default=20)
    parser.add_argument("--steps", type=positive(int), default=50, help="of a turn")
    parser.add_argument("--memory-at", type=positive(int), default=10_000_000, help="samples")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)

    setting = {"num_samples": args.memory_at, "workers": args.workers}
    report = Report("loader", ("what", "fastis", "torch", "ratio (quartiles)", "target"), args.json)
    grown = {name: memory(name, args.memory_at, args.workers) for name in ("fastis", "torch")}
    bytes_each = {name: [part / args.memory_at for part in parts] for name, parts in grown.items()}
    report.store({"what": "memory", **setting, "bytes_per_sample": bytes_each})
    for part, what in enumerate(("table, bytes a sample", "all else, bytes a sample")):
        report.line(what, *(f"{bytes_each[name][part]:.2f}" for name in bytes_each), None, None)

    made = loaders(Images(args.num_samples), args.batch_size, args.workers)
    validate(made["fastis"])
    setting |= {"num_samples": args.num_samples, "batch_size": args.batch_size}
    for what, cases in (("loading", loading(made)), ("step", steps(made, args.model))):
        for of, clock in (("", host), (", main thread", thread)):
            times = interleaved(cases, rounds=args.rounds, calls=args.steps, clock=clock)
            report.store({"what": what + of, **setting, **figures(times)})
            cells = (f"{1e6 / times.us(name):.1f} steps/s" for name in ("fastis", "torch"))
            report.line(what + of, *cells, times.ratio("torch", "fastis").text(".3f"), TARGET)
    report.show()
    return 0


def figures(times: Times) -> dict[str, Any]:
    """Of a row; the ratio is that of steps per second."""
    ratio = times.ratio("torch", "fastis")
    return {
        "us": times.us("fastis"),
        "peer_us": times.us("torch"),
        "ratio": ratio.median,
        "ratio_quartiles": ratio.quartiles,
        "ratio_of_least": min(times["torch"]) / min(times["fastis"]),
        "target": TARGET,
    }


if __name__ == "__main__":
    sys.exit(main())
