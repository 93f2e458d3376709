"""The papers' experiments: their lists, the runner, and the measured step times."""

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from test_bench import PNG_SIGNATURE, fashion_file
from test_runs import small

import fastis

sys.path.append(str(Path(__file__).resolve().parents[1]))

from bench import report, timing
from bench.experiments import page, papers, reproduce, step_times
from bench.experiments.config import RunConfig, latest
from bench.experiments.experiment import Experiment, Settings
from bench.experiments.methods import check_config
from bench.experiments.models import MODELS
from bench.experiments.papers import COMPARED, GRID, VARIANTS
from bench.experiments.reproduce import EXPERIMENTS
from bench.experiments.tasks import TASKS, load_task_data

SETTINGS = Settings("small.npz", seeds=2)
pytestmark = pytest.mark.usefixtures("threads_and_data")


def made_up_row(config: RunConfig, loss: float | None, **final) -> dict:
    """A row as of a run whose train loss fell in a straight line to ``loss``."""
    steps = [10, 20, 30, 40]
    curve = [None if loss is None else loss * (1 + (40 - step) / 10) for step in steps]
    others = dict.fromkeys(("test_error", "efficiency", "relative_batch_size", "lr_factor"), 1.0)
    return {
        "config": config.to_json(),
        "date": "2030-01-02T03:04:05+00:00",
        "machine": {"cpu": "an abacus", "isa": "BEADS", "threads": 1},
        "versions": {"fastis": "9"},
        "jobs": 2,
        "final": {**others, "train_loss": loss, "ms_per_step": 1.0, "steps": 40} | final,
        "curves": {
            "step": steps,
            "train_loss": curve,
            "test_error": curve,
            "seconds": [step / 10 for step in steps],
            **{name: [1.0] * 4 for name in ("efficiency", "effective_batch_size", "lr")},
            **{name: [1.0] * 4 for name in papers.TRACES},
        },
    }


def by_key(rows) -> dict:
    return latest(rows)


def runs(name: str, iterations: int, rows=None) -> list[RunConfig]:
    return EXPERIMENTS[name].configs(replace(SETTINGS, iterations=(iterations,)), rows or {})


# ---- the lists


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_listed_run_can_start(name):
    for device in ("cpu", "cuda"):
        settings = replace(SETTINGS, device=device)
        configs = EXPERIMENTS[name].configs(settings, {})
        assert configs
        assert len({config.key for config in configs}) == len(configs)
        for config in configs:
            assert config.dataset in TASKS
            assert config.model in MODELS
            check_config(config, 1000)


def test_lengths_and_seeds_are_the_callers():
    configs = EXPERIMENTS["table2"].configs(replace(SETTINGS, iterations=(5, 7)), {})
    assert len(configs) == 2 * 2 * len(VARIANTS)
    assert {config.iterations for config in configs} == {5, 7}


def test_methods_that_need_a_class_are_left_out_of_multilabel():
    methods = {config.method for config in EXPERIMENTS["multilabel"].configs(SETTINGS, {})}
    assert methods == set(COMPARED) - {"confidence", "confvar"}


def test_fixed_taus_are_scaled_with_the_run():
    configs = runs("fig1", 2500)
    assert {c.options.get("tau") for c in configs} == {None, 100.0, 500.0, 1000.0, 2500.0}


def test_best_lr_is_chosen_on_seed_0_and_then_repeated():
    first = runs("best_lr", 6250)
    assert {(c.method, c.lr) for c in first} == {(m, lr) for m in COMPARED for lr in GRID}
    assert {config.seed for config in first} == {0}
    losses = {0.01: 0.3, 0.03: 0.1, 0.1: None}  # the largest diverged
    assert len(first) == len(VARIANTS) * len(GRID)
    of_emais = [config for config in first if config.method == "emais"]
    rows = by_key(made_up_row(c, losses[c.lr], lr_factor=2.34) for c in of_emais)
    later = [config for config in runs("best_lr", 6250, rows) if config.seed]
    # Its own second seed, and SGD-Scan's at 0.03 * 2.34 in two digits.
    assert {(c.method, c.lr) for c in later} == {("emais", 0.03), ("scan", 0.07)}


def test_adam_repeats_scan_at_the_rate_that_emais_had():
    first = runs("table6", 100)
    assert {(c.method, c.lr) for c in first} == {
        (method, 0.001) for method in ("emais", "rais", "scan", "uniform")
    }
    rows = by_key(made_up_row(c, 0.1, lr_factor=1.618) for c in first if c.method == "emais")
    later = [c for c in runs("table6", 100, rows) if c not in first]
    assert [(c.method, c.lr, c.optimizer, c.seed) for c in later] == [
        ("scan", 0.0016, "adam", 0),
        ("scan", 0.0016, "adam", 1),
    ]


def test_wall_clock_measures_the_best_rates_once_they_are_known():
    grid = runs("wall_clock", 100)
    assert {(c.method, c.lr) for c in grid} == {
        (method, lr) for method in ("emais", "scan", "uniform") for lr in GRID
    }
    rows = by_key(made_up_row(c, c.lr, lr_factor=2.0) for c in grid)
    found = [(c.variant, c.lr) for c in runs("wall_clock", 100, rows) if c.seed == 1]
    assert found == [
        ("emais", 0.01),
        ("scan", 0.01),
        ("uniform", 0.01),
        ("emais (floor 0.1, tau_scale 0.25)", 0.01),
        ("scan", 0.02),
    ]


def test_seed_0_of_everything_comes_first():
    plan = reproduce.Plan(["table2", "fig6"], SETTINGS, None, {})
    seeds = [config.seed for config in plan()]
    assert seeds == sorted(seeds)
    assert len(seeds) == 2 * (len(VARIANTS) + 1)  # EMAIS is in both experiments, but runs once
    only = reproduce.Plan(["table2"], SETTINGS, ["scan"], {})
    assert {config.method for config in only()} == {"scan"}


def test_a_row_without_a_needed_curve_is_measured_again():
    config = EXPERIMENTS["fig9"].configs(SETTINGS, {})[0]
    row = made_up_row(config, 0.1)
    rows = by_key([row])
    assert EXPERIMENTS["fig9"].has(config, rows)
    del row["curves"]["trace_is"]
    assert not EXPERIMENTS["fig9"].has(config, rows)
    assert EXPERIMENTS["table2"].has(config, rows)


def test_published_rows_are_runs_of_the_experiments():
    rows = reproduce.read_all(reproduce.RESULTS)
    for key, row in rows.items():
        assert RunConfig(**row["config"]).key == key
    settings = Settings("fashion_mnist.npz")
    table2 = EXPERIMENTS["table2"]
    assert sum(table2.has(c, rows) for c in table2.configs(settings, rows)) >= 9


# ---- the runner


def reproduce_here(out: Path, *more: str) -> int:
    data = out.parent / "small.npz"
    if not data.exists():
        images = np.random.default_rng(0).integers(0, 256, (300, 28, 28), dtype=np.uint8)
        fashion_file(data, x_train=images, y_train=np.arange(300, dtype=np.uint8) % 10)
    return reproduce.main([*more, "--data", str(data), "--out", str(out)])


def test_runner_runs_what_is_missing_and_reports(tmp_path, capsys):
    out = tmp_path / "out"
    fig6 = ("fig6", "--iterations", "4", "--seeds", "1")
    assert reproduce_here(out, *fig6) == 0
    (file,) = out.glob("*.jsonl")
    assert file.name == "reproduce_fashion_mnist.jsonl"
    rows = report.read_rows(file)
    assert [row["config"].get("lr_adjust", True) for row in rows] == [True, False]
    assert rows[0]["final"]["steps"] == 4
    assert {"cpu", "threads"} <= set(rows[0]["machine"])
    assert rows[0]["jobs"] == 1
    assert str(tmp_path) not in file.read_text()
    # Again: nothing to do. Another experiment: only what the first one has not run.
    assert reproduce_here(out, *fig6) == 0
    assert reproduce_here(out, "fig9", *fig6[1:]) == 0
    assert len(report.read_rows(file)) == 2
    assert "0 runs to do" in capsys.readouterr().out
    assert reproduce_here(out, "fig6", *fig6[1:3], "--seeds", "2") == 0
    assert len(report.read_rows(file)) == 4
    assert reproduce_here(out, *fig6, "--again") == 0  # seed 0 once more
    assert [row["config"]["seed"] for row in report.read_rows(file)] == [0, 0, 1, 1, 0, 0]

    assert reproduce_here(out, "--report") == 0
    text = (out / page.PAGE).read_text()
    assert "| emais (lr not adjusted) | 0.01 | 2 of 3 |" in text
    assert "--data small.npz --iterations 4" in text
    png = out / "reproduce_fig6.png"
    assert png.read_bytes().startswith(PNG_SIGNATURE)
    assert png.stat().st_size < 100_000
    assert str(tmp_path) not in text


def test_a_failing_run_does_not_stop_the_others(tmp_path, capsys, monkeypatch):
    def plan(settings, rows):
        return [small(method, iterations=2) for method in ("scan", "emais", "uniform")]

    broken = fastis.methods.BY_NAME["scan"]
    monkeypatch.setitem(EXPERIMENTS, "fig6", Experiment("three", plan))
    monkeypatch.setattr(broken, "fused", False)
    monkeypatch.setattr(broken, "update", lambda *_: 1 / 0)
    assert reproduce_here(tmp_path / "out", "fig6") == 1
    assert "scan lr 0.01 seed 0: ZeroDivisionError" in capsys.readouterr().err
    rows = reproduce.read_all(tmp_path / "out").values()
    assert {row["config"]["method"] for row in rows} == {"emais", "uniform"}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["fig99"], "NAME must be one or more of table2,"),
        ([], "got none"),
        (["fig6", "--seeds", "0"], "--seeds: expected a number above 0, got 0"),
        (["fig6", "--iterations", "5", "-1"], "--iterations: expected a number above 0, got -1"),
        (["fig6", "--data", "absent.npz"], "absent.npz"),
    ],
)
def test_runner_refuses_before_it_runs(tmp_path, capsys, options, words):
    with pytest.raises(SystemExit) as stop:
        reproduce.main(["--out", str(tmp_path / "out"), *options])
    assert stop.value.code == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_list_counts_what_is_there(capsys):
    assert reproduce.main(["--list"]) == 0
    text = capsys.readouterr().out
    for name in (*EXPERIMENTS, reproduce.STEP_TIMES):
        assert f"\n| {name} " in text


def test_step_times_take_ratios_within_a_round(tmp_path, monkeypatch):
    times = timing.Times({"uniform": [1.0, 2.0, 4.0], "emais": [1.5, 2.0, 5.0]})
    found = step_times.summary(times)
    assert found["emais"]["ratio"] == 1.25  # of 1.5, 1 and 1.25
    assert found["emais"]["ms"] == 2000
    assert found["uniform"]["ratio_quartiles"] == [1.0, 1.0]
    configs = [small(method) for method in ("uniform", "emais")]
    monkeypatch.setattr(step_times, "configs", lambda _: configs)
    data = load_task_data("fashion_mnist", fashion_file(tmp_path / "small.npz"))
    row = step_times.measure(SETTINGS, data, rounds=2, steps=1, warm_up=1)
    assert set(row["methods"]) == {"uniform", "emais"}
    assert row["methods"]["uniform"]["ratio"] == 1
