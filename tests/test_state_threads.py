"""The sampler's state beside other threads, and in other processes."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from conftest import batch_of, losses_of, observe, scores, sweep

import fastis
from fastis import methods
from fastis.kernels.reference import table as reference_table
from fastis.methods import EMAIS
from fastis.saved import check_states


def snapshots(sampler, score, count):
    """States of a sampler that another thread trains meanwhile."""
    stop, errors = threading.Event(), []

    def run():
        try:
            for step in range(10**9):
                if stop.is_set():
                    return
                batch = sampler.sample()
                values = score(batch.indices) * (1.0 if step % 2 else 0.01)
                sampler.update(batch, observe(values))
        except Exception as error:
            errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        for _ in range(count):
            stop.wait(0.005)  # let it step
            yield sampler.state_dict()
    finally:
        stop.set()
        thread.join()
    assert not errors


@pytest.mark.parametrize(
    ("name", "n", "batch_size", "backend", "count"),
    [
        ("emais", 1_000_000, 4096, None, 50),
        ("rais", 100_000, 512, None, 50),
        ("emais", 100_000, 512, "reference", 50),
    ],
)
def test_a_state_saved_while_another_thread_trains_is_of_one_moment(
    name, n, batch_size, backend, count
):
    options = {"warmup_epochs": 0} if name == "rais" else {"warmup_epochs": 0, "tau": 1.0}
    method = methods.BY_NAME[name](**options)
    sampler, other = (fastis.Sampler(n, batch_size, method=method, seed=s) for s in (1, 2))
    score = scores(torch.arange(n))
    sweep(sampler, score)
    with fastis.backend(backend) if backend else contextlib.nullcontext():
        for state in snapshots(sampler, lambda i: score[i], count):
            _, updates, _, e0, total, seen, *_ = state["scalars"].tolist()
            assert check_states(sampler._table, state["states"], updates, e0) == (seen, total, 0)
            if name == "rais":  # a step changes the sum by some per mille
                total_first = float(state["memory.history"][:, 0].double().sum())
                assert float(state["memory.first"][0]) == pytest.approx(total_first, rel=1e-5)
            other.load_state_dict(state)
        assert updates > 10


@pytest.mark.parametrize("name", ["rais", "emais"])
@pytest.mark.parametrize("action", ["state_dict", "load_state_dict", "sample"])
def test_steps_of_many_operations_are_waited_for(monkeypatch, name, action):
    """RAIS' own update, and that of EMAIS by the reference, each stopped in the middle."""
    place = methods.RAIS if name == "rais" else reference_table
    backend = None if name == "rais" else "reference"
    update, inside, go_on, done = place.update, *(threading.Event() for _ in range(3))

    def slow(*arguments):
        inside.set()
        assert go_on.wait(60)
        return update(*arguments)

    sampler = fastis.Sampler(50, 5, method=name)
    arguments = [sampler.state_dict()] if action == "load_state_dict" else []
    monkeypatch.setattr(place, "update", slow)

    def act():
        getattr(sampler, action)(*arguments)
        done.set()

    with fastis.backend(backend) if backend else contextlib.nullcontext():
        minibatch = batch_of(1, 2, 3), losses_of(1.0, 2.0, 3.0)
        threads = [
            threading.Thread(target=sampler.update, args=minibatch),
            threading.Thread(target=act),
        ]
        threads[0].start()
        assert inside.wait(60)
        threads[1].start()
        early = done.wait(0.1)
        go_on.set()
        for thread in threads:
            thread.join()
    assert not early
    assert done.is_set()


def test_a_load_while_another_thread_trains():
    n = 200_000
    sampler = fastis.Sampler(n, 512, method=EMAIS(warmup_epochs=0, tau=1.0))
    score = scores(torch.arange(n))
    sweep(sampler, score)
    early = sampler.state_dict()
    late = None
    for state in snapshots(sampler, lambda i: 1e4 * score[i], 20):
        late = state
        sampler.load_state_dict(early)
    sampler.load_state_dict(late)
    _, updates, _, e0, total, seen, *_ = sampler.state_dict()["scalars"].tolist()
    states = sampler.state_dict()["states"]
    assert check_states(sampler._table, states, updates, e0) == (seen, total, 0)


def test_the_tree_is_made_once():
    """From Python 3.12 on a cached_property may be computed by two threads."""
    table = fastis.Sampler(50, 5)._table
    compute = type(table).handle.func
    first, view = compute(table), table._view
    assert compute(table) == first
    assert table._view is view


# Processes, modes --------------------------------------------------------------------------------

SCRIPT = """
import sys
import torch
import fastis

def child(sampler, queue):
    batch = sampler.sample()
    queue.put((batch.indices.tolist(), batch.weights.tolist()))

class Data(torch.utils.data.Dataset):
    def __init__(self, sampler):
        self.sampler = sampler
    def __len__(self):
        return 1
    def __getitem__(self, index):
        return self.sampler.sample().indices

if __name__ == "__main__":
    context = torch.multiprocessing.get_context(sys.argv[1])
    sampler = fastis.Sampler(100, 10, method=sys.argv[2], seed=3)
    for _ in range(25):
        batch = sampler.sample()
        losses = torch.rand(10)
        sampler.update(batch, fastis.ScoredLoss(losses.mean(), losses, losses, None))
    queue = context.Queue()
    process = context.Process(target=child, args=(sampler, queue))
    process.start()
    indices, weights = queue.get(timeout=100)
    process.join()
    loader = torch.utils.data.DataLoader(
        Data(sampler), num_workers=1, multiprocessing_context=sys.argv[1]
    )
    loaded = next(iter(loader))[0].tolist()
    batch = sampler.sample()
    assert indices == loaded == batch.indices.tolist()
    assert weights == batch.weights.tolist()
    print("equal")
"""


@pytest.mark.parametrize(("start", "method"), [("spawn", "emais"), ("forkserver", "rais")])
def test_samplers_go_to_other_processes(tmp_path, start, method):
    script = tmp_path / "processes.py"
    script.write_text(SCRIPT)
    root = str(Path(fastis.__file__).parents[1])
    done = subprocess.run(
        [sys.executable, str(script), start, method],
        capture_output=True,
        text=True,
        timeout=200,
        env={**os.environ, "PYTHONPATH": root},
    )
    assert done.stdout.strip() == "equal", done.stderr
