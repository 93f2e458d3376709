"""Prioritized replay: the example's buffer, its environment, and the experiment."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).resolve().parents[1]))

from bench.experiments import replay as experiment
from examples.replay import CartPole, PrioritizedReplay, train
from fastis.methods import Prioritized

ALPHA = 0.5


def small(capacity=8, batch_size=4):
    return PrioritizedReplay(capacity, batch_size, Prioritized(alpha=ALPHA, beta=1.0), seed=0)


def add(replay, number):
    replay.add((number, 0.0, 0.0, 0.0), number % 2, (number + 1.0, 0.0, 0.0, 0.0), 1.0)


def test_a_buffer_draws_what_it_holds_by_its_errors():
    replay = small()
    for number in range(3):
        add(replay, number)
    assert replay.sampler.probabilities().tolist() == pytest.approx([1 / 3] * 3 + [0] * 5)
    drawn, weights = replay.sample()
    assert set(drawn.state[:, 0].tolist()) <= {0.0, 1.0, 2.0}
    assert weights.tolist() == [1.0] * 4
    replay.sampler.update(
        replay.batch._replace(indices=torch.tensor([0, 1, 2, 2])),
        torch.tensor([1.0, 4.0, 9.0, 1.0]),
    )
    add(replay, 3)  # has the largest priority so far, 9^alpha
    expected = torch.tensor([1.0, 2.0, 3.0, 3.0], dtype=torch.float64) / 9
    torch.testing.assert_close(replay.sampler.probabilities()[:4], expected, rtol=1e-4, atol=0)


def test_a_full_buffer_forgets_the_oldest():
    replay = small()
    for number in range(11):
        add(replay, number)
    assert sorted(replay.stored.state[:, 0].tolist()) == list(range(3, 11))
    assert bool((replay.sampler.probabilities() > 0).all())


def test_the_pole_falls_as_physics_has_it():
    """Angles and speeds move by a fiftieth of their rates; leaning by 12 degrees is the end."""
    world = CartPole(0)
    world.start()
    world._state = (0.0, 0.0, 0.1, 0.0)
    (_, _, angle, spin), failed, _ = world.step(1)
    push = 10 / 1.1
    turn = (9.8 * math.sin(0.1) - math.cos(0.1) * push) / (
        0.5 * (4 / 3 - 0.1 * math.cos(0.1) ** 2 / 1.1)
    )
    assert (angle, spin, failed) == (0.1, pytest.approx(0.02 * turn), False)
    world._state = (0.0, 0.0, math.radians(12.1), 0.0)
    assert world.step(0)[1:] == (True, True)


def test_every_buffer_trains_and_costs_are_told():
    for make in experiment.BUFFERS.values():
        assert sum(train(make(64, 8, 120, 0), 120, 0, begin=40)) > 60
    row = experiment.measure_cost(64, 8, rounds=1)
    assert min(row["us"].values()) > 0
    assert {"fastis, step", "uniform, draw and update"} <= row["us"].keys()


def test_the_probe_bounds_every_way_by_the_ideal():
    rows = experiment.probe(steps=1000)
    assert [row["step"] for row in rows] == [600, 800, 1000]
    for row in rows:
        factor = row["factor"]
        assert factor["ideal"] > 1
        assert max(factor.values()) <= factor["ideal"] * (1 + 1e-6)
