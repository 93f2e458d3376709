"""Samples that come and go on a GPU, as on the CPU. Skipped where there is none."""

from __future__ import annotations

import pytest
import torch
from conftest import observe

import fastis
from fastis.methods import EMAIS

DEVICES = ("cpu", "cuda")
pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


@pytest.mark.parametrize("scheme", ["multinomial", "systematic"])
@pytest.mark.parametrize("flatten", ["cap", "mix"])
@pytest.mark.parametrize("n", [40, 3000, 200_000])
def test_samples_that_come_and_go(n, flatten, scheme):
    """reset, exclude, refresh and fold in between: the same draws and states as on the CPU."""
    b = min(64, n // 2)
    samplers = [
        fastis.Sampler(n, b, method=EMAIS(warmup_epochs=0), flatten=flatten, scheme=scheme, seed=4,
                       device=device)
        for device in ("cpu", "cuda")
    ]  # fmt: skip
    generator = torch.Generator().manual_seed(0)

    def both(call):
        for sampler in samplers:
            call(sampler, sampler.device)

    for step in range(60):
        some = torch.randint(n, (n // 3,), generator=generator)
        score = torch.empty(n // 3).log_normal_(0, 2, generator=generator)
        few = torch.randperm(n, generator=generator)[b // 3 :]  # of which all are drawn alike
        if step % 4 == 0:
            both(lambda s, d, i=some: s.exclude(i.to(d)))
        if step % 4 == 2:
            both(lambda s, d, i=some: s.reset(i.to(d)))
        if step % 10 == 7:
            both(lambda s, d, i=few: s.exclude(i.to(d)))
        if step % 10 == 9:
            both(lambda s, d: s.reset(torch.arange(n, device=d)))
        if step % 5 == 3:
            both(lambda s, d, i=some, x=score: s.refresh(i.to(d), x.to(d)))
            both(lambda s, d, i=few, x=score, t=step: s.fold(i[: len(x)].to(d), x.to(d), t - 3))
        for sampler in samplers:
            sampler.uniform = step % 9 in (4, 5)
        cpu, cuda = (sampler.sample() for sampler in samplers)
        assert torch.equal(cpu.indices, cuda.indices.cpu())
        assert torch.equal(cpu.weights, cuda.weights.cpu())
        own = torch.empty(b).log_normal_(0, 2, generator=generator)
        samplers[0].update(cpu, observe(own))
        samplers[1].update(cuda, observe(own.cuda()))
    states = [sampler.state_dict() for sampler in samplers]
    for name in ("states", "scalars"):
        assert torch.equal(states[0][name], states[1][name].cpu())
    assert samplers[0].stats().keys() == samplers[1].stats().keys()


def test_prioritized_replay_in_a_ring_on_the_device():
    samplers = [fastis.Sampler(300, 16, method="prioritized", seed=1, device=d) for d in DEVICES]
    for sampler in samplers:
        sampler.exclude(torch.arange(300))
    for step in range(80):
        slots = torch.arange(4 * step, 4 * step + 4) % 300
        for sampler in samplers:
            sampler.reset(slots)
        cpu, cuda = (sampler.sample() for sampler in samplers)
        assert torch.equal(cpu.indices, cuda.indices.cpu())
        losses = 1.0 + cpu.indices % 7
        samplers[0].update(cpu, observe(losses.float()))
        samplers[1].update(cuda, observe(losses.float().cuda()))


def test_with_everything_excluded_nothing_counts_on_the_device():
    sampler = fastis.Sampler(300, 16, device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        sampler.exclude(torch.arange(300, device="cuda"))
        batch = sampler.sample()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert batch.weights.tolist() == [0] * 16
    assert int(batch.indices.max()) < 300


def test_a_captured_step_sees_samples_come_and_go():
    """Also those of before anything was excluded."""
    graphs = fastis.Sampler(500, 16, method=EMAIS(warmup_epochs=0), seed=2, device="cuda")
    eager = fastis.Sampler(500, 16, method=EMAIS(warmup_epochs=0), seed=2, device="cuda")
    score = torch.rand(16, device="cuda") + 0.1
    slots = torch.arange(0, 500, 5, device="cuda")
    step, renewal = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
    with torch.cuda.graph(step):
        drawn = graphs.sample()
        graphs.update(drawn, observe(score))
    with torch.cuda.graph(renewal):
        graphs.reset(slots)
    for number in range(30):
        if number % 6 == 2:
            for sampler in (graphs, eager):
                sampler.exclude(torch.arange(number * 10, number * 10 + 90))
        if number % 6 == 5:
            renewal.replay()
            eager.reset(slots)
        step.replay()
        batch = eager.sample()
        assert torch.equal(batch.indices, drawn.indices)
        assert torch.equal(batch.weights, drawn.weights)
        eager.update(batch, observe(score))
