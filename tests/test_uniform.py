"""``Sampler.uniform``: draws without replacement when the user asks for them, on every backend."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from conftest import drive, observe, scores

import fastis
from fastis import methods
from fastis.kernels.layout import NEVER, UNIFORM_FROM
from fastis.methods import EMAIS

N, B = 103, 10  # ten minibatches an epoch
METHODS = sorted(methods.BY_NAME)


def method_named(name):
    if name == "presampling":
        return methods.Presampling(scores, tau_threshold=1.0)
    return methods.BY_NAME[name]()


def epoch(sampler):
    """The indices of ten minibatches, whose weights are 1; what is seen of them is learnt."""
    drawn = []
    for _ in range(N // B):
        batch = sampler.sample()
        assert (batch.weights == 1).all()
        sampler.update(batch, observe(scores(batch.indices)))
        drawn.append(batch.indices)
    return torch.cat(drawn)


@pytest.mark.parametrize("before", [23, 20, 7, 0])
@pytest.mark.parametrize("name", METHODS)
def test_whole_epochs_without_replacement(any_backend, name, before):
    sampler = fastis.Sampler(N, B, method=method_named(name), seed=4)
    drive(sampler, before)
    assert not sampler.uniform
    sampler.uniform = True
    assert sampler.uniform
    if before < 20 and sampler.phase == "warm-up":
        drive(sampler, 20 - before)  # goes on to its end
    seen, step = [], sampler.step
    for _ in range(3):
        assert sampler.phase == "uniform"
        assert (sampler.probabilities() == 1 / N).all()
        seen.append(epoch(sampler))
        if name != "self_paced" and name != "scan":  # whose own epochs go on
            assert seen[-1].unique().numel() == N // B * B
    assert sampler.step == step + 3 * (N // B)
    assert float(sampler.lr_factor()) == 1
    assert not torch.equal(seen[0], seen[1])
    assert not torch.equal(seen[1], seen[2])


def test_no_permutation_comes_twice():
    sampler = fastis.Sampler(N, B, seed=4)
    epochs = [epoch(sampler) for _ in range(2)]
    for start in (0, 3, 8):
        drive(sampler, start)
        sampler.uniform = True
        epochs += [epoch(sampler) for _ in range(2)]
        sampler.uniform = False
    assert len({tuple(e.tolist()) for e in epochs}) == len(epochs)


def test_the_reference_draws_the_same():
    samplers = [fastis.Sampler(N, B, seed=4) for _ in range(2)]
    for uniform, steps in ((False, 25), (True, 14), (True, 3), (False, 12), (True, 25)):
        runs = []
        for sampler, backend in zip(samplers, ("reference", "cpu"), strict=True):
            with fastis.backend(backend):
                sampler.uniform = uniform
                runs.append(drive(sampler, steps, seed=steps))
        for ours, theirs in zip(*runs, strict=True):
            assert torch.equal(ours.indices, theirs.indices)
            assert torch.equal(ours.weights, theirs.weights)
        a, b = (sampler.variance for sampler in samplers)
        torch.testing.assert_close(a.trace_is, b.trace_is)
        torch.testing.assert_close(*(sampler.lr_factor() for sampler in samplers))


def test_it_goes_on_learning_and_comes_back(any_backend):
    sampler = fastis.Sampler(N, B, method=EMAIS(warmup_epochs=0), seed=4)
    drive(sampler, 40)
    assert float(sampler.lr_factor()) != 1
    sampler.uniform = True
    batch = sampler.sample()
    mean = sampler.mean
    sampler.update(batch, observe(scores(batch.indices) + 7))
    assert float(sampler.lr_factor()) == float(sampler.lr_factor(rule="gain")) == 1
    assert not (sampler.mean == mean)[batch.indices].any()
    sampler.uniform = False
    assert sampler.phase == "importance"
    assert not (sampler.sample().weights == 1).all()
    drive(sampler, 1)
    assert float(sampler.lr_factor()) != 1


def test_minibatches_drawn_before_keep_their_coefficients(any_backend):
    sampler = fastis.Sampler(N, B, method=EMAIS(warmup_epochs=0), seed=4)
    drive(sampler, 40)
    ahead = sampler.sample()
    kept = ahead.weights.clone()
    sampler.uniform = True
    sampler.update(ahead, observe(scores(ahead.indices)))
    assert torch.equal(ahead.weights, kept)
    assert float(sampler.lr_factor()) != 1  # of draws that were not uniform


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("before", [5, 23])
def test_it_is_saved(any_backend, name, before):
    sampler = fastis.Sampler(N, B, method=method_named(name), seed=4)
    drive(sampler, before)
    sampler.uniform = True
    drive(sampler, 13)
    loaded = fastis.Sampler(N, B, method=method_named(name), seed=1)
    loaded.load_state_dict(sampler.state_dict())
    copies = [loaded, copy.deepcopy(sampler)]
    if name != "presampling":
        copies.append(pickle.loads(pickle.dumps(sampler)))
    batches = drive(sampler, 25)
    for other in copies:
        assert other.uniform
        for ours, theirs in zip(drive(other, 25), batches, strict=True):
            assert torch.equal(ours.indices, theirs.indices)
            assert torch.equal(ours.weights, theirs.weights)
    plain = fastis.Sampler(N, B, method=method_named(name), seed=4)
    loaded.load_state_dict(plain.state_dict())
    assert not loaded.uniform


def test_states_of_the_second_version_load():
    sampler = fastis.Sampler(N, B, seed=4)
    drive(sampler, 30)
    state = sampler.state_dict()
    old = {**state, "version": 2, "scalars": state["scalars"][:UNIFORM_FROM]}
    sampler.uniform = True
    sampler.load_state_dict(old)
    assert not sampler.uniform
    assert torch.equal(sampler.state_dict()["scalars"], state["scalars"])


@pytest.mark.parametrize("value", [19, -1, 0, NEVER + 1])
def test_no_draw_before_the_end_of_the_warm_up_is_loaded(value):
    sampler = fastis.Sampler(N, B, seed=4)
    state = sampler.state_dict()
    state["scalars"][UNIFORM_FROM] = value
    message = rf"must have uniform_from in \[20, {NEVER}\], got {value}"
    with pytest.raises(ValueError, match=message):
        sampler.load_state_dict(state)


def test_more_draws_than_samples_are_refused(any_backend):
    sampler = fastis.Sampler(10, 11, method="uniform")
    with pytest.raises(ValueError, match="batch_size=11 from num_samples=10"):
        sampler.uniform = True
    assert not sampler.uniform
    state = sampler.state_dict()
    state["scalars"][UNIFORM_FROM] = 100
    with pytest.raises(ValueError, match="uniform_from in"):
        sampler.load_state_dict(state)
    sampler.sample()


def test_only_a_bool_is_taken():
    sampler = fastis.Sampler(N, B)
    with pytest.raises(TypeError, match="uniform must be a bool, got int 1"):
        sampler.uniform = 1
    assert not sampler.uniform
