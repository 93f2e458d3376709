"""The update of the state table against the same work in eager torch index operations.

    python bench/bench_update.py [--json FILE]

Both take a minibatch's indices and scores (with duplicates) and leave the moving mean, the moving
variance, the last iteration and the importance of every sample that was drawn, once each, and the
minibatch's variance moments. Results are compared first; then the two take turns, and the ratio is
the median over rounds. Bytes moved: 16 a sample of the table, read and written, 20 of the batch.

Then samples that come and go: 1000 of a table, with scores and a tree, are excluded and reset. The
next draw has to follow; it is compared with the draws after it.

Targets: 4096 samples of a table of 1e6, one thread: at most 0.10. 1000 of 1e6 excluded, and reset:
at most 0.3 ms each.
"""

from __future__ import annotations

import statistics
import sys
import time
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))

import torch

import fastis
from bench.report import Report, make_parser
from bench.timing import Times, interleaved
from fastis import ScoredLoss

TARGETS = {(4096, 1_000_000): 0.10}
CASES = ((128, 60_000), (128, 1_000_000), (4096, 1_000_000))
RENEWED, RENEWAL_TARGET_US = 1000, 300.0


class Eager:
    """Kutsuna 2025, Algorithm 1, as one would write it with torch's index operations."""

    def __init__(self, n: int) -> None:
        self.mean, self.var, self.importance = torch.zeros(n), torch.zeros(n), torch.zeros(n)
        self.last = torch.full((n,), -1)
        self.first = torch.empty(n, dtype=torch.int64)
        self.time = 0

    def update(self, indices, weights, score) -> torch.Tensor:
        t, size = self.time, len(indices)
        # The first position of every index wins; scores that are not finite are left out.
        position = torch.arange(size)
        self.first[indices] = size
        self.first.scatter_reduce_(0, indices, position, "amin")
        keep = (self.first[indices] == position) & torch.isfinite(score)
        i, x = indices[keep], score[keep]
        mean, var, last = self.mean[i], self.var[i], self.last[i]
        alpha = torch.where(last < 0, 0.0, torch.exp((last - t) / max(t, 1)))
        d = x - mean
        mean = mean + (1 - alpha) * d
        var = alpha * (var + (1 - alpha) * d * d)
        self.mean[i], self.var[i], self.last[i] = mean, var, t
        self.importance[i] = (mean * mean + var).sqrt()
        self.time += 1
        r = weights * score
        return torch.stack([(r * r).mean(), (r * score).mean(), r.mean()])


def make_case(batch_size: int, n: int):
    generator = torch.Generator().manual_seed(0)
    indices = torch.randint(n, (batch_size,), generator=generator)
    score = torch.empty(batch_size).log_normal_(0, 1, generator=generator)
    return fastis.Batch(indices, torch.ones(batch_size)), ScoredLoss(score, score, score, None)


def validate(sampler: fastis.Sampler, eager: Eager, batch, out) -> None:
    for scale in (1.0, 1.5, 0.5):
        scaled = ScoredLoss(out.loss, out.losses * scale, out.score * scale, None)
        sampler.update(batch, scaled)
        eager.update(*batch, scaled.score)
    touched = batch.indices
    # A few float32 operations each way.
    torch.testing.assert_close(sampler.mean[touched], eager.mean[touched], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(sampler.var[touched], eager.var[touched], rtol=1e-4, atol=1e-6)
    assert torch.equal(sampler.last_seen[touched], eager.last[touched])


def measure(batch_size: int, n: int, rounds: int) -> Times:
    """By the public API: the table alone, with the tree kept, and eager torch."""
    batch, out = make_case(batch_size, n)
    method = fastis.methods.EMAIS.published(warmup_epochs=0)
    table = fastis.Sampler(n, batch_size, method=method, seed=0)  # never draws: no tree to keep
    tree = fastis.Sampler(n, batch_size, method=method, seed=0)
    eager = Eager(n)
    validate(table, eager, batch, out)
    tree.update(batch, out)
    tree.sample()  # builds the tree, which every further update then keeps
    contenders = {
        "update": lambda: table.update(batch, out),
        "update_and_tree": lambda: tree.update(batch, out),
        "eager": lambda: eager.update(*batch, out.score),
    }
    return interleaved(contenders, rounds=rounds, turn=0.01)


def measure_renewal(n: int, rounds: int) -> dict[str, float]:
    """Microseconds, medians: of samples with scores, other ones in every round."""
    sampler = fastis.Sampler(n, 128, method=fastis.methods.EMAIS(warmup_epochs=0), seed=0)
    generator = torch.Generator().manual_seed(0)
    score = torch.empty(n).log_normal_(0, 1, generator=generator)
    sampler.refresh(torch.arange(n), score)
    sampler.sample()
    times: dict[str, list[float]] = {"exclude": [], "reset": [], "next_draw": [], "draw": []}
    for _ in range(rounds):
        indices = torch.randperm(n, generator=generator)[:RENEWED]
        calls = {
            "exclude": lambda i=indices: sampler.exclude(i),
            "reset": lambda i=indices: sampler.reset(i),
            "next_draw": sampler.sample,
            "draw": sampler.sample,
        }
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            times[name].append(1e6 * (time.perf_counter() - start))
        assert bool((sampler.last_seen[indices] == -1).all())
        sampler.refresh(indices, score[indices])
        sampler.sample()
    return {name: statistics.median(values) for name, values in times.items()}


def report_renewal(rounds: int, json: str | None) -> None:
    head = ("samples", "N", "exclude us", "reset us", "next draw us", "draw us", "target us")
    report = Report("renewal", head, json)
    for n in (60_000, 1_000_000):
        us = measure_renewal(n, rounds)
        row = {"samples": RENEWED, "num_samples": n, "threads": 1}
        report.store({**row, **{f"{name}_us": round(value, 2) for name, value in us.items()}})
        cells = [f"{value:.1f}" for value in us.values()]
        report.line(RENEWED, n, *cells, RENEWAL_TARGET_US if n == 1_000_000 else None)
    report.show()


def main(argv: list[str] | None = None) -> int:
    parser = make_parser(__doc__, "a case")
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--quick", action="store_true", help="a few rounds only")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    head = ("B", "N", "update us", "with tree us", "eager us", "ratio", "target")
    report = Report("update", head, args.json)
    for batch_size, n in CASES:
        times = measure(batch_size, n, 3 if args.quick else args.rounds)
        ratio = times.ratio("update", "eager")
        row = {"batch_size": batch_size, "num_samples": n, "threads": 1}
        row |= {f"{name}_us": round(times.us(name), 2) for name in times}
        report.store({**row, "ratio": ratio.median, "ratio_quartiles": ratio.quartiles})
        cells = [f"{times.us(name):.1f}" for name in times]
        report.line(batch_size, n, *cells, ratio.text(".3f"), TARGETS.get((batch_size, n)))
    report.show()
    report_renewal(3 if args.quick else args.rounds, args.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
