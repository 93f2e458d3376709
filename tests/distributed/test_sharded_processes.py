"""Sharded tables over real processes (gloo): bytes counted, DDP, checkpoints for other numbers of
ranks. Each test starts its processes anew."""

from __future__ import annotations

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
N, B = 576, 8  # all samples are in whole minibatches of 2, 3 and 4 ranks' shards
METHOD = EMAIS(warmup_epochs=1)
COLLECTIVES = (
    *("all_gather_single", "all_gather_into_tensor", "all_gather", "all_reduce", "broadcast"),
    *("reduce_scatter_tensor", "all_to_all_single", "send", "gather", "scatter"),
)
IN_WARMUP, AFTER_WARMUP = 10, 120  # steps until a checkpoint


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
        for name in COLLECTIVES:
            original = getattr(dist, name, None)

            def counted(*tensors, original=original, name=name, **options):
                sent = tensors[1] if len(tensors) > 1 else tensors[0]
                self.bytes.append(sent.numel() * sent.element_size())
                return original(*tensors, **options)

            if original is not None:
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
        counted = Counted(monkeypatch)
        sampler = ShardedSampler(N, B, strategy=strategy, method=METHOD, seed=3)
        assert counted.bytes == [16]  # the seed, and a checksum of the arguments
        counted.bytes.clear()
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
    for step in range(600):
        batch = sampler.sample()
        out = fastis.cross_entropy(ddp(x[batch.indices]), y[batch.indices], batch.weights)
        if step < 200:
            sampler.update(batch, out)
        ddp.zero_grad()
        out.loss.backward()
        if step >= 200:
            uneven += len(batch.indices) != B
            gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    found = torch.stack(gradients).double()
    error = (found.mean(0) - expected).abs() / (found.std(0) / len(found) ** 0.5)
    # 18 numbers; beyond 5 standard errors about once in 1e5.
    assert float(error.max()) < 5
    assert uneven > 200 or strategy == "stratified"
    # It would see a mean over rows that forgets how many they are.
    assert float((found.std(0) / len(found) ** 0.5).max()) < 0.1 * float(expected.abs().max())


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


def save(folder: Path, steps: int) -> None:
    sampler = new_sampler(seed=3)
    train(sampler, steps)
    for _ in range(20):  # theta comes to rest
        sampler.sample()
    dcp.save({"sampler": sampler.as_stateful()}, checkpoint_id=folder / f"{steps}")
    found = everything(sampler)
    if dist.get_rank() == 0:
        torch.save(found, folder / f"{steps}.pt")


def load(folder: Path, steps: int) -> None:
    sampler = new_sampler(seed=4)
    dcp.load({"sampler": sampler.as_stateful()}, checkpoint_id=folder / f"{steps}")
    found, expected = everything(sampler), torch.load(folder / f"{steps}.pt")
    assert torch.equal(found["states"], expected["states"])
    assert torch.equal(found["clocks"], expected["clocks"])
    assert torch.equal(found["variance"], expected["variance"])
    assert sampler._arguments["seed"] == 3
    if steps == AFTER_WARMUP:
        assert bool((expected["states"][:, 2] >= 0).all())
        # The cap follows R B, which is another number now; below it weights are the same.
        p, before = found["p"], expected["p"]
        ratio = (p / before)[(p < p.max()) & (before < before.max())]
        assert float(ratio.max() / ratio.min()) == pytest.approx(1, abs=1e-12)
        assert float(p.sum()) == pytest.approx(1, abs=1e-12)
    train(sampler, 20)


def load_damaged(folder: Path) -> None:
    sampler = new_sampler(seed=4)
    before = sampler.state_dict()
    state = sampler.as_stateful().state_dict()
    dcp.load({"sampler": state}, checkpoint_id=folder / f"{AFTER_WARMUP}")
    other = ShardedSampler(N + 1, B, method=METHOD)
    with pytest.raises(ValueError, match="num_samples=577"):
        other.as_stateful().load_state_dict(state)
    state["states"].to_local()[3, 0] = 0x7FC00000  # NaN
    with pytest.raises(ValueError, match=r"state_dict\['states'\]"):
        sampler.as_stateful().load_state_dict(state)
    assert torch.equal(sampler.state_dict()["states"], before["states"])


# One start of processes serves several checks: it takes seconds ----------------------------------


def check_two(rank: int, folder: Path) -> None:
    for strategy in ("global", "stratified"):
        count_bytes(rank, strategy)
        average_gradients(rank, strategy)
    save(folder, AFTER_WARMUP)


def check_four(rank: int, folder: Path) -> None:
    load(folder, AFTER_WARMUP)
    for strategy in ("global", "stratified"):
        count_bytes(rank, strategy)
    for steps in (IN_WARMUP, AFTER_WARMUP):
        save(folder, steps)


def check_three(rank: int, folder: Path) -> None:
    for steps in (IN_WARMUP, AFTER_WARMUP):
        load(folder, steps)
    load_damaged(folder)


def test_two_processes_send_16_bytes_and_train_without_bias_four_and_three_go_on(tmp_path):
    """Bytes, DDP's gradient, and a checkpoint of 2 ranks on 4, and of 4 on 3."""
    start(2, check_two, tmp_path)
    start(4, check_four, tmp_path)
    start(3, check_three, tmp_path)
