"""Sharded tables over real processes (gloo): bytes counted, DDP, checkpoints for other numbers of
ranks. Each test starts its processes anew."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.nn.parallel import DistributedDataParallel

import fastis
from fastis import ShardedSampler
from fastis.methods import EMAIS

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="needs torch.distributed")
N, B = 600, 8
METHOD = EMAIS(warmup_epochs=1)


def start(ranks: int, run, *arguments) -> None:
    """``run(rank, *arguments)`` in ``ranks`` processes; an error of one is raised here."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(_in_group, (ranks, port, run, arguments), ranks)


def _in_group(rank, ranks, port, run, arguments):
    torch.set_num_threads(1)
    store = dist.TCPStore("127.0.0.1", port, ranks, rank == 0)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks)
    try:
        run(rank, *arguments)
    finally:
        dist.destroy_process_group()


class Counted:
    """Bytes that this rank gives to collectives."""

    def __init__(self, monkeypatch) -> None:
        self.bytes = []
        for name in ("all_gather_into_tensor", "all_gather", "all_reduce", "broadcast"):
            original = getattr(dist, name)

            def counted(*tensors, original=original, name=name, **options):
                sent = tensors[1] if name.startswith("all_gather") else tensors[0]
                self.bytes.append(sent.numel() * sent.element_size())
                return original(*tensors, **options)

            monkeypatch.setattr(dist, name, counted)


def score_of(indices: torch.Tensor, step: int) -> torch.Tensor:
    return (indices.float() / N + 0.1) ** 3 * (1 + 0.1 * (step % 5))


def train(sampler: ShardedSampler, steps: int) -> list[fastis.Batch]:
    batches = []
    for step in range(steps):
        batches.append(sampler.sample())
        sampler.update(batches[-1], score_of(batches[-1].indices, step))
    return batches


# Bytes -------------------------------------------------------------------------------------------


def count_bytes(rank: int, strategy: str) -> None:
    with pytest.MonkeyPatch.context() as monkeypatch:
        sampler = ShardedSampler(N, B, strategy=strategy, method=METHOD, seed=3)
        counted = Counted(monkeypatch)
        batches = train(sampler, 120)
        if strategy == "global":
            assert counted.bytes == [16] * 120
        else:
            assert counted.bytes == []
            sampler.share_moments()
            assert counted.bytes == [40]
    rows = torch.tensor([int((b.weights > 0).sum()) for b in batches])
    dist.all_reduce(rows)
    assert rows.tolist() == [dist.get_world_size() * B] * 120
    # The same averages everywhere, to the bit.
    variance = sampler._table.variance.view(torch.int64)
    found = [torch.empty_like(variance) for _ in range(dist.get_world_size())]
    dist.all_gather(found, variance)
    assert all(torch.equal(other, variance) for other in found)
    assert float(sampler.lr_factor()) != 1.0


@pytest.mark.parametrize("strategy", ["global", "stratified"])
@pytest.mark.parametrize("ranks", [2, 4])
def test_at_most_sixteen_bytes_a_rank_and_step(ranks, strategy):
    start(ranks, count_bytes, strategy)


# DDP ---------------------------------------------------------------------------------------------


def average_gradients(rank: int, strategy: str) -> None:
    """The gradient that DDP leaves, over many minibatches, is that of the whole data."""
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(N, 5, generator=generator), torch.randint(3, (N,), generator=generator)
    x[::50] *= 10  # some samples matter more than others
    model = torch.nn.Linear(5, 3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.linspace(-1, 1, parameter.numel()).view_as(parameter))
    torch.nn.functional.cross_entropy(model(x), y).backward()
    expected = torch.cat([p.grad.flatten() for p in model.parameters()])
    model.zero_grad()
    ddp = DistributedDataParallel(model)
    sampler = ShardedSampler(N, B, strategy=strategy, method=METHOD, seed=3)
    gradients, uneven = [], 0
    for step in range(900):
        batch = sampler.sample()
        out = fastis.cross_entropy(ddp(x[batch.indices]), y[batch.indices], batch.weights)
        if step < 300:
            sampler.update(batch, out)
        ddp.zero_grad()
        out.loss.backward()
        if step >= 300:
            uneven += len(batch.indices) != B
            gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    found = torch.stack(gradients).double()
    error = (found.mean(0) - expected).abs() / (found.std(0) / len(found) ** 0.5)
    # 18 numbers; beyond 5 standard errors about once in 1e5.
    assert float(error.max()) < 5
    assert uneven > 300 or strategy == "stratified"
    # It would see a mean over rows that forgets how many they are.
    assert float((found.std(0) / len(found) ** 0.5).max()) < 0.1 * float(expected.abs().max())


@pytest.mark.parametrize("strategy", ["global", "stratified"])
def test_ddp_s_gradient_is_that_of_the_data(strategy):
    start(2, average_gradients, strategy)


# torch.distributed.checkpoint --------------------------------------------------------------------


def new_sampler(**arguments) -> ShardedSampler:
    return ShardedSampler(N, B, method=METHOD, **arguments)


def everything(sampler: ShardedSampler) -> dict[str, torch.Tensor]:
    """The states and probabilities of all ranks, the clocks and averages."""
    found = {}
    for name, own in (
        ("states", sampler.state_dict()["states"]),
        ("p", sampler.probabilities()),
    ):
        most = -(-N // dist.get_world_size())
        padded = own.new_zeros((most, *own.shape[1:]))
        padded[: len(own)] = own
        parts = [torch.empty_like(padded) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, padded)
        found[name] = torch.cat(parts)[:N]
    scalars = sampler.state_dict()["scalars"]
    return found | {"clocks": scalars[:2].clone(), "variance": sampler._table.variance.clone()}


def save(rank: int, folder: Path, steps: int) -> None:
    sampler = new_sampler(seed=3)
    train(sampler, steps)
    for _ in range(20):  # theta comes to rest
        sampler.sample()
    dcp.save({"sampler": sampler.as_stateful()}, checkpoint_id=folder / "dcp")
    found = everything(sampler)
    if rank == 0:
        torch.save(found, folder / "expected.pt")


def load(rank: int, folder: Path) -> None:
    sampler = new_sampler(seed=4)
    dcp.load({"sampler": sampler.as_stateful()}, checkpoint_id=folder / "dcp")
    found, expected = everything(sampler), torch.load(folder / "expected.pt")
    assert torch.equal(found["states"], expected["states"])
    assert torch.equal(found["clocks"], expected["clocks"])
    assert torch.equal(found["variance"], expected["variance"])
    if int(expected["clocks"][0]) > 80:  # after everybody's warm-up
        seen_by_all = bool((expected["states"][:, 2] >= 0).all())
        assert seen_by_all
        assert sampler._arguments["seed"] == 3
        return compare_probabilities(sampler, found["p"], expected["p"])
    assert dist.get_world_size() * B > 0
    train(sampler, 50)


def compare_probabilities(sampler, found, expected):
    # theta follows R B, which is another number now; before that the weights are the same.
    ratio = found / expected
    uncapped = (found < found.max()) & (expected < expected.max())
    spread = ratio[uncapped].max() / ratio[uncapped].min()
    assert float(spread) == pytest.approx(1, abs=1e-12)
    assert float(found.sum()) == pytest.approx(1, abs=1e-12)
    train(sampler, 50)


@pytest.mark.parametrize("steps", [20, 120])
@pytest.mark.parametrize(("ranks", "then"), [(2, 4), (4, 2), (3, 1)])
def test_a_checkpoint_goes_on_with_other_numbers_of_ranks(tmp_path, ranks, then, steps):
    start(ranks, save, tmp_path, steps)
    start(then, load, tmp_path)


def load_damaged(rank: int, folder: Path) -> None:
    sampler = new_sampler(seed=4)
    before = sampler.state_dict()
    state = sampler.as_stateful().state_dict()
    dcp.load({"sampler": state}, checkpoint_id=folder / "dcp")
    state["states"].to_local()[3, 3] = 1 << 30
    with pytest.raises(ValueError, match=r"state_dict\['states'\]"):
        sampler.as_stateful().load_state_dict(state)
    with pytest.raises(ValueError, match="num_samples=601"):
        ShardedSampler(N + 1, B, method=METHOD).as_stateful().load_state_dict(state)
    assert torch.equal(sampler.state_dict()["states"], before["states"])


def test_a_damaged_checkpoint_is_refused(tmp_path):
    start(2, save, tmp_path, 60)
    start(2, load_damaged, tmp_path)


def test_environment_is_clean():
    assert "RANK" not in os.environ
