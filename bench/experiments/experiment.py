"""What an experiment is: a named list of runs, made by one decorated function (papers.py)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from bench.experiments.config import RunConfig
from bench.report import Row

Rows = Mapping[str, Row]


@dataclass(frozen=True)
class Settings:
    """What all runs of one invocation share.

    ``data`` is the data file's name, as rows have it. ``iterations`` of None: the experiment's own.
    """

    data: str
    seeds: int = 3
    iterations: tuple[int, ...] | None = None
    seconds: float = 75.0
    device: str = "cpu"

    def config(
        self, method: str = "emais", lr: float = 0.01, options: Any = (), **changes: Any
    ) -> RunConfig:
        """A run of seed 0, of the first of the lengths."""
        values = {"data": self.data, "device": self.device, "options": dict(options), **changes}
        if self.iterations:
            values["iterations"] = self.iterations[0]
        return RunConfig(method, lr, 0, **values)


@dataclass(frozen=True)
class Once:
    """A run for seed 0 alone: one of a search, not chosen."""

    config: RunConfig


Plan = Callable[[Settings, Rows], Sequence[RunConfig | Once]]


@dataclass(frozen=True)
class Experiment:
    """A named list of runs.

    Attributes
    ----------
    title : str
        what it shows and where in which paper.
    plan : callable
        (settings, rows) -> the runs of one length, of seed 0 (:class:`Once`: of no other seed);
        asked again after each new row, so that later runs may depend on the rows of earlier ones.
        Its docstring is the page's note: choices of ours, what differs from the paper.
    iterations : int
        the default length of a run.
    longer : tuple of int
        the paper's other lengths: by ``--iterations``.
    curves : tuple of str
        curves that its rows must have; a row without them is measured again.
    panels : tuple of str
        the curves of its figure.
    x : "step" or "seconds"
        what the figure's curves are drawn against.
    compared_with : str
        label of the runs that the table's differences are to.
    """

    title: str
    plan: Plan
    iterations: int = 6250
    longer: tuple[int, ...] = ()
    curves: tuple[str, ...] = ()
    panels: tuple[str, ...] = ("train_loss", "test_error")
    x: str = "step"
    compared_with: str = "scan"

    @property
    def note(self) -> str:
        return " ".join((self.plan.__doc__ or "").split())

    def configs(self, settings: Settings, rows: Rows) -> list[RunConfig]:
        """Every run wanted now, equal ones once; seed 0 of a length first."""
        wanted: dict[str, RunConfig] = {}
        for length in settings.iterations or (self.iterations,):
            first = self.plan(replace(settings, iterations=(length,)), rows)
            repeated = [config for config in first if not isinstance(config, Once)]
            others = (
                replace(config, seed=seed)
                for seed in range(1, settings.seeds)
                for config in repeated
            )
            all_first = (run.config if isinstance(run, Once) else run for run in first)
            wanted |= {config.key: config for config in (*all_first, *others)}
        return list(wanted.values())

    def has(self, config: RunConfig, rows: Rows) -> bool:
        """Whether there is a row of this run with all that the experiment needs."""
        row = rows.get(config.key)
        return row is not None and all(name in row["curves"] for name in self.curves)


def searched(grid: Sequence[RunConfig], best: RunConfig | None) -> list[RunConfig | Once]:
    """The runs of a grid, all but the best one for seed 0 alone."""
    return [config if config == best else Once(config) for config in grid]


def collector(into: dict[str, Experiment]) -> Callable[..., Callable[[Plan], Plan]]:
    """A decorator that makes a plan the experiment of its name, kept in ``into``; it takes
    :class:`Experiment`'s attributes."""

    def experiment(title: str, **about: Any) -> Callable[[Plan], Plan]:
        def register(plan: Plan) -> Plan:
            into[plan.__name__] = Experiment(title, plan, **about)
            return plan

        return register

    return experiment
