"""What a training step costs with each method, against SGD-Uni ([K] Table 5).

All methods train in one process, each its own network, and take turns in short blocks of steps, so
that a slow phase of the machine hits all of them. A ratio is taken within a round, and the median
over rounds is reported. Measured after two epochs and a bit: past every warm-up.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from tqdm import tqdm

from bench import timing
from bench.experiments.config import RunConfig
from bench.experiments.datasets import Dataset
from bench.experiments.experiment import Settings
from bench.experiments.loop import Run
from bench.experiments.papers import VARIANTS
from bench.experiments.tables import NOT_YET
from bench.provenance import provenance, provenance_line
from bench.report import Row, markdown_table

BENCHMARK = "step_times"
REFERENCE = "uniform"


def configs(settings: Settings) -> list[RunConfig]:
    return [settings.config(method, options=options) for method, options in VARIANTS]


def setting(settings: Settings) -> dict[str, str]:
    """What tells one measurement from another of the same machine."""
    return {"benchmark": BENCHMARK, "data": settings.data, "device": settings.device}


def summary(times: timing.Times) -> dict[str, dict[str, object]]:
    """Median milliseconds, and median and quartiles of the ratio to uniform's, of every run."""
    result: dict[str, dict[str, object]] = {}
    for name in times:
        ratio = times.ratio(name, REFERENCE)
        result[name] = {
            "ms": round(times.us(name) / 1e3, 4),
            "ratio": round(ratio.median, 4),
            "ratio_quartiles": [round(end, 4) for end in ratio.quartiles],
        }
    return result


def measure(
    settings: Settings,
    dataset: Dataset,
    rounds: int = 40,
    steps: int = 25,
    warm_up: int | None = None,
) -> Row:
    """The row of one measurement.

    Parameters
    ----------
    rounds, steps : int
        how often every method has its turn (at least 2), and the length of a turn.
    warm_up : int, optional
        steps before the first turn; None: two epochs and 50.
    """
    dataset = dataset.to(settings.device)
    wanted = configs(settings)
    batch_size, num_samples = wanted[0].batch_size, len(dataset.y_train)
    if warm_up is None:
        warm_up = 2 * (num_samples // batch_size) + 50
    runs = {config.variant: Run(config, dataset) for config in wanted}
    for run in tqdm(runs.values(), desc="warm-up", leave=False):
        run.train(warm_up)
    steps_of = {name: lambda run=run: run.train(1) for name, run in runs.items()}
    clock = timing.clock_of(torch.device(settings.device))
    times = timing.interleaved(steps_of, rounds=rounds, calls=steps, clock=clock)
    return {
        **setting(settings),
        "model": wanted[0].model,
        "batch_size": batch_size,
        "num_samples": num_samples,
        "rounds": rounds,
        "steps_per_round": steps,
        "methods": summary(times),
        **provenance(torch.device(settings.device)),
    }


def section(rows: Sequence[Row]) -> str:
    """The results page's section of these rows."""
    parts = ["## table5: Time per step of each method ([K] Table 5)"]
    parts.append(
        "All methods take turns in one process after two epochs of training. The ratio to SGD-Uni "
        "(`uniform`) is taken within a round: median and quartiles over rounds. Presampling's own "
        "forward pass comes and goes with its tau; with a threshold of 0 it is there at every step."
    )
    for row in rows:
        lines = [["method", "ms/step", "ratio", "quartiles"]]
        lines += [
            [
                name,
                f"{found['ms']:.2f}",
                f"{found['ratio']:.3f}",
                "{:.3f} to {:.3f}".format(*found["ratio_quartiles"]),
            ]
            for name, found in row["methods"].items()
        ]
        parts.append(
            f"**{row['model']}, {row['num_samples']} samples ({row['data']}), minibatch "
            f"{row['batch_size']}, {row['rounds']} rounds of {row['steps_per_round']} steps**"
        )
        parts.append(markdown_table(lines, aligned=False))
        parts.append(provenance_line([{**row, "jobs": 1}]))
    if not rows:
        parts.append(NOT_YET)
    last = rows[-1] if rows else {"data": "fashion_mnist.npz", "device": "cpu"}
    options = f" --data {last['data']}" if last["data"] != "embedded" else ""
    options += f" --device {last['device']}" if last["device"] != "cpu" else ""
    parts.append(f"```sh\npython bench/experiments/reproduce.py table5{options}\n```")
    return "\n\n".join(parts)
