"""The rates of an optimizer: set by hand, of groups that are added, saved, after a failure."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from conftest import FakeSampler, parameters, rate, sgd
from torch.optim.lr_scheduler import (
    CosineAnnealingLR,
    ExponentialLR,
    LinearLR,
    OneCycleLR,
    ReduceLROnPlateau,
    SequentialLR,
    StepLR,
)

import fastis


@pytest.mark.parametrize("kind", [float, torch.tensor])
@pytest.mark.parametrize("limits", [{}, {"max_lr": 0.4}], ids=["", "max_lr"])
def test_a_rate_set_by_hand_is_kept(kind, limits):
    optimizer = sgd(kind(0.5), groups=2)
    sampler = FakeSampler()
    sampler.factor = 2.1
    scheduler = fastis.EffectiveBatchLR(optimizer, sampler, **limits)
    scheduler.step()
    first, second = optimizer.param_groups
    in_force = float(second["lr"])  # 0.525, or 0.4: more than 0.25
    for change in ("*=", "=", "fill_"):
        if change == "*=":
            first["lr"] *= 0.1
            expected = 0.105 if not limits else 0.05
        elif change == "=":
            first["lr"] = expected = kind(0.21)
        elif kind is torch.tensor:
            first["lr"].fill_(0.021)
            expected = 0.021
        expected = float(expected)
        for _ in range(2):
            scheduler.step()
            assert scheduler.get_last_lr() == pytest.approx([expected, in_force])
            assert scheduler.get_unscaled_lr() == pytest.approx([expected / 2.1, 0.25])
    sampler.factor = 4.2  # and the factor goes on
    scheduler.step()
    assert float(first["lr"]) == pytest.approx(
        2 * expected if not limits else min(2 * expected, 0.4)
    )


@pytest.mark.parametrize("kind", [float, torch.tensor])
def test_a_rate_set_beyond_max_lr_is_kept(kind):
    optimizer = sgd(kind(0.1))
    sampler = FakeSampler()
    sampler.factor = 3.0
    scheduler = fastis.EffectiveBatchLR(optimizer, sampler, max_lr=0.2)
    scheduler.step()
    assert rate(optimizer) == pytest.approx(0.2)
    optimizer.param_groups[0]["lr"] *= 5.0
    for _ in range(2):
        assert scheduler.get_unscaled_lr() == pytest.approx([1.0])
        scheduler.step()
        assert rate(optimizer) == pytest.approx(1.0)


@pytest.mark.parametrize("kind", [float, torch.tensor])
def test_a_rate_set_from_zero_is_kept(kind):
    optimizer = sgd(kind(0.0))
    sampler = FakeSampler()
    sampler.factor = 2.0
    scheduler = fastis.EffectiveBatchLR(optimizer, sampler)
    scheduler.step()
    assert rate(optimizer) == 0
    optimizer.param_groups[0]["lr"] += 0.3
    scheduler.step()
    assert rate(optimizer) == pytest.approx(0.3)


@pytest.mark.parametrize("kind", [float, torch.tensor])
def test_a_rate_set_by_hand_is_saved(kind):
    def make():
        optimizer, sampler = sgd(kind(0.5)), FakeSampler()
        sampler.factor = 2.0
        return optimizer, fastis.EffectiveBatchLR(StepLR(optimizer, 3), sampler)

    (first, a), (second, b) = make(), make()
    first.step()
    a.step()
    first.param_groups[0]["lr"] *= 0.1
    second.step()
    second.load_state_dict(first.state_dict())
    b.load_state_dict(a.state_dict())
    for expected in (0.1, 0.1, 0.01):
        assert a.get_last_lr() == b.get_last_lr() == pytest.approx([expected])
        a.step()
        b.step()


def test_a_rate_that_becomes_a_tensor_or_a_float():
    optimizer, sampler = sgd(), FakeSampler()
    sampler.factor = 2.0
    scheduler = fastis.EffectiveBatchLR(optimizer, sampler)
    for lr in (torch.tensor(0.3), 0.2, 1, torch.tensor(0.1, dtype=torch.float64)):
        scheduler.step()
        optimizer.param_groups[0]["lr"] = lr
        scheduler.step()
        assert rate(optimizer) == pytest.approx(float(lr))
        assert scheduler.get_unscaled_lr() == pytest.approx([float(lr) / 2])


# Parameter groups, failures -----------------------------------------------------------------------


@pytest.mark.parametrize("kind", [float, torch.tensor])
def test_a_group_that_is_added_comes_with_an_unscaled_rate(kind):
    optimizer, sampler = sgd(kind(0.5)), FakeSampler()
    sampler.factor = 2.0
    scheduler = fastis.EffectiveBatchLR(ExponentialLR(optimizer, 0.5), sampler)
    optimizer.step()
    scheduler.step()
    optimizer.add_param_group({"params": parameters(), "lr": kind(0.1)})
    scheduler.step()
    assert scheduler.get_last_lr() == pytest.approx([0.25, 0.1])
    assert scheduler.get_unscaled_lr() == pytest.approx([0.125, 0.05])
    del optimizer.param_groups[0]
    scheduler.step()
    assert scheduler.get_last_lr() == pytest.approx([0.05])


def test_a_scheduler_that_has_no_rate_for_an_added_group():
    optimizer, sampler = sgd(), FakeSampler()
    sampler.factor = 2.0
    scheduler = fastis.EffectiveBatchLR(OneCycleLR(optimizer, 1.0, 10), sampler)
    optimizer.step()
    scheduler.step()
    optimizer.add_param_group({"params": parameters(), "lr": 0.1})
    with pytest.raises(
        ValueError, match="the optimizer's 2 parameter groups, got OneCycleLR for 1"
    ):
        scheduler.step()
    assert scheduler.get_last_lr()[0] == 2 * scheduler.get_unscaled_lr()[0]


def test_a_step_that_fails_leaves_the_factor():
    optimizer, sampler = sgd(), FakeSampler()
    sampler.factor = 2.0
    scheduler = fastis.EffectiveBatchLR(OneCycleLR(optimizer, 1.0, 3), sampler)
    for _ in range(3):
        optimizer.step()
        scheduler.step()
    before, unscaled = rate(optimizer), scheduler.get_unscaled_lr()
    with pytest.raises(ValueError, match="Tried to step"):
        scheduler.step()
    assert rate(optimizer) == before == 2 * unscaled[0]
    with pytest.raises(TypeError, match="metrics"):
        fastis.EffectiveBatchLR(ReduceLROnPlateau(optimizer), sampler).step()


def test_a_sampler_that_fails_changes_nothing():
    optimizer, sampler = sgd(), FakeSampler()
    scheduler = fastis.EffectiveBatchLR(StepLR(optimizer, 1), sampler)
    sampler.factor = "none"
    optimizer.step()
    with pytest.raises(TypeError):
        scheduler.step()
    assert rate(optimizer) == 0.5
    assert scheduler.last_epoch == 0


# States -------------------------------------------------------------------------------------------


def warm_up_and_cosine(o):
    return SequentialLR(o, [LinearLR(o, 0.1, total_iters=5), CosineAnnealingLR(o, 20)], [5])


def constant(o):
    return o


@pytest.mark.parametrize("kind", [float, torch.tensor])
@pytest.mark.parametrize("made", [warm_up_and_cosine, lambda o: CosineAnnealingLR(o, 20), constant])
@pytest.mark.parametrize("present", [True, False], ids=["", "without_factor"])
def test_a_resumed_run_has_the_same_rates(kind, made, present):
    def make():
        optimizer, sampler = sgd(kind(0.5), groups=2), FakeSampler()
        inner = made(optimizer)
        return optimizer, sampler, fastis.EffectiveBatchLR(inner, sampler)

    (first, live, a), (second, resumed, b) = make(), make()
    live.factor = 1.7
    for _ in range(8):
        first.step()
        a.step()
    file = io.BytesIO()
    saved = a.state_dict()
    if not present:  # as it was before there was a factor in it
        del saved["factor"]
    torch.save((first.state_dict(), saved), file)
    file.seek(0)
    states = torch.load(file, weights_only=True)
    second.step()
    b.load_state_dict(states[1])
    second.load_state_dict(states[0])
    c = copy.deepcopy(b)  # and a rate that is set now has the factor in it, as before
    for scheduler in (copy.deepcopy(a), c):
        scheduler.optimizer.param_groups[1]["lr"] *= 0.1
        (_, expected) = a.get_unscaled_lr()
        assert scheduler.get_unscaled_lr()[1] == pytest.approx(0.1 * expected)
    for step in range(8):
        assert a.get_last_lr() == b.get_last_lr()
        assert a.get_unscaled_lr() == b.get_unscaled_lr()
        live.factor = resumed.factor = 1.0 + step
        for optimizer, scheduler in ((first, a), (second, b)):
            optimizer.step()
            scheduler.step()


@pytest.mark.filterwarnings("ignore:Seems like")  # torch's watch on optimizer.step is not copied
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
@pytest.mark.parametrize("kind", [float, torch.tensor])
def test_copies_go_on_alike(copied, kind):
    optimizer = sgd(kind(0.5))
    scheduler = fastis.EffectiveBatchLR(warm_up_and_cosine(optimizer), FakeSampler())
    scheduler.sampler.factor = 2.0
    for _ in range(3):
        optimizer.step()
        scheduler.step()
    other = copied(scheduler)
    assert other.optimizer is not optimizer
    for _ in range(8):
        scheduler.step()
        assert other.get_last_lr() != scheduler.get_last_lr()
        other.step()
        assert other.get_last_lr() == scheduler.get_last_lr()
        assert rate(other.optimizer) == rate(optimizer)


@pytest.mark.parametrize("tensor", [False, True])
def test_loading_restores_the_rate_in_force_before_or_after_the_sampler(tensor):
    def make(factor):
        lr = torch.tensor(0.5) if tensor else 0.5
        optimizer = torch.optim.SGD(parameters(), lr=lr)
        sampler = FakeSampler()
        sampler.factor = factor
        return optimizer, sampler, fastis.EffectiveBatchLR(StepLR(optimizer, 2), sampler)

    first, _, a = make(3.0)
    first.step()
    a.step()
    second, sampler, b = make(1.0)  # the sampler is loaded last: its factor is another one yet
    b.load_state_dict(a.state_dict())
    assert a.get_last_lr() == b.get_last_lr() == [1.5]
    second.load_state_dict(first.state_dict())
    sampler.factor = 3.0
    for scheduler, optimizer in ((a, first), (b, second)):
        optimizer.step()
        scheduler.step()
    assert a.get_last_lr() == b.get_last_lr() == pytest.approx([0.15])


def test_a_wrong_scheduler_state_changes_nothing():
    optimizer = torch.optim.SGD(parameters(), lr=0.5)
    inner = StepLR(optimizer, 2)
    sampler = fastis.Sampler(20, 2, method="rais")
    plain = fastis.EffectiveBatchLR(inner, sampler).state_dict()
    for _ in range(5):
        optimizer.step()
        inner.step()
    scheduler = fastis.EffectiveIterationsLR(inner, sampler)
    with pytest.raises(ValueError, match="must have scheduler, unscaled, scaled, steps, got sched"):
        scheduler.load_state_dict(plain)
    with pytest.raises(ValueError, match="got nothing"):
        scheduler.load_state_dict({})
    assert inner.last_epoch == 5
