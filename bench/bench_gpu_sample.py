"""Sampling on a GPU: the sampler's launches in graphs, alias tables, ceilings of the same run.

    python bench/bench_gpu_sample.py [--json FILE] [--quick] [--size N ...] [--sigma S ...]

Checks first that the device draws what the CPU draws, then times. What is timed:

- ``update``, ``draw``, ``update, draw`` (two launches) and ``update + draw``
  (``Sampler.update_and_sample``, one launch), each many times in one CUDA graph on minibatches that
  change, at B = 128 and 4096, N = 1e6 and 1e8; beside them an empty kernel as a node of a graph.
  Scores are lognormal with sigma 1, 2 and 3: the wider, the more samples stand above the cap and
  the more draws have to bring that set up to date. ``..., no cap`` leaves that out, and ``update,
  mean gradient`` adds the mean gradient of 1000 classes.
- ``alias build``: ``AliasTable(weights)`` of float32 weights with its checks and what the host
  reads, by events around eager calls. Bytes an item: csrc/cuda/alias.cu.
- ``alias draw``: draws in bulk, in a graph, as a share of what a kernel gets that only reads 16
  bytes at random from memory as large.

Peers: torchrl's CUDA segment tree (update and draw; given random numbers) where torchrl has one;
``torch.multinomial`` where it may be used (N at most 2^24).

Aims: an update of up to 4096 in at most 4 empty nodes; N = 1e8 at most 1.5 times N = 1e6;
update + draw of 4096 in at most 10 us, and at most 0.03 of torchrl's at N = 1e6; an alias table of
1e8 in at most 1.4 ms; draws at 70 % of the random reads at least.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor

import fastis
from bench.bench_graph import make_sampler, validate
from bench.bench_sample import scored
from bench.report import Report, Row, make_parser
from bench.timing import device, device_us, interleaved

MILLION, LARGEST = 1_000_000, 100_000_000
LEGAL_FOR_MULTINOMIAL = 1 << 24
NUM_BATCHES = 20  # different minibatches that one graph goes through

# (figure of the row, "most" or "least", bound) by case, N and B; None: any.
AIMS: dict[tuple[str, int | None, int | None], list[tuple[str, str, float]]] = {
    ("update", None, None): [("nodes", "most", 4.0)],
    ("update + draw", MILLION, 4096): [("us", "most", 10.0), ("of_torchrl", "most", 0.03)],
    ("update + draw", LARGEST, 4096): [("us", "most", 10.0)],
    ("alias build", LARGEST, None): [("us", "most", 1400.0)],
    ("alias draw", None, None): [("of_gather", "least", 0.7)],
}
SCALING = 1.5  # of the time at N = 1e8 to that at 1e6, for the sampler's launches


def aims_of(row: Row) -> list[tuple[str, str, float]]:
    """The aims that a row has, those first that hold for its very N and B."""
    case, n, b = row["case"], row["num_samples"], row["batch_size"]
    found = [a for key in ((case, n, b), (case, n, None), (case, None, None))
             for a in AIMS.get(key, [])]  # type: ignore[arg-type] # fmt: skip
    if n == LARGEST and "of_million" in row:
        found.append(("of_million", "most", SCALING))
    return found


def verdict(row: Row) -> bool | None:
    """Whether all aims are met whose figures are there; None: there are none."""
    held = [
        (row[figure] <= bound if kind == "most" else row[figure] >= bound)  # type: ignore[operator]
        for figure, kind, bound in aims_of(row)
        if row.get(figure) is not None
    ]
    return all(held) if held else None


def ratios(row: Row, node_us: float, others: dict[str, float | None]) -> Row:
    """``row`` with its time in empty nodes and over the other times, by name."""
    us = float(row["us"])  # type: ignore[arg-type]
    row["nodes"] = us / node_us
    row |= {name: None if other is None else us / other for name, other in others.items()}
    return row


HEADER = ("what", "N", "B", "sigma", "us", "nodes", "/torchrl", "/N=1e6", "of gather")
HEADER += ("aims", "met")


def line_of(row: Row) -> tuple[str, ...]:
    """One line of the printed table."""

    def cell(name: str, form: str = "{:.2f}") -> str:
        value = row.get(name)
        return "" if value is None else form.format(value)

    aims = ", ".join(
        f"{figure} {'<=' if kind == 'most' else '>='} {bound:g}"
        for figure, kind, bound in aims_of(row)
    )
    met = {True: "yes", False: "NO", None: ""}[verdict(row)]
    size = "" if row["batch_size"] is None else str(row["batch_size"])
    cells = [cell("us"), cell("nodes"), cell("of_torchrl", "{:.3f}"), cell("of_million")]
    return (
        str(row["case"]), f"{row['num_samples']:.0e}", size, cell("sigma", "{:g}"), *cells,
        cell("of_gather"), aims, met,
    )  # fmt: skip


def eager_microseconds(call: Callable[[], object], repeats: int) -> float:
    """Median of eager calls on the device's clock, which waits for the host where it must."""
    for _ in range(2):
        call()
    torch.cuda.synchronize()
    return interleaved({"call": call}, rounds=repeats, calls=1, clock=device).us("call")


def torchrl_tree(n: int) -> tuple[object | None, str]:
    """torchrl's segment tree on the device, filled; or None and what is missing."""
    try:
        from torchrl._torchrl import CudaSumSegmentTreeFp32
    except ImportError as error:
        return None, f"torchrl's CUDA segment tree is missing ({error}): its column stays empty"
    tree = CudaSumSegmentTreeFp32(n, torch.device("cuda"))
    tree[torch.arange(n, device="cuda")] = torch.rand(n, device="cuda") + 0.1
    return tree, ""


def minibatches(n: int, batch_size: int, sigma: float = 1.0) -> list[tuple[fastis.Batch, Tensor]]:
    """Indices with weights of 1, and scores, that differ from each other."""
    generator = torch.Generator(device="cuda").manual_seed(1)
    ones = torch.ones(batch_size, device="cuda")
    made = []
    for _ in range(NUM_BATCHES):
        indices = torch.randint(n, (batch_size,), device="cuda", generator=generator)
        score = torch.empty(batch_size, device="cuda").log_normal_(0, sigma, generator=generator)
        made.append((fastis.Batch(indices, ones), score))
    return made


def torchrl_microseconds(n: int, batch_size: int, repeats: int) -> tuple[float | None, str]:
    """Update and draw of torchrl's tree, in a graph if that can be; and a note, or none."""
    tree, missing = torchrl_tree(n)
    if tree is None:
        return None, missing
    batches = minibatches(n, batch_size)
    points = torch.rand(batch_size, device="cuda") * n / 2

    def call(batch: fastis.Batch, score: Tensor) -> None:
        tree[batch.indices] = score  # type: ignore[index]
        tree.scan_lower_bound(points)  # type: ignore[attr-defined]

    calls = [lambda d=data: call(*d) for data in batches]
    try:
        return device_us(calls, repeats), ""
    except RuntimeError as error:
        torch.cuda.synchronize()
        note = f"torchrl's segment tree can't be captured ({error}): its times are eager"
    return eager_microseconds(lambda: [f() for f in calls], repeats) / NUM_BATCHES, note


def cases_of(n: int, batch_size: int, sigma: float) -> dict[str, Callable[..., object]]:
    """The sampler's launches, together and apart, and with a stage left out."""
    sampler = make_sampler(n, batch_size, sigma)
    mean_grad = torch.rand(1000, device="cuda")

    def both(batch: fastis.Batch, out: fastis.ScoredLoss) -> None:
        sampler.update(batch, out)
        sampler.sample()

    cases: dict[str, Callable[..., object]] = {
        "update": sampler.update,
        "draw": lambda *_: sampler.sample(),
        "update, draw": both,
        "update + draw": sampler.update_and_sample,
        "update, mean gradient": lambda batch, out: sampler.update(
            batch, out._replace(mean_grad=mean_grad)
        ),
    }
    if n <= MILLION:  # the larger ones fill the memory once
        uncapped = make_sampler(n, batch_size, sigma, max_duplicates=float(batch_size))
        cases["draw, no cap"] = lambda *_: uncapped.sample()
        cases["update + draw, no cap"] = uncapped.update_and_sample
    return cases


def measure_sampler(
    n: int,
    batch_size: int,
    sigma: float,
    node_us: float,
    torchrl_us: float | None,
    repeats: int,
) -> Iterator[Row]:
    data = [(batch, scored(score)) for batch, score in minibatches(n, batch_size, sigma)]
    for case, function in cases_of(n, batch_size, sigma).items():
        calls = [lambda f=function, d=d: f(*d) for d in data]
        row: Row = {"case": case, "num_samples": n, "batch_size": batch_size, "sigma": sigma}
        row["us"] = device_us(calls, repeats)
        peer = torchrl_us if case == "update + draw" else None
        yield ratios(row, node_us, {"of_torchrl": peer})


def measure_alias(n: int, count: int, node_us: float, repeats: int) -> Iterator[Row]:
    """Construction, draws in bulk, and torch.multinomial where it may be used."""
    from bench.gpu_ceilings import gathers_a_second

    generator = torch.Generator(device="cuda").manual_seed(0)
    weights = torch.empty(n, device="cuda").log_normal_(0, 1, generator=generator)
    build = eager_microseconds(lambda: fastis.AliasTable(weights), repeats)
    yield {"case": "alias build", "num_samples": n, "batch_size": None, "us": build}
    table = fastis.AliasTable(weights)
    kernels = fastis.kernels.kernels_for("categorical", "cuda")
    calls = [
        lambda k=k: kernels.alias_draw(table._table, table._total, 7, k * count, count)
        for k in range(4)
    ]
    row: Row = {"case": "alias draw", "num_samples": n, "batch_size": count}
    row["us"] = device_us(calls, repeats)
    gathered = {size: gathers_a_second(n, count, size, repeats) for size in (8, 16)}
    row["gathers_a_second"] = gathered
    row["of_gather"] = count / float(row["us"]) * 1e6 / gathered[16]
    yield ratios(row, node_us, {})
    if n <= LEGAL_FOR_MULTINOMIAL:
        draw = [lambda: torch.multinomial(weights, 4096, replacement=True)]
        row = {"case": "torch.multinomial", "num_samples": n, "batch_size": 4096}
        yield {**row, "us": device_us(draw, repeats)}


def check_alias(n: int = 100_003) -> None:
    """Nothing wrong gets a number: the table and draws of the CPU, bit for bit."""
    weights = torch.empty(n).log_normal_(0, 2, generator=torch.Generator().manual_seed(0))
    cpu, cuda = fastis.AliasTable(weights), fastis.AliasTable(weights.cuda())
    assert torch.equal(cpu._table, cuda._table.cpu()), "the tables differ"
    generators = [torch.Generator().manual_seed(1) for _ in range(2)]
    for a, b in zip(cpu.sample(n, generators[0]), cuda.sample(n, generators[1]), strict=True):
        assert torch.equal(a, b.cpu()), "draws differ"


def measure(
    repeats: int, sizes: list[int], sigmas: list[float], node_us: float, count: int
) -> Iterator[Row]:
    smallest = min(sizes)
    for batch_size in (128, 4096):
        torchrl_us, note = torchrl_microseconds(smallest, batch_size, repeats)
        if note:
            print(note)
        at_smallest: dict[object, float] = {}
        for n in sorted(sizes):
            peer = torchrl_us if n == smallest else None
            for sigma in sigmas:
                for row in measure_sampler(n, batch_size, sigma, node_us, peer, repeats):
                    us = float(row["us"])  # type: ignore[arg-type]
                    if n == smallest:
                        at_smallest[row["case"], sigma] = us
                    else:
                        row["of_million"] = us / at_smallest[row["case"], sigma]
                    yield row
                torch.cuda.empty_cache()
    for n in sorted(sizes):
        yield from measure_alias(n, count, node_us, repeats)
        torch.cuda.empty_cache()


def main(argv: list[str] | None = None) -> int:
    parser = make_parser(__doc__, "a measurement")
    parser.add_argument("--quick", action="store_true", help="N = 1e6 and a few repeats only")
    parser.add_argument("--size", type=float, nargs="+", help="N (1e6 and 1e8)")
    parser.add_argument("--sigma", type=float, nargs="+", help="of the scores (1, 2 and 3)")
    parser.add_argument("--alias-draws", type=float, default=1 << 24, help="draws in bulk")
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print("bench_gpu_sample.py measures a GPU, and torch finds none here", file=sys.stderr)
        return 2
    from bench.gpu_ceilings import ceilings, node_microseconds

    repeats = 5 if args.quick else 30
    validate()
    check_alias()
    shared = {"ceiling": ceilings(repeats), "node_us": node_microseconds(repeats)}
    print(f"empty node of a graph: {shared['node_us']:.2f} us")
    for name, speed in shared["ceiling"].items():
        print(f"{name} ceiling: {speed / 1e12:.2f} TB/s")
    report = Report("gpu sample", HEADER, args.json)
    sizes = [int(n) for n in args.size or ([MILLION] if args.quick else [MILLION, LARGEST])]
    sigmas = args.sigma or ([1.0] if args.quick else [1.0, 2.0, 3.0])
    for row in measure(repeats, sizes, sigmas, shared["node_us"], int(args.alias_draws)):
        report.line(*line_of(row))
        report.store({**shared, **row, "met": verdict(row)}, "cuda")
    report.show()
    return 0


if __name__ == "__main__":
    sys.exit(main())
