"""The page on collocation points, from result rows alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

from bench.experiments.equations import EQUATIONS
from bench.experiments.pinn import (
    CONTENDERS,
    COSTS,
    INCUMBENTS,
    MIXED_IN,
    OURS,
    PROBE,
    RATES,
    RUN,
    SCORES,
)
from bench.experiments.tables import NOT_YET, paired_interval
from bench.provenance import provenance_line
from bench.report import Row, markdown_table, read_rows

PAGE, ROWS = "PINN.md", "pinn.jsonl"
TITLES = {"burgers": "Burgers", "allen_cahn": "Allen-Cahn"}


def rates(equation: str) -> str:
    return f"{TITLES[equation]}: {', '.join(f'{rate:g}' for rate in RATES[equation])}"


INTRODUCTION = f"""# Collocation points of physics-informed networks

Written by `python bench/experiments/pinn.py --report bench/results` from the rows in this folder;
nothing is typed in. Networks of four layers of 32 (tanh) learn Burgers' equation (viscosity
0.01/pi) and Allen-Cahn's (diffusion 0.001) from the mean square of the residual at 10,000 random
points; initial and boundary values are built in. Minibatches of 128, Adam with a cosine schedule
down to 0, float32, one thread. The error is the relative L2 distance to the solution, computed in
float64, on a grid of 101 times and 257 places. Runs are short, a few seconds: errors are far from
what networks of this kind reach in long ones, and scatter from seed to seed.

Every contender has the same processor time: as many steps as fit, by the costs below. All were run
on the same grid of rates ({"; ".join(map(rates, EQUATIONS))}); shown is the
rate with the least geometric mean of the errors, of those that were run with most seeds. That
flatters all contenders alike.

What the contenders are: `bench/experiments/collocation.py`, `pinn.py`. All draw from one pool of
points, but for *new points*, each of which is used once. *RAD* (Wu et al. 2023, arXiv 2207.10289)
draws with p ~ |r|^k / mean + 1 and no coefficients, from residuals that are computed anew every 500
steps; in the paper each step has the whole of a smaller set. *Rescored* (Nabian et al. 2021, arXiv
2104.12325) draws with p ~ r^2 and coefficients, every 1,000 steps anew; a tenth of the mean is
added, without which coefficients have no bound.

The scores: *last* is the norm of the gradient of r^2 by the weights of the last layer, *norm* by
all parameters, *output* by the network's output and its derivatives, *residual* |r|, *loss* r^2.
*Defaults* are fastis', *no pauses* has `least_gain=0`, *refreshed* also scores the whole pool every
200 steps (`refresh_every=200, tau=200`). *Rate*: the learning rate follows N_ems, at most twice the
schedule's. *Correction 0*: no coefficients.
"""


def probe_section(rows: Sequence[Row]) -> str:
    parts = ["## The score decides"]
    parts.append(
        "N_ems / B: what the variance of the gradient by all parameters is divided by, exactly, "
        "over the whole pool at a step of a run, drawn in proportion to each score "
        f"({MIXED_IN:.0%} uniform mixed in), and for the sampler's own probabilities of that "
        "moment (in force)."
    )
    if not rows:
        return "\n\n".join([*parts, NOT_YET])
    lines = [["equation, trained with", "step", "error", *SCORES, "in force"]]
    for row in rows:
        config, gain = row["config"], row["gain"]
        name = f"{TITLES[config['equation']]}, {config['contender']}"
        cells = (f"{gain[way]:.2f}" if way in gain else "-" for way in (*SCORES, "in force"))
        lines.append([name, str(row["step"]), f"{row['error']:.3f}", *cells])
    return "\n\n".join([*parts, markdown_table(lines, aligned=False), provenance_line(rows)])


def costs_section(rows: Sequence[Row]) -> str:
    parts = ["## What a step costs"]
    if not rows:
        return "\n\n".join([*parts, NOT_YET])
    row = rows[-1]
    lines = [["contender", "us a step", "x fixed points (quartiles)"]]
    for label, (low, middle, high) in row["ratio"].items():
        lines.append([label, f"{row['us'][label]:.0f}", f"{middle:.2f} ({low:.2f} to {high:.2f})"])
    text = (
        f"Processor time of the thread, medians of turns of {row['calls']} steps, with all that "
        "comes once in a while. Other work shared the machine: only the ratios carry over."
    )
    parts += [text, markdown_table(lines, aligned=False), provenance_line([row])]
    return "\n\n".join(parts)


class Comparison:
    """The runs of one equation: lengths are steps on fixed points, of which all have the time."""

    def __init__(self, rows: Sequence[Row], equation: str) -> None:
        self.rows = [
            row for row in rows if row["benchmark"] == RUN and row["config"]["equation"] == equation
        ]
        self.lengths = sorted({row["base_steps"] for row in self.rows})

    def rate(self, label: str, length: int) -> float | None:
        """The one of least error, in the geometric mean, of those that were run with most seeds."""
        by_rate: dict[float, list[float]] = {}
        for row in self.of(label, length):
            error = row["error"] if math.isfinite(row["error"]) else 1e9  # diverged
            by_rate.setdefault(row["config"]["lr"], []).append(math.log(error))
        if not by_rate:
            return None
        most = max(map(len, by_rate.values()))
        return min((fmean(logs), rate) for rate, logs in by_rate.items() if len(logs) == most)[1]

    def of(self, label: str, length: int) -> list[Row]:
        return [
            row
            for row in self.rows
            if row["config"]["contender"] == label and row["base_steps"] == length
        ]

    def errors(self, label: str, length: int) -> dict[int, float]:
        """By seed, at the chosen rate."""
        rate = self.rate(label, length)
        found = [row for row in self.of(label, length) if row["config"]["lr"] == rate]
        return {row["config"]["seed"]: row["error"] for row in found}

    def error(self, label: str, length: int) -> float:
        """The geometric mean over seeds; infinite where there is none."""
        errors = self.errors(label, length).values()
        return math.exp(fmean(map(math.log, errors))) if errors else math.inf

    @property
    def best_incumbent(self) -> str | None:
        """At the longest runs."""
        if not self.lengths:
            return None
        last = self.lengths[-1]
        best = min(INCUMBENTS, key=lambda label: self.error(label, last))
        return best if math.isfinite(self.error(best, last)) else None

    def time_ratio(self, label: str) -> tuple[float, float, float] | None:
        """Part of the longest runs' time that ``label`` needs to the best incumbent's error there:
        from the means over seeds, between the least and the most of single seeds; None where not
        reached. Lengths between those run are interpolated, in logarithms."""
        best = self.best_incumbent
        if best is None:
            return None
        target = self.error(best, self.lengths[-1])
        ran = [length for length in self.lengths if self.errors(label, length)]
        seeds = set.intersection(*(set(self.errors(label, n)) for n in ran)) if ran else set()
        means = reached([(n, self.error(label, n)) for n in ran], target)
        if means is None:
            return None
        each = [reached([(n, self.errors(label, n)[s]) for n in ran], target) for s in seeds]
        ratios = [math.inf if t is None else t / self.lengths[-1] for t in each]
        return min(ratios), means / self.lengths[-1], max(ratios)


def reached(curve: Sequence[tuple[int, float]], target: float) -> float | None:
    """At which length a curve of (length, error) is down at ``target``: the shortest there is where
    all are below, None where none is."""
    for (n, error), (m, lower) in zip([curve[0], *curve], curve, strict=False):
        if lower <= target:
            if error <= target:
                return float(m)
            share = math.log(error / target) / math.log(error / lower)
            return n * (m / n) ** share
    return None


def log_ratio_cell(first: dict[int, float], second: dict[int, float]) -> str:
    """first / second, paired by seed, with Student's 95 % interval."""
    if first == second or len(first.keys() & second.keys()) < 3:  # of two: no interval to speak of
        return "-"
    logs = [{seed: math.log(error) for seed, error in errors.items()} for errors in (first, second)]
    try:
        mean, half, _ = paired_interval(*logs)
    except ValueError:
        return "-"
    return f"{math.exp(mean):.2f} ({math.exp(mean - half):.2f} to {math.exp(mean + half):.2f})"


def time_cell(result: Comparison, label: str) -> str:
    """The ratio and its range; "<=" where the shortest runs are better already."""
    ratio = result.time_ratio(label)
    if ratio is None or not result.of(label, result.lengths[0]) or len(result.lengths) == 1:
        return "-" if ratio else "not reached"
    shortest = result.lengths[0] / result.lengths[-1]
    low, middle, high = (
        "never" if r == math.inf else f"{'<= ' if r == shortest else ''}{r:.2f}" for r in ratio
    )
    return f"{middle} ({low} to {high})"


def comparison_section(rows: Sequence[Row], equation: str) -> str:
    result = Comparison(rows, equation)
    parts = [f"## {TITLES[equation]}"]
    best = result.best_incumbent
    if best is None:
        return "\n\n".join([*parts, NOT_YET])
    last = result.lengths[-1]
    target = result.errors(best, last)
    missing: list[str] = []
    lines = [["contender", "rate", "steps", "seeds", "error", "least to most"]]
    lines[0] += ["x the best incumbent's error", "x its time to that error"]
    for label in CONTENDERS:
        errors = result.errors(label, last)
        if not errors:
            missing.append(label)
            continue
        steps = result.of(label, last)[0]["config"]["steps"]
        shown = f"**{label}**" if label == best else label
        cells = [shown, f"{result.rate(label, last):g}", str(steps), str(len(errors))]
        cells += [f"{result.error(label, last):.4f}"]
        cells += [f"{min(errors.values()):.4f} to {max(errors.values()):.4f}"]
        cells += [log_ratio_cell(errors, target)]
        cells += [time_cell(result, label) if label in OURS else "-"]
        lines.append(cells)
    parts.append(
        f"The time of {last:,} steps on fixed points. Errors are geometric means over seeds; "
        "ratios are paired by seed, with Student's 95 % interval of the logarithm. The best "
        f"incumbent is {best}."
    )
    if len(result.lengths) > 1:
        parts.append(
            "The time to its error is interpolated between runs of several lengths "
            f"({', '.join(f'{n / last:.2f}' for n in result.lengths)} of the time), whose "
            "schedules end there; in brackets the least and the most of single seeds."
        )
    parts.append(markdown_table(lines, aligned=False))
    parts += [f"Not yet measured: {', '.join(missing)}."] if missing else []
    parts += [*shorter(result), provenance_line(result.rows)]
    return "\n\n".join(parts)


def shorter(result: Comparison) -> list[str]:
    """The table of errors by length, of the contenders that were run at several."""
    several = [label for label in CONTENDERS if sum(map(bool, at_lengths(result, label))) > 1]
    if not several:
        return []
    lines = [
        ["error after", *(f"{n / result.lengths[-1]:.2f} of the time" for n in result.lengths)]
    ]
    for label in several:
        cells = (
            f"{result.error(label, n):.4f}" if e else "-"
            for n, e in zip(result.lengths, at_lengths(result, label), strict=True)
        )
        lines.append([label, *cells])
    return [markdown_table(lines, aligned=False)]


def at_lengths(result: Comparison, label: str) -> list[dict[int, float]]:
    return [result.errors(label, n) for n in result.lengths]


def write(folder: Path) -> Path:
    """The page, from the rows in the folder."""
    rows = read_rows(folder / ROWS)
    kinds = {kind: [r for r in rows if r["benchmark"] == kind] for kind in (COSTS, PROBE)}
    parts = [INTRODUCTION.rstrip(), probe_section(kinds[PROBE])]
    parts += [comparison_section(rows, equation) for equation in EQUATIONS]
    parts += [costs_section(kinds[COSTS])]
    page = folder / PAGE
    page.write_text("\n\n".join(parts) + "\n")
    return page
