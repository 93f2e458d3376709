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

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1]))

import torch
import torch.nn.functional as F

import fastis
from bench import timing
from bench.bench_sample import scored
from bench.experiments.models import build_model
from bench.report import Report, Row, make_parser

TARGETS = {"resnet18": 0.995, "lenet5": 0.95, "mlp": 0.95}
SHAPES = {"resnet18": (3, 32, 32), "lenet5": (1, 28, 28), "mlp": (1, 28, 28)}
NUM_CLASSES, NUM_SAMPLES, BATCH_SIZE = 10, 50_000, 128
REPLAYS = 50


def replayed(steps: dict[str, Callable[[], object]], turns: int) -> timing.Times:
    """Each step as a graph of its own; a turn is many replays."""
    graphs = {name: timing.captured([step], warmups=5) for name, step in steps.items()}
    replays = {name: graph.replay for name, graph in graphs.items()}
    return timing.interleaved(replays, rounds=turns, calls=REPLAYS, clock=timing.device)


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

    def scored(self, batch: fastis.Batch) -> fastis.ScoredLoss:
        logits = self.logits(batch.indices)
        return fastis.cross_entropy(logits, self.y[batch.indices], batch.weights)


Learn = Callable[[fastis.Batch], fastis.ScoredLoss]
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
        next_batch = sampler.update_and_sample(held, out)
        finish(out.loss)
        return hold(held, next_batch)

    return step


def ahead(sampler: fastis.Sampler, held: fastis.Batch, learn: Learn, finish: Finish) -> Step:
    """As :func:`fused`, but the next minibatch is drawn beside the forward pass."""
    side = torch.cuda.Stream()

    def step() -> fastis.Batch:
        main = torch.cuda.current_stream()
        side.wait_stream(main)
        with torch.cuda.stream(side):
            next_batch = sampler.sample()
        out = learn(held)
        main.wait_stream(side)  # the draw and the update use the same table
        sampler.update(held, out)
        finish(out.loss)
        return hold(held, next_batch)

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

        graph = timing.captured([keep], warmups=5)
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
    way: str, twin: fastis.Sampler, present: fastis.Batch, out: fastis.ScoredLoss
) -> fastis.Batch:
    """What a step of that way returns, by a sampler driven in the same order."""
    if way == "fastis":
        present = twin.sample()
        twin.update(present, out)
        return present
    if way == "ahead":
        next_batch = twin.sample()
        twin.update(present, out)
        return next_batch
    twin.update(present, out)
    return twin.sample()


def measure_model(model: str, turns: int) -> Row:
    steps: dict[str, Callable[[], object]] = {"torch": Training(model).uniform_step}
    for name, way in WAYS.items():
        ours, sampler = Training(model), make_sampler(NUM_SAMPLES, BATCH_SIZE)
        steps[name] = way(sampler, sampler.sample(), ours.scored, ours.finish)
    times = replayed(steps, turns)
    row: Row = {f"{name}_us": times.us(name) for name in times}
    return row | {f"{name}_ratio": times.ratio("torch", name).median for name in WAYS}


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

    steps: dict[str, Callable[[], object]] = {
        "node": lambda: one.add_(1),
        "update": lambda: sampler.update(batch, out),
        "draw": sampler.sample,
        "update, draw": both,
        "update + draw": lambda: sampler.update_and_sample(batch, out),
    }
    times = replayed(steps, turns)
    return {name: times.us(name) for name in steps}


def main(argv: list[str] | None = None) -> int:
    parser = make_parser(__doc__, "a case")
    parser.add_argument("--model", nargs="*", choices=list(TARGETS), default=list(TARGETS))
    parser.add_argument("--turns", type=int, default=40)
    parser.add_argument("--size", type=float, nargs="+", default=[1e6, 1e8], help="N of the parts")
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print("bench_graph.py needs a CUDA device, and torch finds none", file=sys.stderr)
        return 2
    validate()
    head = ("network", "torch us", *WAYS, *(f"{way}, ratio" for way in WAYS), "target")
    report = Report("graph", head, args.json)
    for model in args.model:
        row = measure_model(model, args.turns)
        cells = [f"{row[f'{name}_us']:.1f}" for name in ("torch", *WAYS)]
        cells += [f"{row[f'{name}_ratio']:.3f}" for name in WAYS]
        report.line(model, *cells, TARGETS[model])
        report.store({"model": model, "batch_size": BATCH_SIZE, **row}, "cuda")
    report.show()
    head = ("N", "B", "node us", "update", "draw", "update, draw", "update + draw")
    report = Report("graph parts", head, args.json)
    for n in map(int, args.size):
        for batch_size in (128, 4096):
            parts = measure_parts(n, batch_size, args.turns)
            report.line(f"{n:.0e}", batch_size, *(f"{v:.2f}" for v in parts.values()))
            report.store({"num_samples": n, "batch_size": batch_size, "us": parts}, "cuda")
    report.show()
    return 0


if __name__ == "__main__":
    sys.exit(main())
