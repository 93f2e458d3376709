"""The two ends of distributed scoring, and what goes between them, in one process."""

from __future__ import annotations

import math
import struct
import threading
import time
from datetime import timedelta

import pytest
import torch
from conftest import batch_of, losses_of
from torch.distributed import DistNetworkError, HashStore, TCPStore

import fastis
from fastis import methods
from fastis.kernels.layout import UPDATES
from fastis.methods import EMAIS, Distributed
from fastis.scoring import Inbox, Scorer, StoreChannel, Traces, channel
from fastis.scoring.message import Message, squared_mean
from fastis.scoring.traces import weights_in_force

from .peers import wait_for

N = 40


@pytest.fixture
def store():
    return HashStore()


@pytest.fixture
def inbox(store):
    """Of a sampler of five iterations."""
    sampler = fastis.Sampler(N, 4, method=EMAIS(warmup_epochs=0), seed=0)
    for i in range(5):
        sampler.update(batch_of(i), losses_of(1.0 + i))
    made = Inbox(sampler, store)
    made.sampler = sampler
    assert made.publish(torch.nn.Linear(1, 1), 5)
    yield made
    made.close()


def message(*scores, first=10, iteration=5, squared=0.5):
    indices = torch.arange(first, first + len(scores))
    return Message(iteration, squared, indices, torch.tensor(scores)).to_bytes()


def fold(inbox, store, *raw):
    """Sends these and folds them; the number of scores folded."""
    sender, before = StoreChannel(store), sum_of(inbox.stats())
    for part in raw:
        assert sender.send(part)
    wait_for(lambda: len(inbox._arrived) == len(raw), 5)
    folded = inbox.fold()
    assert sum_of(inbox.stats()) > before
    return folded


def sum_of(stats):
    counted = ("folded", "not_finite", *(name for name in stats if name.startswith("refused")))
    return sum(stats[name] for name in counted)


def state_of(sampler):
    return {k: v for k, v in sampler.state_dict().items() if torch.is_tensor(v)}


# Messages -----------------------------------------------------------------------------------------


def test_a_message_survives_the_way():
    sent = Message(2**40, 0.1, torch.tensor([3, 2**31]), torch.tensor([1.5, torch.inf]))
    found = Message.from_bytes(sent.to_bytes())
    assert found[:2] == sent[:2]
    assert torch.equal(found.indices, sent.indices)
    assert torch.equal(found.scores, sent.scores)
    assert len(sent.to_bytes()) == 16 + 2 * 12


@pytest.mark.parametrize("length", [0, 1, 15, 16, 17, 27, 29])
def test_bytes_of_another_length_are_no_message(length):
    assert Message.from_bytes(b"\x00" * length) is None


def test_the_squared_mean_is_unbiased():
    g = torch.tensor([[1.0, 2.0], [3.0, -1.0], [0.5, 0.0]])
    pairs = [float(g[i] @ g[j]) for i in range(3) for j in range(3) if i != j]
    assert squared_mean(g.mean(0), g.norm(dim=1)) == pytest.approx(sum(pairs) / 6)
    assert math.isnan(squared_mean(None, g.norm(dim=1)))
    assert math.isnan(squared_mean(g[0], g[:1].norm(dim=1)))


def test_garbage_is_refused_and_counted_and_the_table_unharmed(inbox, store):
    before = state_of(inbox.sampler)
    refused = [
        (b"", "malformed"),
        (b"what is this?", "malformed"),
        (b"\x80" * 28, "index"),
        (message(1.0, first=-1), "index"),
        (message(1.0, 2.0, first=N - 1), "index"),
        (message(1.0, iteration=6), "iteration"),
        (message(1.0, iteration=2**62), "iteration"),
        (message(1.0, iteration=-1), "iteration"),
        (struct.pack("<qdqI", 5, 0.0, 3, 0x7FC00000), None),  # NaN
        (message(math.inf, -math.inf, -1.0, 2.0**60), None),
    ]
    assert fold(inbox, store, *(raw for raw, _ in refused)) == 0
    for name, value in state_of(inbox.sampler).items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0, equal_nan=True)
    stats = inbox.stats()
    for why in ("malformed", "index", "iteration"):
        assert stats[f"refused_{why}"] == sum(reason == why for _, reason in refused), why
    assert stats["not_finite"] == 5
    assert math.isnan(stats["ideal"])
    good = message(7.0, math.nan, 9.0, squared=math.nan)
    assert fold(inbox, store, good) == 2
    assert inbox.sampler.mean[10:13].tolist() == [7.0, 0.0, 9.0]


def test_scores_of_before_a_state_was_loaded_are_refused(inbox, store):
    """Their iteration is to come again, with other parameters."""
    early = fastis.Sampler(N, 4, method=EMAIS(warmup_epochs=0), seed=0)
    inbox.sampler.load_state_dict(early.state_dict())
    assert fold(inbox, store, message(1.0, iteration=5)) == 0
    assert inbox.stats()["refused_iteration"] == 1
    assert fold(inbox, store, message(1.0, iteration=0)) == 1


def test_scores_far_too_old_are_refused(inbox, store):
    inbox.sampler._table.scalars[UPDATES] = 5 + 2**20
    assert fold(inbox, store, message(1.0, iteration=5), message(2.0, first=20)) == 0
    assert inbox.stats()["refused_iteration"] == 2


def test_of_the_same_sample_the_newest_score_stays(inbox, store):
    parts = [message(3.0, iteration=4), message(5.0, iteration=5), message(4.0, iteration=2)]
    assert fold(inbox, store, *parts) == 3
    assert inbox.sampler.var[10] > 0, "all three count, the oldest first"
    late = inbox.sampler.mean[10]
    assert fold(inbox, store, message(9.0, iteration=3)) == 1
    assert inbox.sampler.mean[10] == late
    assert inbox.sampler.last_seen[10] == 5


# Traces -------------------------------------------------------------------------------------------


def test_traces_by_hand():
    traces = Traces(40, torch.device("cpu"))
    x, w = torch.tensor([1.0, 2.0, 6.0]), torch.tensor([1.0, 1.0, 2.0])
    traces.add(x, w, 2.0)
    assert float(traces.ideal) == pytest.approx(9 - 2)
    assert float(traces.uniform) == pytest.approx(41 / 3 - 2)
    assert float(traces.stale) == pytest.approx(4 / 3 * (1 + 4 + 18) / 3 - 2)
    traces.add(torch.tensor([4.0]), torch.tensor([1.0]), math.nan)
    keep = [math.exp(-n / 4) for n in (3, 1)]  # a tenth of the data is 4
    a, b = keep[1] * (1 - keep[0]), 1 - keep[1]
    mu2 = a * 2.0 / (a + b)
    assert float(traces.ideal) == pytest.approx(((a * 3 + b * 4) / (a + b)) ** 2 - mu2)


def test_traces_with_ideal_and_with_equal_weights():
    x = torch.rand(1000) + 0.1
    ideal, equal = Traces(1000, x.device), Traces(1000, x.device)
    ideal.add(x, 3 * x, 0.0)
    equal.add(x, torch.ones(1000), 0.0)
    assert float(ideal.stale) == pytest.approx(float(ideal.ideal))
    assert float(equal.stale) == pytest.approx(float(equal.uniform))
    assert float(equal.uniform) > float(equal.ideal)


def test_weights_in_force():
    sampler = fastis.Sampler(5, 1, method=Distributed(constant=0.0, min_usable=0.5), seed=0)
    sampler.update(batch_of(0, 1), losses_of(1.0, 3.0))
    every = torch.arange(5)
    in_force = lambda: weights_in_force(sampler._table, sampler.method, every).tolist()  # noqa: E731
    assert in_force() == [1.0] * 5  # draws are uniform still
    sampler.fold(torch.tensor([2]), torch.tensor([5.0]), 1)
    assert in_force() == [1.0, 3.0, 5.0, 3.0, 3.0]


def test_the_traces_are_those_of_the_weights_before(inbox, store):
    sampler = inbox.sampler
    sampler.update(batch_of(*range(N)), losses_of(*(1.0 + i for i in range(N))))
    fold(inbox, store, message(*([2.0] * N), first=0, squared=1.0))
    w = 1.0 + torch.arange(N)
    expected = w.mean() * (4 / w).mean() - 1
    assert float(inbox.traces.stale) == pytest.approx(float(expected), rel=0.05)  # floored, rounded
    assert float(inbox.traces.ideal) == pytest.approx(3.0)
    assert {"ideal", "stale", "uniform"} < inbox.stats().keys()


# The channel --------------------------------------------------------------------------------------


def test_parameters_of_any_size_arrive(store):
    tcp = TCPStore("127.0.0.1", 0, None, True, timedelta(seconds=20), wait_for_workers=False)
    sender, reader = StoreChannel(tcp), StoreChannel(f"127.0.0.1:{tcp.port}")
    assert reader.newest(0) is None
    for number, size in enumerate((0, 5, channel.CHUNK, 20 << 20), 1):
        parameters = bytes(range(250)) * (size // 250 + 1)
        sender.publish(parameters[:size])
        # A set returns before the store has it.
        found = wait_for(lambda n=number: reader.newest(n - 1))
        assert found == (number, parameters[:size])
        assert reader.newest(number) is None


def test_parameters_that_were_overwritten_while_read_are_not_taken(store):
    sender, reader = StoreChannel(store), StoreChannel(store)
    sender.publish(b"one")
    head = reader._store.get("newest")
    sender.publish(b"two")
    sender.publish(b"three")
    reader._store.set("newest", head)  # as of before, when the reader looked
    assert reader.newest(0) is None


def test_a_scorer_waits_for_a_trainer_that_is_behind(store):
    scorer, trainer = StoreChannel(store), StoreChannel(store)
    sent = 0
    while scorer.send(str(sent).encode()):
        sent += 1
    assert sent == channel.WINDOW
    other = StoreChannel(store)
    assert other.send(b"other"), "another one need not wait"
    assert trainer.receive() == [*((1, str(i).encode()) for i in range(sent)), (2, b"other")]
    assert trainer.receive() == []
    assert scorer.send(b"again")
    assert trainer.receive() == [(1, b"again")]


def test_the_sweep_is_shared(store):
    one, two = StoreChannel(store), StoreChannel(store)
    assert [c.next_position(7) for c in (one, two, one)] == [0, 7, 14]


def test_what_is_no_store():
    with pytest.raises(TypeError, match=r"store must be a torch\.distributed\.Store, 'host:port'"):
        StoreChannel(3)
    for wrong in ("here", "host:", ":7", "host:port"):
        with pytest.raises(ValueError, match=f"'host:port' or 'env://', got '{wrong}'"):
            StoreChannel(wrong)


def test_env_needs_an_environment(monkeypatch):
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    with pytest.raises(ValueError, match="store='env://' needs MASTER_ADDR"):
        StoreChannel("env://")


def test_an_address_that_is_taken():
    taken = TCPStore("127.0.0.1", 0, None, True, timedelta(seconds=5), wait_for_workers=False)
    with pytest.raises(DistNetworkError):
        StoreChannel(f"127.0.0.1:{taken.port}", serve=True, seconds=1)


# The trainer's end --------------------------------------------------------------------------------


def test_what_publish_and_the_inbox_refuse(inbox, store):
    with pytest.raises(ValueError, match=r"step must be sampler\.step, 5, got 4"):
        inbox.publish(torch.nn.Linear(1, 1), 4)
    with pytest.raises(TypeError, match="step must be an int, got str '5'"):
        inbox.publish(torch.nn.Linear(1, 1), "5")
    for name in ("scan", "rais", "confidence"):
        with pytest.raises(ValueError, match=f"sampler must have a method .*, got '{name}'"):
            Inbox(fastis.Sampler(N, 4, method=methods.BY_NAME[name]()), store)
    with pytest.raises(ValueError, match="patience must be in"):
        Inbox(inbox.sampler, store, patience=0)


class Blocked(StoreChannel):
    """Whose publishing takes as long as it is told."""

    def __init__(self, store):
        super().__init__(store)
        self.go_on = threading.Event()

    def publish(self, parameters):
        self.go_on.wait(10)
        super().publish(parameters)


def test_parameters_are_copied_at_once_and_one_at_a_time(store):
    sampler = fastis.Sampler(N, 4, method="distributed")
    slow = Blocked(store)
    with Inbox(sampler, slow) as inbox:
        model = torch.nn.Linear(1, 1)
        expected = model.weight.item()
        assert inbox.publish(model)
        with torch.no_grad():
            model.weight += 1
        assert not inbox.publish(model), "the first is still on its way"
        slow.go_on.set()
        reader = Scorer(torch.nn.Linear(1, 1), lambda i: i.float(), N, store=store)
        wait_for(reader._refresh)
        assert reader.model.weight.item() == expected
        assert reader.iteration == 0
        wait_for(lambda: inbox.publish(model))
        wait_for(lambda: reader._refresh() and reader.model.weight.item() == expected + 1)
    assert not inbox.publish(model), "closed"


def test_two_trainings_in_one_store(store):
    """As after a restart: the second one's parameters are newer, and its scorers live."""
    sampler = fastis.Sampler(N, 4, method="distributed")
    reader = Scorer(torch.nn.Linear(1, 1), lambda i: i.float(), N, store=store)
    for _ in range(2):
        inbox = Inbox(sampler, store)
        model = torch.nn.Linear(1, 1)
        inbox.publish(model)
        wait_for(lambda m=model: reader._refresh() and torch.equal(reader.model.weight, m.weight))
        inbox._closed = True  # without a last word
        inbox._thread.join()


# The scorer's end ---------------------------------------------------------------------------------


def in_thread(scorer, *arguments):
    found = []
    thread = threading.Thread(target=lambda: found.append(scorer.run(*arguments)))
    thread.start()
    return thread, found


def test_a_scorer_sweeps_the_data_and_refreshes(inbox, store):
    asked, x, y = [], torch.randn(N, 3), torch.randint(4, (N,))
    model = torch.nn.Linear(3, 4)

    def score_fn(indices):
        assert not torch.is_grad_enabled()
        asked.append(indices)
        return fastis.cross_entropy(copy(x[indices]), y[indices])

    copy = torch.nn.Linear(3, 4)
    wait_for(lambda: inbox.publish(model, 5))
    wait_for(lambda: inbox._parcel is None)
    scorer = Scorer(copy, score_fn, N, store=store, batch_size=16, refresh_every=3)
    wait_for(lambda: scorer._refresh() and torch.equal(copy.weight, model.weight))
    assert scorer.run(5) == 5
    assert torch.equal(torch.cat(asked), torch.arange(80) % N)
    wait_for(lambda: (inbox.fold(), inbox.stats()["folded"] == 80)[1])
    exact = fastis.cross_entropy(model(x), y)
    assert torch.allclose(inbox.sampler.mean[5:], exact.score.detach()[5:], rtol=1e-5)
    squared = float(exact.mean_grad.square().sum())
    found = exact.score.mean() ** 2 - float(inbox.traces.ideal)
    assert float(found) == pytest.approx(squared, abs=0.3 * float(exact.score.square().mean()))


def test_nothing_is_scored_before_there_are_parameters(store):
    sampler = fastis.Sampler(N, 4, method="distributed")
    scorer = Scorer(torch.nn.Linear(1, 1), pytest.fail, N, store=store, patience=5)
    with Inbox(sampler, store):
        thread, found = in_thread(scorer)
        time.sleep(0.2)
        assert thread.is_alive()
    thread.join(2)
    assert found == [0], "told to end"


def test_a_failing_score_function_is_heard(inbox, store):
    def fails(indices):
        raise RuntimeError("of the user's")

    scorer = Scorer(torch.nn.Linear(1, 1), fails, N, store=store)
    wait_for(scorer._refresh)
    with pytest.raises(RuntimeError, match="of the user's"):
        scorer.run()


def test_what_a_scorer_refuses(store):
    model = torch.nn.Linear(1, 1)
    for name, wrong in {
        "num_samples": 0, "batch_size": 0, "refresh_every": 0, "patience": 0.0
    }.items():  # fmt: skip
        with pytest.raises(ValueError, match=f"{name} must be "):
            Scorer(model, print, **{"num_samples": N, "store": store, name: wrong})
    with pytest.raises(TypeError, match="score_fn must be callable, got None"):
        Scorer(model, None, N, store=store)
