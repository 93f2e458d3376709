"""The page on distributed scoring, and its figures, from result rows alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import fmean

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes

from bench.experiments.plot import PALETTE, STYLE, log_axis, reference_line, save
from bench.experiments.scoring import ScoringConfig
from bench.provenance import provenance_line
from bench.report import Row, markdown_table, read_rows

PAGE, ROWS, TRANSPORT = "SCORING.md", "scoring.jsonl", "scoring_transport.jsonl"
TRACES = ("uniform", "stale", "ideal")
INTRODUCTION = """# Scores from other processes

Written by `python bench/experiments/scoring.py --report bench/results` from the rows in this
folder; nothing is typed in. It shows in kind what Alain et al. 2016 (arXiv 1511.06481) show: the
variance of ideal, stale and uniform sampling along a run, with one trainer and two scorers, and
what the constant and the limit of staleness do. Theirs are gradients of all parameters and long
runs; here they are gradients at the logits, on 10,000 images.

Traces are exact, from the scores of all samples at each twentieth of a run: `ideal` is the trace of
the covariance with probabilities in proportion to the scores of that moment, `stale` with those in
force, `uniform` with equal ones. S = (stale - ideal) / (uniform - ideal), with the traces' means
over the second half of a run and over seeds: 0 for ideal and 1 for uniform sampling. In simulated
runs a scorer finishes a minibatch every so many steps of the trainer, which makes a run the same on
any machine.
"""


VARIED = ("method", "constant", "max_age", "steps_per_minibatch", "processes")
NUM_SAMPLES = 10_000  # of the embedded data


def second_half(rows: Sequence[Row], name: str) -> float:
    """The mean over seeds and the second half of the evaluations."""
    curves = [row["curves"][name] for row in rows]
    return fmean(value for curve in curves for value in curve[len(curve) // 2 :])


def efficiency(rows: Sequence[Row]) -> float:
    ideal, stale, uniform = (second_half(rows, name) for name in ("ideal", "stale", "uniform"))
    return (stale - ideal) / (uniform - ideal)


def of(rows: Sequence[Row], **wanted: object) -> list[Row]:
    """The rows of a setting that differs from the default in ``wanted`` alone."""
    setting = {**asdict(ScoringConfig()), **wanted}
    return [row for row in rows if all(row["config"][name] == setting[name] for name in VARIED)]


def sweep(config: Row) -> str:
    """How many steps of the trainer the scorers need for all samples."""
    if not config["steps_per_minibatch"]:
        return "no scorers"
    minibatches = NUM_SAMPLES / config["scorer_batch"] / config["scorers"]
    return f"{minibatches * config['steps_per_minibatch']:.0f}"


Setting = tuple[str, dict[str, object]]
CONSTANTS: list[Setting] = [(f"{c:g}", {"constant": c}) for c in (0.0, 0.03, 0.1, 0.3, 1.0)]
LIMITS: list[Setting] = [("none", {}), *((f"{a}", {"max_age": a}) for a in (320, 160, 80, 40))]
SPEEDS: list[Setting] = [
    (f"{steps or '-'}", {"steps_per_minibatch": steps}) for steps in (1, 4, 16, 0)
]
METHODS: list[Setting] = [
    ("uniform, without replacement", {"method": "scan", "steps_per_minibatch": 0}),
    ("distributed, no scorers", {"steps_per_minibatch": 0}),
    ("distributed", {}),
    ("emais, no scorers", {"method": "emais", "steps_per_minibatch": 0}),
    ("emais", {"method": "emais"}),
    ("distributed, three processes", {"processes": True}),
    ("emais, three processes", {"method": "emais", "processes": True}),
]


def table(rows: Sequence[Row], what: str, settings: Sequence[Setting]) -> str:
    head = [what, "steps a sweep", "ideal", "stale", "uniform", "S", "train loss", "test error, %"]
    lines = [head]
    for label, wanted in settings:
        found = of(rows, **wanted)
        if not found:
            lines.append([label, *["not yet measured"], *["-"] * 6])
            continue
        config = found[0]["config"]
        traces = (f"{second_half(found, name):.4f}" for name in ("ideal", "stale", "uniform"))
        loss, error = (fmean(r["final"][k] for r in found) for k in ("train_loss", "test_error"))
        steps = "as it comes" if config["processes"] else sweep(config)
        s = f"{efficiency(found):.2f}"
        lines.append([label, steps, *traces, s, f"{loss:.3f}", f"{error:.1f}"])
    return markdown_table(lines, aligned=False)


def processes_table(rows: Sequence[Row]) -> str:
    lines = [["method", "seed", "scores folded", "age of their parameters, steps"]]
    lines[0] += ["ms a step", "of these publish and fold", "monitored S", "exact S"]
    for row in rows:
        if not row["config"]["processes"]:
            continue
        final = row["final"]
        each = 1e3 / row["config"]["iterations"]
        step, part = (each * final[k] for k in ("seconds", "seconds_of_publish_and_fold"))
        ideal, stale, uniform = (
            second_half([row], f"monitored_{name}") for name in ("ideal", "stale", "uniform")
        )
        lines.append(
            [
                *(row["config"]["method"], str(row["config"]["seed"]), f"{final['folded']:,.0f}"),
                *(f"{final['mean_age_of_parameters']:.1f}", f"{step:.1f}", f"{part:.1f}"),
                *(f"{(stale - ideal) / (uniform - ideal):.2f}", f"{efficiency([row]):.2f}"),
            ]
        )
    return markdown_table(lines, aligned=False)


def transport_table(rows: Sequence[Row]) -> str:
    """The last row of each measurement."""
    last = {(row["means"], row["event"]): row for row in rows}
    lines = [["means", "peer 1", "longest call, ms", "heard at the end", "lost"]]
    happened = {
        "killed": "killed, started again",
        "hung": "stopped, goes on",
        "late": "a third one comes",
    }
    for (means, event), row in last.items():
        heard = ", ".join(row["heard_at_the_end"]) or "none"
        lost = "; ".join(f"{p}: {why.split(' [')[0]}" for p, why in row["lost"].items())
        call = f"{row['longest_call_ms']:,.0f}"
        lines.append([means, happened[event], call, heard, lost or "-"])
    return markdown_table(lines, aligned=False)


# ---- figures


def mean_curve(rows: Sequence[Row], name: str) -> tuple[list[int], np.ndarray]:
    curves = np.array([row["curves"][name] for row in rows], dtype=float)
    return rows[0]["curves"]["step"], curves.mean(0)


def draw_traces(axes: Axes, rows: Sequence[Row], title: str) -> None:
    for name, colour in zip(TRACES, PALETTE[1::-1] + PALETTE[2:3], strict=True):
        axes.plot(*mean_curve(rows, name), color=colour, label=name)
        axes.plot(*mean_curve(rows, f"monitored_{name}"), ".", color=colour, alpha=0.6)
    axes.set_title(title)
    axes.set_xlabel("iteration")


def traces_figure(rows: Sequence[Row], out: Path, text: str) -> str:
    panels = [
        ("simulated, 156 steps a sweep", of(rows)),
        ("simulated, 625 steps a sweep", of(rows, steps_per_minibatch=16)),
        ("three processes", of(rows, processes=True)),
    ]
    if not all(found for _, found in panels):
        return ""
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(1, 3, figsize=(11, 3.6), sharey=True, layout="constrained")
        for axis, (title, found) in zip(axes, panels, strict=True):
            draw_traces(axis, found, title)
        curves = [mean_curve(found, name)[1] for _, found in panels for name in TRACES]
        axes[0].set_ylim(np.min(curves) / 1.1, np.max(curves) * 1.1)
        log_axis(axes[0])
        axes[0].set_ylabel("trace (dots: as monitored)")
        axes[0].legend(frameon=False)
        save(figure, out)
        plt.close(figure)
    return f"![{text}]({out.name})"


def options_figure(rows: Sequence[Row], out: Path, text: str) -> str:
    panels = [
        ("constant, of the mean score", CONSTANTS),
        ("limit of staleness, steps", LIMITS),
        ("steps for a scorer's minibatch", SPEEDS[:-1]),
    ]
    if not all(of(rows, **wanted) for _, settings in panels for _, wanted in settings):
        return ""
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(1, 3, figsize=(11, 3.2), sharey=True, layout="constrained")
        for axis, (title, settings) in zip(axes, panels, strict=True):
            values = [efficiency(of(rows, **wanted)) for _, wanted in settings]
            axis.plot([label for label, _ in settings], values, "o-", color=PALETTE[0])
            axis.set_title(title)
            axis.set_ylim(0, 1.05)
            reference_line(axis, 1.0, "uniform sampling")
        axes[0].set_ylabel("efficiency S")
        save(figure, out)
        plt.close(figure)
    return f"![{text}]({out.name})"


# ---- the page


def write(folder: Path) -> Path:
    """Writes the page and its figures into ``folder``, from its rows."""
    rows, transport = read_rows(folder / ROWS), read_rows(folder / TRANSPORT)
    drawn = [
        figure(rows, folder / name, text)
        for figure, name, text in (
            (traces_figure, "scoring_traces.png", "Traces along a run"),
            (options_figure, "scoring_options.png", "S by constant, limit and speed"),
        )
    ]
    base = rows[0]["config"] if rows else asdict(ScoringConfig())
    seeds = len({row["config"]["seed"] for row in rows})
    parts = [
        INTRODUCTION.rstrip(),
        f"**{base['model']}, {base['data']}, SGD with momentum 0.9 at rate {base['lr']:g}, "
        f"{base['iterations']} iterations at minibatch {base['batch_size']}, {seeds} seed(s); "
        f"{base['scorers']} scorers, minibatches of {base['scorer_batch']}, parameters taken every "
        f"{base['refresh_every']} of them**",
        "## Along a run",
        drawn[0],
        table(rows, "method", METHODS),
        "## The constant",
        "c as a part of the mean score; all else as in the run above.",
        table(rows, "constant", CONSTANTS),
        "## The limit of staleness",
        "In steps: a sample whose score is older has the mean weight.",
        table(rows, "limit", LIMITS),
        "## The speed of the scorers",
        "Steps of the trainer in which a scorer finishes a minibatch. (Minibatches of the trainer "
        "are scored anyway, and count too.)",
        table(rows, "steps", SPEEDS),
        drawn[1],
        "## Three processes",
        "A trainer and two scorers on two cores that other work shared, with whatever staleness "
        "there was; times are rough. Parameters were offered before every step, and all scores "
        "that had arrived were folded.",
        processes_table(rows),
        "```sh\npython bench/experiments/scoring.py --json bench/results/scoring.jsonl\n```",
        provenance_line(rows) if rows else "",
        "## What carries them",
        "A trainer sends parameters to two peers and hears them, while something happens to peer 1 "
        "(`bench/bench_scoring_transport.py`; timeouts of two seconds). Only with a store does a "
        "caller never wait for a timeout, is everybody heard in the end, and can a peer come back, "
        "or a new one come. So that is what `fastis.scoring` is built on.",
        transport_table(transport),
        provenance_line(transport) if transport else "",
    ]
    out = folder / PAGE
    out.write_text("\n\n".join(part for part in parts if part) + "\n")
    return out
