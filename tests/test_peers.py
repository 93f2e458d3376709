"""What others use in place of a sampler: shares, coefficients and memories by hand, and a run."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_bench import fashion_file

import fastis

sys.path.append(str(Path(__file__).resolve().parents[1]))

from bench.experiments import loop
from bench.experiments.config import RunConfig
from bench.experiments.k_means import k_means
from bench.experiments.methods import check_config
from bench.experiments.peers import SAMPLERS, build_peer
from bench.experiments.tasks import load_task_data


def config(method: str, batch_size: int = 10, iterations: int = 10**6, **options) -> RunConfig:
    return RunConfig(method, 0.01, 0, batch_size=batch_size, iterations=iterations, options=options)


def scored(values: torch.Tensor) -> fastis.ScoredLoss:
    return fastis.ScoredLoss(values.mean(), values, values, None)


def drawn(peer, losses: torch.Tensor, samples: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Indices and coefficients of the next minibatches, ``samples`` long; a sample's loss and
    score is always its own of ``losses``."""
    batches = []
    for _ in range(samples // peer.batch_size):
        batches.append(peer.sample())
        assert batches[-1].indices.shape == batches[-1].weights.shape == (peer.batch_size,)
        assert batches[-1].indices.dtype == torch.int64
        assert batches[-1].weights.dtype == torch.float32
        peer.update(batches[-1], scored(losses[batches[-1].indices]))
    indices, weights = (torch.cat(part) for part in zip(*batches, strict=True))
    return indices, weights


def is_permutation(indices: torch.Tensor, n: int) -> bool:
    return torch.equal(indices.sort().values, torch.arange(n))


# ---- class balance


def test_classes_are_drawn_equally_often_and_losses_count_alike():
    labels = torch.tensor([0] * 70 + [1] * 25 + [2] * 5)
    peer = build_peer(config("class_balanced"), labels)
    indices, weights = drawn(peer, torch.ones(100), 30_000)
    shares = labels[indices].bincount() / 30_000
    assert shares.tolist() == pytest.approx([1 / 3] * 3, abs=5 * (2 / 9 / 30_000) ** 0.5)
    assert (weights == 1).all()


# ---- InfoBatch

# The mean is 1.75: 30 are below it.
LOSSES = torch.cat([torch.linspace(0, 1, 30), torch.linspace(3, 6.25, 10)])
LABELS = torch.zeros(40, dtype=torch.int64)


@pytest.mark.parametrize(("ratio", "kept"), [(0.5, 15), (0.3, 21), (0.0, 30)])
def test_infobatch_leaves_out_a_share_of_the_losses_below_the_mean(ratio, kept):
    peer = build_peer(config("infobatch", 1, prune_ratio=ratio), LABELS)
    first, weights = drawn(peer, LOSSES, 40)
    assert is_permutation(first, 40)
    assert (weights == 1).all()
    for _ in range(3):
        indices, weights = drawn(peer, LOSSES, kept + 10)
        assert len(indices.unique()) == kept + 10
        is_easy = LOSSES[indices] < 1.75
        assert is_easy.sum() == kept
        assert (weights[~is_easy] == 1).all()
        torch.testing.assert_close(weights[is_easy], torch.full((kept,), 1 / (1 - ratio)))


def test_infobatchs_expected_coefficient_is_one_an_epoch():
    peer = build_peer(config("infobatch", 5), LABELS)
    drawn(peer, LOSSES, 40)
    epochs = 1000
    indices, weights = drawn(peer, LOSSES, epochs * 25)
    sums = torch.zeros(40).index_add_(0, indices, weights) / epochs
    # Kept half of the time, with 2: the standard deviation is 1 an epoch.
    assert sums[:30].tolist() == pytest.approx([1] * 30, abs=5 / epochs**0.5)
    assert sums[30:].tolist() == [1] * 10


def test_infobatchs_chance_and_order_are_drawn_anew_each_epoch():
    peer = build_peer(config("infobatch", 5), LABELS)
    drawn(peer, LOSSES, 40)
    one, other = (drawn(peer, LOSSES, 25)[0] for _ in range(2))
    assert not torch.equal(one.sort().values, other.sort().values)
    # The ten that are always there are not at one end of the epoch.
    begins, ends = (int((LOSSES[part] > 1.75).sum()) for part in (one[:10], one[-10:]))
    assert begins > 0 < ends
    late = drawn(build_peer(config("infobatch", 5, delta=0.0), LABELS), LOSSES, 80)[0].split(40)
    assert not torch.equal(*late)


def test_samples_that_were_not_visited_yet_are_not_pruned():
    """Ten of 40 are left over by two minibatches of 15; the third one begins the second epoch, of
    these ten and half of the others."""
    peer = build_peer(config("infobatch", 15), LABELS)
    visited, _ = drawn(peer, torch.linspace(0, 1, 40), 30)
    batches = [peer.sample() for _ in range(3)]
    indices, weights = (torch.cat(part) for part in zip(*batches, strict=True))
    left, epoch = indices[:10], indices[10:35]
    assert not torch.isin(left, visited).any()
    is_left = torch.isin(epoch, left)
    assert is_left.sum() == 10
    assert torch.equal(weights[10:35], torch.where(is_left, 1.0, 2.0))


@pytest.mark.parametrize("batch_size", [5, 7])
def test_infobatchs_last_part_is_not_pruned(batch_size):
    run = config("infobatch", batch_size, iterations=200, delta=0.5)
    peer = build_peer(run, LABELS)
    peer.last_losses.copy_(LOSSES)  # as if all samples had been visited before
    indices, weights = drawn(peer, LOSSES, 200 * batch_size)
    late = 100 * batch_size
    assert (weights[late:] == 1).all()
    # Pruned epochs of 25 samples, as long as they end in the first half.
    begin = late // 25 * 25
    assert weights[:begin].sum() == begin // 25 * (2 * 15 + 10)
    for epoch in indices[begin:].split(40)[:-1]:
        assert is_permutation(epoch, 40)


def test_a_run_that_is_annealed_from_the_start_is_never_pruned():
    indices, weights = drawn(build_peer(config("infobatch", 8, delta=0.0), LABELS), LOSSES, 120)
    assert (weights == 1).all()
    assert all(is_permutation(epoch, 40) for epoch in indices.split(40))


def test_the_remainder_of_an_epoch_begins_the_next_minibatch():
    peer = build_peer(config("infobatch", 15, prune_ratio=0.0), LABELS)
    indices, _ = drawn(peer, LOSSES, 120)
    assert all(is_permutation(epoch, 40) for epoch in indices.split(40))


def test_a_loss_that_is_not_finite_is_not_remembered():
    peer = build_peer(config("infobatch", 2), LABELS)
    batch = fastis.Batch(torch.tensor([3, 5]), torch.ones(2))
    peer.update(batch, scored(torch.tensor([0.5, 0.25])))
    peer.update(batch, scored(torch.tensor([float("nan"), 0.125])))
    peer.update(batch, scored(torch.tensor([float("inf"), 0.125])))
    assert peer.last_losses[[3, 5]].tolist() == [0.5, 0.125]


# ---- SeTa

# Five groups of 20, of which the losses are 0, 10, 20, 30 and 40 and a little.
GROUPS = torch.arange(100) % 5
GROUPED = 10.0 * GROUPS + torch.linspace(0, 1, 100)
HUNDRED = torch.zeros(100, dtype=torch.int64)


@pytest.mark.parametrize(
    ("scale", "epochs"),
    [
        (0.9, ["1234", "0123", "1234", "0123"]),  # 4.5 is rounded to 4, as theirs
        (0.6, ["123", "234", "012", "123"]),
        (1.0, ["01234", "01234"]),
    ],
)
def test_setas_window_slides_from_easy_to_hard(scale, epochs):
    peer = build_peer(config("seta", 20, prune_ratio=0.0, window_scale=scale), HUNDRED)
    indices, weights = drawn(peer, GROUPED, 100)
    assert is_permutation(indices, 100)
    for groups in epochs:
        indices, weights = drawn(peer, GROUPED, 20 * len(groups))
        assert len(indices.unique()) == len(indices)
        assert "".join(map(str, GROUPS[indices].unique().tolist())) == groups
        assert (weights == 1).all()


@pytest.mark.parametrize("ratio", [0.0, 0.25])
def test_setas_first_and_late_epochs_are_a_random_share_of_all(ratio):
    kept = round(100 * (1 - ratio))
    first = drawn(build_peer(config("seta", 5, prune_ratio=ratio), HUNDRED), GROUPED, kept)
    late = drawn(
        build_peer(config("seta", 5, prune_ratio=ratio, delta=0.0), HUNDRED), GROUPED, 3 * kept
    )
    for epoch in (first[0], *late[0].split(kept)):
        assert len(epoch.unique()) == kept
        assert GROUPS[epoch].unique().tolist() == [0, 1, 2, 3, 4]
    assert torch.cat([first[1], late[1]]).eq(1).all()
    counts = late[0].bincount(minlength=100)
    assert (counts.min() == 3) == (ratio == 0)  # another share each time


def test_setas_last_part_has_all_groups():
    run = config("seta", 10, iterations=100, prune_ratio=0.0, delta=0.5)
    indices, _ = drawn(build_peer(run, HUNDRED), GROUPED, 1000)
    # 100, then five windows of 80 end with half of the run.
    assert all(len(GROUPS[epoch].unique()) == 4 for epoch in indices[100:500].split(80))
    assert all(is_permutation(epoch, 100) for epoch in indices[500:].split(100))


def test_setas_windows_that_are_empty_or_small_are_made_up_for():
    """All losses are equal, and so in one group: a window without it has no samples."""
    peer = build_peer(config("seta", 20, prune_ratio=0.0), HUNDRED)
    indices, _ = drawn(peer, torch.ones(100), 400)
    assert (indices.bincount() == 4).all()


def test_k_means_finds_groups_in_their_order():
    generator = torch.Generator().manual_seed(0)
    values = torch.cat([torch.randn(n, generator=generator).double() for n in (500, 40, 3)])
    truth = torch.tensor([2] * 500 + [0] * 40 + [1] * 3)
    order = torch.randperm(543, generator=generator)
    values, truth = (values + 100 * truth)[order], truth[order]
    for _ in range(20):
        assert torch.equal(k_means(values, 3, generator), truth)
    assert k_means(values, 1, generator).eq(0).all()


def test_k_means_settles_where_no_sample_is_nearer_to_another_mean():
    generator = torch.Generator().manual_seed(0)
    values = torch.rand(2000, generator=generator).double().log().neg()
    cluster = k_means(values, 5, generator)
    means = torch.stack([values[cluster == c].mean() for c in range(5)])
    assert torch.equal((values[:, None] - means).abs().argmin(1), cluster)
    assert means.diff().gt(0).all()


def test_k_means_of_fewer_values_than_clusters():
    generator = torch.Generator().manual_seed(0)
    cluster = k_means(torch.tensor([1.0, 2.0, 1.0, 1.0, 2.0]).double(), 4, generator)
    assert len(cluster.unique()) == 2
    assert len(cluster[[0, 2, 3]].unique()) == len(cluster[[1, 4]].unique()) == 1
    assert cluster[0] == 0


# ---- online importance sampling


def test_the_first_epoch_fills_the_memory():
    scores = torch.linspace(0.1, 2, 25)
    peer = build_peer(config("online_importance"), torch.zeros(25, dtype=torch.int64))
    indices, weights = drawn(peer, scores, 30)
    assert is_permutation(indices[:25], 25)
    assert torch.equal(indices[25:], indices[:5])
    assert (weights == 1).all()
    torch.testing.assert_close(peer.importance, scores.double())


def test_importances_by_hand():
    """Five minibatches of 2 are an epoch of 10."""
    options = {"alpha": 0.25, "epsilon": 0.5}
    peer = build_peer(config("online_importance", 2, **options), LABELS[:10])
    drawn(peer, torch.arange(1.0, 11.0), 10)
    assert peer.importance.tolist() == list(range(1, 11))
    batch = fastis.Batch(torch.tensor([0, 7]), torch.ones(2))
    for _ in range(2):
        peer.update(batch, scored(torch.tensor([9.0, float("nan")])))
    # 0.25 * 1 + 0.75 * 9 = 7, then 8.5
    assert peer.importance.tolist() == [8.5, *range(2, 11)]
    twice = fastis.Batch(torch.tensor([2, 2]), torch.ones(2))
    for _ in range(2):
        peer.update(twice, scored(torch.tensor([3.0, 3.0])))
    assert peer.importance.tolist() == [8.5, *range(2, 11)]
    peer.update(twice, scored(torch.tensor([3.0, 3.0])))
    assert peer.importance.tolist() == [9.0, *(i + 0.5 for i in range(2, 11))]


def test_draws_are_by_importance_and_their_coefficients_unbiased():
    scores = torch.linspace(0.25, 2, 40)
    peer = build_peer(config("online_importance", epsilon=0.0), LABELS)
    drawn(peer, scores, 40)
    samples = 40_000
    indices, weights = drawn(peer, scores, samples)
    p = scores.double() / scores.sum()
    torch.testing.assert_close(weights, (1 / (40 * p[indices])).float())
    counts = indices.bincount(minlength=40)
    assert ((counts / samples - p).abs() < 5 * (p / samples).sqrt()).all()
    # The mean of w_i over the draws: E[w 1(i)] = p_i / (N p_i).
    mean = torch.zeros(40).index_add_(0, indices, weights) / samples
    assert ((mean - 1 / 40).abs() < 5 / 40 / (samples * p).sqrt()).all()


# ---- all of them


def losses_of_seed(seed: int) -> torch.Tensor:
    return torch.rand(50, generator=torch.Generator().manual_seed(seed)).log().neg()


@pytest.mark.parametrize("method", SAMPLERS)
def test_a_seed_fixes_the_minibatches(method):
    labels, losses = torch.arange(50) % 3, losses_of_seed(0)
    run = config(method, 8, iterations=50)
    runs = (run, run, replace(run, seed=1))
    one, same, other = (drawn(build_peer(r, labels), losses, 400) for r in runs)
    assert all(map(torch.equal, one, same))
    assert not torch.equal(one[0], other[0])


@pytest.mark.parametrize("method", sorted(SAMPLERS.keys() - {"class_balanced"}))
def test_minibatches_follow_what_is_observed(method):
    run, labels = config(method, 8, iterations=50), torch.zeros(50, dtype=torch.int64)
    one, other = (drawn(build_peer(run, labels), losses_of_seed(s), 400)[0] for s in (0, 1))
    assert torch.equal(one[:40], other[:40])
    assert not torch.equal(one, other)


@pytest.mark.parametrize(
    ("run", "words"),
    [
        (config("infobatch", ratio=0.5), "'infobatch' must be among prune_ratio, delta, got ratio"),
        (config("class_balanced", power=1), "'class_balanced' must be among .none., got power"),
        (config("seta", k=5, tau=1), "'seta' must be among prune_ratio, .* got k, tau"),
        (config("infobatch", prune_ratio=0.95), r"prune_ratio must be in \[0, 0.9\]"),
        (config("infobatch", delta=1.5), "delta must be"),
        (config("seta", num_group=0), "num_group must be"),
        (config("seta", num_group=37), r"num_group must be in \[1, 36\], got 37"),
        (config("seta", window_scale=0.05), "window_scale must leave one of 5 groups, got 0.05"),
        (config("online_importance", alpha=1.0), r"alpha must be in \[0, 1\)"),
        (config("online_importance", epsilon=-1), "epsilon must be"),
        (config("infobatch", 41), r"batch_size must be in \[1, 40\], got 41"),
        (replace(config("seta"), seconds=2.5), "seconds must be 0 for method 'seta'.* got 2.5"),
    ],
)
def test_bad_configurations_are_named(run, words):
    for build in (lambda: check_config(run, 40), lambda: build_peer(run, LABELS)):
        with pytest.raises(ValueError, match=words):
            build()


@pytest.mark.usefixtures("threads_and_data")
@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("infobatch", {"prune_ratio": 0.75}),
        ("seta", {"num_group": 3}),
        ("online_importance", {"alpha": 0.0}),
    ],
)
def test_a_run_trains_with_a_peer(tmp_path, method, options):
    data = load_task_data("fashion_mnist", fashion_file(tmp_path / "small.npz"))
    run = config(method, 8, iterations=40, **options)
    check_config(run, len(data.y_train))
    row = loop.run(replace(run, model="mlp", data="small.npz"), data)
    assert row["config"]["options"] == options
    assert row["final"]["steps"] == 40
    assert row["final"]["lr_factor"] == 1
    assert row["final"]["efficiency"] is row["curves"]["effective_batch_size"][-1] is None
    state = loop.Run(replace(run, model="mlp", data="small.npz"), data)
    untrained = state.task.evaluate(state.model, data.x_train, data.y_train)["loss"]
    assert row["final"]["train_loss"] < untrained
