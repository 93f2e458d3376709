"""Scorers and trainers that die, hang, are slow, come back: real processes and real signals."""

from __future__ import annotations

import signal
import time
import warnings
from datetime import timedelta

import pytest
import torch
from conftest import batch_of, losses_of
from torch.distributed import TCPStore

import fastis
from fastis.methods import Distributed
from fastis.scoring import Inbox, Scorer

from .peers import Idle, wait_for

N, PATIENCE, LONG = 400, 1.0, 60.0


class Scale(torch.nn.Module):
    """A network of one number: the score of sample i is scale (1 + i)."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.scale = torch.nn.Parameter(torch.tensor(scale))


def scorer(say, address, seconds=0.0, patience=LONG):
    model = Scale(0.0)

    def score(indices):
        time.sleep(seconds)
        return model.scale * (1.0 + indices)

    minibatches = Scorer(
        model, score, N, store=address, batch_size=20, refresh_every=2, patience=patience
    ).run()
    say(minibatches)


def trainer(say, store=None):
    """Publishes, and folds until it is killed."""
    inbox = Inbox(new_sampler(), *(() if store is None else (store,)))
    inbox.publish(Scale(1.0), 0)
    say(inbox.address)
    wait_for(lambda: inbox.fold() and inbox.stats()["folded"] > 2 * N)
    say("folded")
    while True:
        inbox.fold()
        time.sleep(0.01)


def new_sampler():
    return fastis.Sampler(N, 8, method=Distributed(constant=0.0), seed=0)


@pytest.fixture
def idle():
    processes = [Idle() for _ in range(3)]
    yield processes
    for process in processes:
        process.kill()


class Training:
    """A loop of steps that does nothing but score its minibatch and look at the clock."""

    def __init__(self, patience=PATIENCE):
        self.sampler = new_sampler()
        self.inbox = Inbox(self.sampler, patience=patience)
        self.scale, self.longest, self.heard = 1.0, 0.0, []

    def step(self):
        before = time.perf_counter()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            self.inbox.publish(Scale(self.scale), self.sampler.step)
            self.inbox.fold()
        self.longest = max(self.longest, time.perf_counter() - before)
        self.heard += [str(warning.message) for warning in caught]
        self.sampler.update(batch_of(0), losses_of(self.scale))
        time.sleep(0.002)
        return True

    def until(self, condition, seconds=20.0):
        wait_for(lambda: self.step() and condition(), seconds)

    def until_all_are_of(self, scale):
        """... scores of another network, which take the place of all older ones."""
        self.scale = scale
        expected = scale * (1.0 + torch.arange(N))
        self.until(lambda: torch.equal(self.sampler.mean, expected))

    def goes_on(self, seconds):
        end = time.monotonic() + seconds
        self.until(lambda: time.monotonic() > end)

    @property
    def scorers(self):
        return self.inbox.stats()["scorers"]


@pytest.fixture
def training():
    made = Training()
    yield made
    made.inbox.close()


def test_scores_are_those_of_the_newest_network(idle, training):
    training.inbox.patience = LONG
    for process in idle[:2]:
        process.start(scorer, training.inbox.address)
    for scale in (1.0, 3.0, 2.0):
        training.until_all_are_of(scale)
    assert training.scorers == 2
    assert training.heard == []
    last_seen = training.sampler.last_seen
    assert int(last_seen.max()) <= training.sampler.step
    assert training.inbox.stats()["age"] >= 0
    training.inbox.close()
    assert all(process.ends_within(3) for process in idle[:2])
    sent = [process.answers.recv() for process in idle[:2]]
    assert sum(sent) * 20 >= training.inbox.stats()["folded"] >= 3 * N


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_a_scorer_that_is_killed_or_hangs_slows_and_loses_nothing(idle, training, how):
    for process in idle[:2]:
        process.start(scorer, training.inbox.address)
    training.until(lambda: training.scorers == 2)
    idle[0].signal(how)
    training.longest = 0.0
    training.goes_on(1.5 * PATIENCE)
    assert training.longest < PATIENCE, "no step waited for it"
    training.until_all_are_of(5.0)  # the other one takes its part over
    assert training.scorers == 1
    number = 1 if "scorer 1" in training.heard[0] else 2
    assert training.heard == [
        f"nothing was heard of scorer {number} for 1 s: training goes on with the scores there are"
    ]
    if how == signal.SIGSTOP:
        idle[0].signal(signal.SIGCONT)
        training.until(lambda: training.scorers == 2)
        old = training.sampler.mean == 1.0 + torch.arange(N)
        assert not old.any(), "what it had scored before undoes nothing"
        training.until_all_are_of(7.0)


def test_a_slow_scorer_slows_nothing(idle, training):
    training.inbox.patience = LONG
    idle[0].start(scorer, training.inbox.address, 0.2)
    training.until(lambda: training.scorers == 1)
    training.longest, steps = 0.0, training.sampler.step
    training.goes_on(1.0)
    assert training.longest < 0.5 * PATIENCE, "less than three of its minibatches"
    assert training.sampler.step - steps > 50
    assert training.heard == []


def test_a_scorer_that_comes_back_or_late_joins(idle, training):
    training.goes_on(0.1)  # nobody is there
    idle[0].start(scorer, training.inbox.address)
    training.until_all_are_of(2.0)
    idle[0].kill()
    training.scale = 3.0
    training.goes_on(1.5 * PATIENCE)
    assert training.scorers == 0
    assert len(training.heard) == 1
    idle[1].start(scorer, training.inbox.address)
    training.until_all_are_of(4.0)
    assert training.scorers == 1
    assert len(training.heard) == 1, "said once"


def test_nobody_ever_came():
    training = Training(patience=0.2)
    training.goes_on(0.5)
    training.inbox.close()
    assert training.heard == [
        "nothing was heard of any scorer for 0.2 s: training goes on with the scores there are"
    ]


def test_scorers_end_with_their_trainer(idle):
    idle[0].start(trainer)
    address = idle[0].answers.recv()
    for process in idle[1:]:
        process.start(scorer, address)
    assert idle[0].answers.recv() == "folded"
    idle[0].kill()
    assert all(process.ends_within(3) for process in idle[1:])
    assert all(process.process.exitcode == 0 for process in idle[1:])


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_scorers_end_without_a_sign_of_life_where_the_store_lives_on(idle, how):
    store = TCPStore("127.0.0.1", 0, None, True, timedelta(seconds=20), wait_for_workers=False)
    address = f"127.0.0.1:{store.port}"
    idle[0].start(trainer_at, address)
    idle[0].answers.recv()
    for process in idle[1:]:
        process.start(scorer, address, 0.0, 2 * PATIENCE)
    assert idle[0].answers.recv() == "folded"
    idle[0].signal(how)
    assert all(process.ends_within(10 * PATIENCE) for process in idle[1:])
    assert all(process.process.exitcode == 0 for process in idle[1:])


def trainer_at(say, address):
    host, port = address.split(":")
    store = TCPStore(host, int(port), None, False, timedelta(seconds=20), wait_for_workers=False)
    trainer(say, store)


def server(say):
    store = TCPStore("127.0.0.1", 0, None, True, timedelta(seconds=20), wait_for_workers=False)
    say(store.port)
    time.sleep(60)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_a_store_that_is_gone_or_hangs_slows_nothing(idle, how):
    idle[0].start(server)
    port = idle[0].answers.recv()
    store = TCPStore("127.0.0.1", port, None, False, timedelta(seconds=20), wait_for_workers=False)
    sampler = new_sampler()
    inbox = Inbox(sampler, store, patience=0.5)
    idle[1].start(scorer, f"127.0.0.1:{port}")
    inbox.publish(Scale(1.0))
    wait_for(inbox.fold)
    idle[0].signal(how)
    time.sleep(0.7)
    heard, before = [], time.perf_counter()
    for _ in range(20):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            inbox.publish(Scale(2.0))
            inbox.fold()
        heard += caught
        sampler.update(batch_of(0), losses_of(1.0))
    assert time.perf_counter() - before < 0.5
    said = [str(warning.message) for warning in heard]
    assert 1 <= len(said) <= 2  # the scorer's silence too
    assert all("training goes on with the scores there are" in text for text in said)
    of_store = "store is gone (" if how == signal.SIGKILL else "store has not answered for 0.5 s"
    assert sum(of_store in text for text in said) == 1
    assert (sampler.mean > 0).any()
    idle[0].kill()
    inbox.close()
