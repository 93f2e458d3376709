"""The factor on any scheduler: its unscaled rates are those of the scheduler alone."""

from __future__ import annotations

import inspect

import pytest
import torch
from conftest import FakeSampler, parameters, rate, sgd
from torch.optim import lr_scheduler as schedulers
from torch.optim.lr_scheduler import (
    CosineAnnealingLR,
    LambdaLR,
    LinearLR,
    LRScheduler,
    OneCycleLR,
    ReduceLROnPlateau,
    SequentialLR,
    StepLR,
)
from torch.optim.swa_utils import SWALR

import fastis

STEPS = 25


def warm_up_and_cosine(o):
    return SequentialLR(o, [LinearLR(o, 0.1, total_iters=5), CosineAnnealingLR(o, 20)], [5])


MADE = {
    "LambdaLR": lambda o: LambdaLR(o, lambda t: 1 / (1 + t)),
    "MultiplicativeLR": lambda o: schedulers.MultiplicativeLR(o, lambda t: 0.9),
    "StepLR": lambda o: StepLR(o, 5),
    "MultiStepLR": lambda o: schedulers.MultiStepLR(o, [4, 9, 9]),
    "ConstantLR": lambda o: schedulers.ConstantLR(o, 0.3, 7),
    "LinearLR": lambda o: LinearLR(o, 0.1, total_iters=10),
    "ExponentialLR": lambda o: schedulers.ExponentialLR(o, 0.9),
    "PolynomialLR": lambda o: schedulers.PolynomialLR(o, 20, 2.0),
    "CosineAnnealingLR": lambda o: CosineAnnealingLR(o, 10, eta_min=0.01),  # up again after 10
    "CosineAnnealingWarmRestarts": lambda o: schedulers.CosineAnnealingWarmRestarts(o, 6, 2),
    "CyclicLR": lambda o: schedulers.CyclicLR(o, 0.1, 1.0, 4),
    "OneCycleLR": lambda o: OneCycleLR(o, 1.0, STEPS + 1),
    "ReduceLROnPlateau": lambda o: ReduceLROnPlateau(o, patience=2),
    "SequentialLR": warm_up_and_cosine,
    "ChainedScheduler": lambda o: schedulers.ChainedScheduler(
        [LinearLR(o, 0.1, total_iters=10), schedulers.ExponentialLR(o, 0.9)]
    ),
    "SWALR": lambda o: SWALR(o, 0.05, anneal_epochs=8),
}


def test_no_scheduler_of_torchs_is_left_out():
    found = {
        name
        for name, cls in inspect.getmembers(schedulers, inspect.isclass)
        if issubclass(cls, LRScheduler) and not name.startswith("_")
    }
    assert found - {"LRScheduler"} == MADE.keys() - {"SWALR"}


def advance(scheduler, metric):
    plateau = isinstance(getattr(scheduler, "scheduler", scheduler), ReduceLROnPlateau)
    scheduler.step(*([metric] if plateau else []))


def settings(optimizer):
    """All that a scheduler may change, but for the rates in force."""
    return [
        {k: v for k, v in g.items() if k not in ("params", "lr")} for g in optimizer.param_groups
    ]


@pytest.mark.parametrize("edited", [False, True], ids=["", "edited"])
@pytest.mark.parametrize("kind", [float, torch.tensor])
@pytest.mark.parametrize("name", MADE)
def test_schedulers_see_their_own_rates(name, kind, edited):
    """The factor varies at random; the unscaled rates are those of the scheduler alone.

    So they are after both had their rates divided by ten on the way.
    """
    generator = torch.Generator().manual_seed(0)
    plain, wrapped = sgd(kind(0.5), groups=2), sgd(kind(0.5), groups=2)
    alone, inner = MADE[name](plain), MADE[name](wrapped)
    sampler = FakeSampler()
    scheduler = fastis.EffectiveBatchLR(inner, sampler)
    for step in range(STEPS):
        if edited and step == 7:
            for group in plain.param_groups + wrapped.param_groups:
                group["lr"] *= 0.1
        sampler.factor = float(torch.rand((), generator=generator) * 3 + 0.1)
        metric = float(torch.rand((), generator=generator))
        plain.step()
        wrapped.step()
        advance(alone, metric)
        advance(scheduler, metric)
        unscaled = [float(group["lr"]) for group in plain.param_groups]
        # Exact, but for a rate set by hand: divided by the factor, and recursions carry that on.
        slack = {"abs": 0, "rel": (1e-12 if kind is float else 1e-4) if edited else 0}
        assert scheduler.get_unscaled_lr() == pytest.approx(unscaled, **slack)
        scaled = [lr * sampler.factor for lr in unscaled]
        rel = 1e-12 if kind is float else 1e-4
        assert scheduler.get_last_lr() == pytest.approx(scaled, rel=rel)
        assert settings(plain) == settings(wrapped)
    if name != "ChainedScheduler":  # which has none
        assert scheduler.last_epoch == alone.last_epoch


def test_a_part_of_a_sequence_has_the_factor():
    plain, wrapped = sgd(), sgd()
    alone = warm_up_and_cosine(plain)
    sampler = FakeSampler()
    second = fastis.EffectiveBatchLR(CosineAnnealingLR(wrapped, 20), sampler)
    sequence = SequentialLR(wrapped, [LinearLR(wrapped, 0.1, total_iters=5), second], [5])
    sampler.factor = 2.0
    for step in range(1, 15):
        for optimizer, scheduler in ((plain, alone), (wrapped, sequence)):
            optimizer.step()
            scheduler.step()
        assert rate(wrapped) == pytest.approx(rate(plain) * (1 if step < 5 else 2))


def test_all_parts_of_a_sequence_have_the_factor():
    """Of one that is made in the middle of a run, too."""
    plain, wrapped = sgd(), sgd()
    sampler = FakeSampler()
    sampler.factor = 2.0
    first = fastis.EffectiveBatchLR(wrapped, sampler)
    wrapped.step()
    first.step()

    def both(o, factor):
        parts = [schedulers.ExponentialLR(o, 0.9), CosineAnnealingLR(o, 20)]
        return SequentialLR(o, [factor(part) for part in parts], [5])

    alone = both(plain, lambda s: s)
    sequence = both(wrapped, lambda s: fastis.EffectiveBatchLR(s, sampler))
    for step in range(1, 15):
        sampler.factor = 1.0 + step
        for optimizer, scheduler in ((plain, alone), (wrapped, sequence)):
            optimizer.step()
            scheduler.step()
        assert rate(wrapped) == pytest.approx(rate(plain) * sampler.factor)


def test_schedulers_take_turns_on_an_optimizer():
    """Stochastic weight averaging as in torch's example, with both schedules wrapped."""
    plain, wrapped = sgd(), sgd()
    sampler = FakeSampler()
    alone = (CosineAnnealingLR(plain, 40), SWALR(plain, 0.05, anneal_epochs=8))
    turns = [
        fastis.EffectiveBatchLR(s, sampler)
        for s in (CosineAnnealingLR(wrapped, 40), SWALR(wrapped, 0.05, anneal_epochs=8))
    ]
    for step in range(20):
        sampler.factor = 1.5 + step % 3
        for optimizer, pair in ((plain, alone), (wrapped, turns)):
            optimizer.step()
            pair[step >= 10].step()
        assert rate(wrapped) == pytest.approx(rate(plain) * sampler.factor)


@pytest.mark.parametrize("kind", [float, torch.tensor])
@pytest.mark.parametrize("name", ["CosineAnnealingLR", "LambdaLR", "SequentialLR"])
def test_wrapping_anew_takes_no_factor_for_a_rate(name, kind):
    """Both for schedulers that leave the rate as it is when they are made, and that set it."""
    optimizer, plain = sgd(kind(0.5)), sgd(kind(0.5))
    sampler = FakeSampler()
    sampler.factor = 3.0
    first = fastis.EffectiveBatchLR(optimizer, sampler)
    optimizer.step()
    first.step()
    second = fastis.EffectiveBatchLR(MADE[name](optimizer), sampler)
    alone = MADE[name](plain)
    assert second.get_unscaled_lr() == [rate(plain)]
    plain.step()
    alone.step()
    second.step()
    assert second.get_unscaled_lr() == [rate(plain)]


# Loops --------------------------------------------------------------------------------------------


def test_a_skipped_step_of_the_grad_scaler():
    optimizer, sampler = sgd(lr=0.5), FakeSampler()
    (weight,) = optimizer.param_groups[0]["params"]
    scheduler = fastis.EffectiveBatchLR(schedulers.ExponentialLR(optimizer, 0.5), sampler)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    sampler.factor = 2.0
    for step, value in enumerate((1.0, float("inf"), 1.0)):
        before = weight.detach().clone()
        scaler.scale((weight * value).sum()).backward()
        scaler.step(optimizer)
        scaler.update()
        scheduler.step()
        optimizer.zero_grad()
        assert torch.equal(before, weight) == (step == 1)
        assert scheduler.get_last_lr() == [0.5 ** (step + 1)]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_compiled_step_with_a_rate_that_is_a_tensor():
    """It is compiled once, and takes the rates as they change."""
    counted = 0

    def backend(graph, _):
        nonlocal counted
        counted += 1
        return graph.forward

    lr = torch.tensor(0.5)
    optimizer = torch.optim.SGD(parameters(), lr=lr)
    (weight,) = optimizer.param_groups[0]["params"]
    sampler = FakeSampler()
    scheduler = fastis.EffectiveBatchLR(StepLR(optimizer, 1, gamma=0.5), sampler)
    step = torch.compile(optimizer.step, backend=backend)
    for t in range(4):
        weight.grad = torch.ones(2)
        before = weight.detach().clone()
        expected = rate(optimizer)
        step()
        torch.testing.assert_close(before - weight, torch.full((2,), expected))
        sampler.factor = 3.0 + t
        scheduler.step()
        assert optimizer.param_groups[0]["lr"] is lr
    assert counted == 1
