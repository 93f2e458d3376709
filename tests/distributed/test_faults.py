"""Ranks that are slow, stand still or are killed: nothing is lost, and what goes on has the bits of
a run that was left alone."""

from __future__ import annotations

import itertools
import os
import signal
import time
from pathlib import Path

import pytest
import torch
from conftest import assert_equal

import fastis
from distributed.processes import SECONDS, results, run, start
from distributed.test_replicated import WHOLE, N, alone, assert_same_state, drawn, learn
from distributed.torchrun import torchrun
from distributed.training import EVERY, train

STEPS = 45


def slow_by_turns(sampler, batch, step):
    """Each rank keeps the others waiting, before the update and after it."""
    late = sampler._exchange.rank if isinstance(sampler, fastis.replicated.Replicated) else None
    if late == step % 3:
        time.sleep(0.01)
    learn(sampler, batch, step)
    if late == (step + 1) % 3:
        time.sleep(0.01)


def test_a_slow_rank_changes_nothing(tmp_path):
    def slow(group):
        sampler = fastis.Sampler(N, WHOLE // 2, group=group, seed=1)
        drawn(sampler, 50, slow_by_turns)
        return sampler.state_dict()

    _, expected, _ = alone(50, learn, {"seed": 1})
    for state in run(tmp_path, 2, slow):
        assert_same_state(state, expected)


def test_a_rank_that_stands_still_for_a_while_loses_nothing(tmp_path):
    """SIGSTOP in the middle of the run, as a network that stalls; the other waits, and goes on."""

    def long(group):
        sampler = fastis.Sampler(N, WHOLE // 2, group=group, seed=1)
        times = []

        def step(sampler, batch, number):
            learn(sampler, batch, number)
            times.append(time.monotonic())
            if number == 20 and group.rank() == 1:
                os.kill(os.getpid(), signal.SIGSTOP)

        drawn(sampler, 60, step)
        return sampler.state_dict(), times

    processes = start(tmp_path, 2, long)
    _, status = os.waitpid(processes[1].pid, os.WUNTRACED)
    assert os.WIFSTOPPED(status)
    time.sleep(1.0)
    assert not (tmp_path / "result0.0").exists(), "the other rank waits"
    os.kill(processes[1].pid, signal.SIGCONT)
    _, expected, _ = alone(60, learn, {"seed": 1})
    for state, times in results(processes):
        assert_same_state(state, expected)
        assert max(b - a for a, b in itertools.pairwise(times)) > 0.9, "it did stand still"


def uninterrupted(folder):
    folder.mkdir()
    first, second = run(folder, 2, train, folder, STEPS)
    for name in ("model", "loader", "scheduler"):
        assert_equal(second[name], first[name], name)
    return first


def test_a_rank_that_is_killed_stops_the_others_and_a_restart_goes_on(tmp_path):
    """The survivor gets an error, and can still read its sampler; the restart has the same bits."""
    expected = uninterrupted(tmp_path / "alone")
    folder = tmp_path / "killed"
    folder.mkdir()

    def killed(group):
        def begins(step):
            if step == 27 and group.rank() == 1:
                os.kill(os.getpid(), signal.SIGKILL)

        train(group, folder, STEPS, begins)

    processes = start(folder, 2, killed)
    until = time.monotonic() + SECONDS
    (survived, error), (ended, lost) = [process.result(until) for process in processes]
    assert not survived
    assert error[0] == "RuntimeError", "within seconds, since the connection is closed"
    assert (ended, lost[0]) == (False, "Killed")
    assert (folder / "last.pt").exists()
    found = run(folder, 2, train, folder, STEPS)
    for state in found:
        assert_equal(state, expected)


def test_the_survivor_can_save_its_sampler(tmp_path):
    def survive(group):
        sampler = fastis.Sampler(N, WHOLE // 2, group=group, seed=1)
        drawn(sampler, 20)
        assert sampler.step == 20
        if group.rank() == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        with pytest.raises(RuntimeError):
            drawn(sampler, 5)
        return sampler.state_dict()

    processes = start(tmp_path, 2, survive)
    until = time.monotonic() + SECONDS
    (survived, state), _ = [process.result(until) for process in processes]
    assert survived, state
    _, expected, _ = alone(20, learn, {"seed": 1})
    assert_same_state({**state, "scalars": 0}, {**expected, "scalars": 0})


@pytest.mark.slow
def test_torchrun_starts_killed_ranks_again(tmp_path):
    """Elastic restart: a rank kills itself, torchrun starts all again, from the checkpoint."""
    kill = 27
    assert kill % EVERY
    script = Path(__file__).parent / "training.py"
    for name, arguments in (("alone", []), ("killed", [kill])):
        (tmp_path / name).mkdir()
        torchrun(script, tmp_path / name, STEPS, *arguments, restarts=1)
    for rank in range(2):
        found, expected = (
            torch.load(tmp_path / name / f"final{rank}.pt", weights_only=True)
            for name in ("killed", "alone")
        )
        assert_equal(found, expected)
