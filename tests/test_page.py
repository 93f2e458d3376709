"""The page of the papers' experiments: means, differences, best rates, and what is missing."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest
from test_reproduce import by_key, made_up_row
from test_runs import small

sys.path.append(str(Path(__file__).resolve().parents[1]))

from bench.experiments import page
from bench.experiments.config import RunConfig
from bench.experiments.experiment import Settings
from bench.experiments.groups import Results, grouped
from bench.experiments.papers import EXPERIMENTS

pytestmark = pytest.mark.usefixtures("threads_and_data")


@pytest.fixture
def _no_figures(monkeypatch):
    """They take a second each."""
    monkeypatch.setattr(page.plot, "draw", lambda *_: False)


def write_page(tmp_path, rows, times=()) -> str:
    return page.write(tmp_path, by_key(rows), times, []).read_text()


def test_a_page_of_nothing_says_so(tmp_path):
    text = write_page(tmp_path, [])
    assert text.count(page.NOT_YET) >= len(EXPERIMENTS)
    for name in EXPERIMENTS:
        assert f"## {name}: " in text
        assert f"python bench/experiments/reproduce.py {name} --data " in text
    assert not list(tmp_path.glob("*.png"))


@pytest.mark.usefixtures("_no_figures")
def test_page_has_means_paired_differences_and_what_is_missing(tmp_path):
    settings = Settings("small.npz", seeds=3)
    errors = {("emais", 0): 9.0, ("emais", 1): 10.0, ("scan", 0): 10.0, ("scan", 1): 12.0}
    rows = [
        made_up_row(config, 0.5, test_error=errors[config.method, config.seed], lr_factor=2.0)
        for config in EXPERIMENTS["table2"].configs(settings, {})
        if (config.method, config.seed) in errors
    ]
    text = write_page(tmp_path, rows)
    section = text.split("## table2")[1].split("\n## ")[0]
    (emais,) = (line for line in section.splitlines() if line.startswith("| emais "))
    # Means 9.5 and 11; differences -1 and -2: -1.5 +- 12.706 * 0.7071 / sqrt(2).
    assert "| 2 of 3 | 9.50 ± 0.71 | 0.5000 ± 0.0000 |" in emais
    assert "| -1.50 ± 6.35 | +0.0000 ± 0.0000 |" in emais
    assert "Not yet measured: emais lr 0.01 (seed 2)" in section
    assert "| uniform | 0.01 | 0 of 3 | not yet measured |" in section
    machine = "an abacus (BEADS), 1 thread(s) a run, 2 run(s) at a time"
    assert f"Measured 2030-01-02 on {machine}" in section


@pytest.mark.usefixtures("_no_figures")
def test_page_compares_each_method_at_its_best_rate(tmp_path):
    settings = Settings("small.npz", seeds=2)
    losses = {"emais": {0.01: 0.2, 0.03: 0.1, 0.1: None}, "scan": {0.01: 0.4, 0.03: 0.3, 0.1: 0.2}}
    rows: list[dict] = []
    for _ in range(3):  # the choice, the second seeds
        for config in EXPERIMENTS["best_lr"].configs(settings, by_key(rows)):
            loss = losses.get(config.method, {}).get(config.lr, "missing")
            if loss != "missing" and config.key not in by_key(rows):
                rows.append(made_up_row(config, loss))
    times = {"methods": {"emais": {"ms": 500.0, "ratio": 1.0, "ratio_quartiles": [1.0, 1.0]}}}
    setting = {"model": "m", "num_samples": 1, "data": "d", "batch_size": 1, "rounds": 1}
    setting["device"] = "cpu"
    made = {key: rows[0][key] for key in ("date", "machine", "versions")}
    text = write_page(tmp_path, rows, [{**times, **setting, **made, "steps_per_round": 1}])
    section = text.split("## best_lr")[1].split("\n## ")[0]
    assert "| emais | 0.2000 | 0.1000 | - | 0.03 |" in section
    assert "| scan | 0.4000 | 0.3000 | 0.2000 | 0.1 (edge of the grid) |" in section
    assert "| uniform | - | - | - | not yet known |" in section
    # EMAIS's curve is 0.4, 0.3, 0.2, 0.1 at steps 10 to 40: at SGD-Scan's 0.2 by step 30.
    reached = [line for line in section.splitlines() if "| 30 ± 0 |" in line]
    assert reached == ["| emais | 0.03 | 2 of 2 | 30 ± 0 | 15.0 | 3.0 ± 0.0 |"]


@pytest.mark.usefixtures("_no_figures")
def test_figure_2_is_compared_with_emais_and_s_is_a_late_median(tmp_path):
    configs = EXPERIMENTS["fig2"].configs(Settings("small.npz", seeds=2), {})
    rows = [made_up_row(c, 0.3 if c.batch_size_like else 0.1 * (1 + c.seed)) for c in configs]
    for row in rows:
        row["final"]["efficiency"] = 0.5  # the mean is not what is shown
        row["curves"]["efficiency"] = [9.0, 9.0, 0.25, 0.25, None, 80.0]
    section = write_page(tmp_path, rows).split("## fig2")[1].split("\n## ")[0]
    assert "test error minus emais 0.01 | train loss minus emais 0.01" in section
    (line,) = (x for x in section.splitlines() if x.startswith("| uniform (minibatch N_ems"))
    assert "| +0.1500 ± 0.6353 |" in line  # 12.706 * 0.0707 / sqrt(2)
    assert "| 40.12 ± 0.00 |" in line  # of 0.25 and 80: S is None in between


@pytest.mark.usefixtures("_no_figures")
def test_diverged_and_undefined_figures_are_said(tmp_path):
    settings = Settings("small.npz", seeds=1)
    configs = {c.variant: c for c in EXPERIMENTS["table2"].configs(settings, {})}
    rows = [
        made_up_row(configs["emais"], None, lr_factor=2.0, efficiency=0.5),
        made_up_row(configs["confidence"], 0.3, efficiency=0.7),
    ]
    text = write_page(tmp_path, rows)
    assert "| emais | 0.01 | 1 of 3 | 1.00 | diverged |" in text
    (line,) = (line for line in text.splitlines() if line.startswith("| confidence | 0.01 | 1"))
    assert "0.70" not in line  # S means nothing without coefficients


def test_curves_of_other_steps_are_interpolated():
    first, second = (made_up_row(replace(small("rais"), seed=seed), 1.0) for seed in (0, 1))
    second["curves"] |= {"step": [20, 40], "train_loss": [3.0, 1.0]}
    rows = by_key([first, second])
    configs = [RunConfig(**row["config"]) for row in rows.values()]
    (group,) = grouped(configs, lambda config: rows[config.key])
    points, values = group.curve("train_loss")
    assert points.tolist() == [20, 40]
    assert values.tolist() == [[3.0, 1.0], [3.0, 1.0]]
    for row in rows.values():  # equal steps stay as they are, even if they are uneven
        row["curves"] |= {"step": [10, 20, 35], "train_loss": [3.0, 2.0, 1.0]}
    assert group.curve("train_loss")[0].tolist() == [10, 20, 35]
    del second["curves"]["seconds"]
    assert group.curve("train_loss", "seconds") is None


def test_results_prefer_the_whole_data_set():
    def of(data, seeds):
        return EXPERIMENTS["fig6"].configs(Settings(data, seeds=seeds), {})

    configs = [*of("embedded", 3), *of("whole.npz", 1)]
    results = Results("fig6", EXPERIMENTS["fig6"], by_key(made_up_row(c, 0.1) for c in configs))
    assert results.settings.data == "whole.npz"
    assert [len(group.rows) for group in results.main_groups] == [1, 1]
    assert results.main_groups[0].missing_seeds == (1, 2)
