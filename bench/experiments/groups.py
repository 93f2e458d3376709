"""Runs as groups over seeds: what tables and figures are made of."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from statistics import fmean, median

import numpy as np

from bench.experiments.config import RunConfig, latest
from bench.experiments.experiment import Experiment, Rows, Settings
from bench.report import Row

# No coefficients, or not quite: the variance traces, N_ems and S mean nothing for them.
# Presampling's draws share their candidates: N_ems and S of rows from before the sampler took that
# into account are too good.
WITHOUT_TRACES = ("confidence", "confvar", "self_paced", "online_batch", "prioritized")
WITHOUT_TRACES += ("presampling",)
OF_TRACES = ("efficiency", "effective_batch_size", "relative_batch_size")


@dataclass(frozen=True)
class Group:
    """Equal runs but for the seed: ``config`` with any seed, and the rows that there are."""

    config: RunConfig
    rows: tuple[Row, ...]
    missing_seeds: tuple[int, ...]

    @property
    def label(self) -> str:
        return self.config.variant

    def defines(self, name: str) -> bool:
        """Whether a figure is there, and means something for this method."""
        if self.config.method in WITHOUT_TRACES and name in OF_TRACES:
            return False
        return any(row["final"].get(name) is not None for row in self.rows)

    def finals(self, name: str) -> list[float]:
        """NaN where a run has none: it diverged."""
        values = (row["final"][name] for row in self.rows)
        return [math.nan if value is None else value for value in values]

    @property
    def final_loss(self) -> float:
        """The mean final train loss; infinite if a run diverged."""
        losses = self.finals("train_loss")
        return fmean(losses) if losses and all(map(math.isfinite, losses)) else math.inf

    def late_medians(self, name: str) -> list[float]:
        """Of every run that has the curve: its median over the second half of the evaluations, for
        estimates that jump now and then."""
        late = (row["curves"][name][len(row["curves"][name]) // 2 :] for row in self.rows)
        defined = ([value for value in values if value is not None] for values in late)
        return [median(values) for values in defined if values]

    def by_seed(self, name: str) -> dict[int, float]:
        found = ((row["config"]["seed"], row["final"][name]) for row in self.rows)
        return {seed: value for seed, value in found if value is not None}

    def curve(self, name: str, x: str = "step") -> tuple[np.ndarray, np.ndarray] | None:
        """Points ``[P]`` and values ``[seeds, P]`` where all seeds have the curve; None if one has
        not."""
        if self.config.method in WITHOUT_TRACES and name in OF_TRACES:
            return None
        if not self.rows or not all({name, x} <= row["curves"].keys() for row in self.rows):
            return None
        return curve(self.rows, name, x)


def curve(rows: Sequence[Row], name: str, x: str) -> tuple[np.ndarray, np.ndarray]:
    """Points ``[P]`` and values ``[seeds, P]``, NaN where there is none.

    Runs that were read at other points (by time, or by effective iterations) are interpolated over
    the part that all of them have.
    """
    pairs = [(_floats(row["curves"][x]), _floats(row["curves"][name])) for row in rows]
    if all(np.array_equal(points, pairs[0][0]) for points, _ in pairs):
        return pairs[0][0], np.stack([values for _, values in pairs])
    start, end = max(points[0] for points, _ in pairs), min(points[-1] for points, _ in pairs)
    points = np.linspace(start, end, min(len(points) for points, _ in pairs))
    return points, np.stack([np.interp(points, *pair) for pair in pairs])


def _floats(values: list[float | None]) -> np.ndarray:
    return np.array([np.nan if value is None else value for value in values], dtype=float)


def grouped(configs: list[RunConfig], found: Callable[[RunConfig], Row | None]) -> list[Group]:
    """Groups in the order of their first run."""
    by_run: dict[str, list[RunConfig]] = {}
    for config in configs:
        by_run.setdefault(replace(config, seed=0).key, []).append(config)
    groups = []
    for runs in by_run.values():
        rows = {config.seed: found(config) for config in runs}
        there = tuple(row for row in rows.values() if row is not None)
        missing = tuple(seed for seed, row in rows.items() if row is None)
        groups.append(Group(runs[0], there, missing))
    return groups


def groups_of(rows: Iterable[Row]) -> list[Group]:
    """Of a results file; the last row of a run counts."""
    found = latest(rows)
    return grouped([RunConfig(**row["config"]) for row in found.values()], lambda c: found[c.key])


def best_rates(groups: Iterable[Group]) -> dict[str, Group]:
    """For each variant its learning rate of least final train loss, the mean over seeds."""
    best: dict[str, Group] = {}
    for group in groups:
        if group.label not in best or group.final_loss < best[group.label].final_loss:
            best[group.label] = group
    return best


@dataclass(frozen=True)
class Results:
    """What the rows say of one experiment; settings and lengths are those that were run."""

    name: str
    experiment: Experiment
    rows: Rows

    @cached_property
    def settings(self) -> Settings:
        """The data, device and budget that most rows of the experiment have; the whole data set
        before the embedded subset."""
        candidates = Counter(
            (
                row["config"]["data"],
                row["config"]["device"],
                row["config"].get("seconds") or Settings.seconds,
            )
            for row in self.rows.values()
        )
        lengths = tuple(sorted({row["config"]["iterations"] for row in self.rows.values()}))
        best, most = Settings(data="embedded"), (False, 0)
        for data, device, seconds in candidates:
            settings = Settings(data, 5, lengths, seconds, device)
            configs = self.experiment.configs(settings, self.rows)
            hits = [c for c in configs if self.experiment.has(c, self.rows)]
            rank = (bool(hits) and data != "embedded", len(hits))
            if rank > most:
                seeds = max(3, 1 + max(c.seed for c in hits))
                # Less than a tenth of the most: runs of other experiments, by chance.
                counts = Counter(c.iterations for c in hits)
                often = max(counts.values()) / 10
                ran = tuple(sorted(n for n, count in counts.items() if count >= often))
                best, most = replace(settings, seeds=seeds, iterations=ran), rank
        if best.iterations is None:
            return replace(best, iterations=(self.experiment.iterations,))
        return best

    @property
    def lengths(self) -> tuple[int, ...]:
        """Those that were run, or the default one."""
        return self.settings.iterations or (self.experiment.iterations,)

    def groups(self, iterations: int) -> list[Group]:
        configs = self.experiment.configs(
            replace(self.settings, iterations=(iterations,)), self.rows
        )
        return grouped(
            configs,
            lambda c: self.rows[c.key] if self.experiment.has(c, self.rows) else None,
        )

    @cached_property
    def main_groups(self) -> list[Group]:
        """Those of the length that has most rows: the figure's."""
        return max(
            (self.groups(length) for length in self.lengths),
            key=lambda groups: sum(len(group.rows) for group in groups),
        )

    @property
    def all_rows(self) -> list[Row]:
        return [row for length in self.lengths for g in self.groups(length) for row in g.rows]
