"""On a GPU: the same draws, states and losses as on the CPU. Skipped where there is none."""

from __future__ import annotations

import pytest
import torch
from conftest import observe

import fastis
from fastis.methods import EMAIS

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


@pytest.mark.parametrize("method", ["emais", "scan", "uniform", EMAIS(warmup_epochs=0)])
@pytest.mark.parametrize("scheme", ["multinomial", "stratified", "systematic"])
def test_equal_scores_give_equal_draws(method, scheme):
    samplers = [
        fastis.Sampler(300, 16, method=method, scheme=scheme, seed=3, device=device)
        for device in ("cpu", "cuda")
    ]
    generator = torch.Generator().manual_seed(0)
    for _ in range(80):
        score = torch.empty(16).log_normal_(0, 2, generator=generator)
        cpu, cuda = (sampler.sample() for sampler in samplers)
        assert cuda.indices.device.type == cuda.weights.device.type == "cuda"
        assert torch.equal(cpu.indices, cuda.indices.cpu())
        assert torch.equal(cpu.weights, cuda.weights.cpu())
        samplers[0].update(cpu, observe(score))
        samplers[1].update(cuda, observe(score.cuda()))
    if samplers[0].method.has_records:
        assert torch.equal(samplers[0].importance, samplers[1].importance.cpu())
    torch.testing.assert_close(samplers[0].lr_factor(), samplers[1].lr_factor().cpu())


def test_state_moves_between_devices():
    cpu = fastis.Sampler(100, 10, seed=1)
    for _ in range(30):
        cpu.update(cpu.sample(), observe(torch.rand(10)))
    cuda = fastis.Sampler(100, 10, device="cuda")
    cuda.load_state_dict(cpu.state_dict())
    assert torch.equal(cpu.sample().indices, cuda.sample().indices.cpu())


def test_alias_table_and_weights_on_the_device():
    weights = torch.rand(1000, generator=torch.Generator().manual_seed(0))
    host, device = fastis.AliasTable(weights), fastis.AliasTable(weights.cuda())
    assert torch.equal(host.probabilities, device.probabilities.cpu())
    drawn = [t.sample(50, generator=torch.Generator().manual_seed(1)) for t in (host, device)]
    assert torch.equal(drawn[0].indices, drawn[1].indices.cpu())
    batch = fastis.sample(weights.cuda(), 20, replacement=False)
    assert batch.indices.is_cuda
    assert batch.indices.unique().numel() == 20


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_losses_on_the_device(dtype):
    generator = torch.Generator().manual_seed(0)
    logits = (3 * torch.randn(64, 10, generator=generator)).to(dtype)
    target = torch.randint(10, (64,), generator=generator)
    weights = torch.rand(64, generator=generator) + 0.5
    outs = []
    for device in ("cpu", "cuda"):
        leaf = logits.to(device).requires_grad_()
        out = fastis.cross_entropy(leaf, target.to(device), weights.to(device))
        out.loss.backward()
        outs.append((out.loss.cpu(), out.losses.cpu(), out.score.cpu(), leaf.grad.cpu()))
    for ours, theirs in zip(*outs, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_the_loop_trains_on_the_device():
    generator = torch.Generator(device="cuda").manual_seed(0)
    x = torch.randn(512, 20, device="cuda", generator=generator)
    y = (x[:, 0] > 0).long()
    model = torch.nn.Linear(20, 2, device="cuda")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    sampler = fastis.Sampler(512, 32, device="cuda", seed=0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 100)
    scheduler = fastis.EffectiveBatchLR(schedule, sampler)
    for _ in range(100):
        batch = sampler.sample()
        out = fastis.cross_entropy(model(x[batch.indices]), y[batch.indices], batch.weights)
        sampler.update(batch, out)
        out.loss.backward()
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    assert (model(x).argmax(1) == y).float().mean() > 0.95
