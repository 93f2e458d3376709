"""Scores from elsewhere: into the table as of the iteration that they are of, on every backend."""

from __future__ import annotations

import math

import pytest
import torch
from conftest import batch_of, drive, losses_of, observe
from test_device import FORWARDS, SCRAMBLED, Emulator, assert_equal_tables

import fastis
from fastis import batch as batch_module
from fastis import kernels
from fastis.kernels.layout import LATE, UPDATES
from fastis.methods import EMAIS, Distributed, Loss

IDS = ["linear tau", "fixed tau, pausing", "loss", "distributed"]
FOLDING = [
    EMAIS(warmup_epochs=0),
    EMAIS(warmup_epochs=0, tau=5.0, importance="sum", least_gain=1.0001, smoothing=0.5),
    Loss(warmup_epochs=0),
    Distributed(max_age=20),
]


def folded(sampler, *values, first=0, at):
    sampler.fold(
        torch.arange(first, first + len(values)), torch.tensor(values, dtype=torch.float32), at
    )


def state_of(sampler):
    return {k: v for k, v in sampler.state_dict().items() if torch.is_tensor(v)}


def assert_same(sampler, before, but=()):
    for name, value in state_of(sampler).items():
        if name not in but:
            torch.testing.assert_close(value, before[name], rtol=0, atol=0, equal_nan=True)


def test_as_the_update_of_that_iteration_would_have(any_backend):
    """To the bit, although the folded scores come 30 iterations later."""
    then, later = (fastis.Sampler(40, 4, method=EMAIS(warmup_epochs=0)) for _ in range(2))
    for sampler in (then, later):
        sampler.update(batch_of(*range(40)), observe(torch.linspace(1, 5, 40)))
        drive_on(sampler, 20)
    new = torch.tensor([3.0, 0.5, 9.0, 1.0])
    then.update(batch_of(7, 8, 9, 10), observe(new))
    later.update(batch_of(30, 31, 32, 33), observe(new))
    for sampler in (then, later):
        drive_on(sampler, 30)
    later.fold(torch.tensor([7, 8, 9, 10]), new, 21)
    assert later.last_seen[7:11].tolist() == [21] * 4
    for column in ("mean", "var", "last_seen"):
        assert torch.equal(getattr(then, column)[7:11], getattr(later, column)[7:11])


def drive_on(sampler, steps):
    """Updates of samples from 34 on."""
    for step in range(steps):
        sampler.update(batch_of(34 + step % 6), losses_of(1.0 + step % 7))


def test_by_hand():
    sampler = fastis.Sampler(4, 1, method=EMAIS(warmup_epochs=0, tau_scale=0.5))
    sampler.update(batch_of(0), losses_of(2.0))
    for _ in range(11):
        sampler.update(batch_of(3), losses_of(1.0))
    folded(sampler, 6.0, 5.0, at=8)  # of 8 iterations after the first, tau = 4
    alpha = math.exp(-8 / 4)
    assert sampler.mean[:2].tolist() == pytest.approx([2 + (1 - alpha) * 4, 5.0])
    assert sampler.var[:2].tolist() == pytest.approx([alpha * (1 - alpha) * 16, 0.0])


@pytest.mark.parametrize("method", FOLDING, ids=IDS)
def test_older_scores_undo_nothing_and_the_same_ones_change_nothing(method, any_backend):
    sampler = fastis.Sampler(60, 6, method=method)
    drive(sampler, 30)
    folded(sampler, *range(1, 11), at=25)
    before = state_of(sampler)
    folded(sampler, *range(11, 21), at=25)
    folded(sampler, *range(21, 31), at=12)
    assert_same(sampler, before)
    folded(sampler, *range(21, 31), at=26)
    assert sampler.last_seen[:10].tolist() == [max(26, t) for t in before["states"][:10, 2]]


@pytest.mark.parametrize("method", FOLDING, ids=IDS)
def test_neither_clocks_nor_traces_move(method, any_backend):
    sampler = fastis.Sampler(60, 6, method=method, seed=1)
    drive(sampler, 33)
    before = state_of(sampler)
    folded(sampler, *([50.0] * 60), at=33)
    assert sampler.step == 33
    assert_same(sampler, before, but={"scalars", "states"})
    assert torch.equal(state_of(sampler)["scalars"][:3], before["scalars"][:3])


def test_the_present_iterations_score_is_the_same_observation():
    """Parameters of iteration t are those that update t computes its scores with."""
    sampler = fastis.Sampler(60, 6, method=EMAIS(warmup_epochs=0))
    drive(sampler, 10)
    folded(sampler, 4.0, at=10)
    before = sampler.mean[0]
    sampler.update(batch_of(0, 1), losses_of(9.0, 9.0))
    assert sampler.mean[0] == before


def messages(steps, n):
    """For every step scores of 9 samples, some twice, some no numbers, of a past iteration."""
    generator = torch.Generator().manual_seed(4)
    for step in range(steps):
        indices = torch.randint(n, (9,), generator=generator)
        score = torch.empty(9).log_normal_(0, 3, generator=generator)
        score[torch.rand(9, generator=generator) < 0.1] = torch.nan
        age = int(torch.randint(15, (), generator=generator))
        yield indices, score, max(0, step - age)


def run(method, flatten):
    n, drawn = 90, []
    sampler = fastis.Sampler(n, 8, method=method, seed=2, flatten=flatten)
    generator = torch.Generator().manual_seed(0)
    for indices, score, iteration in messages(120, n):
        sampler.fold(indices, score, iteration)
        drawn.append(sampler.sample())
        own = torch.empty(8).log_normal_(0, 3, generator=generator)
        sampler.update(drawn[-1], observe(own, torch.full((4,), 0.1)))
    return sampler, drawn


@pytest.mark.parametrize("flatten", ["cap", "mix"])
@pytest.mark.parametrize("method", FOLDING, ids=IDS)
def test_every_backend_has_the_same_bits(method, flatten, monkeypatch):
    with fastis.backend("reference"):
        expected, theirs = run(method, flatten)
    assert expected.skipped > 20
    found = [run(method, flatten)]
    for stride in (FORWARDS, SCRAMBLED):
        monkeypatch.setitem(kernels._chosen, ("table", "cpu"), Emulator(stride))
        found.append(run(method, flatten))
    for sampler, drawn in found:
        assert_equal_tables(expected, sampler)
        for ours, batch in zip(drawn, theirs, strict=True):
            assert torch.equal(ours.indices, batch.indices)
            assert torch.equal(ours.weights, batch.weights)


def test_what_is_wrong_changes_nothing(any_backend):
    sampler = fastis.Sampler(60, 6, method=EMAIS(warmup_epochs=0))
    drive(sampler, 12)
    before = state_of(sampler)
    i, x = torch.tensor([1, 2]), torch.tensor([1.0, 2.0])
    for arguments, error, says in (
        ((i, x, 13), ValueError, r"iteration must be in \[0, 12\], the sampler's step, got 13"),
        ((i, x, -1), ValueError, "iteration must be at least 0, got -1"),
        ((i, x, 1.5), TypeError, "iteration must be an int, got float 1.5"),
        ((i, x[:1], 3), ValueError, r"scores must have shape \[2\], got \[1\]"),
        ((i.int(), x, 3), TypeError, "indices must have dtype torch.int64, got torch.int32"),
        ((i, i, 3), TypeError, "scores must have dtype torch.float32 or"),
        (([1], x, 3), TypeError, "indices must be a tensor, got list"),
        ((i + 58, x, 3), IndexError, r"must be in \[0, 60\), got values from 59 to 60"),
        ((i - 2, x, 3), IndexError, r"must be in \[0, 60\), got values from -1 to 0"),
    ):
        with pytest.raises(error, match=says):
            sampler.fold(*arguments)
        assert_same(sampler, before)


def test_too_old_to_be_told_from_the_future():
    sampler = fastis.Sampler(60, 6, method=EMAIS(warmup_epochs=0))
    sampler._table.scalars[UPDATES] = LATE + 7
    folded(sampler, 1.0, at=8)
    with pytest.raises(ValueError, match=rf"iteration must be in \[8, {LATE + 7}\]"):
        folded(sampler, 1.0, at=7)


def test_a_device_leaves_out_what_is_out_of_range(monkeypatch):
    monkeypatch.setattr(batch_module, "may_read", lambda device: False)
    monkeypatch.setitem(kernels._chosen, ("table", "cpu"), Emulator(FORWARDS))
    sampler = fastis.Sampler(60, 6, method=EMAIS(warmup_epochs=0))
    drive(sampler, 12)
    before = state_of(sampler)
    folded(sampler, 1.0, 2.0, at=13)
    folded(sampler, 5.0, 5.0, first=60, at=5)
    assert_same(sampler, before, but={"scalars"})
    assert sampler.skipped == 2
    sampler.fold(torch.tensor([60, 3, -1]), torch.tensor([1.0, 2.0, 3.0]), 12)
    assert sampler.last_seen[3] == 12


@pytest.mark.parametrize("method", ["scan", "rais", "confidence", "prioritized", "online_batch"])
def test_methods_that_do_not_average_scores_say_so(method):
    with pytest.raises(ValueError, match=f"table is one of scores .*, got '{method}'"):
        folded(fastis.Sampler(60, 6, method=method), 1.0, at=0)
