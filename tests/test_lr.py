"""The learning rate: the factor and its bounds, optimizers and wrappers, a scheduler as torch's."""

from __future__ import annotations

import warnings

import pytest
import torch
from conftest import FakeSampler, parameters, rate, sgd
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, OneCycleLR, StepLR

import fastis
from fastis.lr import DEFAULT_RULE


@pytest.mark.parametrize(
    ("optimizer", "expected"), [(torch.optim.SGD, 4.0), (torch.optim.AdamW, 2.0)]
)
def test_the_rule_follows_the_optimizer(optimizer, expected):
    made = optimizer(parameters(), lr=1.0)
    sampler = FakeSampler()
    sampler.factor = 4.0
    scheduler = fastis.EffectiveBatchLR(LambdaLR(made, lambda t: 1.0), sampler)
    made.step()
    scheduler.step()
    assert made.param_groups[0]["lr"] == expected
    limited = fastis.EffectiveBatchLR(LambdaLR(made, lambda t: 1.0), sampler, max_factor=1.5)
    made.step()
    limited.step()
    assert made.param_groups[0]["lr"] == pytest.approx(1.5 * limited.get_unscaled_lr()[0])


@pytest.mark.parametrize("kind", [float, torch.tensor])
def test_a_largest_rate_limits_what_the_factor_does(kind):
    made = torch.optim.Adam(parameters(), lr=kind(0.5), capturable=False)
    sampler = FakeSampler()
    sampler.factor = 9.0
    inner = LambdaLR(made, lambda t: [1.0, 0.8, 0.4, 0.1][t])
    scheduler = fastis.EffectiveBatchLR(inner, sampler, max_lr=0.4)
    rates = []
    for _ in range(3):
        made.step()
        scheduler.step()
        rates.append(scheduler.get_last_lr()[0])
    # 0.4 times 3 and 0.2 times 3 are too much, 0.05 times 3 is not.
    assert rates == pytest.approx([0.4, 0.4, 0.15])
    sampler.factor = 1.0
    beyond = fastis.EffectiveBatchLR(LambdaLR(made, lambda t: 10.0), sampler, max_lr=0.4)
    made.step()
    beyond.step()
    assert beyond.get_last_lr() == beyond.get_unscaled_lr()


def test_tensor_rates_are_scaled_in_place():
    rate = torch.tensor(0.5)
    optimizer = torch.optim.Adam(parameters(), lr=rate, capturable=False)
    sampler = FakeSampler()
    sampler.factor = 9.0
    scheduler = fastis.EffectiveBatchLR(StepLR(optimizer, 1, gamma=0.5), sampler)
    held = optimizer.param_groups[0]["lr"]
    for step in range(3):
        optimizer.step()
        scheduler.step()
        assert optimizer.param_groups[0]["lr"] is held
        assert float(held) == pytest.approx(0.5 ** (step + 2) * 3)


def test_the_factor_is_renewed_between_the_steps_of_a_schedule():
    optimizer, sampler = sgd(lr=1.0), FakeSampler()
    scheduler = fastis.EffectiveBatchLR(StepLR(optimizer, 1, gamma=0.5), sampler, max_factor=8.0)
    for factor in (2.0, 3.0, 16.0):
        sampler.factor = factor
        optimizer.step()
        scheduler.renew()
        assert rate(optimizer) == min(factor, 8.0)
        assert scheduler.last_epoch == 0
    scheduler.step()
    assert rate(optimizer) == 4.0


# An optimizer, wrappers ---------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [float, torch.tensor])
def test_an_optimizer_stands_for_a_constant_rate(kind):
    optimizer = sgd(kind(0.5), groups=2)
    sampler = FakeSampler()
    scheduler = fastis.EffectiveBatchLR(optimizer, sampler)
    for step in range(3):
        sampler.factor = 2.0 + step
        optimizer.step()
        scheduler.step()
        assert scheduler.get_last_lr() == [0.5 * sampler.factor, 0.25 * sampler.factor]
    assert scheduler.get_unscaled_lr() == [0.5, 0.25]
    assert scheduler.last_epoch == 3
    # As any other is called in the loops of others.
    scheduler.step(4, 0.1)
    scheduler.step_update(num_updates=100, metric=0.3)
    assert scheduler.get_unscaled_lr() == [0.5, 0.25]


class Wrapper(torch.optim.Optimizer):
    """As AcceleratedOptimizer."""

    def __init__(self, optimizer):
        self.optimizer = optimizer

    param_groups = property(lambda self: self.optimizer.param_groups)


class Doubling:
    """As AcceleratedScheduler with two processes: two steps a step."""

    is_prepared = True

    def __init__(self, scheduler):
        self.scheduler = scheduler

    def step(self):
        self.scheduler.step()
        self.scheduler.step()

    def state_dict(self):
        return self.scheduler.state_dict()


@pytest.mark.filterwarnings("ignore:Seems like")  # of torch, since schedule.optimizer is another
def test_wrappers_are_looked_through():
    adam = torch.optim.AdamW(parameters(), lr=1.0)
    outer = Wrapper(Wrapper(adam))
    sampler = FakeSampler()
    sampler.factor = 4.0
    schedule = LambdaLR(adam, lambda t: 0.5**t)
    schedule.optimizer = outer  # made of the wrapped one
    for given in (outer, schedule, Doubling(schedule)):
        scheduler = fastis.EffectiveBatchLR(given, sampler)
        assert scheduler.optimizer is adam
        adam.step()
        scheduler.step()
        assert sampler.asked[0] == "adam"
    # 0.5 from the second, two steps more from the third, and the square root of 4
    assert scheduler.get_last_lr() == [0.25]
    assert scheduler.last_epoch == 3
    assert scheduler.is_prepared
    assert scheduler.state_dict()["scheduler"]["last_epoch"] == 3


def named(name, *bases):
    """An optimizer of another library, by its name."""
    init = {"__init__": lambda self, p: torch.optim.Optimizer.__init__(self, p, {"lr": 0.1})}
    return type(name, bases or (torch.optim.Optimizer,), init)(parameters())


@pytest.mark.parametrize(
    ("optimizer", "family"),
    [
        (torch.optim.ASGD(parameters()), "sgd"),
        (torch.optim.RAdam(parameters()), "adam"),
        (torch.optim.RMSprop(parameters()), "adam"),
        (named("MySGD", torch.optim.SGD), "sgd"),
        (named("SGDW"), "sgd"),
        (named("AdamP"), "adam"),
        (named("PagedAdamW8bit"), "adam"),
    ],
    ids=lambda o: o if isinstance(o, str) else type(o).__name__,
)
def test_families(optimizer, family):
    sampler = FakeSampler()
    fastis.EffectiveBatchLR(optimizer, sampler).step()
    assert sampler.asked == (family, DEFAULT_RULE)


@pytest.mark.parametrize("name", ["Lamb", "Lion", "Adan", "Muon", "SignSGD", "AdEMAMix"])
def test_an_unknown_family_is_to_be_named(name):
    optimizer = named(name)
    with pytest.raises(ValueError, match=f"given as 'sgd' .* or 'adam' .* for a {name}, whose"):
        fastis.EffectiveBatchLR(optimizer, FakeSampler())
    fastis.EffectiveBatchLR(optimizer, FakeSampler(), optimizer="adam").step()


class Timms:
    """As timm's schedulers, by updates: rates from the count that is given, none by epochs."""

    def __init__(self, optimizer):
        self.optimizer = optimizer

    def step(self, epoch, metric=None):
        self.metric = metric

    def step_update(self, num_updates, metric=None):
        self.optimizer.param_groups[0]["lr"] = 1 / num_updates

    def state_dict(self):
        return {}


def test_schedulers_of_timm():
    optimizer, sampler = sgd(), FakeSampler()
    scheduler = fastis.EffectiveBatchLR(Timms(optimizer), sampler)
    for update in range(1, 4):
        sampler.factor = 2.0 * update
        scheduler.step_update(num_updates=update, metric=1.0)
        assert rate(optimizer) == pytest.approx(2.0)
    sampler.factor = 9.0
    scheduler.step(1, 0.25)
    assert rate(optimizer) == pytest.approx(3.0)
    assert scheduler.metric == 0.25


# As torch's ---------------------------------------------------------------------------------------


def test_it_is_a_scheduler():
    optimizer, sampler = sgd(), FakeSampler()
    inner = OneCycleLR(optimizer, 1.0, 10)
    scheduler = fastis.EffectiveBatchLR(inner, sampler)
    assert isinstance(scheduler, LRScheduler)
    assert isinstance(fastis.EffectiveIterationsLR(inner, fastis.Sampler(8, 2)), LRScheduler)
    scheduler._step_count += 1  # as Accelerate
    scheduler.last_epoch = 7
    scheduler.base_lrs = [2.0]
    assert (inner._step_count, inner.last_epoch, inner.base_lrs) == (2, 7, [2.0])
    assert scheduler.total_steps == 10
    assert not hasattr(scheduler, "T_max")
    assert not hasattr(LRScheduler.__new__(fastis.EffectiveBatchLR), "T_max")


def test_torchs_warning_about_the_order_is_heard():
    optimizer, sampler = sgd(), FakeSampler()
    with pytest.warns(UserWarning, match=r"`lr_scheduler.step\(\)` before `optimizer.step\(\)`"):
        fastis.EffectiveBatchLR(StepLR(optimizer, 5), sampler).step()
    optimizer = sgd()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scheduler = fastis.EffectiveBatchLR(StepLR(optimizer, 5), sampler)
        optimizer.step()
        scheduler.step()
        fastis.EffectiveBatchLR(sgd(), sampler).step()  # a constant rate: nothing is skipped


# Errors -------------------------------------------------------------------------------------------


def test_lr_errors():
    sampler = FakeSampler()
    schedule = LambdaLR(torch.optim.SGD(parameters(), lr=1.0), lambda t: 1.0)
    for wrong, got in ((3, "int 3"), (None, "None"), (StepLR, "type"), (Doubling(3), "Doubling")):
        with pytest.raises(TypeError, match=f"LR scheduler, one of timm's or an .*, got {got}"):
            fastis.EffectiveBatchLR(wrong, sampler)
    once = fastis.EffectiveBatchLR(schedule, sampler)
    for wrong in (once, Doubling(once)):
        with pytest.raises(TypeError, match="rates have no factor yet, got an EffectiveBatchLR"):
            fastis.EffectiveBatchLR(wrong, sampler)
    with pytest.raises(TypeError, match="must be one of timm's to step_update, got LambdaLR"):
        once.step_update(num_updates=1)
    with pytest.raises(TypeError, match=r"sampler must be a fastis.Sampler, got str"):
        fastis.EffectiveBatchLR(schedule, "emais")
    with pytest.raises(ValueError, match="optimizer must be one of 'sgd', 'adam', got 'lion'"):
        fastis.EffectiveBatchLR(schedule, sampler, optimizer="lion")
    with pytest.raises(ValueError, match=r"max_factor must be in \(0, inf\]"):
        fastis.EffectiveBatchLR(schedule, sampler, max_factor=0)
    with pytest.raises(ValueError, match=r"max_lr must be in \(0, inf\]"):
        fastis.EffectiveBatchLR(schedule, sampler, max_lr=-1.0)
    schedule.optimizer.param_groups[0]["lr"] = None
    with pytest.raises(TypeError, match="lr must be a number, got None"):
        fastis.EffectiveBatchLR(schedule, sampler)
    schedule.optimizer.param_groups[0]["lr"] = 1.0
    state = fastis.EffectiveBatchLR(schedule, sampler).state_dict()
    state["unscaled"] = [1.0, 2.0]
    with pytest.raises(ValueError, match="must have 1 parameter groups, got 2"):
        fastis.EffectiveBatchLR(schedule, sampler).load_state_dict(state)
