"""Processes that do not do the same are told what differs, all of them; what goes round is
counted."""

from __future__ import annotations

import copy
import pickle
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from conftest import Observation, scores

import fastis
from distributed.processes import errors, run, start
from distributed.test_replicated import N, assert_same_state, drawn, learn
from fastis import exchange
from fastis.methods import EMAIS

B = 6  # of each process


# Arguments ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argument", "values", "message"),
    [
        ("num_samples", (100, 101), "got 100 on rank 0 and 101 on rank 1"),
        ("batch_size", (5, 6), "got 5 on rank 0 and 6 on rank 1"),
        ("seed", (0, 1), "got 0 on rank 0 and 1 on rank 1"),
        ("seed", (None, 1), "got None on rank 0 and 1 on rank 1"),
        ("method", ("emais", "loss"), "got 'emais' on rank 0 and 'loss' on rank 1"),
        ("method", (EMAIS(), EMAIS(floor=0.5)), "'floor': 0.1.*rank 1"),
        ("max_duplicates", (2, 3), "got 2 on rank 0 and 3 on rank 1"),
        ("correction", (1.0, 0.5), "got 1.0 on rank 0 and 0.5 on rank 1"),
        ("num_samples", (100, "many"), "got 100 on rank 0 and 'many' on rank 1"),
    ],
)
def test_arguments_that_differ_are_an_error_in_all(tmp_path, argument, values, message):
    def make(group):
        arguments = {"num_samples": 100, "batch_size": 5, argument: values[group.rank()]}
        fastis.Sampler(**arguments, group=group)

    for name, text in errors(start(tmp_path, 2, make)):
        assert name == "ValueError"
        assert f"{argument} must be the same in all processes of the group" in text
        with pytest.raises(ValueError, match=message):
            raise ValueError(text)


def test_bad_arguments_that_are_the_same_are_named_in_all(tmp_path):
    found = errors(start(tmp_path, 2, lambda g: fastis.Sampler(100, 51, group=g)))
    assert (
        found
        == [
            (
                "ValueError",
                "batch_size must be at most num_samples=100, since method 'emais' draws without "
                "replacement, got 102 in 2 processes",
            )
        ]
        * 2
    )


def test_without_a_seed_the_first_ranks_is_everybodys(tmp_path):
    def seeded(group):  # each with its own torch.manual_seed
        sampler = fastis.Sampler(N, B, group=group)
        return sampler.sample().global_batch.indices, repr(sampler), float(torch.rand(()))

    def seed_alone():
        torch.manual_seed(0)
        return fastis.Sampler(N, 2 * B).sample().indices, float(torch.rand(()))

    (first, text, number), (second, _, _) = run(tmp_path, 2, seeded)
    assert torch.equal(first, second)
    expected, next_number = seed_alone()
    assert torch.equal(first, expected)
    assert number == next_number
    assert "batch_size=6, " in text
    assert "group=<rank 0 of 2>" in text


class Derived(fastis.Sampler):
    pass


def test_a_subclass_that_knows_no_group_is_refused(tmp_path):
    for name, text in errors(start(tmp_path, 2, lambda g: Derived(N, B, group=g))):
        assert name == "TypeError"
        assert "group must be False for Derived" in text


# Steps -------------------------------------------------------------------------------------------


def draws_twice(sampler, batch, rank):
    if rank == 1:
        sampler.sample()
    learn(sampler, batch, 0)


def updates_another(sampler, batch, rank):
    other = sampler.sample()
    learn(sampler, (batch, other)[rank], 0)


def mixes_alone(sampler, batch, rank):
    learn(sampler, batch.mix(torch.arange(B)) if rank else batch, 0)


def corrects_alone(sampler, batch, rank):
    sampler.correction = 1 - rank / 4
    learn(sampler, batch, 0)


def uniform_alone(sampler, batch, rank):
    sampler.uniform = rank == 1
    learn(sampler, batch, 0)


def excludes_alone(sampler, batch, rank):
    if rank:
        sampler.exclude(torch.arange(40))
    learn(sampler, batch, 0)


def with_another_gradient(sampler, batch, rank):
    score = scores(batch.indices)
    sampler.update(batch, Observation(score, score, torch.ones(3 + rank)))


def without_a_gradient(sampler, batch, rank):
    score = scores(batch.indices)
    sampler.update(batch, Observation(score, score, None if rank else torch.ones(3)))


def with_another_state(sampler, batch, rank):
    if rank:
        state = sampler.state_dict()
        state["scalars"][2] = 7
        sampler.load_state_dict(state)
    learn(sampler, batch, 0)


APART = [
    (draws_twice, "draws is 11 on rank 0 and 12 on rank 1"),
    (updates_another, r"sum of the global minibatch's indices is \d+ on rank 0 and \d+"),
    (mixes_alone, "update of another minibatch than was drawn is False on rank 0 and True"),
    (corrects_alone, "correction is 1.0 on rank 0 and 0.75 on rank 1"),
    (uniform_alone, "uniform_from is 4611686018427387904 on rank 0 and 40 on rank 1"),
    (excludes_alone, r"total is \d+ on rank 0 and \d+ on rank 1"),
    (with_another_gradient, r"len\(out.mean_grad\) is 3 on rank 0 and 4 on rank 1"),
    (without_a_gradient, r"len\(out.mean_grad\) is 3 on rank 0 and -1 on rank 1"),
    (with_another_state, "skipped is 0 on rank 0 and 7 on rank 1"),
]


def settled(sampler, step, *arguments):
    """A step, and what its update waits for."""
    step(sampler, *arguments)
    return sampler.variance.trace_is


@pytest.mark.parametrize(("step", "message"), APART, ids=[step.__name__ for step, _ in APART])
def test_processes_that_come_apart_are_told(tmp_path, step, message):
    """In all of them, with what differs; nothing is learnt of it."""

    def apart(group):
        sampler = fastis.Sampler(N, B, group=group, seed=0)
        drawn(sampler, 10)
        before = sampler.step
        batch = sampler.sample()
        with pytest.raises(RuntimeError, match=f"have come apart: {message}"):
            settled(sampler, step, batch, group.rank())
        assert sampler.step == before, "nothing was learnt"
        dist.barrier()

    run(tmp_path, 2, apart)


def test_the_error_of_three_names_the_one_that_differs(tmp_path):
    def apart(group):
        sampler = fastis.Sampler(N, B, group=group, seed=0)
        for _ in range(2 if group.rank() == 2 else 1):
            batch = sampler.sample()
        learn(sampler, batch, 0)
        sampler.sample()

    for name, message in errors(start(tmp_path, 3, apart)):
        assert name == "RuntimeError"
        assert "draws is 1 on rank 0 and 2 on rank 2" in message


def test_one_state_in_all_brings_them_together_again(tmp_path):
    def apart(group):
        sampler = fastis.Sampler(N, B, group=group, seed=0)
        drawn(sampler, 50)
        state = sampler.state_dict()
        if group.rank():
            sampler.sample()
        with pytest.raises(RuntimeError, match="have come apart"):
            settled(sampler, learn, sampler.sample(), 0)
        sampler.load_state_dict(state)
        return [indices for indices, _ in drawn(sampler, 30)], sampler.state_dict()

    def never_apart():
        sampler = fastis.Sampler(N, 2 * B, seed=0)
        drawn(sampler, 50)
        return [indices for indices, _ in drawn(sampler, 30)], sampler.state_dict()

    (first, state), (second, _) = run(tmp_path, 2, apart)
    expected, expected_state = never_apart()
    for one, other, whole in zip(first, second, expected, strict=True):
        assert torch.equal(torch.cat([one, other]), whole)
    assert_same_state(state, expected_state)


def test_an_error_in_one_process_changes_nothing_there(tmp_path):
    def wrong(group):
        sampler = fastis.Sampler(N, B, group=group, seed=0)
        batch = sampler.sample()
        if group.rank() == 0:
            with pytest.raises(ValueError, match=r"out\.score must have shape"):
                sampler.update(batch, scores(batch.indices)[1:])
            with pytest.raises(ValueError, match="batch and data are not those of one draw"):
                sampler.update(batch, scores(batch.indices), indices=batch.indices + 1)
        learn(sampler, batch, 0)
        drawn(sampler, 20)
        return sampler.state_dict()

    first, second = run(tmp_path, 2, wrong)
    assert_same_state(first, second)
    assert first["scalars"][:2].tolist() == [21, 21]


# What goes round ---------------------------------------------------------------------------------


def counting(step, steps=10, **options):
    """What a process sends in each step, in bytes: the calls of the collective are counted."""

    def count(group):
        sampler = fastis.Sampler(N, B, group=group, seed=0, **options)
        sent, gather = [], exchange._all_gather

        def counted(everyone, ours, **arguments):
            assert everyone.nbytes == group.size() * ours.nbytes
            sent.append(ours.nbytes)
            return gather(everyone, ours, **arguments)

        with mock.patch.object(exchange, "_all_gather", counted):
            drawn(sampler, steps, step)
            sampler.state_dict()
        return sent

    return count


def plain(sampler, batch, step):
    learn(sampler, fastis.Batch(*batch), step)


def test_bytes_that_go_round(tmp_path):
    """Four a sample, and 152 a process; with indices and coefficients sixteen more a sample."""
    assert run(tmp_path, 2, counting(learn)) == [[152 + 4 * B] * 10] * 2
    assert run(tmp_path, 4, counting(learn)) == [[152 + 4 * B] * 10] * 4
    assert run(tmp_path, 2, counting(learn, method="loss")) == [[152 + 8 * B] * 10] * 2
    assert run(tmp_path, 2, counting(plain)) == [[152 + 4 * B, 16 * B] * 10] * 2


# Copies ------------------------------------------------------------------------------------------


def test_pickles_are_of_a_process_on_its_own(tmp_path):
    def pickled(group):
        sampler = fastis.Sampler(N, B, group=group, seed=0)
        drawn(sampler, 60)
        twin = copy.deepcopy(sampler)
        assert type(twin) is fastis.Sampler
        assert twin.batch_size == 2 * B
        return pickle.dumps(sampler), [indices for indices, _ in drawn(sampler, 10)]

    (theirs, first), (_, second) = run(tmp_path, 2, pickled)
    expected = drawn(pickle.loads(theirs), 10)
    for one, other, (whole, _) in zip(first, second, expected, strict=True):
        assert torch.equal(torch.cat([one, other]), whole)
