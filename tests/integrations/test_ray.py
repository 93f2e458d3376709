"""Distributed scoring through a Ray actor, with a real Ray on one machine."""

from __future__ import annotations

import os
import signal
import sys
import time

import pytest
import torch

import fastis
from fastis.methods import Distributed
from fastis.scoring import Inbox, Scorer

ray = pytest.importorskip("ray")

from torch.distributed import DistNetworkError  # noqa: E402

from fastis.integrations.ray import RayChannel  # noqa: E402
from fastis.scoring.channel import ENDED, WINDOW  # noqa: E402

pytestmark = pytest.mark.slow  # ten seconds, most of them Ray's start
N = 60


@pytest.fixture(scope="module")
def cluster():
    # A worker can't import tests.
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, configure_logging=False)
    yield
    ray.shutdown()


class Scale(torch.nn.Module):
    def __init__(self, scale):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.tensor(scale))


def scorer(name, file):
    file.write_text(str(os.getpid()))
    torch.set_num_threads(1)
    model = Scale(0.0)
    score = lambda indices: model.scale * (1.0 + indices)  # noqa: E731
    channel = RayChannel(name)
    return Scorer(model, score, N, store=channel, batch_size=20, patience=20).run()


def wait_for(condition, seconds=120):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


def test_the_channel_does_what_a_store_does(cluster):
    trainer = RayChannel("here/one", serve=True)
    first, second = RayChannel("here/one"), RayChannel("here/one")
    assert first.newest(0) is None
    trainer.publish(b"parameters")
    assert first.newest(0) == (1, b"parameters")
    assert first.newest(1) is None
    assert [c.next_position(5) for c in (first, second)] == [0, 5]
    assert all(first.send(b"%d" % i) for i in range(WINDOW))
    assert not first.send(b"too much")
    assert second.send(b"other")
    expected = [*((1, b"%d" % i) for i in range(WINDOW)), (2, b"other")]
    assert trainer.receive() == expected
    assert trainer.receive() == []
    trainer.beat()
    assert first.beats() == 1
    trainer.end()
    assert first.beats() == ENDED
    ray.kill(trainer._mailbox)

    def is_gone():
        try:
            return first.beats() is None
        except DistNetworkError:
            return True

    wait_for(is_gone)  # ray.kill waits for nothing


def test_a_killed_scorer_is_started_again_by_ray(cluster, tmp_path):
    sampler = fastis.Sampler(N, 8, method=Distributed(constant=0.0), seed=0)
    with Inbox(sampler, RayChannel("two", serve=True)) as inbox:
        remote = ray.remote(scorer).options(num_cpus=1, max_retries=3)
        task = remote.remote("two", tmp_path / "pid")
        for scale in (1.0, 2.0):
            expected = scale * (1.0 + torch.arange(N))
            model = Scale(scale)
            sampler.update(fastis.Batch(torch.tensor([0]), torch.ones(1)), torch.tensor([9.0]))

            def all_new(model=model, expected=expected):
                assert not ray.wait([task], timeout=0)[0], ray.get(task)
                inbox.publish(model, sampler.step)
                inbox.fold()
                return torch.equal(sampler.mean[1:], expected[1:])

            wait_for(all_new)
            if scale == 1.0:
                first = (tmp_path / "pid").read_text()
                os.kill(int(first), signal.SIGKILL)
    assert ray.get(task) >= 3
    assert (tmp_path / "pid").read_text() != first
