"""Checkpoints of a group: alike on every rank, and a run of any number of processes goes on."""

from __future__ import annotations

import io
import re

import pytest
import torch
import torch.distributed.checkpoint as dcp
from conftest import scores
from test_data import Indices

import fastis
from distributed.processes import run
from distributed.test_replicated import WHOLE, N, assert_same_state, drawn, learn
from fastis.methods import EMAIS

OPTIONS = {"seed": 8, "method": EMAIS(warmup_epochs=1)}


def through_a_file(state):
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def make(group, **options):
    size = 1 if group is None else group.size()
    return fastis.Sampler(N, WHOLE // size, group=group, **{**OPTIONS, **options})


def in_order(parts):
    """Minibatches of all ranks as those of one process."""
    return [
        tuple(torch.cat(tensors) for tensors in zip(*several, strict=True))
        for several in zip(*parts, strict=True)
    ]


def assert_same(found, expected):
    assert len(found) == len(expected)
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.equal(ours[0], theirs[0])
        assert torch.equal(ours[1], theirs[1])


# The sampler -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("before", "after"), [(2, 4), (4, 1), (1, 2), (4, 2)])
def test_another_number_of_processes_goes_on(tmp_path, before, after):
    """With the same global minibatch, bit for bit; 1: a sampler without a group."""

    def first(group):
        sampler = make(group)
        drawn(sampler, 40)
        return through_a_file(sampler.state_dict())

    def second(group, state):
        sampler = make(group, seed=9)
        sampler.load_state_dict(state)
        return drawn(sampler, 40), sampler.state_dict()

    state = first(None) if before == 1 else run(tmp_path, before, first)[-1]
    found = [second(None, state)] if after == 1 else run(tmp_path, after, second, state)
    one = make(None)
    expected = drawn(one, 40)
    one.load_state_dict(state)
    expected = drawn(one, 40)
    assert_same(in_order([batches for batches, _ in found]), expected)
    for _, theirs in found:
        assert_same_state(theirs, one.state_dict())


def test_another_global_minibatch_is_refused(tmp_path):
    state = make(None).state_dict()
    message = re.escape(
        "state_dict must be of a global minibatch of 24 samples (3 processes, batch_size=8), got 16"
    )

    def load(group):
        sampler = fastis.Sampler(N, 8, group=group, **OPTIONS)
        with pytest.raises(ValueError, match=message):
            sampler.load_state_dict(state)
        with pytest.raises(TypeError, match="state_dict must be a dict, got NoneType"):
            sampler.load_state_dict(None)

    run(tmp_path, 3, load)


def test_minibatches_that_are_saved_by_hand(tmp_path):
    """Drawn and not yet updated: as plain tensors they can be saved, and updated later."""

    def straight(group):
        sampler = make(group)
        waiting = [sampler.sample() for _ in range(3)]
        return finished(sampler, waiting)

    def resumed(group):
        sampler = make(group)
        waiting = [sampler.sample() for _ in range(3)]
        state = through_a_file([sampler.state_dict(), [tuple(batch) for batch in waiting]])
        other = make(group, seed=9)
        other.load_state_dict(state[0])
        return finished(other, [fastis.Batch(*tensors) for tensors in state[1]])

    def finished(sampler, waiting):
        for step, batch in enumerate(waiting):
            learn(sampler, batch, step)
        drawn(sampler, 40)
        return sampler.state_dict()

    expected = straight(None)
    for function in (straight, resumed):
        for state in run(tmp_path, 2, function):
            assert_same_state(state, expected)


def test_torch_distributed_checkpoint(tmp_path):
    """Its Stateful protocol, from two processes to four; what is alike is written once."""
    (tmp_path / "checkpoint").mkdir()
    n = 5000

    def new(group, seed):
        return fastis.Sampler(n, WHOLE // group.size(), group=group, seed=seed)

    def save(group):
        sampler = new(group, 8)
        drawn(sampler, 40)
        dcp.save({"sampler": sampler}, checkpoint_id=tmp_path / "checkpoint")
        return drawn(sampler, 30)

    def load(group):
        sampler = new(group, 9)
        dcp.load({"sampler": sampler}, checkpoint_id=tmp_path / "checkpoint")
        return drawn(sampler, 30)

    expected = in_order(run(tmp_path, 2, save))
    assert_same(in_order(run(tmp_path, 4, load)), expected)
    files = (tmp_path / "checkpoint").glob("*.distcp")
    assert 16 * n < sum(file.stat().st_size for file in files) < 2 * 16 * n


# The loader --------------------------------------------------------------------------------------


def loader_of(group, workers=2, **options):
    return fastis.DataLoader(Indices(N), make(group, **options), num_workers=workers)


def loaded(loader, steps):
    """Trains through as many passes as it takes; every minibatch has its own data."""
    batches = []
    while len(batches) < steps:
        for batch, data in loader:
            assert torch.equal(batch.indices, data)
            loader.sampler.update(batch, scores(batch.indices))
            batches.append(tuple(batch))
            if len(batches) == steps:
                break
    return batches


def test_the_loader_shares_every_minibatch_out(tmp_path):
    """Two workers each, which load four minibatches ahead; a pass is one over all the data."""

    def load(group):
        loader = loader_of(group)
        assert len(loader) == N // WHOLE
        return loaded(loader, 40)

    expected = loaded(loader_of(None), 40)
    assert_same(in_order(run(tmp_path, 2, load)), expected)
    first_pass = torch.cat([indices for indices, _ in expected[: N // WHOLE]])
    assert len(first_pass.unique()) == N


@pytest.mark.parametrize(("before", "after"), [(2, 2), (2, 4), (4, 1)])
def test_minibatches_in_flight_go_on_with_another_number_of_processes(tmp_path, before, after):
    def save(group):
        loader = loader_of(group)
        loaded(loader, 19)
        state = through_a_file(loader.state_dict())
        assert state["indices"].shape == (4, WHOLE), "under way, of all processes"
        return state, loaded(loader, 30)

    def resume(group, state):
        loader = loader_of(group, workers=1, seed=9)
        loader.load_state_dict(state)
        return loaded(loader, 30)

    saved = run(tmp_path, before, save)
    for state, _ in saved:
        assert_same_state(state["sampler"], saved[0][0]["sampler"])
        assert torch.equal(state["indices"], saved[0][0]["indices"])
    state = saved[0][0]
    found = [resume(None, state)] if after == 1 else run(tmp_path, after, resume, state)
    one = loader_of(None)
    loaded(one, 19)
    expected = loaded(one, 30)
    assert_same(in_order([batches for _, batches in saved]), expected)
    assert_same(in_order(found), expected)


def test_what_comes_from_the_loader_knows_the_whole(tmp_path):
    """Four bytes a sample go round, not those of indices and coefficients."""

    def load(group):
        loader = loader_of(group)
        for batch, _ in loader:
            assert batch.is_as_drawn
            assert len(batch.global_batch.indices) == WHOLE
            assert batch.to("cpu").is_as_drawn
            loader.sampler.update(batch, scores(batch.indices))

    run(tmp_path, 2, load)


def test_loaders_with_different_workers_are_told_apart(tmp_path):
    def load(group):
        loader = loader_of(group, workers=group.rank())
        with pytest.raises(RuntimeError, match="draws is 1 on rank 0 and 3 on rank 1"):
            loaded(loader, 3)

    run(tmp_path, 2, load)


# The learning rate -------------------------------------------------------------------------------


def test_all_processes_have_the_same_learning_rate(tmp_path):
    """The factor is the global minibatch's; the weights of replicas drift apart otherwise."""

    def rates(group):
        sampler = make(group)
        optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)
        scheduler = fastis.EffectiveBatchLR(optimizer, sampler, rule="linear")
        found = []
        for step in range(60):
            learn(sampler, sampler.sample(), step)
            optimizer.step()
            scheduler.step()
            found.append(optimizer.param_groups[0]["lr"])
        return found

    first, second = run(tmp_path, 2, rates)
    assert first == second == rates(None)
    assert max(first) > 0.12
