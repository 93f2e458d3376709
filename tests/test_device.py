"""The device's update and draw, run on the host: bit for bit what the reference does.

csrc/device is written in phases over all threads of a launch. Here the phases run one index after
the other, forwards, backwards and scrambled, so that a dependence on the order of threads shows.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from unittest import mock

import pytest
import torch
from conftest import observe, sweep
from native import native

import fastis
from fastis import _C, kernels
from fastis.kernels.cuda import table as cuda_table
from fastis.kernels.cuda.table import _addresses as addresses_of
from fastis.kernels.flatten import distribution
from fastis.kernels.layout import (
    CODE,
    LAST,
    LAST_EXCLUDED,
    LAST_UNSEEN,
    MEAN,
    SEEN,
    TOTAL,
    UPDATES,
    VALID,
)
from fastis.methods import EMAIS

FORWARDS, BACKWARDS, SCRAMBLED = 1, 0, 7919
UNCAPPED, NUM_CAPPED, CEILING = VALID + 1, VALID + 2, VALID + 6  # of csrc/layout.h's Scalars


class Emulator:
    """The sampler's kernels for a table, one after the other."""

    def __init__(self, stride: int) -> None:
        self.stride = stride

    IS_ATOMIC = False

    def update(self, table, observation) -> None:
        native().update(table.device_handle, *addresses_of(observation), self.stride)

    def fold(self, table, observation, iteration) -> None:
        with mock.patch.object(cuda_table, "_learn", self._learn):
            cuda_table.fold(table, observation, iteration)

    def _learn(self, table, indices, observed) -> None:
        addresses = indices.data_ptr(), 0, observed.data_ptr(), 0, len(indices), 0, 0
        native().update(table.device_handle, *addresses, self.stride)

    def clear(self, table, indices, last) -> None:
        native().clear(table.device_handle, indices.data_ptr(), len(indices), last, self.stride)

    def rescale(self, table) -> None:
        native().rescale(table.device_handle, self.stride)

    def update_and_draw(self, table, observation, next_batch) -> None:
        addresses = *addresses_of(observation), *(part.data_ptr() for part in next_batch)
        native().update_and_draw(table.device_handle, *addresses, self.stride)

    def draw(self, table, batch) -> None:
        addresses = (part.data_ptr() for part in batch)
        native().draw(table.device_handle, *addresses, self.stride)


@pytest.fixture
def emulated(monkeypatch):
    """A context in which samplers run the device's code on the host."""

    def enter(stride: int) -> None:
        emulator = Emulator(stride)
        monkeypatch.setitem(kernels._chosen, ("table", "cpu"), emulator)

    yield enter
    kernels._chosen.clear()


def pair(**arguments) -> list[fastis.Sampler]:
    return [fastis.Sampler(**{"seed": 3, **arguments}) for _ in range(2)]


def assert_equal_tables(reference: fastis.Sampler, device: fastis.Sampler) -> None:
    theirs, ours = reference.state_dict(), device.state_dict()
    if "states" in ours:
        assert torch.equal(ours["states"], theirs["states"])
    assert torch.equal(ours["scalars"], theirs["scalars"])
    torch.testing.assert_close(ours["variance"], theirs["variance"], equal_nan=True)


def levels_of(leaves, most=1024):
    """The sums of leaves of 4, level by level of 16, each padded to a multiple of 16."""
    nodes, levels = torch.nn.functional.pad(leaves, (0, -len(leaves) % 4)).view(-1, 4).sum(1), []
    while True:
        padded = torch.nn.functional.pad(nodes, (0, -len(nodes) % 16))
        levels.append(padded)
        if len(nodes) <= most:
            return torch.cat(levels)
        nodes = padded.view(-1, 16).sum(1)


def assert_exact_tree(sampler):
    """After a draw: flags, tree and totals say what the reference says. The capped items."""
    table = sampler._table
    tensors, scalars = table._tree, table.scalars
    drawn = distribution(table)
    seen = table.column(LAST) >= 0
    capped = torch.zeros_like(seen)
    capped[drawn.capped] = True
    uncapped = torch.where(seen & ~capped, drawn.weights, 0)
    assert torch.equal(table.column(CODE) < 0, capped)
    assert torch.equal(tensors["sums"], levels_of(uncapped))
    last = table.column(LAST)
    assert torch.equal(tensors["unseen"].long(), levels_of((last == LAST_UNSEEN).long()))
    assert torch.equal(tensors["excluded"].long(), levels_of((last == LAST_EXCLUDED).long()))
    assert torch.equal(tensors["capped"].long(), levels_of(capped.long()))
    assert bool((tensors["claims"] == -1).all())
    assert int(tensors["arrivals"]) == 0
    assert int(scalars[UNCAPPED]) == int(uncapped.sum())
    assert int(scalars[NUM_CAPPED]) == len(drawn.capped)
    assert int(scalars[CEILING]) >= int(uncapped.max())
    return drawn.capped


def run(samplers, emulated, stride, steps, batch_size, spread=2.0, trend=0.0, size=None):
    generator = torch.Generator().manual_seed(0)
    for step in range(steps):
        size = size or batch_size
        score = torch.empty(size).log_normal_(0, spread, generator=generator)
        score *= 10.0 ** (trend * step)
        score[torch.rand(size, generator=generator) < 0.02] = torch.nan
        mean_grad = torch.randn(5, generator=generator)
        kernels._chosen.clear()
        with fastis.backend("reference"):
            expected = samplers[0].sample()
            samplers[0].update(expected, observe(score, mean_grad))
        emulated(stride)
        batch = samplers[1].sample()
        assert torch.equal(batch.indices, expected.indices)
        assert torch.equal(batch.weights, expected.weights)
        samplers[1].update(batch, observe(score, mean_grad))
    assert_equal_tables(*samplers)


@pytest.mark.parametrize("stride", [FORWARDS, BACKWARDS, SCRAMBLED])
@pytest.mark.parametrize("flatten", ["cap", "mix"])
@pytest.mark.parametrize("scheme", ["multinomial", "stratified", "systematic"])
def test_same_indices_coefficients_and_state(emulated, stride, flatten, scheme):
    samplers = pair(
        num_samples=700, batch_size=32, method=EMAIS(warmup_epochs=0), flatten=flatten,
        scheme=scheme,
    )  # fmt: skip
    run(samplers, emulated, stride, steps=120, batch_size=32)


class LastScore(EMAIS):
    """By the last score alone: how tables keep weights that are given."""

    def constants(self):
        return {**super().constants(), "tau": -1.0}


@pytest.mark.parametrize(
    "method",
    [
        *("emais", "scan", "uniform", LastScore()),
        *(EMAIS(importance="sum", tau=30.0), EMAIS(tau_scale=0.3)),
        *("confidence", "prioritized", "rais"),
        EMAIS(refresh_every=7, score_fn=lambda i: 1.0 + i.float()),
    ],
    ids=lambda method: method if isinstance(method, str) else type(method).__name__,
)
def test_methods_and_the_warm_up(emulated, method):
    samplers = pair(num_samples=300, batch_size=16, method=method)
    run(samplers, emulated, SCRAMBLED, 80, 16)


@pytest.mark.parametrize("method", ["emais", "uniform", "prioritized", "rais"])
def test_uniform_draws_that_are_asked_for(emulated, method):
    samplers = pair(num_samples=300, batch_size=16, method=method)
    for steps, uniform in ((45, True), (25, False), (10, True), (25, True)):
        run(samplers, emulated, SCRAMBLED, steps, 16)
        for sampler in samplers:
            sampler.uniform = uniform
    run(samplers, emulated, SCRAMBLED, 10, 16)


@pytest.mark.parametrize("trend", [-0.05, 0.05])
@pytest.mark.parametrize("flatten", ["cap", "mix"])
def test_rescaling_when_scores_move_by_decades(emulated, trend, flatten):
    samplers = pair(
        num_samples=200, batch_size=24, method=EMAIS(warmup_epochs=0, tau=3.0), flatten=flatten
    )
    run(samplers, emulated, SCRAMBLED, steps=200, batch_size=24, trend=trend)


def effective_total(table) -> int:
    """The sum of the weights with the mean for every unseen sample, in Python's integers."""
    total, seen = int(table.scalars[TOTAL]), int(table.scalars[SEEN])
    return total + (table.constants.num_samples - seen) * (total // max(seen, 1))


@pytest.mark.parametrize("ratio", [1e3, 1e4, 1e5, 1e6])
@pytest.mark.parametrize("flatten", ["cap", "mix"])
def test_sums_hold_the_weights_of_all_unseen_samples(emulated, flatten, ratio):
    n, batch_size = 2**16, 128
    method = EMAIS(warmup_epochs=0)
    samplers = pair(num_samples=n, batch_size=batch_size, method=method, flatten=flatten)
    generator = torch.Generator().manual_seed(0)
    limit = samplers[0]._table.constants.total_limit
    for step in range(4):
        first = torch.arange(batch_size) + step * batch_size
        batch = fastis.Batch(first, torch.ones(batch_size))
        score = torch.empty(batch_size).log_normal_(0, 0.5, generator=generator)
        score *= 1e-5 * ratio**step
        kernels._chosen.clear()
        with fastis.backend("reference"):
            samplers[0].update(batch, observe(score))
            expected = samplers[0].sample()
        emulated(SCRAMBLED)
        samplers[1].update(batch, observe(score))
        assert effective_total(samplers[1]._table) <= limit
        drawn = samplers[1].sample()
        assert torch.equal(drawn.indices, expected.indices)
        assert torch.equal(drawn.weights, expected.weights)
        assert float(samplers[0].probabilities().sum()) == pytest.approx(1, abs=1e-9)
    assert_equal_tables(*samplers)


@pytest.mark.parametrize("updates", [2**31 - 3, 2**31 - 1, 2**32 - 2, 2**40 + 2**31 - 2])
@pytest.mark.parametrize("tau", ["linear", 3.0])
def test_samples_learn_on_when_the_clock_of_last_wraps(emulated, updates, tau):
    samplers = pair(num_samples=60, batch_size=24, method=EMAIS(warmup_epochs=0, tau=tau))
    for sampler in samplers:
        sampler._table.scalars[UPDATES] = updates
    run(samplers, emulated, SCRAMBLED, steps=8, batch_size=24)
    table = samplers[1]._table
    seen = table.column(LAST) >= 0
    ages = ((updates + 7) - table.column(LAST)[seen].long()) & (2**31 - 1)
    assert int(ages.max()) <= 7
    if tau == "linear":
        return  # the last 10 of 2^31 iterations: less than the mean's last bit
    before = table.column(MEAN).clone()
    kernels._chosen.clear()
    emulated(SCRAMBLED)
    sweep(samplers[1], torch.full((60,), 1000.0))
    assert bool((table.column(MEAN) > before).all())


def test_late_updates_leave_younger_records(emulated):
    samplers = pair(num_samples=60, batch_size=24, method=EMAIS(warmup_epochs=0, tau=3.0))
    run(samplers, emulated, SCRAMBLED, steps=8, batch_size=24)
    for sampler in samplers:
        sampler._table.scalars[UPDATES] -= 5
    run(samplers, emulated, SCRAMBLED, steps=4, batch_size=24)


@pytest.mark.parametrize("duplicates", [0.2, 1, 1.5, 5, 40])
def test_every_cap(emulated, duplicates):
    samplers = pair(
        num_samples=300, batch_size=40, method=EMAIS(warmup_epochs=0), max_duplicates=duplicates
    )
    run(samplers, emulated, SCRAMBLED, steps=60, batch_size=40, spread=3.0)
    table = samplers[1]._table
    assert int(table.scalars[NUM_CAPPED]) <= table.constants.max_capped


@pytest.mark.parametrize("stride", [FORWARDS, SCRAMBLED])
@pytest.mark.parametrize("trend", [-0.4, 0.0, 0.4])
@pytest.mark.parametrize("over", [1.0, 1.0001, 1.01, 1.3, 3.0])
def test_caps_close_to_uniform(emulated, over, trend, stride):
    n, batch_size = 1500, 60
    samplers = pair(
        num_samples=n, batch_size=batch_size, method=EMAIS(warmup_epochs=0, tau=5.0),
        max_duplicates=over * batch_size / n,
    )  # fmt: skip
    score = torch.empty(n).log_normal_(0, 2, generator=torch.Generator().manual_seed(1))
    # A third of the samples is unseen at first.
    with fastis.backend("reference"):
        samplers[0].update(
            fastis.Batch(torch.arange(1000), torch.ones(1000)), observe(score[:1000])
        )
    emulated(stride)
    samplers[1].update(fastis.Batch(torch.arange(1000), torch.ones(1000)), observe(score[:1000]))
    for _ in range(8):
        run(samplers, emulated, stride, steps=3, batch_size=batch_size, trend=trend)
        with fastis.backend("reference"):
            samplers[0].sample()
        emulated(stride)
        samplers[1].sample()
        assert_exact_tree(samplers[1])


@pytest.mark.parametrize("factor", [1e-3, 1e3])
def test_many_items_cross_the_cap_at_once(emulated, factor):
    # Far more items lie above the old cap than can be capped, or all the capped ones below it.
    n, batch_size = 3000, 64
    samplers = pair(num_samples=n, batch_size=batch_size, method=EMAIS(warmup_epochs=0, tau=1.0))
    generator = torch.Generator().manual_seed(1)
    score = torch.empty(n).log_normal_(0, 2, generator=generator)
    many = torch.randperm(n, generator=generator)[: n // 2]
    changed = score[many] * factor * torch.empty(n // 2).log_normal_(0, 1, generator=generator)
    for step in range(3):
        drawn = []
        for sampler in samplers:
            kernels._chosen.clear()
            if drawn:
                emulated(SCRAMBLED)
            reference = contextlib.nullcontext() if drawn else fastis.backend("reference")
            with reference:
                if step == 0:
                    sweep(sampler, score)
                elif step == 1:
                    sampler.update(fastis.Batch(many, torch.ones(len(many))), observe(changed))
                drawn.append(sampler.sample())
        assert torch.equal(drawn[0].indices, drawn[1].indices)
        assert torch.equal(drawn[0].weights, drawn[1].weights)
        assert_exact_tree(samplers[1])


def test_hundred_thousand_capped_items_take_no_time(emulated):
    n, batch_size = 100_000, 256
    samplers = pair(
        num_samples=n, batch_size=batch_size, method=EMAIS.published(warmup_epochs=0, tau=5.0),
        max_duplicates=1.01 * batch_size / n,
    )  # fmt: skip
    score = torch.empty(n).log_normal_(0, 2, generator=torch.Generator().manual_seed(1))
    with fastis.backend("reference"):
        sweep(samplers[0], score)
    emulated(FORWARDS)
    sweep(samplers[1], score)
    start = time.perf_counter()
    run(samplers, emulated, FORWARDS, steps=5, batch_size=batch_size)
    assert time.perf_counter() - start < 5
    samplers[1].sample()
    assert len(assert_exact_tree(samplers[1])) > 95_000


@pytest.mark.parametrize("stride", [FORWARDS, BACKWARDS, SCRAMBLED])
@pytest.mark.parametrize("method", ["emais", "scan", EMAIS(warmup_epochs=0)])
def test_update_and_draw_in_one_launch(emulated, stride, method):
    samplers = pair(num_samples=400, batch_size=32, method=method)
    assert samplers[1].method.fused  # else it would be two launches
    generator = torch.Generator().manual_seed(0)
    kernels._chosen.clear()
    with fastis.backend("reference"):
        expected = samplers[0].sample()
    emulated(stride)
    batch = samplers[1].sample()
    for _ in range(60):
        out = observe(torch.empty(32).log_normal_(0, 2, generator=generator))
        kernels._chosen.clear()
        with fastis.backend("reference"):
            samplers[0].update(expected, out)
            expected = samplers[0].sample()
        emulated(stride)
        batch = samplers[1].update_and_sample(batch, out)
        assert torch.equal(batch.indices, expected.indices)
        assert torch.equal(batch.weights, expected.weights)
    assert_equal_tables(*samplers)


def test_many_levels_and_many_capped_items(emulated):
    n, batch_size = 2**17 + 3, 512
    samplers = pair(num_samples=n, batch_size=batch_size, method=EMAIS.published(warmup_epochs=0))
    generator = torch.Generator().manual_seed(1)
    score = torch.empty(n).log_normal_(0, 3, generator=generator)
    with fastis.backend("reference"):
        sweep(samplers[0], score)
    emulated(SCRAMBLED)
    sweep(samplers[1], score)
    assert_equal_tables(*samplers)
    run(samplers, emulated, SCRAMBLED, steps=8, batch_size=batch_size, spread=3.0)
    samplers[1].sample()
    assert len(assert_exact_tree(samplers[1])) > 10


def test_sums_hold_every_integer(emulated):
    n = 3001
    sampler = fastis.Sampler(n, 32, method=EMAIS(warmup_epochs=0, least_gain=0.0), seed=1)
    emulated(SCRAMBLED)
    generator = torch.Generator().manual_seed(0)
    for _ in range(600):
        batch = sampler.sample()
        score = torch.empty(32).log_normal_(0, 2.5, generator=generator)
        sampler.update(batch, observe(score))
    sampler.sample()
    assert_exact_tree(sampler)


WRONG_TREE = """
import torch, fastis
from fastis.methods import EMAIS
from native import native
from fastis.kernels.layout import VALID
sampler = fastis.Sampler(5001, 64, method=EMAIS(warmup_epochs=0))
table = sampler._table
indices, weights = torch.empty(64, dtype=torch.int64), torch.empty(64)
score = torch.rand(5001)
arguments = (torch.arange(5001), torch.ones(5001), score, score)
native().update(table.device_handle, *(a.data_ptr() for a in arguments), 5001, 0, 0, 1)
generator = torch.Generator().manual_seed(0)
for name in ("sums", "unseen", "capped"):
    for most in (1, 2**20):
        native().draw(table.device_handle, indices.data_ptr(), weights.data_ptr(), 1)
        nodes = table._tree[name]
        kept = nodes.clone()
        nodes.random_(0, most, generator=generator)
        table.scalars[VALID + 2] = 5  # capped items
        native().draw(table.device_handle, indices.data_ptr(), weights.data_ptr(), 1)
        assert ((indices >= 0) & (indices < 5001)).all(), indices
        nodes.copy_(kept)
        table.scalars[VALID] = 0  # rebuilt
"""


def test_a_draw_stays_in_range_whatever_the_tree_holds():
    done = subprocess.run(
        [sys.executable, "-c", WRONG_TREE],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert done.returncode == 0, done.stderr


def test_a_sample_drawn_many_times_is_observed_once(emulated):
    for stride in (FORWARDS, BACKWARDS, SCRAMBLED):
        samplers = pair(num_samples=10, batch_size=8, method=EMAIS(warmup_epochs=0))
        indices = torch.tensor([3, 5, 3, 3, 5, 0, 3, 9])
        score = torch.tensor([torch.nan, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, torch.inf])
        kernels._chosen.clear()
        with fastis.backend("reference"):
            samplers[0].update(fastis.Batch(indices, torch.ones(8)), observe(score))
        emulated(stride)
        samplers[1].update(fastis.Batch(indices, torch.ones(8)), observe(score))
        assert_equal_tables(*samplers)
        assert samplers[1].mean[[0, 3, 5, 9]].tolist() == [6.0, 3.0, 2.0, 0.0]
        assert samplers[1].skipped == 2


def nodes_of(n, most):
    """Of the levels of 16, each padded to a multiple of 16, over leaves of 4."""
    nodes, total = -(-n // 4), 0
    while True:
        total += -(-nodes // 16) * 16
        if nodes <= most:
            return total
        nodes = -(-nodes // 16)


@pytest.mark.parametrize("n", [1, 4, 5, 64, 65, 4096, 4097, 2**22 + 1, 2**31, 2**31 + 5, 2**32 - 1])
def test_trees_of_any_size_have_room_in_64_bits(n):
    assert _C.tree_nodes(n) == nodes_of(n, 16)
    assert _C.device_tree_nodes(n) == nodes_of(n, 1024)
