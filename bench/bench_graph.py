"""A whole training step in one CUDA graph: sample, forward, update, backward, optimizer.

    python bench/bench_graph.py [--json FILE] [--model lenet5 mlp resnet18]

Graphs of the same network, optimizer and data take turns. EMAIS past its warm-up, in three ways:

- ``fastis``: draw, loss, update, one after the other;
- ``fused``: the update and the next draw in one launch (``Sampler.update_and_sample``);
- ``ahead``: the next minibatch is drawn on a side stream while the network works on this one, from
  the state before this one's update. Its coefficients are those of that state: drawing ahead is
  legal, the update only comes one minibatch later to bear;

and ``torch`` (``randint``, ``F.cross_entropy``). Nothing of a replay runs on the host: both clocks,
the table and the draws live on the device. Checked first: replays of each way draw what a sampler
on the CPU draws from the same state and scores in the same order, and the clock ticks once a
replay.

Then what the graph adds, each captured alone and replayed many times over: the update, the draw,
both in two launches and in one, beside the smallest kernel of torch (one element) for the cost of a
node.

Targets: at batch 128 at least 0.995 of the uniform steps per second for ResNet-18 (bf16), 0.95 for
LeNet-5 and the MLP; update + draw of 4096 in at most 10 us.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1]))

import torch
import torch.nn.functional as F

import fastis
from bench.bench_sample import scored
from bench.models import build_model
from bench.provenance import provenance
from bench.report import aligned, append_row

TARGETS = {"resnet18": 0.995, "lenet5": 0.95, "mlp": 0.95}
SHAPES = {"resnet18": (3, 32, 32), "lenet5": (1, 28, 28), "mlp": (1, 28, 28)}
NUM_CLASSES, NUM_SAMPLES, BATCH_SIZE = 10, 50_000, 128
REPLAYS = 50


def capture(step: Callable[[], object], warmups: int = 5) -> torch.cuda.CUDAGraph:
    """``step`` as a graph, after some eager calls on a side stream, as torch asks for."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(warmups):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph


def milliseconds(graph: torch.cuda.CUDAGraph, replays: int = REPLAYS) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(replays):
        graph.replay()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / replays


def take_turns(graphs: dict[str, torch.cuda.CUDAGraph], turns: int) -> dict[str, list[float]]:
    times: dict[str, list[float]] = {name: [] for name in graphs}
    for _ in range(turns):
        for name, graph in graphs.items():
            times[name].append(milliseconds(graph))
    return times


class Training:
    """Network, data and optimizer; everything stays on the device."""

    def __init__(self, model: str) -> None:
        torch.manual_seed(0)
        shape, self.on = SHAPES[model], torch.device("cuda")
        self.x = torch.randn(NUM_SAMPLES, *shape, device=self.on)
        self.y = torch.randint(NUM_CLASSES, (NUM_SAMPLES,), device=self.on)
        self.model = build_model(model, shape, NUM_CLASSES).to(self.on)
        self.mixed = model == "resnet18"
        if self.mixed:
            self.x = self.x.bfloat16().to(memory_format=torch.channels_last)
            self.model = self.model.to(memory_format=torch.channels_last)
        options = {"momentum": 0.9, "weight_decay": 1e-3, "fused": True}
        self.optimizer = torch.optim.SGD(self.model.parameters(), 1e-3, **options)

    def logits(self, indices: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cuda", torch.bfloat16, enabled=self.mixed):
            return self.model(self.x[indices])

    def finish(self, loss: torch.Tensor) -> None:
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def uniform_step(self) -> None:
        indices = torch.randint(NUM_SAMPLES, (BATCH_SIZE,), device=self.on)
        self.finish(F.cross_entropy(self.logits(indices).float(), self.y[indices]))

    def scored(self, batch: fastis.Batch) -> fastis.loss.ScoredLoss:
        logits = self.logits(batch.indices)
        return fastis.cross_entropy(logits, self.y[batch.indices], batch.weights)


Learn = Callable[[fastis.Batch], fastis.loss.ScoredLoss]
Finish = Callable[[torch.Tensor], None]
Step = Callable[[], fastis.Batch]


def one_after_the_other(
    sampler: fastis.Sampler, held: fastis.Batch, learn: Learn, finish: Finish
) -> Step:
    """A step on a minibatch of its own, which it returns; ``held`` is not used."""

    def step() -> fastis.Batch:
        batch = sampler.sample()
        out = learn(batch)
        sampler.update(batch, out)
        finish(out.loss)
        return batch

    return step


def fused(sampler: fastis.Sampler, held: fastis.Batch, learn: Learn, finish: Finish) -> Step:
    """A step on the minibatch in ``held`` that leaves the next one there."""

    def step() -> fastis.Batch:
        out = learn(held)
        following = sampler.update_and_sample(held, out)
        finish(out.loss)
        return hold(held, following)

    return step


def ahead(sampler: fastis.Sampler, held: fastis.Batch, learn: Learn, finish: Finish) -> Step:
    """As :func:`fused`, but the next minibatch is drawn beside the forward pass."""
    side = torch.cuda.Stream()

    def step() -> fastis.Batch:
        main = torch.cuda.current_stream()
        side.wait_stream(main)
        with torch.cuda.stream(side):
            following = sampler.sample()
        out = learn(held)
        main.wait_stream(side)  # the draw and the update use the same table
        sampler.update(held, out)
        finish(out.loss)
        return hold(held, following)

    return step


WAYS = {"fastis": one_after_the_other, "fused": fused, "ahead": ahead}


def hold(held: fastis.Batch, batch: fastis.Batch) -> fastis.Batch:
    """Into the tensors that the next replay reads: those of a captured call are another's."""
    held.indices.copy_(batch.indices)
    held.weights.copy_(batch.weights)
    return held


def make_sampler(n: int, batch_size: int, sigma: float = 1.0, **options: Any) -> fastis.Sampler:
    """A sampler on the device that has seen every sample once, with lognormal(sigma) scores."""
    method = fastis.methods.EMAIS(warmup_epochs=0)
    sampler = fastis.Sampler(n, batch_size, method=method, device="cuda", seed=0, **options)
    generator = torch.Generator(device="cuda").manual_seed(0)
    for begin in range(0, n, 1 << 24):
        indices = torch.arange(begin, min(begin + (1 << 24), n), device="cuda")
        score = torch.empty(len(indices), device="cuda").log_normal_(0, sigma, generator=generator)
        sampler.update(fastis.Batch(indices, torch.ones_like(score)), scored(score))
    sampler.sample()
    return sampler


def validate() -> None:
    """Replays must go on as an eager sampler on the CPU does from the same state and scores."""
    for name, way in WAYS.items():
        sampler = make_sampler(5000, 64)
        out = scored(torch.rand(64, device="cuda") + 0.1)
        step = way(sampler, sampler.sample(), lambda _, out=out: out, lambda _: None)
        kept: list[fastis.Batch] = []

        def keep(step: Step = step, kept: list[fastis.Batch] = kept) -> None:
            kept[:] = [step()]

        graph = capture(keep)
        held = kept[0]
        twin = fastis.Sampler(5000, 64, method=sampler.method, device="cpu")
        twin.load_state_dict(sampler.state_dict())
        present = fastis.Batch(*(t.cpu().clone() for t in held))
        for _ in range(20):
            graph.replay()
            held = kept[0]
            present = follow(name, twin, present, scored(out.score.cpu()))
            message = f"a replay of {name} drew other "
            assert torch.equal(held.indices.cpu(), present.indices), message + "indices"
            assert torch.equal(held.weights.cpu(), present.weights), message + "coefficients"
        assert sampler.step == twin.step, f"the clock of {name} does not tick once a replay"


def follow(
    way: str, twin: fastis.Sampler, present: fastis.Batch, out: fastis.loss.ScoredLoss
) -> fastis.Batch:
    """What a step of that way returns, by a sampler driven in the same order."""
    if way == "fastis":
        present = twin.sample()
        twin.update(present, out)
        return present
    if way == "ahead":
        following = twin.sample()
        twin.update(present, out)
        return following
    twin.update(present, out)
    return twin.sample()


def measure_model(model: str, turns: int) -> dict[str, object]:
    theirs = Training(model)
    graphs = {"torch": capture(theirs.uniform_step)}
    for name, way in WAYS.items():
        ours, sampler = Training(model), make_sampler(NUM_SAMPLES, BATCH_SIZE)
        graphs[name] = capture(way(sampler, sampler.sample(), ours.scored, ours.finish))
    times = take_turns(graphs, turns)
    figures: dict[str, object] = {f"{name}_us": 1e3 * median(v) for name, v in times.items()}
    for name in WAYS:
        pairs = zip(times[name], times["torch"], strict=True)
        figures[f"{name}_ratio"] = median(theirs / ours for ours, theirs in pairs)
    return figures


def measure_parts(n: int, batch_size: int, turns: int) -> dict[str, float]:
    """Microseconds of a node, and of the sampler's parts, in graphs of their own."""
    sampler = make_sampler(n, batch_size)
    indices = torch.randint(n, (batch_size,), device="cuda")
    batch = fastis.Batch(indices, torch.ones(batch_size, device="cuda"))
    out = scored(torch.rand(batch_size, device="cuda") + 0.1)
    one = torch.zeros(1, device="cuda")

    def both() -> None:
        sampler.update(batch, out)
        sampler.sample()

    graphs = {
        "node": capture(lambda: one.add_(1)),
        "update": capture(lambda: sampler.update(batch, out)),
        "draw": capture(sampler.sample),
        "update, draw": capture(both),
        "update + draw": capture(lambda: sampler.update_and_sample(batch, out)),
    }
    return {name: 1e3 * median(values) for name, values in take_turns(graphs, turns).items()}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", nargs="*", choices=list(TARGETS), default=list(TARGETS))
    parser.add_argument("--turns", type=int, default=40)
    parser.add_argument("--size", type=float, nargs="+", default=[1e6, 1e8], help="N of the parts")
    parser.add_argument("--json", type=Path, help="file to append a row a case to")
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print("bench_graph.py needs a CUDA device, and torch finds none", file=sys.stderr)
        return 2
    validate()
    device = torch.device("cuda")
    lines = [("network", "torch us", *WAYS, *(f"{way}, ratio" for way in WAYS), "target")]
    for model in args.model:
        row = measure_model(model, args.turns)
        cells = [f"{row[f'{name}_us']:.1f}" for name in ("torch", *WAYS)]
        cells += [f"{row[f'{name}_ratio']:.3f}" for name in WAYS]
        lines.append((model, *cells, f"{TARGETS[model]}"))
        if args.json:
            case = {"benchmark": "graph", "model": model, "batch_size": BATCH_SIZE}
            append_row(args.json, {**case, **row, **provenance(device)})
    print(aligned(lines))
    lines = [("N", "B", "node us", "update", "draw", "update, draw", "update + draw")]
    for n in map(int, args.size):
        for batch_size in (128, 4096):
            parts = measure_parts(n, batch_size, args.turns)
            lines.append((f"{n:.0e}", str(batch_size), *(f"{v:.2f}" for v in parts.values())))
            if args.json:
                case = {"benchmark": "graph parts", "num_samples": n, "batch_size": batch_size}
                append_row(args.json, {**case, "us": parts, **provenance(device)})
    print(aligned(lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())
