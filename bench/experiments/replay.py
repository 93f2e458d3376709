"""Prioritized replay: a sampler as the ring buffer, TorchRL's buffer, and uniform draws.

    python bench/experiments/replay.py [--seeds 5] [--what probe cost learning] [--json FILE]
    python bench/experiments/replay.py --report bench/results

``probe``: along one run, over all transitions in the buffer, by what factor the variance of the
gradient of all parameters falls below that of uniform draws (N_ems/B, exact): with probabilities in
proportion to that gradient's norm (``ideal``), to the absolute TD error, to its power alpha, and
with those in force.

``cost``: the time of what a training step asks of a full buffer, one transition added, a minibatch
drawn and its priorities updated, in turns; then of the last two alone.

``learning``: double DQN on CartPole (examples/replay.py), the same network, exploration and
schedule for all, alpha = 0.6 and beta from 0.4 to 1. The learning rate is that of the largest mean
return of seed 0. Time is the processor's, of the whole run: environment, network and buffer.

TorchRL's rows need its compiled extension (torchrl 0.11.1 is built for torch 2.10); without it they
are left out.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import fmean
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[2]))

import torch
from torch import Tensor, nn

import fastis
from bench.experiments.tables import mean_sd, paired_interval
from bench.provenance import provenance, provenance_line
from bench.report import Row, append_row, make_parser, markdown_table, positive, read_rows
from bench.timing import interleaved
from examples.replay import PrioritizedReplay, Replay, Transitions, td_error, train
from fastis.estimators import per_sample_gradients, population_traces
from fastis.methods import Prioritized

try:
    from tensordict import TensorDict
    from torchrl._torchrl import SumSegmentTreeFp32  # noqa: F401
    from torchrl.data import LazyTensorStorage, PrioritizedReplayBuffer
except ImportError:  # not installed, or built for another torch
    PrioritizedReplayBuffer = None

PAGE, ROWS = "REPLAY.md", "replay.jsonl"
ALPHA, BETA = 0.6, 0.4
STEPS, CAPACITY, BATCH = 20_000, 10_000, 64
RATES = (3e-4, 1e-3, 3e-3)
SIZES = (10_000, 1_000_000)
PARTS = ("probe", "cost", "learning")


class Uniform:
    """A ring buffer whose transitions are all alike."""

    def __init__(self, capacity: int, batch_size: int, total_steps: int, seed: int) -> None:
        self.stored = Transitions.room_for(capacity)
        self.capacity, self.batch_size, self.count = capacity, batch_size, 0
        self.generator = torch.Generator().manual_seed(seed)

    def add(self, *transition: Any) -> None:
        slot = self.count % self.capacity
        for column, value in zip(self.stored, transition, strict=True):
            column[slot] = torch.as_tensor(value)
        self.count += 1

    def sample(self) -> tuple[Transitions, Tensor]:
        size = min(self.count, self.capacity)
        i = torch.randint(size, (self.batch_size,), generator=self.generator)
        return Transitions(*(column[i] for column in self.stored)), torch.ones(self.batch_size)

    def update(self, error: Tensor) -> None:
        """Nothing."""


class TorchRL:
    """``PrioritizedReplayBuffer`` as its documentation uses it."""

    def __init__(self, capacity: int, batch_size: int, total_steps: int, seed: int) -> None:
        storage = LazyTensorStorage(capacity)
        self.buffer = PrioritizedReplayBuffer(
            alpha=ALPHA, beta=BETA, storage=storage, batch_size=batch_size
        )
        self.growth = (1 - BETA) / total_steps

    def add(self, *transition: Any) -> None:
        columns = Transitions(*map(torch.as_tensor, transition))
        self.buffer.add(TensorDict(columns._asdict(), batch_size=[]))

    def sample(self) -> tuple[Transitions, Tensor]:
        drawn, info = self.buffer.sample(return_info=True)
        self.indices = info["index"]
        sampler = self.buffer.sampler
        sampler._beta = min(1.0, sampler._beta + self.growth)
        return Transitions(*(drawn[name] for name in Transitions._fields)), info["priority_weight"]

    def update(self, error: Tensor) -> None:
        self.buffer.update_priority(self.indices, error)


def fastis_replay(capacity: int, batch_size: int, total_steps: int, seed: int) -> Replay:
    method = Prioritized(alpha=ALPHA, beta=BETA, total_steps=total_steps)
    return PrioritizedReplay(capacity, batch_size, method, seed)


BUFFERS: dict[str, Callable[[int, int, int, int], Replay]] = {
    "uniform": Uniform,
    "fastis": fastis_replay,
}
if PrioritizedReplayBuffer is not None:
    BUFFERS["torchrl"] = TorchRL


# ---- variance of the gradient


def probe(steps: int = STEPS) -> list[Row]:
    """At each fifth of a run."""
    replay = fastis_replay(CAPACITY, BATCH, steps, 0)
    assert isinstance(replay, PrioritizedReplay)
    rows: list[Row] = []

    def watch(step: int, network: nn.Module, target: nn.Module) -> None:
        if (step + 1) % (steps // 5) == 0:
            rows.append(
                {"what": "probe", "step": step + 1, "factor": factors(replay, network, target)}
            )

    train(replay, steps, 0, watch=watch)
    return rows


def factors(replay: PrioritizedReplay, network: nn.Module, target: nn.Module) -> dict[str, float]:
    count = min(replay.count, replay.capacity)
    held = Transitions(*(column[:count] for column in replay.stored))
    with torch.no_grad():
        error = td_error(network, target, held)
        value = network(held.state).gather(1, held.action[:, None])[:, 0]
    aims = torch.stack([held.action.float(), value - error], 1)

    def loss(values: Tensor, aim: Tensor) -> Tensor:
        found = values.gather(1, aim[:, :1].long())[:, 0]
        return nn.functional.smooth_l1_loss(found, aim[:, 1])

    gradients = per_sample_gradients(network, loss, held.state, aims)
    score = error.abs().double()
    weights = {
        "ideal": torch.linalg.vector_norm(gradients, dim=1, dtype=torch.float64),
        "TD error": score,
        "its power alpha": score**ALPHA,
        "in force": replay.sampler.probabilities()[:count],
    }
    p = torch.stack([w.clamp(min=1e-6 * float(w.mean())) for w in weights.values()])
    traces = population_traces(None, p / p.sum(1, keepdim=True), grads=gradients)
    return dict(zip(weights, traces.effective_batch_size.tolist(), strict=True))


# ---- what the buffer costs a step


def measure_cost(capacity: int, batch_size: int, rounds: int = 40) -> Row:
    """Microseconds of every buffer: of a step with a new transition, and without."""
    cases: dict[str, Callable[[], None]] = {}
    for name, make in BUFFERS.items():
        torch.manual_seed(0)
        replay, error = make(capacity, batch_size, 10**6, 0), torch.rand(batch_size)
        fill(replay, capacity)

        def draw(replay: Replay = replay, error: Tensor = error) -> None:
            replay.sample()
            replay.update(error)

        def step(replay: Replay = replay, draw: Callable[[], None] = draw) -> None:
            replay.add((0.1, 0.2, 0.3, 0.4), 1, (0.1, 0.2, 0.3, 0.4), 1.0)
            draw()

        cases |= {f"{name}, step": step, f"{name}, draw and update": draw}
    times = interleaved(cases, rounds=rounds, turn=0.02)
    return {
        "what": "cost",
        "capacity": capacity,
        "batch_size": batch_size,
        "us": {name: times.us(name) for name in cases},
    }


def fill(replay: Replay, capacity: int) -> None:
    """The whole buffer with transitions, all of them with an error; at once, where it can be."""
    state = torch.rand(capacity, 4)
    columns = Transitions(
        state, torch.ones(capacity, dtype=torch.int64), state, torch.ones(capacity)
    )
    errors = torch.empty(capacity).log_normal_()
    if isinstance(replay, TorchRL):
        found = replay.buffer.extend(TensorDict(columns._asdict(), batch_size=[capacity]))
        replay.buffer.update_priority(found, errors)
        return
    assert isinstance(replay, Uniform | PrioritizedReplay)
    replay.stored, replay.count = columns, capacity
    if isinstance(replay, PrioritizedReplay):
        everything = torch.arange(capacity)
        replay.sampler.reset(everything)
        replay.sampler.update(fastis.Batch(everything, torch.ones(capacity)), errors)


# ---- learning


def measure_learning(name: str, lr: float, seed: int) -> Row:
    replay = BUFFERS[name](CAPACITY, BATCH, STEPS, seed)
    begin = time.process_time()
    returns = train(replay, STEPS, seed, lr=lr)
    seconds = time.process_time() - begin
    late = returns[-max(1, len(returns) // 4) :]
    return {
        "what": "learning",
        "buffer": name,
        "lr": lr,
        "seed": seed,
        "steps": STEPS,
        "seconds": seconds,
        "returns": returns,
        "mean_return": STEPS / len(returns),
        "late_return": fmean(late),
    }


def learning(path: Path, seeds: int) -> None:
    for name in BUFFERS:
        found = [stored(path, name, lr, 0) for lr in RATES]
        best = max(found, key=lambda row: row["mean_return"])["lr"]
        for seed in range(1, seeds):
            stored(path, name, best, seed)


def stored(path: Path, name: str, lr: float, seed: int) -> Row:
    """The row of that run, made if it isn't there."""
    wanted = {"what": "learning", "buffer": name, "lr": lr, "seed": seed, "steps": STEPS}
    for row in read_rows(path):
        if all(row.get(key) == value for key, value in wanted.items()):
            return row
    row = {**measure_learning(name, lr, seed), **provenance(torch.device("cpu"))}
    append_row(path, row)
    print(name, lr, seed, f"{row['mean_return']:.1f} {row['seconds']:.1f} s", flush=True)
    return row


# ---- the page


def probe_table(rows: list[Row]) -> str:
    latest = {row["step"]: row["factor"] for row in rows if row["what"] == "probe"}
    names = list(next(iter(latest.values()), {}))
    lines = [("step", *names)]
    lines += [
        (f"{step:,}", *(f"{factor[name]:.2f}" for name in names))
        for step, factor in sorted(latest.items())
    ]
    return markdown_table(lines, aligned=False)


def cost_table(rows: list[Row]) -> str:
    lines = [("capacity", "minibatch", "", "fastis, us", "TorchRL, us", "ratio", "uniform, us")]
    latest = {(row["capacity"], row["batch_size"]): row for row in rows if row["what"] == "cost"}
    for (capacity, batch_size), row in sorted(latest.items()):
        for what in ("step", "draw and update"):
            us = {
                name: row["us"].get(f"{name}, {what}") for name in ("fastis", "torchrl", "uniform")
            }
            peer = us["torchrl"]
            lines.append(
                (
                    f"{capacity:,}",
                    str(batch_size),
                    what,
                    f"{us['fastis']:.0f}",
                    "-" if peer is None else f"{peer:.0f}",
                    "-" if peer is None else f"{us['fastis'] / peer:.2f}",
                    f"{us['uniform']:.0f}",
                )
            )
    return markdown_table(lines, aligned=False)


def learning_table(rows: list[Row]) -> str:
    rows = [row for row in rows if row["what"] == "learning"]
    lines = [
        ("buffer", "rate", "seeds", "mean return", "return of the last quarter", "seconds a run")
    ]
    chosen: dict[str, dict[int, Row]] = {}
    for name in ("uniform", "torchrl", "fastis"):
        of_seed_0 = [row for row in rows if row["buffer"] == name and row["seed"] == 0]
        if not of_seed_0:
            continue
        lr = max(of_seed_0, key=lambda row: row["mean_return"])["lr"]
        found = [row for row in rows if row["buffer"] == name and row["lr"] == lr]
        chosen[name] = {row["seed"]: row for row in found}
        columns = [
            mean_sd([row[key] for row in found], 1)
            for key in ("mean_return", "late_return", "seconds")
        ]
        lines.append((name, f"{lr:g}", str(len(found)), *columns))
    text = markdown_table(lines, aligned=False)
    for peer in ("torchrl", "uniform"):
        if min(len(chosen.get(peer, ())), len(chosen.get("fastis", ()))) < 2:
            continue
        mean, half, seeds = paired_interval(
            *(
                {seed: row["mean_return"] for seed, row in chosen[of].items()}
                for of in ("fastis", peer)
            )
        )
        ratio = fmean(
            chosen["fastis"][seed]["seconds"] / chosen[peer][seed]["seconds"]
            for seed in chosen["fastis"].keys() & chosen[peer].keys()
        )
        text += (
            f"\n\nfastis less {peer}, mean return: {mean:+.1f} ± {half:.1f} ({seeds} seeds); "
            f"seconds of a run over {peer}'s: {ratio:.2f}."
        )
    return text


def paragraph(part: str) -> str:
    """What the module's docstring says of a part."""
    text = (__doc__ or "").split(f"``{part}``: ")[1].split("\n\n")[0]
    return (text[0].upper() + text[1:]).replace("\n", " ").replace("``", "`")


def report(folder: Path) -> None:
    rows = read_rows(folder / ROWS)
    parts = [
        "# Prioritized replay",
        "Written by `python bench/experiments/replay.py --report bench/results` from the rows in "
        "this folder; nothing is typed in. ± after a mean is the standard deviation over seeds; a "
        "difference is paired by seed, with Student's 95 % interval.",
        "## Probe: what can be gained",
        paragraph("probe"),
        probe_table(rows),
        "## What the buffer costs a step",
        "A full buffer of CartPole's transitions. `step`: one is added, a minibatch drawn and its "
        "priorities updated; the draw includes gathering the transitions.",
        cost_table(rows),
        "## Learning",
        paragraph("learning"),
        learning_table(rows),
        "```sh\npython bench/experiments/replay.py --seeds 5\n```",
        provenance_line(rows),
    ]
    (folder / PAGE).write_text("\n\n".join(parts) + "\n")


def main(argv: list[str] | None = None) -> int:
    parser = make_parser(__doc__)
    results = Path(__file__).resolve().parents[1] / "results"
    parser.add_argument("--json", type=Path, default=results / ROWS, help="file of the rows")
    parser.add_argument("--what", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--seeds", type=positive(int), default=5)
    parser.add_argument("--report", type=Path, metavar="FOLDER", help="write the page alone")
    args = parser.parse_args(argv)
    if args.report:
        report(args.report)
        return 0
    torch.set_num_threads(1)
    if "probe" in args.what:
        for row in probe():
            append_row(args.json, {**row, **provenance(torch.device("cpu"))})
    if "cost" in args.what:
        for capacity in SIZES:
            row = {**measure_cost(capacity, BATCH), **provenance(torch.device("cpu"))}
            append_row(args.json, row)
    if "learning" in args.what:
        learning(args.json, args.seeds)
    return 0


if __name__ == "__main__":
    sys.exit(main())
