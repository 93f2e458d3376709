"""The papers' experiments: their lists, the runner, methods' options, and the page."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from test_bench import PNG_SIGNATURE, fashion_file

import fastis

sys.path.append(str(Path(__file__).resolve().parents[1]))

from bench import experiments, loop, markdown, page, report, reproduce, step_times
from bench.config import RunConfig
from bench.dynamic_batch import FollowingSampler, factors_of
from bench.experiments import COMPARED, EXPERIMENTS, GRID, VARIANTS, Settings
from bench.groups import Results, grouped
from bench.methods import Scorer, build_method, check_config
from bench.models import MODELS
from bench.tasks import TASKS, load_task_data

SETTINGS = Settings("small.npz", seeds=2)


@pytest.fixture(autouse=True)
def _one_thread(monkeypatch):
    monkeypatch.delenv("FASTIS_DATA", raising=False)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def data(tmp_path):
    return load_task_data("fashion_mnist", fashion_file(tmp_path / "small.npz"))


def small(method="emais", **changes) -> RunConfig:
    values = {"model": "mlp", "batch_size": 8, "iterations": 20, "data": "small.npz"} | changes
    return RunConfig(method, 0.01, 0, **values)


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
            **{name: [1.0] * 4 for name in experiments.TRACES},
        },
    }


def by_key(rows) -> dict:
    return {report.config_key(row["config"]): row for row in rows}


# ---- configurations


def test_a_row_leaves_out_later_fields_at_their_default():
    config = small()
    assert set(config.to_json()) & {"options", "lr_adjust", "scheme", "seconds"} == set()
    changed = replace(config, options={"tau": 5.0}, lr_adjust=False, seconds=1.5)
    assert set(changed.to_json()) - set(config.to_json()) == {"options", "lr_adjust", "seconds"}
    for one in (config, changed):
        assert RunConfig(**json.loads(json.dumps(one.to_json()))) == one
    assert len({config.key, changed.key, replace(config, scheme="systematic").key}) == 3


def test_published_rows_are_runs_of_the_experiments():
    rows = reproduce.read_all(reproduce.RESULTS)
    for key, row in rows.items():
        assert RunConfig(**row["config"]).key == key
    settings = Settings("fashion_mnist.npz")
    table2 = EXPERIMENTS["table2"]
    assert sum(table2.has(c, rows) for c in table2.configs(settings, rows)) >= 9


def test_label_tells_variants_apart():
    assert small().label == "emais lr 0.01 seed 0"
    assert small(options={"tau": 5.0}, scheme="systematic").variant == "emais (tau 5.0, systematic)"
    assert small("uniform", batch_size_like="emais").variant == "uniform (minibatch N_ems of emais)"


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
    configs = experiments.fig1(SETTINGS, 2500, {})
    assert {c.options.get("tau") for c in configs} == {None, 100.0, 500.0, 1000.0, 2500.0}


def test_best_lr_is_chosen_on_seed_0_and_then_repeated():
    first = experiments.best_lr(SETTINGS, 6250, {})
    assert {(c.method, c.lr) for c in first} == {(m, lr) for m in COMPARED for lr in GRID}
    assert {config.seed for config in first} == {0}
    losses = {0.01: 0.3, 0.03: 0.1, 0.1: None}  # the largest diverged
    assert len(first) == len(VARIANTS) * len(GRID)
    of_emais = [config for config in first if config.method == "emais"]
    rows = by_key(made_up_row(c, losses[c.lr], lr_factor=2.34) for c in of_emais)
    later = [config for config in experiments.best_lr(SETTINGS, 6250, rows) if config.seed]
    # Its own second seed, and SGD-Scan's at 0.03 * 2.34 in two digits.
    assert {(c.method, c.lr) for c in later} == {("emais", 0.03), ("scan", 0.07)}


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


# ---- scores


def test_last_layer_score_is_the_norm_of_that_layers_gradient():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.ReLU(), torch.nn.Linear(5, 3))
    last_layer = loop.LastLayer(model)
    x, y = torch.randn(7, 6), torch.randint(3, (7,))
    out = last_layer.scored(fastis.cross_entropy(model(x), y))
    for i in range(7):
        loss = fastis.cross_entropy(model(x[i : i + 1]), y[i : i + 1]).loss
        gradients = torch.autograd.grad(loss, list(model[2].parameters()))
        norm = torch.cat([g.flatten() for g in gradients]).norm()
        torch.testing.assert_close(out.score[i], norm)
    assert out.mean_grad is None


# ---- methods' options


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (small("sgd"), "method must be one of .*got 'sgd'"),
        (small(options={"temperature": 3}), "options of method 'emais' .*tau.*got temperature"),
        (small(options={"tau": -1}), "tau must be"),
        (small(scheme="sliced"), "scheme must be"),
    ],
)
def test_bad_configurations_are_named(config, words):
    with pytest.raises(ValueError, match=words):
        check_config(config, 100)


def test_methods_get_the_length_of_their_run():
    scorer = Scorer(None)
    online = build_method(small("online_batch", iterations=25), 40, scorer)
    assert (online.total_epochs, online.score_fn) == (5, None)
    given = small("online_batch", options={"total_epochs": 9, "score_fn": True})
    online = build_method(given, 40, scorer)
    assert (online.total_epochs, online.score_fn) == (9, scorer)
    assert build_method(small("prioritized"), 40, scorer).total_steps == 20
    assert build_method(small("presampling"), 40, scorer).score_fn is scorer
    assert build_method(small(), 40, scorer).score_fn is None


def test_scorer_gives_losses_scores_and_exact_norms(data, monkeypatch):
    run = loop.Run(small(), data)
    monkeypatch.setattr("bench.methods.EVALUATION_BATCH", 3)
    indices = torch.tensor([5, 1, 1, 30, 7, 12, 39])
    x, y = data.x_train[indices], data.y_train[indices]
    with torch.no_grad():
        out = run.scorer(indices)
        run.scorer.exact = True
        norms = run.scorer(indices)
    whole = fastis.cross_entropy(run.model(x), y)
    torch.testing.assert_close(out.losses, whole.losses)
    torch.testing.assert_close(out.score, whole.score)
    assert run.scorer.num_scored == 14
    for i, norm in enumerate(norms):
        loss = torch.nn.functional.cross_entropy(run.model(x[i : i + 1]), y[i : i + 1])
        gradients = torch.autograd.grad(loss, list(run.model.parameters()))
        expected = torch.cat([gradient.flatten() for gradient in gradients]).norm()
        torch.testing.assert_close(norm, expected)


def test_extra_forward_samples_are_counted(data):
    row = loop.run(small(options={"refresh_every": 5}), data)
    assert row["final"]["extra_forward_samples"] == 4 * 40
    assert row["config"]["options"] == {"refresh_every": 5}
    assert loop.run(small(), data)["final"]["extra_forward_samples"] == 0


# ---- runs


def test_dynamic_minibatches_have_the_size_of_the_other_runs_n_ems():
    whole = load_task_data("fashion_mnist")  # learnable images: some become easy
    data = replace(whole, x_train=whole.x_train[:400], y_train=whole.y_train[:400])
    config = replace(small(iterations=120), lr=0.05)
    leader = loop.Run(config, data)
    factors = factors_of(leader, 120)
    assert factors[:99] == [1.0] * 99  # two epochs of 50 minibatches, less one
    assert max(factors) > 1.2
    run = loop.Run(replace(config, method="uniform", batch_size_like="emais"), data)
    sizes, sample = [], run.sampler.sample

    def recorded():
        batch = sample()
        sizes.append(len(batch.indices))
        return batch

    run.sampler.sample = recorded
    run.timed_train(80)
    run.timed_train(40)
    assert sizes == [8, *(max(1, round(8 * factor)) for factor in factors[:-1])]
    # The learning rate goes with the size, and the other run's network is its own.
    assert float(run.sampler.lr_factor("adam")) == pytest.approx((run.sampler.size / 8) ** 0.5)
    assert run.leader.steps_taken == run.steps_taken == 120
    for mine, theirs in zip(run.leader.model.parameters(), leader.model.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_dynamic_sizes_stay_within_one_and_the_data():
    sampler = FollowingSampler(20, 8, seed=0, device=torch.device("cpu"))
    sampler.follow([0.01, 100.0])
    sizes = []
    for _ in range(2):
        sampler.update(sampler.sample(), None)
        sizes.append(len(sampler.sample().indices))
    assert sizes == [1, 20]


def test_without_adjustment_the_rate_is_the_schedules(data):
    adjusted, plain = (loop.Run(small(lr_adjust=adjust), data) for adjust in (True, False))
    for run in (adjusted, plain):
        run.train(15)
    cosine = 0.01 * (1 + np.cos(np.pi * 15 / 20)) / 2
    assert plain.reading()["lr"] == pytest.approx(cosine)
    factor = float(adjusted.sampler.lr_factor())
    assert factor != 1
    assert adjusted.reading()["lr"] == pytest.approx(cosine * factor)


def test_rais_ends_when_its_effective_iterations_do(data):
    run = loop.Run(small("rais", iterations=40), data)
    before = 0.0
    while run.progress() < 1:
        before = float(run.sampler.effective_iterations)
        run.train(run.steps_to_go(50))
    assert before < 40 <= float(run.sampler.effective_iterations) < 40 + 3
    row = loop.run(small("rais", iterations=40), data)
    assert row["final"]["steps"] == run.steps_taken
    assert row["curves"]["step"][-1] == run.steps_taken


def test_a_time_budget_ends_the_run_and_its_schedule(data):
    row = loop.run(small("uniform", seconds=0.2, iterations=1000), data)
    seconds = row["curves"]["seconds"]
    assert seconds == sorted(seconds)
    assert 0.2 <= seconds[-1] == pytest.approx(row["final"]["seconds"], rel=1e-3)
    assert row["curves"]["lr"][-1] < 1e-4


def test_clipping_bounds_the_gradient(data):
    free, clipped = (loop.Run(small("scan", clip_norm=norm), data) for norm in (0.0, 1e-3))
    start = torch.cat([p.detach().flatten() for p in free.model.parameters()])
    moved = []
    for run in (free, clipped):
        run.train(1)
        now = torch.cat([p.detach().flatten() for p in run.model.parameters()])
        moved.append(float((now - start + 0.01 * 1e-3 * start).norm()))  # less the weight decay
    assert moved[1] == pytest.approx(0.01 * 1e-3, rel=0.05)
    assert moved[0] > 10 * moved[1]


@pytest.mark.parametrize("name", ["fashion_tiles", "permuted_rows"])
def test_other_tasks_train(tmp_path, name):
    data = load_task_data(name, fashion_file(tmp_path / "small.npz"))
    config = small("presampling", model=TASKS[name].model, dataset=name, iterations=2)
    final = loop.run(config, data)["final"]
    assert final["train_loss"] > 0
    assert ("test_map" in final) == (name == "fashion_tiles")


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
    def plan(settings, iterations, rows):
        return [small(method, iterations=2) for method in ("scan", "emais", "uniform")]

    broken = fastis.methods.BY_NAME["scan"]
    monkeypatch.setitem(EXPERIMENTS, "fig6", experiments.Experiment("three", plan))
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
        (["fig6", "--seeds", "0"], "--seeds must be above 0, got 0"),
        (["fig6", "--iterations", "5", "-1"], "--iterations must be above 0, got -1"),
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
        assert f"\n{name} " in text


def test_step_times_take_ratios_within_a_round(data, monkeypatch):
    times = {"uniform": [1.0, 2.0, 4.0], "emais": [1.5, 2.0, 5.0]}
    found = step_times.summary(times)
    assert found["emais"]["ratio"] == 1.25  # of 1.5, 1 and 1.25
    assert found["emais"]["ms"] == 2000
    assert found["uniform"]["ratio_quartiles"] == [1.0, 1.0]
    configs = [small(method) for method in ("uniform", "emais")]
    monkeypatch.setattr(step_times, "configs", lambda _: configs)
    row = step_times.measure(SETTINGS, data, rounds=2, steps=1, warm_up=1)
    assert set(row["methods"]) == {"uniform", "emais"}
    assert row["methods"]["uniform"]["ratio"] == 1


# ---- the page


@pytest.fixture
def _no_figures(monkeypatch):
    """They take a second each."""
    monkeypatch.setattr(page.figures, "draw", lambda *_: False)


def write_page(tmp_path, rows, times=()) -> str:
    return page.write(tmp_path, by_key(rows), times, []).read_text()


def test_a_page_of_nothing_says_so(tmp_path):
    text = write_page(tmp_path, [])
    assert text.count(markdown.NOT_YET) >= len(EXPERIMENTS)
    for name in EXPERIMENTS:
        assert f"## {name}: " in text
        assert f"python bench/reproduce.py {name} --data " in text
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
