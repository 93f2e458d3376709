"""The methods where the host may not look: as on the CPU, but rows out of range are left out.

Run here on the CPU with looking forbidden, and with the device's kernels for batches that the CPU's
would refuse.
"""

from __future__ import annotations

import pytest
import torch
from conftest import Observation as Out
from test_device import FORWARDS, Emulator

import fastis
from fastis import kernels
from fastis.kernels import layout
from fastis.kernels.layout import UPDATES
from fastis.kernels.table import Observation
from fastis.methods import BY_NAME, distributed, prioritized, weighted
from fastis.methods.weighted import distinct, is_first

NUM_SAMPLES, BATCH_SIZE, STEPS = 60, 16, 90
METHODS = sorted(set(BY_NAME) - {"presampling", "scan", "uniform", "emais", "loss"})
OPTIONS = {
    "rais": {"buffer_size": 40},  # goes round, in one minibatch nearly
}
# RAIS' gain counts the rows of a minibatch, whatever they hold.
BY_ROW = {"memory.moments", "memory.gain", "memory.effective_iterations"}


@pytest.fixture
def unseen_by_the_host(monkeypatch):
    for module in (layout, weighted, prioritized, distributed):
        monkeypatch.setattr(module, "may_read", lambda device: False)


def minibatches(outside: bool = False):
    """Indices with duplicates and losses of which some are not finite, at times all."""
    generator = torch.Generator().manual_seed(0)
    for step in range(STEPS):
        indices = torch.randint(NUM_SAMPLES, (BATCH_SIZE,), generator=generator)
        score = torch.empty(BATCH_SIZE).log_normal_(0, 1, generator=generator)
        score[torch.rand(BATCH_SIZE, generator=generator) < 0.2] = torch.nan
        if step % 17 == 3:
            score[:] = torch.inf
        weights = torch.rand(BATCH_SIZE, generator=generator) + 0.5
        if outside:
            indices = torch.cat([torch.tensor([NUM_SAMPLES, -1]), indices, torch.tensor([2**40])])
            score = torch.cat([torch.ones(2), score, torch.ones(1)])
            weights = torch.cat([torch.ones(2), weights, torch.ones(1)])
        yield fastis.Batch(indices, weights), Out(score, score, torch.full((4,), 0.1))


def run(method, *, outside=False, draw=True):
    method = BY_NAME[method](**OPTIONS.get(method, {}))
    sampler = fastis.Sampler(NUM_SAMPLES, BATCH_SIZE, method=method, seed=1)
    drawn = []
    for batch, out in minibatches(outside):
        if draw:
            drawn.append(sampler.sample())
        sampler.update(batch, out)
    return sampler, drawn


def assert_close(ours, theirs, without=()):
    for name, tensor in theirs.items():
        if torch.is_tensor(tensor) and name not in without:
            a, b = ours[name], tensor
            if name == "states":
                a, b = (t[:, :2].contiguous().view(torch.float32) for t in (a, b))
            torch.testing.assert_close(
                a, b, rtol=1e-6, atol=1e-7, equal_nan=True, msg=lambda m, n=name: f"{n}: {m}"
            )


@pytest.mark.parametrize("method", METHODS)
def test_the_same_draws_and_states(method, request):
    theirs, expected = run(method)
    request.getfixturevalue("unseen_by_the_host")
    ours, drawn = run(method)
    assert ours.step == theirs.step == STEPS
    assert ours._table.counts_on_host[UPDATES] == STEPS
    if method == "prioritized":  # whose weights a device sets at every update
        assert_close(ours.state_dict(), theirs.state_dict(), without={"scalars", "states"})
        return
    assert_close(ours.state_dict(), theirs.state_dict())
    for a, b in zip(drawn, expected, strict=True):
        assert torch.equal(a.indices, b.indices)
        torch.testing.assert_close(a.weights, b.weights)


@pytest.mark.parametrize("method", METHODS)
def test_rows_out_of_range_are_left_out(method, monkeypatch, unseen_by_the_host):
    monkeypatch.setitem(kernels._chosen, ("table", "cpu"), Emulator(FORWARDS))
    inside, _ = run(method, draw=False)
    outside, _ = run(method, outside=True, draw=False)
    without = {"scalars", "variance"} | (BY_ROW if method == "rais" else set())
    assert_close(outside.state_dict(), inside.state_dict(), without)
    assert inside.step == outside.step == STEPS


def test_on_the_cpu_an_index_out_of_range_changes_nothing():
    for method in METHODS:
        sampler = fastis.Sampler(NUM_SAMPLES, BATCH_SIZE, method=method)
        before = sampler.state_dict()
        batch, out = next(iter(minibatches(outside=True)))
        with pytest.raises(IndexError, match=r"batch.indices must be in \[0, 60\)"):
            sampler.update(batch, out)
        after = sampler.state_dict()
        for name, tensor in before.items():
            if torch.is_tensor(tensor):
                torch.testing.assert_close(after[name], tensor, rtol=0, atol=0, equal_nan=True)


def test_first_occurrences():
    indices = torch.tensor([5, -1, 3, 5, -1, 3, 0])
    assert is_first(indices).tolist() == [True, False, True, False, False, False, True]


def test_repeats_are_of_the_last_that_counts(unseen_by_the_host):
    table = fastis.Sampler(10, 5)._table
    observed = torch.tensor([1.0, torch.nan, 2.0, 3.0, 4.0])
    indices = torch.tensor([7, 1, 7, 99, 2])
    found = distinct(table, Observation(indices, observed + 1, observed, observed, None))
    assert found.indices.tolist() == [7, 2, 2, 2, 2]
    assert found.observed.tolist() == [1, 4, 4, 4, 4]
    assert found.counts.tolist() == [True, True, False, False, False]
    memory = torch.zeros(10)
    found.write(memory, found.observed)
    assert memory.nonzero().flatten().tolist() == [2, 7]


def test_counts_on_the_host_follow_a_load(unseen_by_the_host):
    sampler, _ = run("online_batch")
    other = fastis.Sampler(NUM_SAMPLES, BATCH_SIZE, method="online_batch")
    other.load_state_dict(sampler.state_dict())
    assert other._table.counts_on_host == {}
    for batch, out in minibatches():
        sampler.update(batch, out)
        other.update(batch, out)
    assert other._table.counts_on_host[UPDATES] == other.step == 2 * STEPS
    assert_close(other.state_dict(), sampler.state_dict())
