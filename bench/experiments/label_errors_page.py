"""The page on label errors, from result rows alone, and its picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

import fastis
from bench.experiments import label_errors
from bench.experiments.datasets import Dataset
from bench.experiments.label_errors import BENCHMARK, EPOCHS, LENGTHS, Config
from bench.experiments.label_noise import KINDS
from bench.experiments.plot import save
from bench.experiments.tables import NOT_YET, mean_sd, paired_interval
from bench.provenance import provenance_line
from bench.report import Row, markdown_table, read_rows

PAGE, PICTURE = "LABEL_ERRORS.md", "label_errors.png"
INTRODUCTION = """# Label errors

Written by `python bench/experiments/label_errors.py --report` from the rows in this folder; nothing
is typed in. LeNet-5 on 10,000 images of Fashion-MNIST, about 20 % of whose labels are wrong: to any
other class ("symmetric"), from each class to the next ("pair", Han et al. 2018), or with a
probability and to a class that depend on the image ("instance", Xia et al. 2020, algorithm 2). SGD
with momentum 0.9, minibatch 128, base rate 0.05 with a cosine to 0, the same for all ways, tuned
for none. ± is the standard deviation over seeds, of which each makes its own wrong labels.
"""
# Way, ranking, and what the page calls it.
RANKINGS = (
    ("emais", "mean", "`fastis.suspects`: mean gradient norm, method emais"),
    ("emais", "importance", "`sampler.importance`, emais"),
    ("emais", "variance", "`sampler.var`, emais"),
    ("emais", "last loss", "each sample's last loss, emais"),
    ("loss", "mean", "`fastis.suspects`: mean loss, method loss"),
    ("uniform", "last loss", "last epoch's loss, uniform training"),
    ("uniform", "mean loss", "mean loss of all epochs, uniform training"),
    ("cleanlab", "self_confidence", "cleanlab, five folds (its default)"),
    ("cleanlab", "normalized_margin", "cleanlab, normalized margin"),
    ("cleanlab", "confidence_weighted_entropy", "cleanlab, confidence-weighted entropy"),
)
LONG_MEMORY = (label_errors.LONG, "mean", "the same with `EMAIS(tau_scale=1)`")
OURS = RANKINGS[0]
PEERS = (RANKINGS[7], RANKINGS[5])
METRICS = {
    "auroc": "AUROC: the probability that a wrong label ranks above a right one",
    "average_precision": "Average precision",
    "precision": "Precision among as many as there are wrong labels",
}


class Results:
    """Rows by configuration."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self.rows = [row for row in rows if row["benchmark"] == BENCHMARK]
        self.by_config = {Config(**row["config"]): row["final"] for row in self.rows}
        self.seeds = sorted({config.seed for config in self.by_config})
        self.data = next(iter(self.by_config)).data if self.by_config else "embedded"

    def finals(self, noise: str, way: str, epochs: int = EPOCHS) -> dict[int, Row]:
        """By seed."""
        configs = {seed: Config(noise, way, epochs, seed, self.data) for seed in self.seeds}
        return {seed: self.by_config[c] for seed, c in configs.items() if c in self.by_config}

    def values(
        self, noise: str, ranking: tuple[str, str, str], metric: str, epochs: int = EPOCHS
    ) -> dict[int, float]:
        way, name, _ = ranking
        finals = self.finals(noise, way, epochs)
        return {seed: final["rankings"][name][metric] for seed, final in finals.items()}


def quality_table(results: Results, metric: str) -> str:
    lines = [["ranking", *KINDS]]
    for ranking in RANKINGS:
        found = [list(results.values(noise, ranking, metric).values()) for noise in KINDS]
        lines.append([ranking[2], *(mean_sd(values, 3) if values else "-" for values in found)])
    for peer in PEERS:
        line = [f"difference of the first to: {peer[2]}"]
        for noise in KINDS:
            ours, theirs = (results.values(noise, one, metric) for one in (OURS, peer))
            try:
                mean, half, _ = paired_interval(ours, theirs)
                line.append(f"{mean:+.3f} ± {half:.3f}")
            except ValueError:
                line.append("-")
        lines.append(line)
    return markdown_table(lines, aligned=False)


def time_table(results: Results) -> str:
    seconds = {
        way: [final["seconds"] for noise in KINDS for final in results.finals(noise, way).values()]
        for way in label_errors.COMPARED
    }
    if not all(seconds.values()):
        return NOT_YET
    plain = fmean(seconds["uniform"])
    lines = [["way", "processor time, s", "beyond one uniform training, s"]]
    for way, found in seconds.items():
        extra = fmean(found) - (0 if way == "cleanlab" else plain)
        lines.append([way, mean_sd(found, 1), f"{round(extra, 1) + 0.0:.1f}"])
    return markdown_table(lines, aligned=False)


def length_table(results: Results) -> str:
    """The same rankings after shorter and longer training, of seed 0."""
    shown = (OURS, LONG_MEMORY, RANKINGS[3], RANKINGS[5], RANKINGS[6])
    lengths = sorted((*LENGTHS, EPOCHS))
    lines = [["noise, AUROC of", *(f"{epochs} epochs" for epochs in lengths)]]

    def number(value: float | None) -> str:
        return "-" if value is None else f"{value:.3f}"

    for noise in KINDS:
        for ranking in shown:
            by_length = [results.values(noise, ranking, "auroc", e).get(0) for e in lengths]
            lines.append([f"{noise}: {ranking[2]}", *map(number, by_length)])
        for way in ("emais", "uniform"):
            finals = [results.finals(noise, way, e).get(0, {}) for e in lengths]
            shares = [number(final.get("known_by_heart")) for final in finals]
            lines.append([f"{noise}: share of wrong labels that the network predicts, {way}"])
            lines[-1] += shares
    return markdown_table(lines, aligned=False)


def draw(folder: Path, dataset: Dataset) -> Path:
    """A training, and its most and least important samples."""
    config = Config("symmetric", "emais", EPOCHS, 0, "embedded")
    y = label_errors.labels_of(config, dataset)
    sampler, _ = label_errors.with_sampler(config, dataset, y)
    labels = [f"{a}" if a == b else f"{a} ({b})" for a, b in zip(y, dataset.y_train, strict=True)]
    save(fastis.contact_sheet(sampler, dataset.x_train, labels, count=12), folder / PICTURE)
    return folder / PICTURE


def write(folder: Path) -> Path:
    """Writes the page into ``folder``, from its rows."""
    results = Results(read_rows(folder / f"{BENCHMARK}.jsonl"))
    parts = [INTRODUCTION.rstrip(), f"{len(results.seeds)} seeds, {EPOCHS} epochs."]
    for metric, title in METRICS.items():
        parts += [f"## {title}", quality_table(results, metric)]
    parts += [
        "## Time",
        "Of one thread, from the first step to the ranking. cleanlab's folds come beside the "
        "training that one does anyway; with fastis that training is all there is.",
        time_table(results),
        "## Longer training",
        "One seed. A network that has learnt wrong labels by heart no longer tells them by its "
        "losses; averages over the training remember longer.",
        length_table(results),
    ]
    if (folder / PICTURE).exists():
        text = "The most and the least important samples"
        parts += [
            f"## {text}",
            "By `fastis.contact_sheet`: index, label (in brackets the right one, where it is "
            "another), importance over its mean; symmetric noise, seed 0.",
            f"![{text}]({PICTURE})",
        ]
    parts.append("```sh\npython bench/experiments/label_errors.py\n```")
    if results.rows:
        peers = sorted({row["final"]["peer"] for row in results.rows if "peer" in row["final"]})
        parts.append(" ".join([provenance_line(results.rows), *(f"Peer: {p}." for p in peers)]))
    out = folder / PAGE
    out.write_text("\n\n".join(part for part in parts if part) + "\n")
    return out
