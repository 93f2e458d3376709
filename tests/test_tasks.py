"""The benchmarks' tasks: metrics by hand, data made from data, and their evaluation."""

import math
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from test_bench import fashion_file

sys.path.append(str(Path(__file__).resolve().parents[1]))

from bench.experiments import metrics, tasks
from bench.experiments.models import build_model
from bench.experiments.tasks import TASKS, load_task_data

SCORES = torch.tensor([0.6, 0.9, 0.7, 0.8])
TARGET = torch.tensor([0.0, 1.0, 1.0, 0.0])


def column(values) -> torch.Tensor:
    return torch.as_tensor(values, dtype=torch.float32)[:, None]


# ---- metrics


def test_average_precision_by_hand():
    # In falling order: hit, miss, hit, miss. Precision 1 at recall 1/2, 2/3 at recall 1.
    found = metrics.average_precision(column(SCORES), column(TARGET))
    assert found.tolist() == pytest.approx([(1 + 2 / 3) / 2])


def test_average_precision_of_ties_is_that_of_the_whole_group():
    # 0.9 is a miss; then two hits and a miss share a score: precision 2/4 for both.
    found = metrics.average_precision(column([0.9, 0.5, 0.5, 0.5, 0.1]), column([0, 1, 0, 1, 0]))
    assert found.item() == pytest.approx(0.5)
    equal = metrics.average_precision(torch.zeros(4, 1), column([0, 0, 1, 0]))
    assert equal.item() == pytest.approx(0.25)


def test_area_under_roc_by_hand():
    # Pairs of (positive, negative): 0.9 wins twice, 0.7 wins against 0.6 and loses against 0.8.
    found = metrics.area_under_roc(column(SCORES), column(TARGET))
    assert found.tolist() == pytest.approx([0.75])
    tied = metrics.area_under_roc(column([0.5, 0.5, 0.1]), column([1, 0, 0]))
    assert tied.item() == pytest.approx(0.75)


def test_metrics_take_each_label_alone_and_no_order():
    generator = torch.Generator().manual_seed(0)
    scores = torch.randint(0, 5, (40, 3), generator=generator).float()
    target = torch.randint(0, 2, (40, 3), generator=generator).float()
    order = torch.randperm(40, generator=generator)
    for metric in (metrics.average_precision, metrics.area_under_roc):
        alone = torch.cat([metric(scores[:, [j]], target[:, [j]]) for j in range(3)])
        torch.testing.assert_close(metric(scores, target), alone)
        torch.testing.assert_close(metric(scores[order], target[order]), alone)


def test_a_label_that_no_sample_has_is_not_defined():
    assert math.isnan(metrics.average_precision(torch.rand(5, 1), torch.zeros(5, 1)).item())
    assert math.isnan(metrics.area_under_roc(torch.rand(5, 1), torch.zeros(5, 1)).item())


# ---- data


@pytest.fixture
def file(tmp_path):
    return fashion_file(tmp_path / "small.npz")


def test_tiles_hold_four_images_and_their_set_of_classes():
    # Image i is constant i, so that a tile tells which images it holds.
    x = torch.arange(10.0)[:, None, None, None].expand(10, 1, 2, 3)
    y = torch.arange(10) // 2
    tiles, labels = tasks.tile_images(x, y, num_classes=6, seed=3)
    assert tiles.shape == (4, 1, 4, 6)
    assert labels.shape == (4, 6)
    members = tiles[:, 0, ::2, ::3].flatten(1).long()  # one pixel of each quarter
    for tile, four, label in zip(tiles, members, labels, strict=True):
        assert torch.equal(tile[0, :2, 3:], torch.full((2, 3), float(four[1])))
        assert len(set(four.tolist())) == 4
        assert label.nonzero().flatten().tolist() == sorted(set(y[four].tolist()))
    for half in members.view(2, 8):  # nothing twice within a pass
        assert len(half.unique()) == 8
    again, _ = tasks.tile_images(x, y, num_classes=6, seed=3)
    assert torch.equal(tiles, again)


def test_test_tiles_are_of_test_images(file):
    plain, tiled = load_task_data("fashion_mnist", file), load_task_data("fashion_tiles", file)
    assert tiled.x_train.shape == (20, 1, 56, 56)
    assert tiled.x_test.shape == (10, 1, 56, 56)
    for tile in tiled.x_test:
        assert any(torch.equal(tile[:, :28, :28], image) for image in plain.x_test)


def test_sequences_permute_all_pixels_alike(file):
    plain = load_task_data("fashion_mnist", file)
    for name, shape in (("permuted_rows", (28, 28)), ("permuted_pixels", (784, 1))):
        data = load_task_data(name, file)
        assert data.x_train.shape == (40, *shape)
        for mine, whole in ((data.x_train, plain.x_train), (data.x_test, plain.x_test)):
            assert torch.equal(mine.flatten(1).sort().values, whole.flatten(1).sort().values)
        # One permutation: equal pixels of two images stay in equal places.
        same = plain.x_train[0].flatten() == plain.x_test[0].flatten()
        moved = data.x_train[0].flatten() == data.x_test[0].flatten()
        assert same.sum() == moved.sum()
        assert not torch.equal(data.x_train.flatten(1), plain.x_train.flatten(1))


def test_sorted_by_class_keeps_images_with_their_labels(file):
    plain, data = load_task_data("fashion_mnist", file), load_task_data("fashion_by_class", file)
    assert data.y_train.tolist() == sorted(plain.y_train.tolist())
    assert torch.equal(data.x_train[:4], plain.x_train[plain.y_train == 0])
    assert torch.equal(data.y_test, plain.y_test)


def test_unknown_task_is_named():
    with pytest.raises(ValueError, match=r"--dataset must be one of .*got 'mnist'"):
        load_task_data("mnist")


# ---- evaluation


@pytest.mark.parametrize("name", ["fashion_mnist", "fashion_tiles", "permuted_rows"])
def test_evaluation_by_parts_is_that_of_the_whole(file, monkeypatch, name):
    monkeypatch.setattr(tasks, "EVALUATION_BATCH", 7)
    task, data = TASKS[name], load_task_data(name, file)
    torch.manual_seed(0)
    model = build_model(task.model, data.image_shape, data.num_classes)
    found = task.evaluate(model, data.x_test, data.y_test)
    logits = model(data.x_test).detach()
    assert found["loss"] == pytest.approx(task.loss(logits, data.y_test).loss.item(), rel=1e-5)
    if task.one_class:
        wrong = logits.argmax(1) != data.y_test
        assert found["error"] == pytest.approx(100 * wrong.double().mean().item())
        losses = F.cross_entropy(logits, data.y_test, reduction="none")
    else:
        assert found["error"] == pytest.approx(100 - found["map"])
        losses = F.binary_cross_entropy_with_logits(logits, data.y_test, reduction="none").mean(1)
    torch.testing.assert_close(task.sample_losses(logits, data.y_test), losses)
    assert model.training
