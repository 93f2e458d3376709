"""Sampler.refresh: scores from outside of the draws are learnt, and count as no iteration."""

from __future__ import annotations

import warnings

import pytest
import torch
from conftest import batch_of, drive, losses_of, observe, scores, train
from test_device import BACKWARDS, FORWARDS, emulated  # noqa: F401

import fastis
from fastis import kernels, methods, misuse
from fastis.kernels.layout import LAST, UPDATES
from fastis.methods import EMAIS

N, B = 300, 20


def trained(steps: int = 60, **options) -> fastis.Sampler:
    sampler = fastis.Sampler(N, B, seed=4, **options)
    drive(sampler, steps)
    return sampler


def lognormal(count: int, seed: int = 9) -> torch.Tensor:
    return torch.empty(count).log_normal_(0, 2, generator=torch.Generator().manual_seed(seed))


def test_the_states_are_those_of_an_update_and_nothing_else_changes(any_backend):
    refreshed, updated = trained(), trained()
    before, score, i = refreshed.state_dict(), lognormal(N), torch.arange(N)
    refreshed.refresh(i, observe(score))
    updated.update(fastis.Batch(i, torch.ones(N)), observe(score))
    after, theirs = refreshed.state_dict(), updated.state_dict()
    assert torch.equal(after["states"], theirs["states"])
    assert not torch.equal(after["states"], before["states"])
    assert torch.equal(after["variance"], before["variance"])
    ticked = after["scalars"].clone()
    ticked[UPDATES] += 1
    assert torch.equal(ticked, theirs["scalars"])
    assert torch.equal(refreshed.probabilities(), updated.probabilities())
    assert refreshed.step == 60


def test_a_pass_in_parts_is_one_pass(any_backend):
    whole, parts = trained(), trained()
    score = lognormal(N)
    whole.refresh(torch.arange(N), score)
    for i in torch.arange(N).split(7):
        parts.refresh(i, [losses_of(*score[i[:3]].tolist()), losses_of(*score[i[3:]].tolist())])
    # (The floor of the weights is at the mean of the moment, which moves from part to part.)
    for ours, theirs in zip(
        (parts.mean, parts.var, parts.last_seen),
        (whole.mean, whole.var, whole.last_seen),
        strict=True,
    ):
        assert torch.equal(ours, theirs)
    assert parts.step == whole.step == 60


@pytest.mark.filterwarnings("ignore:.*more updates than minibatches drawn")
def test_n_ems_outlives_an_evaluation_pass():
    """By updates with weights of 1 it would be that of uniform minibatches."""
    refreshed, updated = (fastis.Sampler(N, B, seed=4) for _ in range(2))
    for sampler in (refreshed, updated):
        train(sampler, 400)
    n_ems = float(refreshed.variance.effective_batch_size)
    assert n_ems > 1.3 * B
    for _ in range(40):
        for i in torch.arange(N).split(B):
            refreshed.refresh(i, scores(i))
            updated.update(fastis.Batch(i, torch.ones(B)), scores(i))
    assert float(refreshed.variance.effective_batch_size) == n_ems
    assert float(updated.variance.effective_batch_size) < 1.1 * B
    assert refreshed.step == 400


def test_it_may_come_first(any_backend):
    sampler = fastis.Sampler(N, B, method=EMAIS(warmup_epochs=0), seed=0)
    score = 1 + torch.rand(N)
    sampler.refresh(torch.arange(N), score)
    assert sampler.stats()["share_unseen"] == 0
    assert sampler.stats()["effective_batch_size"] != sampler.stats()["effective_batch_size"]
    torch.testing.assert_close(sampler.importance, score, rtol=2**-16, atol=0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(2 * misuse.LEAST_PATIENCE):
            sampler.sample()


def test_the_same_network_is_not_asked_twice(any_backend):
    sampler = trained()
    sampler.refresh(torch.arange(N), torch.full((N,), 3.0))
    mean = sampler.mean
    sampler.refresh(torch.arange(N), torch.full((N,), 90.0))
    sampler.update(batch_of(1, 2), losses_of(90.0, 90.0))
    assert torch.equal(sampler.mean, mean)
    sampler.update(batch_of(1, 2), losses_of(90.0, 90.0))
    assert bool((sampler.mean > mean).nonzero().flatten().tolist() == [1, 2])


def test_a_state_saved_before_the_next_update_can_be_loaded(any_backend):
    sampler, resumed = trained(), trained(0)
    sampler.refresh(torch.arange(N), lognormal(N))
    resumed.load_state_dict(sampler.state_dict())
    assert resumed.last_seen.tolist() == [60] * N
    assert torch.equal(resumed.sample().indices, sampler.sample().indices)


def test_what_is_not_finite_is_counted(any_backend):
    sampler = trained()
    before = sampler.mean
    sampler.refresh(torch.tensor([3, 5]), torch.tensor([torch.nan, 2.0]))
    assert sampler.skipped == 1
    assert (sampler.mean != before).nonzero().flatten().tolist() == [5]


def test_losses_go_to_those_who_average_them():
    sampler = fastis.Sampler(N, B, method="loss", seed=0)
    sampler.refresh(
        torch.tensor([3]), fastis.ScoredLoss(torch.ones(()), *torch.tensor([[7.0], [1]]))
    )
    assert sampler.mean[3] == 7


@pytest.mark.parametrize("stride", [FORWARDS, BACKWARDS])
def test_the_device_does_as_the_reference(emulated, stride):  # noqa: F811
    with fastis.backend("reference"):
        theirs = trained()
    ours = fastis.Sampler(N, B, seed=4)
    ours.load_state_dict(theirs.state_dict())
    i, score = torch.arange(N).flip(0)[: N - 9], lognormal(N - 9)
    score[5] = torch.nan
    emulated(stride)
    ours.sample()
    ours.refresh(i, score)
    found, drawn = ours.state_dict(), [ours.sample() for _ in range(3)]
    kernels._chosen.clear()
    with fastis.backend("reference"):
        theirs.sample()
        theirs.refresh(i, score)
        expected = theirs.state_dict()
        assert all(torch.equal(found[k], expected[k]) for k in ("states", "scalars", "variance"))
        for batch in drawn:
            again = theirs.sample()
            assert torch.equal(batch.indices, again.indices)
            assert torch.equal(batch.weights, again.weights)


def test_distributed_adds_its_constant():
    sampler = fastis.Sampler(N, B, method="distributed", seed=0)
    sampler.refresh(torch.arange(4), torch.tensor([1.0, 2.0, 3.0, 6.0]))
    assert sampler.mean[:4].tolist() == pytest.approx([1.3, 2.3, 3.3, 6.3])
    assert sampler.step == 0


@pytest.mark.parametrize("name", sorted(n for n, m in methods.BY_NAME.items() if not m.folds))
def test_methods_that_learn_from_their_own_draws_refuse_it(name):
    made = methods.Presampling(torch.rand) if name == "presampling" else methods.BY_NAME[name]()
    sampler = fastis.Sampler(N, B, method=made)
    with pytest.raises(TypeError, match=rf"method '{name}' learns from its own minibatches alone"):
        sampler.refresh(torch.arange(3), torch.ones(3))


@pytest.mark.parametrize(
    ("indices", "out", "error", "message"),
    [
        ([1, 2], torch.ones(2), TypeError, "indices must be a tensor, got list"),
        (torch.ones(2), torch.ones(2), TypeError, "indices must have dtype torch.int64"),
        (torch.tensor([[1]]), torch.ones(1), ValueError, r"indices must have shape \[n\]"),
        (torch.tensor([1, 2]), torch.ones(3), ValueError, r"out.score must have shape \[2\]"),
        (torch.tensor([1, N]), torch.ones(2), IndexError, r"^indices must be in \[0, 300\)"),
        (torch.tensor([-1, 1]), torch.ones(2), IndexError, r"got values from -1 to 1"),
        (torch.tensor([1]), "x", TypeError, "out must be a ScoredLoss"),
    ],
)  # fmt: skip
def test_errors_change_nothing(any_backend, indices, out, error, message):
    sampler = trained()
    before = sampler.state_dict()
    with pytest.raises(error, match=message):
        sampler.refresh(indices, out)
    after = sampler.state_dict()
    assert all(torch.equal(before[k], after[k]) for k in ("states", "scalars", "variance"))
    sampler.refresh(torch.empty(0, dtype=torch.int64), torch.empty(0))
    assert torch.equal(before["scalars"], sampler.state_dict()["scalars"])
    assert int((sampler._table.column(LAST) < 0).sum()) == 0
