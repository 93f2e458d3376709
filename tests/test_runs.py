"""One run: its configuration, its method's options and scores, minibatches, and how it ends."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from test_bench import fashion_file

import fastis

sys.path.append(str(Path(__file__).resolve().parents[1]))

from bench.experiments import loop
from bench.experiments.config import RunConfig
from bench.experiments.dynamic_batch import FollowingSampler
from bench.experiments.methods import Scorer, build_method, check_config
from bench.experiments.tasks import TASKS, load_task_data

pytestmark = pytest.mark.usefixtures("threads_and_data")


@pytest.fixture
def data(tmp_path):
    return load_task_data("fashion_mnist", fashion_file(tmp_path / "small.npz"))


def small(method="emais", **changes) -> RunConfig:
    values = {"model": "mlp", "batch_size": 8, "iterations": 20, "data": "small.npz"} | changes
    return RunConfig(method, 0.01, 0, **values)


# ---- configurations


def test_a_row_leaves_out_later_fields_at_their_default():
    config = small()
    assert set(config.to_json()) & {"options", "lr_adjust", "scheme", "seconds"} == set()
    changed = replace(config, options={"tau": 5.0}, lr_adjust=False, seconds=1.5)
    assert set(changed.to_json()) - set(config.to_json()) == {"options", "lr_adjust", "seconds"}
    for one in (config, changed):
        assert RunConfig(**json.loads(json.dumps(one.to_json()))) == one
    assert len({config.key, changed.key, replace(config, scheme="systematic").key}) == 3


def test_label_tells_variants_apart():
    assert small().label == "emais lr 0.01 seed 0"
    assert small(options={"tau": 5.0}, scheme="systematic").variant == "emais (tau 5.0, systematic)"
    assert small("uniform", batch_size_like="emais").variant == "uniform (minibatch N_ems of emais)"


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


def test_scorer_gives_losses_scores_and_exact_norms(data, monkeypatch):
    run = loop.Run(small(), data)
    monkeypatch.setattr("bench.experiments.methods.EVALUATION_BATCH", 3)
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


# ---- methods' options


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


# ---- training


def test_dynamic_minibatches_have_the_size_of_the_other_runs_n_ems():
    whole = load_task_data("fashion_mnist")  # learnable images: some become easy
    data = replace(whole, x_train=whole.x_train[:400], y_train=whole.y_train[:400])
    config = replace(small(iterations=120), lr=0.05)
    leader = loop.Run(config, data)
    factors = leader.factors(120)
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
    factor = float(adjusted.sampler.lr_factor(rule="linear"))
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
