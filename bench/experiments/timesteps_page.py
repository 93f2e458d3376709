"""The page on diffusion timesteps, from result rows alone.

    python bench/experiments/timesteps_page.py

Rows: bench/results/timesteps.jsonl, of bench/experiments/timesteps.py.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from itertools import pairwise
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[2]))

from bench.experiments.tables import NOT_YET, STUDENT, mean_sd, paired_interval
from bench.experiments.timesteps import METHODS, RATES, Config, best_rate
from bench.provenance import provenance_line
from bench.report import Row, markdown_table, read_rows

RESULTS = Path(__file__).resolve().parents[1] / "results"
PAGE, ROWS = "TIMESTEPS.md", "timesteps.jsonl"
INCUMBENTS = METHODS[:3]
INTRODUCTION = """# Diffusion timesteps

Written by `python bench/experiments/timesteps_page.py` from the rows in this folder; nothing is
typed in. How timesteps are drawn while a small diffusion model is trained (an MLP-mixer on images
of 16 x 16, Adam, the rate falling linearly to 0): uniformly; by improved-diffusion's
loss-second-moment resampling (p ~ sqrt(E[loss^2]), the last 10 losses of each timestep, uniform
until all have them, which is much of a run as short as these; "of 2": the last 2, which shortens
that); by fastis' `TimestepSampler` from the same losses; and by it from the norm of the gradient at
the model's output. Objectives are those of Nichol & Dhariwal 2021: "simple", the error of the
predicted noise; "vlb", the variational bound with a learned variance, in bits per dimension;
"hybrid", simple + 0.001 vlb. Weights keep all of them unbiased.
"""
PROBE = """## What there is to gain

N_ems / B: how many times larger a uniform minibatch would have to be for as little variance in the
gradient of all parameters. One network trains with uniform timesteps while the samplers look on.
Its gradients are computed for {images} images at each of the timesteps, so a figure is exact but
for the choice of images and noise; the mean gradient counts as 0. "Ideal" is p ~ sqrt(E|g|^2),
"by loss" sqrt(E[loss^2]) and "by output" the same of the gradient at the output, each with
expectations of the moment, found on half of the images and judged on the others; the last three
columns are the samplers' own tables. These know the timesteps that the run has drawn by then: one
that is missing has the mean weight, which decides where a single one is most of the variance. (A
sampler that draws for itself begins with all of them.)"""
PROBE_COLUMNS = {
    "ideal": "ideal",
    "ideal, image and timestep": "ideal, by image too",
    "by loss": "by loss",
    "by gradient at the output": "by output",
    "loss-second-moment": "loss-second-moment",
    "fastis by loss": "fastis by loss",
    "fastis by gradient": "fastis by gradient",
}


def setting_of(row: Row) -> Config:
    """What rows have in common that are compared."""
    return replace(Config(**row["config"]), method="", lr=0.0, seed=0, steps=0)


def described(setting: Config) -> str:
    return (
        f"{setting.objective}, {setting.schedule} schedule, T = {setting.num_timesteps}, "
        f"minibatches of {setting.batch_size}, {setting.data}"
    )


# ---- the probe


def probe_section(rows: Sequence[Row]) -> str:
    probes = [row for row in rows if row["benchmark"] == "timesteps_probe"]
    if not probes:
        return f"## What there is to gain\n\n{NOT_YET}"
    from bench.experiments.timesteps import IMAGES_A_STEP

    lines = [["objective, schedule", "step", *PROBE_COLUMNS.values()]]
    for row in probes:
        config = Config(**row["config"])
        for at, step in enumerate(row["steps"]):
            cells = [f"{row['gain'][name][at]:.3g}" for name in PROBE_COLUMNS]
            lines.append([f"{config.objective}, {config.schedule}", str(step), *cells])
    return "\n\n".join([
        PROBE.format(images=IMAGES_A_STEP),
        markdown_table(lines, aligned=False),
        provenance_line(probes),
    ])  # fmt: skip


# ---- the comparison


def _sizes(row: Row) -> list[Any]:
    """What a step's cost depends on, beside the method."""
    return [row["config"][name] for name in ("dataset", "num_timesteps", "batch_size", "width")]


class Comparison:
    """The runs of one setting."""

    def __init__(self, setting: Config, rows: Sequence[Row], costs: Sequence[Row]) -> None:
        self.setting = setting
        self.rows = [row for row in rows if setting_of(row) == setting]
        self.steps = max(row["config"]["steps"] for row in self.rows)
        self.methods = [m for m in METHODS if self._grid(m)]
        self.cost = next((row["ms"] for row in costs if _sizes(row) == _sizes(self.rows[0])), None)

    def _grid(self, method: str) -> dict[float, float]:
        """Test losses by rate, of seed 0 at full length."""
        return {
            row["config"]["lr"]: row["test"][self.setting.objective]
            for row in self.rows
            if (row["config"]["method"], row["config"]["seed"], row["config"]["steps"])
            == (method, 0, self.steps)
        }

    def rate(self, method: str) -> float:
        return best_rate(self.rows, replace(self.setting, method=method, steps=self.steps))

    def losses(self, method: str, steps: int) -> dict[int, float]:
        """Test losses by seed, at the method's best rate."""
        rate = self.rate(method)
        return {
            row["config"]["seed"]: row["test"][self.setting.objective]
            for row in self.rows
            if (row["config"]["method"], row["config"]["lr"], row["config"]["steps"])
            == (method, rate, steps)
        }

    def lengths(self, method: str) -> list[int]:
        return sorted({
            row["config"]["steps"] for row in self.rows if row["config"]["method"] == method
        })  # fmt: skip

    def incumbents(self) -> list[str]:
        return [method for method in INCUMBENTS if method in self.methods]

    def time_ratio(self, method: str, peer: str, seed: int) -> float:
        """Of the processor time that the method needs for what a peer ends with; NaN where it does
        not come to that. Between lengths log(steps) is linear in the loss; below the shortest it
        counts as that."""
        target = self.losses(peer, self.steps)[seed]
        found = [(n, self.losses(method, n).get(seed, math.nan)) for n in self.lengths(method)]
        needed = math.nan
        if found[0][1] <= target:
            needed = found[0][0]
        else:
            for (n0, before), (n1, after) in pairwise(found):
                if after <= target < before:
                    part = (before - target) / (before - after)
                    needed = n0 * (n1 / n0) ** part
                    break
        return needed / self.steps * self.relative_cost(method, peer)

    def relative_cost(self, method: str, peer: str) -> float:
        """Of a step; where it is not yet measured all steps cost the same."""
        return 1.0 if self.cost is None else self.cost[method] / self.cost[peer]

    def grid_table(self) -> str:
        lines = [["seed 0", *(f"rate {rate:g}" for rate in RATES)]]
        for method in self.methods:
            grid = self._grid(method)
            lines.append([method, *(f"{grid[r]:.4f}" if r in grid else "-" for r in RATES)])
        return markdown_table(lines, aligned=False)

    def results_table(self) -> str:
        lengths = sorted({n for m in self.methods for n in self.lengths(m)})
        lines = [["method", "rate", "ms a step", *(f"{n} steps" for n in lengths)]]
        for method in self.methods:
            cells = [
                method,
                f"{self.rate(method):g}",
                "-" if self.cost is None else f"{self.cost[method]:.2f}",
            ]
            for n in lengths:
                losses = self.losses(method, n)
                cells.append(mean_sd(list(losses.values()), 4) if losses else "-")
            lines.append(cells)
        return markdown_table(lines, aligned=False)

    def time_table(self) -> str:
        peers = self.incumbents()
        lines = [["time of, to the end of", *peers]]
        lines += [[m, *(self.time_cell(m, peer) for peer in peers)] for m in self.methods]
        return markdown_table(lines, aligned=False)

    def time_cell(self, method: str, peer: str) -> str:
        """Geometric mean of the ratios over seeds, and its 95 % interval."""
        if method == peer:
            return "1"
        seeds = self.losses(method, self.steps).keys() & self.losses(peer, self.steps).keys()
        ratios = [self.time_ratio(method, peer, seed) for seed in seeds]
        if not ratios or any(map(math.isnan, ratios)):
            return "not reached"
        shortest = self.lengths(method)[0]
        cost = self.relative_cost(method, peer)
        if all(ratio <= shortest / self.steps * cost for ratio in ratios):
            return f"at most {ratios[0]:.2f}"
        if len(ratios) < 2:
            return f"{ratios[0]:.2f}"
        logs = [math.log(ratio) for ratio in ratios]
        half = STUDENT[len(logs) - 2] * stdev(logs) / len(logs) ** 0.5
        low, mid, high = (math.exp(fmean(logs) + k * half) for k in (-1, 0, 1))
        return f"{mid:.2f} ({low:.2f} to {high:.2f})"

    def differences(self) -> str:
        """Of the last method from the others, paired by seed."""
        ours = self.methods[-1]
        parts = []
        for method in self.methods[:-1]:
            try:
                mean, half, seeds = paired_interval(
                    self.losses(ours, self.steps), self.losses(method, self.steps)
                )
            except ValueError:
                continue
            parts.append(f"{mean:+.4f} ± {half:.4f} from {method} ({seeds} seeds)")
        return f"Test loss of {ours} at {self.steps} steps: {'; '.join(parts)}." if parts else ""

    def section(self) -> str:
        command = "python bench/experiments/timesteps.py compare --data FILE.npz"
        options = f"--objective {self.setting.objective} --schedule {self.setting.schedule}"
        return "\n\n".join(
            part
            for part in [
                f"## {described(self.setting)}",
                "Test loss, over all timesteps. " + COMPARISON,
                self.results_table(),
                self.differences(),
                TIMES,
                self.time_table(),
                "The rates were chosen by seed 0:",
                self.grid_table(),
                f"```sh\n{command} {options} --steps {self.steps}\n```",
                provenance_line(self.rows),
            ]
            if part
        )


COMPARISON = (
    "Mean and standard deviation over seeds; every length is a run with a schedule of its own. A "
    "step's cost is processor time on one thread, with the methods taking turns. Edge: of the grid "
    "of rates; one beyond may be better still."
)
TIMES = (
    "Processor time (steps times their cost) that a row's method needs to come to the test loss "
    "that a column's has at full length, as a part of that one's: geometric mean over seeds, with "
    "a 95 % interval. Between lengths log(steps) is taken to be linear in the loss."
)


def write(folder: Path) -> Path:
    rows = read_rows(folder / ROWS)
    runs = [row for row in rows if row["benchmark"] == "timesteps"]
    costs = [row for row in rows if row["benchmark"] == "timesteps_cost"]
    settings: dict[Any, Config] = {tuple(asdict(s).items()): s for s in map(setting_of, runs)}
    parts = [INTRODUCTION.rstrip(), probe_section(rows)]
    parts += [Comparison(setting, runs, costs).section() for setting in settings.values()]
    page = folder / PAGE
    page.write_text("\n\n".join(parts) + "\n")
    return page


if __name__ == "__main__":
    print(write(RESULTS))
