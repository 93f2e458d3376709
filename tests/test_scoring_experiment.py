"""The experiment on distributed scoring, on made-up data, and its page."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import fastis
from bench.experiments import scoring, scoring_page
from bench.experiments.datasets import Dataset
from bench.experiments.scoring import ScoringConfig, exact, measure
from bench.report import append_row

RESULTS = Path(__file__).resolve().parents[1] / "bench" / "results"
SMALL = ScoringConfig(batch_size=8, scorer_batch=16, iterations=60, refresh_every=2)


@pytest.fixture
def dataset():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(96, 1, 6, 6, generator=generator)
    y = torch.randint(3, (96,), generator=generator)
    return Dataset("made up", x, y, x[:20], y[:20], 3)


def test_traces_are_those_of_the_gradients(dataset):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(36, 3))
    sampler = fastis.Sampler(96, 8, method=fastis.methods.Distributed(min_usable=0.0), seed=0)
    sampler.fold(torch.arange(96), torch.rand(96) + 0.1, 0)
    logits = model(dataset.x_train).detach()
    g = logits.softmax(1) - torch.nn.functional.one_hot(dataset.y_train, 3)
    p, total = sampler.probabilities(), g.double().mean(0)

    def trace(q):
        return float((g.double().square().sum(1) / (96**2 * q)).sum() - total.square().sum())

    norms = g.double().norm(dim=1)
    found = exact(model, dataset, sampler)
    assert found["uniform"] == pytest.approx(trace(torch.full((96,), 1 / 96)), rel=1e-5)
    assert found["stale"] == pytest.approx(trace(p), rel=1e-5)
    assert found["ideal"] == pytest.approx(trace(norms / norms.sum()), rel=1e-5)


@pytest.mark.parametrize("method", ["distributed", "emais"])
def test_simulated_runs_are_reproducible(dataset, method):
    config = replace(SMALL, method=method, steps_per_minibatch=2)
    one, two = (measure(config, dataset) for _ in range(2))
    assert one["curves"] == two["curves"]
    assert one["final"]["train_loss"] == two["final"]["train_loss"]
    assert one["curves"]["step"] == list(range(3, 61, 3))
    assert all(value > 0 for value in one["curves"]["monitored_stale"])
    without = measure(replace(config, steps_per_minibatch=0), dataset)
    assert without["curves"] != one["curves"]


def test_scorers_take_turns_and_refresh(dataset):
    sampler = fastis.Sampler(96, 8, method="distributed", seed=0)
    scorers = scoring.SimulatedScorers(replace(SMALL, steps_per_minibatch=4), dataset, sampler)
    model = scoring.new_model(SMALL, dataset)
    found = []
    for step in range(17):
        scorers.before_step(step, model)
        found.append((sum(scorers.scored), *scorers.iterations))
        sampler.update(sampler.sample(), torch.ones(8))
    # The first at steps 0, 4, 8, ..., the second between; parameters for two minibatches each.
    assert [found[i] for i in (0, 1, 2, 4, 6, 8, 10)] == [
        *((1, 0, 0), (1, 0, 0), (2, 0, 2), (3, 0, 2), (4, 0, 2), (5, 8, 2), (6, 8, 10)),
    ]


@pytest.fixture
def folder(tmp_path, dataset):
    for config in scoring.configs(SMALL):
        if not config.processes:
            append_row(tmp_path / scoring_page.ROWS, measure(config, dataset))
    shutil.copy(RESULTS / scoring_page.TRANSPORT, tmp_path)
    return tmp_path


def test_the_page_says_what_is_missing(folder, tmp_path_factory):
    text = scoring_page.write(folder).read_text()
    assert text.count("not yet measured") == 2  # both runs with processes
    assert "scoring_options.png" in text
    assert (folder / "scoring_options.png").stat().st_size > 10_000
    empty = scoring_page.write(tmp_path_factory.mktemp("empty")).read_text()
    assert "not yet measured" in empty


def test_the_page_is_that_of_its_rows(tmp_path):
    for name in (scoring_page.ROWS, scoring_page.TRANSPORT):
        shutil.copy(RESULTS / name, tmp_path)
    assert scoring_page.write(tmp_path).read_text() == (RESULTS / scoring_page.PAGE).read_text()
