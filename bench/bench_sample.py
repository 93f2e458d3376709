"""Sampling against its peers: a step's update and draw, the kernels alone, alias tables, scaling.

    python bench/bench_sample.py [--json FILE] [--quick]

One thread; a case's contenders take turns, and the figures are medians. Data vary from call to
call. The peers:

- ``torch.multinomial`` with replacement, which pays O(N) a call;
- ``numpy``'s ``Generator.choice`` with probabilities, O(N) a call;
- a float64 cumulative sum with ``searchsorted``: cached (weights then never change), or renewed;
- torchrl's ``SumSegmentTreeFp32`` (prioritised replay), a binary tree of float32 sums, when
  torchrl is installed. Its update sets leaves; ours also averages the scores, derives the weights
  and the variance traces, and caps: ``tree`` is what keeping the tree adds to that.

What is checked before anything is timed: both backends draw the same indices and coefficients from
the same scores, after updates too, and the alias table holds the weights it was given.

Bytes touched a sample: update 64 of states and 128 a level (the small levels once a minibatch),
draw 128 a level and 64.

Targets: update + draw through ``Sampler`` at N = 1e6, B = 128 at most 0.03 of one call of
torch.multinomial; at B = 4096 the update at most 0.30 of torchrl's and the draw at most 0.35;
time at N = 1e8 at most 2.5 times that at N = 1e6; at most 24 bytes a sample; alias construction at
N = 1e7 at most 8 ns an item, alias draws at most 0.08 of torchrl's draw.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch

import fastis
from bench.report import Report, Row, make_parser
from bench.timing import interleaved
from fastis import _C, ScoredLoss

try:
    from torchrl._torchrl import SumSegmentTreeFp32
except ImportError:  # not installed, or built for another torch
    SumSegmentTreeFp32 = None

Contenders = dict[str, Callable[[], object]]

NUM_BATCHES = 64  # different minibatches that calls go through
TARGETS = {
    ("step", 1_000_000, 128): 0.03,
    ("update", 1_000_000, 4096): 0.30,
    ("draw", 1_000_000, 4096): 0.35,
    ("alias draw", 1_000_000, 4096): 0.08,
    ("alias draw, kernel", 1_000_000, 4096): 0.08,
    ("alias construction", 10_000_000, None): 8.0,
    ("scaling", 100_000_000, 128): 2.5,
    ("scaling", 100_000_000, 4096): 2.5,
}


def medians(contenders: Contenders, seconds: float) -> dict[str, float]:
    """Microseconds of each."""
    times = interleaved(contenders, seconds=seconds)
    return {name: times.us(name) for name in contenders}


class Data:
    """Scores of N samples, and minibatches of indices and scores to go through."""

    def __init__(self, n: int, batch_size: int, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.score = torch.empty(n).log_normal_(0, 1, generator=generator)
        shape = (NUM_BATCHES, batch_size)
        self.indices = torch.randint(n, shape, generator=generator)
        self.scores = torch.empty(shape).log_normal_(0, 1, generator=generator)
        self.points = torch.rand(shape, generator=generator) * float(self.score.double().sum())
        self.at = 0

    def next(self) -> int:
        self.at = (self.at + 1) % NUM_BATCHES
        return self.at


def scored(score: torch.Tensor) -> ScoredLoss:
    return ScoredLoss(score, score, score, None)


def make_sampler(n: int, batch_size: int, score: torch.Tensor) -> fastis.Sampler:
    """A sampler that has seen every sample once, on the way of one epoch."""
    sampler = fastis.Sampler(n, batch_size, method=fastis.methods.EMAIS(warmup_epochs=0), seed=0)
    for begin in range(0, n, 1 << 24):
        part = score[begin : begin + (1 << 24)]
        indices = torch.arange(begin, begin + len(part))
        sampler.update(fastis.Batch(indices, torch.ones(len(part))), scored(part))
    return sampler


def step_of(sampler: fastis.Sampler, data: Data) -> Callable[[], object]:
    """What a training step asks of the sampler: the batch drawn, then updated with new scores."""
    outs = [scored(row) for row in data.scores]

    def step() -> None:
        batch = sampler.sample()
        sampler.update(batch, outs[data.next()])

    return step


def measure_step(n: int, batch_size: int, seconds: float) -> Row:
    data = Data(n, batch_size)
    p = (data.score.double() / data.score.double().sum()).numpy()
    ends = torch.cumsum(data.score.double(), 0)
    rng = np.random.default_rng(0)

    def cumsum_cached() -> torch.Tensor:
        points = torch.rand(batch_size, dtype=torch.float64) * ends[-1]
        return torch.searchsorted(ends, points, right=True)

    def cumsum_renewed() -> torch.Tensor:
        k = data.next()
        data.score[data.indices[k]] = data.scores[k]
        torch.cumsum(data.score, 0, dtype=torch.float64, out=ends)
        return cumsum_cached()

    contenders: Contenders = {
        "fastis": step_of(make_sampler(n, batch_size, data.score), data),
        "torch.multinomial": lambda: torch.multinomial(data.score, batch_size, replacement=True),
        "numpy choice": lambda: rng.choice(n, batch_size, p=p),
        "cumsum, cached": cumsum_cached,
        "cumsum, renewed": cumsum_renewed,
    }
    if SumSegmentTreeFp32 is not None:
        tree = SumSegmentTreeFp32(n)
        tree[torch.arange(n)] = data.score

        def torchrl_step() -> None:
            points = torch.rand(batch_size) * tree.query(0, n)
            tree[tree.scan_lower_bound(points)] = data.scores[data.next()]

        contenders["torchrl"] = torchrl_step
    times = medians(contenders, seconds)
    return {"us": times, "ratio": times["fastis"] / times["torch.multinomial"]}


def measure_kernels(n: int, batch_size: int, seconds: float) -> dict[str, Row]:
    """The compiled functions alone, on memory that exists, against torchrl's."""
    data = Data(n, batch_size)
    with_tree = make_sampler(n, batch_size, data.score)
    with_tree.sample()  # builds the tree, which updates keep from then on
    without_tree = make_sampler(n, batch_size, data.score)
    indices, weights = torch.empty(batch_size, dtype=torch.int64), torch.ones(batch_size)

    def update(sampler: fastis.Sampler) -> Callable[[], object]:
        table = sampler._table.handle
        r, calls = torch.ones(batch_size), []
        for i, x in zip(data.indices, data.scores, strict=True):
            addresses = (i.data_ptr(), x.data_ptr(), r.data_ptr(), x.data_ptr())
            calls.append((table, *addresses, batch_size, 0, 0))
        update.kept.append(r)  # type: ignore[attr-defined]
        return lambda: _C.update(*calls[data.next()])

    update.kept = []  # type: ignore[attr-defined]
    draw = (with_tree._table.handle, indices.data_ptr(), weights.data_ptr())
    contenders: Contenders = {
        "update": update(with_tree),
        "update, no tree": update(without_tree),
        "draw": lambda: _C.draw(*draw),
    }
    if SumSegmentTreeFp32 is not None:
        tree = SumSegmentTreeFp32(n)
        tree[torch.arange(n)] = data.score

        def torchrl_update() -> None:
            k = data.next()
            tree[data.indices[k]] = data.scores[k]

        contenders["torchrl update"] = torchrl_update
        contenders["torchrl draw"] = lambda: tree.scan_lower_bound(data.points[data.next()])
    times = medians(contenders, seconds)
    ours = {"update": times["update"], "draw": times["draw"]}
    ours["tree"] = times["update"] - times["update, no tree"]
    rows: dict[str, Row] = {}
    for name, us in ours.items():
        peer = times.get("torchrl draw" if name == "draw" else "torchrl update")
        rows[name] = {"us": {"fastis": us, "torchrl": peer}, "ratio": _ratio(us, peer)}
    return rows


def measure_scaling(sizes: list[int], batch_size: int, seconds: float) -> dict[int, Row]:
    """A step at each N, in turns; the ratio is to N = 1e6."""
    contenders: Contenders = {}
    for n in sizes:
        data = Data(n, batch_size)
        contenders[str(n)] = step_of(make_sampler(n, batch_size, data.score), data)
        del data.score
    times = medians(contenders, seconds)
    base = times[str(1_000_000)]
    return {n: {"us": {"fastis": times[str(n)]}, "ratio": times[str(n)] / base} for n in sizes}


def measure_alias(n: int, batch_size: int, seconds: float) -> dict[str, Row]:
    """Construction from float32 weights, checks included, in ns an item; draws in us a call."""
    data = Data(n, batch_size)
    generator = torch.Generator().manual_seed(1)
    table = fastis.AliasTable(data.score)
    indices, weights = torch.empty(batch_size, dtype=torch.int64), torch.empty(batch_size)
    addresses = indices.data_ptr(), weights.data_ptr()
    head, tail = (table._table.data_ptr(), n, table._total, 7), (batch_size, *addresses)
    calls = [(*head, k * batch_size, *tail) for k in range(NUM_BATCHES)]
    contenders: Contenders = {
        "fastis": lambda: table.sample(batch_size, generator),
        "kernel": lambda: _C.alias_draw(*calls[data.next()]),
    }
    if SumSegmentTreeFp32 is not None:
        tree = SumSegmentTreeFp32(n)
        tree[torch.arange(n)] = data.score
        contenders["torchrl"] = lambda: tree.scan_lower_bound(data.points[data.next()])
    draws = medians(contenders, seconds)
    build = medians({"fastis": lambda: fastis.AliasTable(data.score)}, seconds)["fastis"]
    kernel, peer = draws.pop("kernel"), draws.get("torchrl")
    return {
        "alias construction": {"us": {"fastis": build}, "ns_per_item": 1e3 * build / n},
        "alias draw": {"us": draws, "ratio": _ratio(draws["fastis"], peer)},
        "alias draw, kernel": {"us": {**draws, "fastis": kernel}, "ratio": _ratio(kernel, peer)},
    }


def measure_sample(n: int, batch_size: int, seconds: float) -> Row:
    """``fastis.sample(weights, B)`` against the function that it stands in for."""
    score = Data(n, batch_size).score
    times = medians(
        {
            "fastis": lambda: fastis.sample(score, batch_size),
            "torch.multinomial": lambda: torch.multinomial(score, batch_size, replacement=True),
        },
        seconds,
    )
    return {"us": times, "ratio": times["fastis"] / times["torch.multinomial"]}


def bytes_per_sample(n: int, batch_size: int) -> float:
    """All of a sampler's tensors, over N."""
    sampler = fastis.Sampler(n, batch_size)
    table = sampler._table
    _ = table.handle  # allocates the tree
    tensors = [table.scalars, table.variance, table.states, *table._tree.values()]
    return sum(t.numel() * t.element_size() for t in tensors if t is not None) / n


def validate() -> None:
    n, batch_size = 5000, 64
    data = Data(n, batch_size)
    samplers = [make_sampler(n, batch_size, data.score) for _ in range(2)]
    for k in range(NUM_BATCHES):
        with fastis.backend("reference"):
            expected = samplers[0].sample()
            samplers[0].update(expected, scored(data.scores[k]))
        batch = samplers[1].sample()
        samplers[1].update(batch, scored(data.scores[k]))
        assert torch.equal(batch.indices, expected.indices), "backends draw different indices"
        assert torch.equal(batch.weights, expected.weights), "backends draw different coefficients"
    p = fastis.AliasTable(data.score).probabilities
    torch.testing.assert_close(p, data.score.double() / data.score.double().sum())


def _ratio(ours: float, peer: float | None) -> float | None:
    return None if peer is None else ours / peer


def measure(seconds: float, largest: int) -> Iterator[tuple[str, int, int | None, Row]]:
    """Case, N, B and figures of every row, N up to ``largest``."""
    million, sizes = 1_000_000, [n for n in (10**4, 10**5, 10**6, 10**7, 10**8) if n <= largest]
    for batch_size in (128, 4096):
        yield "step", million, batch_size, measure_step(million, batch_size, seconds)
        for name, row in measure_kernels(million, batch_size, seconds).items():
            yield name, million, batch_size, row
        for n, row in measure_scaling(sizes, batch_size, seconds).items():
            yield "scaling", n, batch_size, row
    for n in (million, largest // 10):
        for name, row in measure_alias(n, 4096, seconds).items():
            yield name, n, None if name == "alias construction" else 4096, row
    yield "sample(weights)", million, 128, measure_sample(million, 128, seconds)
    for batch_size in (128, 4096):
        row = {"bytes_per_sample": bytes_per_sample(largest // 10, batch_size)}
        yield "memory", largest // 10, batch_size, row


def cells_of(row: Row, target: float | None) -> tuple[object, ...]:
    """Our time, the peers', the figure that counts, and its target."""
    us = dict(row.get("us", {}))
    ours, figure = us.pop("fastis", None), row.get("ratio")
    text = None if figure is None else f"{figure:.3f}"
    if "ns_per_item" in row:
        text = f"{row['ns_per_item']:.1f} ns an item"
    if "bytes_per_sample" in row:
        text, target = f"{row['bytes_per_sample']:.1f} bytes a sample", 24
    peers = ", ".join(f"{peer} {v:.4g}" for peer, v in us.items() if v is not None)
    return None if ours is None else f"{ours:.4g}", peers or None, text, target


def main(argv: list[str] | None = None) -> int:
    parser = make_parser(__doc__, "a case")
    parser.add_argument("--seconds", type=float, default=8.0, help="a case's time")
    parser.add_argument("--quick", action="store_true", help="N up to 1e6 and a moment each")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    validate()
    if SumSegmentTreeFp32 is None:
        print("torchrl is not installed (or not for this torch): its columns stay empty")
    head = ("what", "N", "B", "us", "peers, us", "ratio", "target")
    report = Report("sample", head, args.json)
    seconds, largest = (0.2, 1_000_000) if args.quick else (args.seconds, 100_000_000)
    for name, n, batch_size, row in measure(seconds, largest):
        report.store({"case": name, "num_samples": n, "batch_size": batch_size, **row})
        size = f"{n:.0e}".replace("+0", "")
        report.line(name, size, batch_size, *cells_of(row, TARGETS.get((name, n, batch_size))))
    report.show()
    return 0


if __name__ == "__main__":
    sys.exit(main())
