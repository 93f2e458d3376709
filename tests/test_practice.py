"""The practitioners' experiments: searches by made-up rows, and their page."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_bench import fashion_file
from test_reproduce import by_key, made_up_row
from test_runs import small

sys.path.append(str(Path(__file__).resolve().parents[1]))

from bench.experiments import loop, practice, practice_page
from bench.experiments.experiment import Once, Settings
from bench.experiments.tasks import load_task_data, long_tailed, mislabelled

pytestmark = pytest.mark.usefixtures("threads_and_data")
SETTINGS = Settings("fashion_mnist.npz", seeds=2)


def filled(name: str, error_of, settings=SETTINGS) -> dict:
    """Rows of all runs that an experiment asks for, until it asks for no more."""
    rows: dict = {}
    while missing := [
        config
        for config in practice.EXPERIMENTS[name].configs(settings, rows)
        if config.key not in rows
    ]:
        made = (made_up_row(c, error_of(c) / 100, test_error=error_of(c)) for c in missing)
        rows |= by_key(made)
    return rows


def test_a_search_walks_to_the_least_error_and_looks_around_it():
    best = (256, 0.2)

    def error(config):
        sizes, rates = sorted(practice.FASHION.step_ms), practice.RATES
        down = sizes.index(config.batch_size) - sizes.index(best[0])
        right = rates.index(config.lr) - rates.index(best[1])
        return 8 + down**2 + right**2

    rows = filled("budgets_fashion", error)
    for seconds in practice.FASHION.seconds:
        for method in practice.FASHION.compared:
            visited, found = practice.FASHION.search(SETTINGS, rows, method, seconds)
            assert (found.batch_size, found.lr) == best
            cells = {(config.batch_size, config.lr) for config in visited}
            assert cells >= {best, *practice.FASHION.neighbours(best, seconds)}
            assert len(cells) < len(practice.RATES) * len(practice.FASHION.step_ms)
    repeated = {row["config"]["batch_size"] for row in rows.values() if row["config"]["seed"]}
    assert repeated == {256}


def test_lengths_fill_the_budget_with_what_the_sampler_costs():
    scan = practice.FASHION.config(SETTINGS, "SGD-Scan", 60, (128, 0.1))
    emais = practice.FASHION.config(SETTINGS, "EMAIS without pauses", 60, (128, 0.1))
    assert scan.iterations * 6.2 == pytest.approx(60_000, rel=1e-3)
    assert emais.iterations * (6.2 + practice.FASTIS_MS) == pytest.approx(60_000, rel=1e-3)


def test_uniform_samplings_best_rate_is_everybodys():
    def error(config):
        return 10.0 if config.lr == 0.03 else 11.0

    rows = filled("defaults", error)
    others = [row["config"] for row in rows.values() if row["config"]["method"] != "scan"]
    assert {c["lr"] for c in others if c["dataset"] != "permuted_rows"} == {0.03}
    searched = [c for c in practice.defaults(SETTINGS, rows) if isinstance(c, Once)]
    assert {c.config.lr for c in searched if c.config.method == "scan"} >= {0.06, 0.1}
    assert not any(c["dataset"].startswith("cifar") for c in others)


def test_the_page_has_every_section_with_or_without_rows(tmp_path):
    empty = practice_page.write(tmp_path, {}).read_text()
    assert empty.count(practice_page.NOT_YET) == len(practice.EXPERIMENTS)
    rows: dict = {}
    for name in practice.EXPERIMENTS:
        rows |= filled(name, lambda c: 10.0 + c.lr + c.seed + (c.method != "scan"))
    text = practice_page.write(tmp_path, rows).read_text()
    for name in practice.EXPERIMENTS:
        assert f"## {name}: " in text
        assert f"reproduce.py {name} --data " in text
    defaults = text.split("## defaults")[1]
    # Each seed one point more than uniform sampling: no spread of the paired difference.
    assert "| 0.03 | 10.53 ± 0.71 (2) | +1.00 ± 0.00 (2) |" in defaults
    assert (tmp_path / "budgets_fashion.png").is_file()


# ---- data and runs of their own


@pytest.fixture
def data(tmp_path):
    return load_task_data("fashion_mnist", fashion_file(tmp_path / "small.npz"))


def test_a_long_tail_keeps_images_with_their_labels(data):
    counts = data.y_train.bincount(minlength=data.num_classes)
    tailed = long_tailed(data, factor=4.0)
    kept = tailed.y_train.bincount(minlength=data.num_classes)
    wanted = [round(int(n) * 4 ** (-c / 9)) for c, n in enumerate(counts)]
    assert kept.tolist() == wanted
    for image, label in zip(tailed.x_train, tailed.y_train, strict=True):
        same = (data.x_train == image).flatten(1).all(1)
        assert label in data.y_train[same]
    assert tailed.y_test is data.y_test


def test_wrong_labels_are_exactly_as_many_and_all_wrong(data):
    noisy = mislabelled(data, 0.25)
    assert (noisy.y_train != data.y_train).sum() == round(0.25 * len(data.y_train))
    assert noisy.y_train.max() < data.num_classes
    assert torch.equal(noisy.y_train, mislabelled(data, 0.25).y_train)
    assert torch.equal(noisy.y_test, data.y_test)


def test_class_weights_count_every_class_alike(data):
    weights = loop.class_weights_of(data)
    of_samples = weights[data.y_train]
    assert of_samples.mean().item() == pytest.approx(1.0)
    sums = torch.zeros(data.num_classes).index_add(0, data.y_train, of_samples)
    assert sums.tolist() == pytest.approx([len(data.y_train) / data.num_classes] * 10)
    run = loop.Run(small(class_weights=True), data)
    logits = torch.randn(8, 10)
    expected = torch.nn.functional.cross_entropy(
        logits, data.y_train[:8], weights, reduction="none"
    )
    loss = run.loss(logits, data.y_train[:8], torch.ones(8)).loss
    assert loss.item() == pytest.approx(expected.mean().item(), rel=1e-6)


def test_batch_norm_layers_get_the_coefficients(data):
    config = small(model="cnn_bn", options={"warmup_epochs": 0})
    plain, weighted = (loop.Run(replace(config, weighted_norm=on), data) for on in (False, True))
    for run in (plain, weighted):
        run.train(3)
    layer = type(plain.model[1])
    assert type(weighted.model[1]) is not layer
    assert not torch.equal(plain.model[1].running_mean, weighted.model[1].running_mean)
