"""The experiment on label errors, on made-up data: its noise, its rankings, its page."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from bench.experiments import label_errors, label_errors_page
from bench.experiments.datasets import Dataset
from bench.experiments.label_errors import Config, labels_of, measure, quality
from bench.experiments.label_noise import KINDS
from bench.experiments.missing_runs import run_missing

RESULTS = Path(__file__).resolve().parents[1] / "bench" / "results"


@pytest.fixture
def dataset():
    generator = torch.Generator().manual_seed(0)
    y = torch.randint(4, (900,), generator=generator)
    x = torch.randn(900, 1, 28, 28, generator=generator) + y[:, None, None, None]
    return Dataset("made up", x, y, x[:50], y[:50], 4)


def noisy(kind, dataset, seed=0):
    return labels_of(Config(kind, "emais", 1, seed, "embedded"), dataset)


@pytest.mark.parametrize("kind", KINDS)
def test_a_fifth_of_the_labels_is_wrong(dataset, kind):
    labels = noisy(kind, dataset)
    wrong = labels != dataset.y_train
    assert wrong.double().mean().item() == pytest.approx(0.2, abs=4 * (0.16 / 900) ** 0.5)
    assert torch.equal(labels, noisy(kind, dataset))
    assert not torch.equal(labels, noisy(kind, dataset, seed=1))
    shift = (labels - dataset.y_train)[wrong] % 4
    if kind == "pair":
        assert shift.unique().tolist() == [1]
    else:
        assert shift.unique().tolist() == [1, 2, 3]


def test_instance_dependent_noise_depends_on_the_image(dataset):
    """The same images again go to the same classes far more often than others of their class."""
    twice = Dataset("", dataset.x_train.repeat(2, 1, 1, 1), dataset.y_train.repeat(2), *[None] * 3)
    labels = noisy("instance", twice).view(2, 900)
    both = (labels != dataset.y_train).all(0)
    assert int(both.sum()) > 20
    agree = (labels[0] == labels[1])[both].double().mean()
    assert float(agree) > 0.9  # x W has a deviation of 28: next to no chance is left; else 1/3


def test_quality_by_hand():
    wrong = torch.tensor([True, False, True, False, False])
    found = quality(torch.tensor([5.0, 4.0, 3.0, 2.0, 1.0]), wrong)
    assert found == {"auroc": 0.83333, "average_precision": 0.83333, "precision": 0.5}


@pytest.mark.parametrize("way", ["emais", "loss", "uniform"])
def test_rankings_find_wrong_labels(dataset, way):
    final = measure(Config("symmetric", way, 6, 0, "embedded"), dataset)
    name = "last loss" if way == "uniform" else "mean"
    assert final["rankings"][name]["auroc"] > 0.9
    assert final["wrong"] == int((noisy("symmetric", dataset) != dataset.y_train).sum())


def test_folds_are_predicted_by_networks_that_have_not_seen_them(dataset):
    pytest.importorskip("cleanlab")
    final = measure(Config("symmetric", "cleanlab", 6, 0, "embedded"), dataset)
    assert final["rankings"]["self_confidence"]["auroc"] > 0.9


def test_what_is_there_is_not_measured_again(tmp_path):
    path, asked = tmp_path / "rows.jsonl", []

    def once(config):
        asked.append(config.seed)
        return {"value": config.seed}

    configs = [Config("pair", "emais", 1, seed, "embedded") for seed in (0, 1)]
    run_missing("try", path, configs[:1], once)
    rows = run_missing("try", path, configs, once)
    assert asked == [0, 1]
    assert [row["final"] for row in rows] == [{"value": 0}, {"value": 1}]
    assert all(row["benchmark"] == "try" and "versions" in row for row in rows)


def test_the_page_is_that_of_the_rows(tmp_path):
    for name in ("label_errors.jsonl", "label_errors.png"):
        shutil.copy(RESULTS / name, tmp_path)
    page = label_errors_page.write(tmp_path)
    assert page.read_text() == (RESULTS / page.name).read_text()


def test_the_page_without_rows_says_so(tmp_path):
    text = label_errors_page.write(tmp_path).read_text()
    assert "| cleanlab, five folds (its default) | - | - | - |" in text
    assert label_errors_page.NOT_YET in text


def test_every_way_has_its_place_on_the_page():
    assert {way for way, _, _ in label_errors_page.RANKINGS} == set(label_errors.COMPARED)
    assert set(label_errors.COMPARED) <= label_errors.WAYS.keys()
