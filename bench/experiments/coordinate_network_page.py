"""The page on coordinate networks, from result rows alone, and its figure."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

import matplotlib.pyplot as plt

from bench.experiments.coordinate_network import (
    BATCH,
    BENCHMARK,
    BUDGETS,
    IMAGES,
    INCUMBENTS,
    OURS,
    RATES,
    ROWS,
    SIZE,
    STEPS,
    WAYS,
    WIDTH,
    Fit,
    best_rate,
)
from bench.experiments.plot import PALETTE, STYLE, reference_line, save
from bench.experiments.tables import NOT_YET, mean_sd, paired_interval
from bench.provenance import provenance_line
from bench.report import Row, markdown_table, read_rows

PAGE, FIGURE = "COORDINATE_NETWORK.md", "coordinate_network.png"
PROBED_SCORES = {
    "gradient norm": "by the gradient's norm",
    "|residual|": "by the residual's norm",
    "loss": "by the loss",
    "fastis": "fastis' own",
}
INTRODUCTION = f"""# Coordinate networks

Written by `python bench/experiments/coordinate_network.py --report` from the rows in this folder;
nothing is typed in. A SIREN (Sitzmann et al. 2020; three hidden layers of {WIDTH}, w0 = 30) is
fitted to {SIZE} x {SIZE} pixels, {BATCH:,} of them a step: to "texture", smooth but for a star of
sharp edges and a fine grating, and to "photo", the portrait that comes with matplotlib; by Adam,
with a cosine to 0 at the end of each run. PSNR is that of all pixels, in dB. fastis is
`Sampler(method=EMAIS(warmup_epochs=1, least_gain=0))` on the norm of the residual; "annealed": its
correction goes linearly from 0 to 1; "stratified": pixels lie along a Z-order curve, and
`scheme="stratified"`. What the others do is in the code (`LastError`).
"""


def of(rows: Sequence[Row], kind: str) -> list[Row]:
    return [row for row in rows if row["benchmark"] == kind]


def probe_table(rows: Sequence[Row]) -> str:
    lines = [["image, step", "PSNR, dB", *PROBED_SCORES.values()]]
    for row in rows:
        final = row["final"]
        for i, step in enumerate(final["step"]):
            factors = [f"{final[score][i]:.2f}" for score in PROBED_SCORES]
            line = [f"{row['config']['image']}, {step}", f"{final['psnr'][i]:.1f}", *factors]
            lines.append(line)
    return markdown_table(lines, aligned=False)


def step_table(row: Row) -> str:
    lines = [["way", "ms a step", "relative to uniform (quartiles)"]]
    for way in WAYS:
        low, high = row["final"]["quartiles"][way]
        ratio = f"{row['final']['ratio'][way]:.2f} ({low:.2f} to {high:.2f})"
        lines.append([way, f"{row['final']['ms'][way]:.2f}", ratio])
    return markdown_table(lines, aligned=False)


class Fits:
    """The runs of an image by way and budget, at each way's chosen rate."""

    def __init__(self, rows: Sequence[Row], image: str) -> None:
        self.image = image
        self.by_config = {Fit(**row["config"]): row["final"] for row in rows}
        self.rates = {way: best_rate(list(rows), image, way) for way in WAYS}
        self.seeds = sorted({fit.seed for fit in self.by_config})

    def psnr(self, way: str, budget: float = 1.0) -> dict[int, float]:
        """By seed."""
        rate = self.rates[way]
        if rate is None:
            return {}
        fits = {seed: Fit(self.image, way, rate, budget, seed) for seed in self.seeds}
        return {s: self.by_config[fit]["psnr"] for s, fit in fits.items() if fit in self.by_config}

    @property
    def best_incumbent(self) -> str:
        found = {way: self.psnr(way) for way in INCUMBENTS}
        return max(found, key=lambda way: fmean(found[way].values()) if found[way] else 0.0)

    def quality_table(self) -> str:
        best = self.best_incumbent
        rates = [f"{lr:g}" for lr in RATES]
        lines = [["way", *(f"seed 0 at {rate}" for rate in rates), "chosen rate", "steps"]]
        lines[0] += ["PSNR, dB", f"minus {best}"]
        for way, chosen in self.rates.items():
            grid = [self.by_config.get(Fit(self.image, way, lr, 1.0, 0), {}) for lr in RATES]
            cells = ["-" if "psnr" not in f else f"{f['psnr']:.2f}" for f in grid]
            steps = next((str(f["steps"]) for f in grid if f), "-")
            found = self.psnr(way)
            line = [way, *cells, "-" if chosen is None else f"{chosen:g}", steps]
            line += [f"{mean_sd(list(found.values()), 2)} ({len(found)})" if found else "-"]
            lines.append([*line, difference(found, self.psnr(best)) if way != best else "-"])
        return markdown_table(lines, aligned=False)

    def curve(self, way: str, seed: int | None = None) -> list[tuple[float, float]]:
        """Part of the time and PSNR, ascending; of a seed, or the mean over seeds."""
        found = {budget: self.psnr(way, budget) for budget in (*BUDGETS, 1.0)}
        if seed is None:
            return [(budget, fmean(psnr.values())) for budget, psnr in found.items() if psnr]
        return [(budget, psnr[seed]) for budget, psnr in found.items() if seed in psnr]

    def time_table(self) -> str:
        budgets = (*BUDGETS, 1.0)
        lines = [["way", *(f"PSNR in {budget:g} of the time" for budget in budgets)]]
        lines[0] += [f"time to {way}'s" for way in INCUMBENTS]
        for way in OURS:
            curve = dict(self.curve(way))
            if len(curve) > 1:
                cells = [f"{curve[b]:.2f}" if b in curve else "-" for b in budgets]
                lines.append([way, *cells, *(self.time_cell(way, peer) for peer in INCUMBENTS)])
        return markdown_table(lines, aligned=False)

    def time_cell(self, way: str, peer: str) -> str:
        """Until ``way`` is as good as ``peer`` at the end, seed by seed."""
        times = {
            seed: time_to(self.curve(way, seed), target) for seed, target in self.psnr(peer).items()
        }
        reached = {seed: time for seed, time in times.items() if time is not None}
        if not reached or len(reached) < len(times):
            return f"reached by {len(reached)} of {len(times)} seeds" if times else "-"
        if max(reached.values()) <= min(BUDGETS):
            return f"at most {min(BUDGETS):g}"
        if len(reached) == 1:
            return f"{reached.popitem()[1]:.2f}"
        mean, half, _ = paired_interval(reached, dict.fromkeys(reached, 0.0))
        return f"{mean:.2f} ± {half:.2f}"


def difference(ours: dict[int, float], theirs: dict[int, float]) -> str:
    try:
        mean, half, _ = paired_interval(ours, theirs)
    except ValueError:
        return "-"
    return f"{mean:+.2f} ± {half:.2f}"


def time_to(curve: Sequence[tuple[float, float]], target: float) -> float | None:
    """The part of the time in which ``target`` is reached, linear between two budgets; the shortest
    budget where that is enough; None where the whole isn't."""
    before: tuple[float, float] | None = None
    for budget, value in curve:
        if value >= target:
            if before is None:
                return budget
            share = (target - before[1]) / (value - before[1])
            return before[0] + share * (budget - before[0])
        before = budget, value
    return None


def figure(fits: Sequence[Fits], out: Path) -> str:
    with plt.rc_context(STYLE):
        drawn, axes = plt.subplots(1, len(fits), figsize=(9, 3.4), layout="constrained")
        for axis, one in zip(axes, fits, strict=True):
            for colour, way in zip(PALETTE, OURS, strict=False):
                axis.plot(*zip(*one.curve(way), strict=True), "o-", color=colour, label=way)
            for way in INCUMBENTS:
                if found := one.psnr(way):
                    reference_line(axis, fmean(found.values()), way)
            axis.set_title(one.image)
            axis.set_xlabel("part of the time")
        axes[0].set_ylabel("PSNR, dB")
        axes[0].legend(frameon=False)
        save(drawn, out)
        plt.close(drawn)
    return f"![PSNR by the time given]({out.name})"


def write(folder: Path) -> Path:
    """Writes the page and its figure into ``folder``, from its rows."""
    rows = read_rows(folder / ROWS.name)
    probes, times, runs = (of(rows, f"{BENCHMARK}{kind}") for kind in ("_probe", "_step_times", ""))
    parts = [
        INTRODUCTION.rstrip(),
        "## Probe: what could be gained",
        "N_ems / B, the factor by which probabilities in proportion to a score (the loss with a "
        "tenth of uniform draws) divide the variance of a minibatch's gradient with respect to all "
        "parameters. The gradient norm's is the greatest there can be. From the exact gradients of "
        "a quarter of the pixels, along a run of fastis, correction 1.",
        probe_table(probes) if probes else NOT_YET,
        "## Steps",
        step_table(times[-1]) if times else NOT_YET,
    ]
    fits = [Fits(runs, image) for image in IMAGES]
    for one in fits:
        parts.append(f"## {one.image}: PSNR at equal processor time")
        if not one.psnr("uniform"):
            parts.append(NOT_YET)
            continue
        parts += [
            f"As many steps as fit the time of {STEPS} with uniform pixels. In brackets the number "
            "of seeds, which are paired in the differences (95 % intervals).",
            one.quality_table(),
            "How soon, with schedules that end with the shorter time, at the rate chosen for the "
            "whole; times are parts of it, by seed (95 % intervals), linear between two of them:",
            one.time_table(),
        ]
    if all(one.curve(way) for one in fits for way in OURS):
        parts.append(figure(fits, folder / FIGURE))
    parts.append("```sh\npython bench/experiments/coordinate_network.py\n```")
    parts.append(provenance_line(rows) if rows else "")
    out = folder / PAGE
    out.write_text("\n\n".join(part for part in parts if part) + "\n")
    return out
