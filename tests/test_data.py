"""``fastis.DataLoader``: every minibatch comes back with its own data, and all of torch's options
work."""

from __future__ import annotations

import copy
import os
import pickle
import random
import resource
from unittest import mock

import pytest
import torch
from conftest import scores
from torch.utils.data import BatchSampler, Dataset, IterableDataset, TensorDataset, get_worker_info
from torch.utils.data.distributed import DistributedSampler

import fastis
from fastis import batch as batch_module
from fastis import in_flight
from fastis.batch import _moved
from fastis.kernels.table import Observation
from fastis.methods import EMAIS

N, B = 200, 10
PER_PASS = N // B


class Indices(Dataset):
    """Every sample is its own index, so that a mistake in what came with what is seen."""

    def __init__(self, length: int = N) -> None:
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> int:
        return index


class WholeMinibatches(Indices):
    def __getitems__(self, indices: list[int]) -> list[int]:
        assert type(indices) is list
        return [-index for index in indices]


class WithWorker(Indices):
    """Which process loaded it, what worker_init_fn did there, and a random number."""

    mark = 0.0

    def __getitem__(self, index: int) -> tuple[int, int, float, float]:
        return index, os.getpid(), self.mark, float(torch.rand(()))


def mark_worker(worker_id: int) -> None:
    get_worker_info().dataset.mark = 7.0


class FailsOnce(Indices):
    """At one index, while a file is there."""

    def __init__(self, path, error: type[BaseException], index: int) -> None:
        super().__init__()
        self.path, self.error, self.index = path, error, index
        path.touch()

    def __getitem__(self, index: int) -> int:
        if index == self.index and self.path.exists():
            raise self.error("no such sample")
        return index


def to_tuple(items):
    return tuple(items)


def make(dataset: Dataset | None = None, seed: int = 3, **arguments) -> fastis.DataLoader:
    dataset = Indices() if dataset is None else dataset
    sampler = fastis.Sampler(len(dataset), B, seed=seed, method=EMAIS(warmup_epochs=1))
    return fastis.DataLoader(dataset, sampler, **arguments)


def learn(loader: fastis.DataLoader, batch: fastis.Batch) -> None:
    loader.sampler.update(batch, scores(batch.indices))


def run(loader: fastis.DataLoader, steps: int) -> list[fastis.Batch]:
    """Trains through as many passes as it takes."""
    batches: list[fastis.Batch] = []
    while len(batches) < steps:
        for batch, data in loader:
            assert torch.equal(batch.indices, data)
            learn(loader, batch)
            batches.append(batch)
            if len(batches) == steps:
                break
    return batches


def learn_all(loader: fastis.DataLoader, passing, found: list[fastis.Batch]) -> None:
    """To the end of a pass, or to an error."""
    for batch, _ in passing:
        learn(loader, batch)
        found.append(batch)


def drawn_ahead(ahead: int, steps: int, seed: int = 3) -> list[fastis.Batch]:
    """What a loop without any loader draws and learns, so many minibatches ahead."""
    sampler = fastis.Sampler(N, B, seed=seed, method=EMAIS(warmup_epochs=1))
    waiting = [sampler.sample() for _ in range(ahead)]
    batches = []
    for _ in range(steps):
        waiting.append(sampler.sample())
        batches.append(waiting.pop(0))
        sampler.update(batches[-1], scores(batches[-1].indices))
    return batches


def assert_same(found: list[fastis.Batch], expected: list[fastis.Batch]) -> None:
    assert len(found) == len(expected)
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.equal(ours.indices, theirs.indices)
        assert torch.equal(ours.weights, theirs.weights)


# What comes --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "ahead"),
    [
        ({}, 0),
        ({"num_workers": 1}, 2),
        ({"num_workers": 2, "prefetch_factor": 3}, 6),
        ({"num_workers": 2, "persistent_workers": True, "timeout": 60}, 4),
    ],
)
def test_minibatches_are_the_samplers_with_their_own_data(arguments, ahead):
    loader = make(**arguments)
    assert loader.ahead == ahead
    batches = run(loader, 2 * PER_PASS + 7)
    assert_same(batches, drawn_ahead(ahead, 2 * PER_PASS + 7))
    assert len({float(r) for r in batches[-1].weights}) > 1, "importance sampling has begun"
    assert all(type(batch) is fastis.Batch for batch in batches)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_pass_is_an_epoch(workers):
    loader = make(num_workers=workers)
    assert len(loader) == PER_PASS
    seen = torch.cat([batch.indices for batch, _ in loader])
    assert len(seen) == N
    assert torch.equal(seen.sort().values, torch.arange(N)), "without replacement at first"
    again = iter(loader)
    for _ in range(PER_PASS):
        next(again)
    for _ in range(2):  # as every iterator
        with pytest.raises(StopIteration):
            next(again)


@pytest.mark.parametrize(
    "arguments", [{}, {"num_workers": 2}, {"num_workers": 2, "persistent_workers": True}]
)
def test_what_a_break_leaves_comes_first_in_the_next_pass(arguments):
    loader = make(**arguments)
    found = []
    for stop in (1, 5, PER_PASS, 3):
        for number, (batch, data) in enumerate(loader, 1):
            assert torch.equal(batch.indices, data)
            learn(loader, batch)
            found.append(batch)
            if number == stop:
                break
    assert_same(found, drawn_ahead(loader.ahead, len(found)))


def test_one_look_at_a_minibatch_loses_none():
    loader = make(num_workers=1)
    first, _ = next(iter(loader))
    learn(loader, first)
    assert_same([first, *run(loader, 30)], drawn_ahead(2, 31))


@pytest.mark.parametrize("ahead", [0, 1, 3, 9])
def test_how_far_ahead_can_be_chosen(ahead):
    loader = make(num_workers=2)
    loader.ahead = ahead
    assert_same(run(loader, 30), drawn_ahead(ahead, 30))
    with pytest.raises(ValueError, match="ahead must be at least 0, got -1"):
        loader.ahead = -1


def test_the_last_pass_counts():
    """Two loops at a time would each get a part of the minibatches."""
    loader = make()
    first = iter(loader)
    next(first)
    second = iter(loader)
    next(second)
    with pytest.raises(RuntimeError, match=r"this pass over the fastis\.DataLoader is over"):
        next(first)
    next(second)


# torch's options ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "method",
    [
        "fork",
        pytest.param("forkserver", marks=pytest.mark.slow),  # which import torch anew
        pytest.param("spawn", marks=pytest.mark.slow),
    ],
)
def test_workers_of_every_kind(method):
    if method not in torch.multiprocessing.get_all_start_methods():
        pytest.skip(f"no {method} here")
    loader = make(WithWorker(), num_workers=1, multiprocessing_context=method)
    (batch, data) = next(iter(loader))
    assert torch.equal(batch.indices, data[0])
    assert os.getpid() not in data[1].tolist()


@pytest.mark.parametrize("workers", [0, 1])
def test_data_sets_may_load_whole_minibatches(workers):
    for batch, data in make(WholeMinibatches(), num_workers=workers):
        assert torch.equal(batch.indices, -data)


@pytest.mark.parametrize("workers", [0, 1])
def test_collate_fn(workers):
    loader = make(num_workers=workers, collate_fn=to_tuple)
    assert loader.collate_fn is to_tuple
    batch, data = next(iter(loader))
    assert data == tuple(batch.indices.tolist())


def test_worker_init_fn_finds_the_data_set():
    loader = make(WithWorker(), num_workers=1, worker_init_fn=mark_worker)
    assert next(iter(loader))[1][2].tolist() == [7.0] * B


def test_workers_are_seeded_by_the_generator_as_in_torch():
    def numbers(loader):
        return [data[3].tolist() for _, data in loader]

    def made(seed):
        return make(WithWorker(), num_workers=2, generator=torch.Generator().manual_seed(seed))

    first = numbers(made(1))
    assert numbers(made(1)) == first != numbers(made(2))
    theirs = torch.utils.data.DataLoader(
        WithWorker(), B, num_workers=2, generator=torch.Generator().manual_seed(1)
    )
    assert [data[3].tolist() for data in theirs] == first


def test_pinned_minibatches(monkeypatch):
    pinned = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda t, *_: pinned.append(t) or t)
    batch = fastis.Batch(torch.arange(3), torch.ones(3))
    found = in_flight.Minibatch(5, batch).pin_memory()
    assert found.number == 5
    assert [id(tensor) for tensor in pinned] == [id(tensor) for tensor in found.batch]


def test_it_looks_like_a_loader_of_torch():
    loader = make(num_workers=2)
    assert isinstance(loader, torch.utils.data.DataLoader)
    assert isinstance(loader.dataset, Indices)
    assert isinstance(loader.sampler, fastis.Sampler)
    assert loader.batch_size == B
    assert len(loader.batch_sampler) == PER_PASS
    with pytest.raises(ValueError, match="sampler attribute should not be set"):
        loader.sampler = fastis.Sampler(N, B)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies_and_pickles_go_on_by_themselves(copied):
    loader = make(num_workers=2, persistent_workers=True)
    run(loader, 7)
    other = copied(loader)
    assert other.sampler is not loader.sampler
    assert_same(run(other, 20), run(loader, 20))


# What goes wrong ---------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(
    ("error", "expected", "message"),
    [
        (ValueError, ValueError, "no such sample"),
        (StopIteration, RuntimeError, "the data set must not raise StopIteration"),
    ],
)
def test_a_minibatch_that_could_not_be_loaded_stays_first(
    tmp_path, workers, error, expected, message
):
    at = drawn_ahead(0, 9)[8].indices[4]
    dataset = FailsOnce(tmp_path / "fails", error, int(at))
    loader = make(dataset, num_workers=workers, persistent_workers=workers > 0)
    found, passing = [], iter(loader)
    with pytest.raises(expected, match=message):
        learn_all(loader, passing, found)
    assert len(found) == 8
    with pytest.raises(RuntimeError, match="iterate over the loader again"):
        next(passing)
    dataset.path.unlink()
    assert_same(found + run(loader, 20), drawn_ahead(loader.ahead, 28))


def test_a_killed_worker_is_an_error_and_the_next_pass_has_new_ones():
    loader = make(num_workers=2, persistent_workers=True)
    before = run(loader, 3)
    passing = iter(loader)
    loader._iterator._timeout = 1  # after which torch looks for them; else 5 seconds
    for worker in loader._iterator._workers:
        worker.kill()
        worker.join()
    with pytest.raises(RuntimeError, match=r"worker .* exited unexpectedly"):
        learn_all(loader, passing, before)
    assert_same(before + run(loader, 20), drawn_ahead(4, len(before) + 20))


class Stream(IterableDataset):
    def __iter__(self):
        return iter(range(N))


class NoLength:
    def __getitem__(self, index):
        return index


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"batch_size": B}, TypeError, "batch_size must be left out, got 10: the sampler has it"),
        ({"shuffle": True}, TypeError, "shuffle must be left out, got True"),
        ({"batch_sampler": [[1]]}, TypeError, "batch_sampler must be left out"),
        ({"drop_last": True}, TypeError, "drop_last must be left out, got True"),
        ({"in_order": False}, ValueError, "in_order must be True, got False"),
        ({"dataset": Stream()}, TypeError, "dataset must be map-style .* IterableDataset"),
        ({"dataset": NoLength()}, TypeError, r"dataset must have a length .* got NoLength"),
        ({"dataset": Indices(N + 1)}, ValueError, "num_samples=200 samples, got 201: make the"),
        ({"sampler": BatchSampler([1], 1, True)}, TypeError, "must be a fastis.Sampler, got Batch"),
        (
            {"sampler": DistributedSampler(Indices(), 2, 0)},
            TypeError,
            "must be a fastis.Sampler, got DistributedSampler: .*trainer",
        ),
        ({"num_workers": -1}, ValueError, "num_workers option should be non-negative"),
        ({"workers": 2}, TypeError, "unexpected keyword argument 'workers'"),
    ],
)
def test_misuse(arguments, error, message):
    arguments = {"dataset": Indices(), "sampler": fastis.Sampler(N, B), **arguments}
    with pytest.raises(error, match=message):
        fastis.DataLoader(**arguments)


def test_a_data_set_that_has_grown_since():
    loader = make()
    run(loader, 3)
    loader.dataset.length += 1
    with pytest.raises(ValueError, match=r"got 201: .*if the data set has grown, load"):
        iter(loader)


def test_torchs_loader_refuses_the_sampler():
    with pytest.raises(TypeError, match=r"use fastis\.DataLoader\(dataset, sampler\)"):
        list(torch.utils.data.DataLoader(Indices(), B, sampler=fastis.Sampler(N, B)))
    with pytest.raises(TypeError, match=r"use fastis\.DataLoader\(dataset, sampler\)"):
        list(torch.utils.data.DataLoader(Indices(), batch_sampler=fastis.Sampler(N, B)))


# What trainers do to a loader: Accelerate, Hugging Face and Lightning make others of its parts.


def rebuilt_around_the_batch_sampler(loader):
    return torch.utils.data.DataLoader(
        loader.dataset, batch_sampler=loader.batch_sampler, collate_fn=loader.collate_fn
    )


def minibatches_skipped(loader):
    skipping = BatchSampler(loader.batch_sampler, 1, False)
    return torch.utils.data.DataLoader(loader.dataset, batch_sampler=skipping)


def another_sampler_put_into_the_batch_sampler(loader):
    theirs = loader.batch_sampler
    return type(theirs)(
        DistributedSampler(loader.dataset, 2, 0),
        batch_size=theirs.batch_size,
        drop_last=theirs.drop_last,
    )


@pytest.mark.parametrize(
    "rebuild",
    [
        rebuilt_around_the_batch_sampler,
        minibatches_skipped,
        another_sampler_put_into_the_batch_sampler,
    ],
)
def test_a_trainer_that_takes_it_apart_hears_of_it(rebuild):
    with pytest.raises(RuntimeError, match=r"a fastis\.DataLoader can't be taken apart"):
        list(rebuild(make()))


# Memory ------------------------------------------------------------------------------------------


def resident() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


def test_nothing_as_long_as_the_data_set_is_made():
    n = 10_000_000
    sampler = fastis.Sampler(n, 100, method=EMAIS(warmup_epochs=0))
    sampler.update(fastis.Batch(torch.arange(100), torch.ones(100)), torch.ones(100))
    sampler.sample()  # its tree is there
    for workers in (0, 2):
        before = resident()
        loader = fastis.DataLoader(Indices(n), sampler, num_workers=workers)
        for number, (batch, data) in enumerate(loader):
            assert torch.equal(batch.indices, data)
            if number == 20:
                break
        grown = resident() - before
        assert grown < n, "a list of indices would take 8 bytes a sample or more"


# Between devices ---------------------------------------------------------------------------------


def test_batch_to():
    batch = fastis.Batch(torch.arange(3), torch.ones(3))
    assert batch.to("cpu").indices is batch.indices
    moved = batch.to("meta", non_blocking=True)
    assert type(moved) is fastis.Batch
    assert moved.indices.is_meta
    assert moved.weights.is_meta


def gpu_observation() -> Observation:
    score = torch.ones(3, device="cuda")
    return Observation(
        torch.arange(3), torch.ones(3, device="cuda"), score, score, torch.ones(4, device="cuda")
    )


def test_a_sampler_on_the_host_waits_once_for_a_gpu(monkeypatch):
    fake = pytest.importorskip("torch._subclasses.fake_tensor")
    stream = mock.Mock()
    monkeypatch.setattr(torch.cuda, "current_stream", stream)
    with fake.FakeTensorMode(allow_non_fake_inputs=True):
        seen = gpu_observation()
        moved = _moved(torch.device("cpu"), seen)
    assert all(tensor.device.type == "cpu" for tensor in moved)
    assert moved.indices is seen.indices, "it was there"
    assert moved.score is moved.observed
    stream.assert_called_once_with(torch.device("cuda:0"))
    stream.return_value.synchronize.assert_called_once_with()


def test_a_sampler_on_a_gpu_waits_for_nothing(monkeypatch):
    fake = pytest.importorskip("torch._subclasses.fake_tensor")
    monkeypatch.setattr(torch.cuda, "current_stream", mock.Mock(side_effect=AssertionError))
    with fake.FakeTensorMode(allow_non_fake_inputs=True):
        moved = _moved(torch.device("cuda:0"), gpu_observation())
    assert all(tensor.device == torch.device("cuda:0") for tensor in moved)


def test_what_has_no_values_is_not_moved():
    sampler = fastis.Sampler(N, B)
    batch = sampler.sample()
    with pytest.raises(ValueError, match=r"out.score must be on cpu, got meta"):
        sampler.update(batch, torch.ones(B, device="meta"))
    with pytest.raises(ValueError, match=r"batch.indices must be on cpu, got meta"):
        sampler.update(batch.to("meta"), torch.ones(B))
    assert sampler.step == 0


def test_what_needs_no_move_is_taken_without_a_look(monkeypatch):
    monkeypatch.setattr(batch_module, "_moved", mock.Mock(side_effect=AssertionError))
    run(make(), 5)


def test_indices_of_a_gpu_are_waited_for_when_a_worker_needs_them(monkeypatch):
    """And not before: by then the event lies behind, since one more is drawn ahead."""
    events = []

    def to_host(batch):
        events.append(mock.Mock())
        return batch, events[-1]

    monkeypatch.setattr(in_flight, "_to_host", to_host)
    loader = make()
    loader.ahead = 1
    passing = iter(loader)
    for handed_out in range(1, 5):
        batch, _ = next(passing)
        waited = [event.synchronize.call_count for event in events]
        assert waited == [1] * handed_out + [0]
        learn(loader, batch)
    loader.state_dict()
    assert events[-1].synchronize.call_count == 1


def test_a_sampler_on_a_device_draws_one_further_ahead():
    sampler = fastis.Sampler(N, B, device="meta")
    assert fastis.DataLoader(Indices(), sampler).ahead == 1
    assert fastis.DataLoader(Indices(), sampler, num_workers=2).ahead == 5


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("sampler_on", ["cpu", "cuda"])
@pytest.mark.parametrize("workers", [0, 2])
def test_on_a_gpu(sampler_on, workers):
    """The network is there, the data on the host, the sampler on either."""
    data = TensorDataset(torch.arange(N))
    sampler = fastis.Sampler(N, B, seed=3, device=sampler_on, method=EMAIS(warmup_epochs=1))
    loader = fastis.DataLoader(data, sampler, num_workers=workers, pin_memory=True)
    found = []
    for _ in range(3):
        for batch, (indices,) in loader:
            assert batch.weights.is_pinned()
            assert torch.equal(batch.indices, indices)
            found.append(batch)
            batch = batch.to("cuda", non_blocking=True)
            sampler.update(batch, scores(batch.indices))
    assert_same(found, drawn_ahead(loader.ahead, len(found)))


def test_random_is_not_touched():
    before = random.getstate(), torch.get_rng_state()
    loader = make()
    state = loader.state_dict()
    loader.load_state_dict(state)
    assert random.getstate() == before[0]
    assert torch.equal(torch.get_rng_state(), before[1])
