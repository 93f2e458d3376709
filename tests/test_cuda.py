"""On a GPU: the same draws, states and losses as on the CPU. Skipped where there is none."""

from __future__ import annotations

import pytest
import torch
from conftest import observe

import fastis
from fastis import _C, kernels
from fastis.kernels.cpu import categorical as cpu_categorical
from fastis.kernels.cuda import categorical as cuda_categorical
from fastis.kernels.cuda import scale as cuda_scale
from fastis.kernels.reference import loss as reference_loss
from fastis.methods import BY_NAME, EMAIS, RAIS, Presampling

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
    if samplers[0].method.has_states:
        assert torch.equal(samplers[0].importance, samplers[1].importance.cpu())
    torch.testing.assert_close(samplers[0].lr_factor(), samplers[1].lr_factor().cpu())


def test_additional_updates_give_the_same_table():
    method = EMAIS(refresh_every=5, score_fn=lambda i: 1.0 + i.float(), warmup_epochs=0)
    samplers = [fastis.Sampler(300, 16, method=method, device=d) for d in ("cpu", "cuda")]
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        score = torch.empty(16).log_normal_(0, 2, generator=generator)
        cpu, cuda = (sampler.sample() for sampler in samplers)
        assert torch.equal(cpu.indices, cuda.indices.cpu())
        samplers[0].update(cpu, observe(score))
        samplers[1].update(cuda, observe(score.cuda()))
    assert torch.equal(samplers[0].importance, samplers[1].importance.cpu())


@pytest.mark.parametrize("name", BY_NAME)
def test_every_method_draws_and_learns(name):
    def scores(indices):
        return 1.0 + indices % 7

    method = Presampling(lambda i: scores(i).float()) if name == "presampling" else name
    sampler = fastis.Sampler(300, 16, method=method, seed=3, device="cuda")
    for _ in range(60):
        batch = sampler.sample()
        assert bool(((batch.indices >= 0) & (batch.indices < 300)).all())
        assert bool(batch.weights.isfinite().all())
        sampler.update(batch, observe(scores(batch.indices).float()))
    assert sampler.step == 60
    assert sampler.skipped == 0


def test_state_moves_between_devices():
    cpu = fastis.Sampler(100, 10, seed=1)
    for _ in range(30):
        cpu.update(cpu.sample(), observe(torch.rand(10)))
    cuda = fastis.Sampler(100, 10, device="cuda")
    cuda.load_state_dict(cpu.state_dict())
    assert torch.equal(cpu.sample().indices, cuda.sample().indices.cpu())


FLOATS = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
WEIGHTS = {
    "lognormal": lambda n: torch.empty(n).log_normal_(0, 1, generator=seeded()),
    "heavy tail": lambda n: torch.empty(n).log_normal_(0, 4, generator=seeded()).clamp(max=6e4),
    "descending": lambda n: torch.rand(n, generator=seeded()).sort(descending=True).values,
    "all equal": lambda n: torch.full((n,), 0.7),
    "mostly zeros": lambda n: torch.rand(n, generator=seeded()) * (torch.arange(n) % 5000 == 0),
    "one giant": lambda n: torch.where(torch.arange(n) == n // 3, 6e4, 1e-3),
}


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def assert_same_weights_and_table(values):
    quantized = [
        kernels.quantize(v)
        for kernels, v in ((cpu_categorical, values), (cuda_categorical, values.cuda()))
    ]
    cpu, cuda = quantized
    assert (cuda.shift, cuda.total) == (cpu.shift, cpu.total)
    assert torch.equal(
        cuda_categorical.integer_weights(cuda).cpu(), cpu_categorical.integer_weights(cpu)
    )
    table = cpu_categorical.alias_build(cpu)
    assert torch.equal(cuda_categorical.alias_build(cuda).cpu(), table)
    ours = cuda_categorical.alias_draw(table.cuda(), cpu.total, 5, 3, 10_000)
    for a, b in zip(ours, cpu_categorical.alias_draw(table, cpu.total, 5, 3, 10_000), strict=True):
        assert torch.equal(a.cpu(), b)
    ours = cuda_categorical.draw(cuda, 5, 3, 1000)
    for a, b in zip(ours, cpu_categorical.draw(cpu, 5, 3, 1000), strict=True):
        assert torch.equal(a.cpu(), b)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", WEIGHTS)
@pytest.mark.parametrize("n", [3, 1025, 100_003])
def test_alias_tables_and_searches_equal_the_cpus(dtype, shape, n):
    values = WEIGHTS[shape](n).to(dtype)
    assert_same_weights_and_table(values + (values.sum() == 0).to(dtype))


@pytest.mark.parametrize("shape", ["lognormal", "descending", "all equal"])
def test_large_alias_tables_equal_the_cpus(shape):
    assert_same_weights_and_table(WEIGHTS[shape](2**21 + 5))


def test_integer_weights_and_unaligned_ones_on_the_device():
    assert_same_weights_and_table(torch.randint(2**40, (5001,), generator=seeded()))
    assert_same_weights_and_table(torch.rand(5001, generator=seeded())[1:])


@pytest.mark.parametrize("count", [1, 4096, 1_000_003])
def test_points_and_what_they_fall_on_equal_the_cpus(count):
    table = fastis.AliasTable(torch.rand(1000, generator=seeded()))
    here = torch.device("cpu"), torch.device("cuda")
    points = [
        kernels.random_below(table._total, 2**63 + 5, 2**33 - 250, count, device)
        for kernels, device in zip((cpu_categorical, cuda_categorical), here, strict=True)
    ]
    assert torch.equal(points[0], points[1].cpu())
    expected = cpu_categorical.alias_inverse_cdf(table._table, table._total, points[0])
    found = cuda_categorical.alias_inverse_cdf(table._table.cuda(), table._total, points[1])
    assert all(torch.equal(a, b.cpu()) for a, b in zip(expected, found, strict=True))


@pytest.mark.parametrize("bad", [-1.0, float("nan"), float("inf")])
def test_bad_weights_on_the_device_are_an_error(bad):
    weights = torch.ones(1000, device="cuda")
    weights[700] = bad
    with pytest.raises(ValueError, match="weights must be finite and non-negative"):
        fastis.AliasTable(weights)


def test_alias_table_and_weights_on_the_device():
    weights = torch.rand(1000, generator=seeded())
    host, device = fastis.AliasTable(weights), fastis.AliasTable(weights.cuda())
    assert torch.equal(host.probabilities, device.probabilities.cpu())
    drawn = [t.sample(50, generator=seeded(1)) for t in (host, device)]
    assert torch.equal(drawn[0].indices, drawn[1].indices.cpu())
    assert torch.equal(drawn[0].weights, drawn[1].weights.cpu())
    drawn = [fastis.sample(w, 50, generator=seeded(1)) for w in (weights, weights.cuda())]
    assert torch.equal(drawn[0].indices, drawn[1].indices.cpu())
    capped = [fastis.AliasTable(w, max_prob=0.00101) for w in (weights, weights.cuda())]
    assert torch.equal(capped[0].probabilities, capped[1].probabilities.cpu())
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


@pytest.mark.parametrize("flatten", ["cap", "mix"])
def test_flattening_and_heavy_tails(flatten):
    samplers = [
        fastis.Sampler(
            5000, 300, method=EMAIS(warmup_epochs=0), flatten=flatten, seed=4, device=device
        )
        for device in ("cpu", "cuda")
    ]
    generator = torch.Generator().manual_seed(0)
    for step in range(60):
        score = torch.empty(300).log_normal_(0, 3, generator=generator) * 10.0 ** (step / 20)
        score[::50] = torch.nan
        batches = [sampler.sample() for sampler in samplers]
        assert torch.equal(batches[0].indices, batches[1].indices.cpu())
        assert torch.equal(batches[0].weights, batches[1].weights.cpu())
        samplers[0].update(batches[0], observe(score))
        samplers[1].update(batches[1], observe(score.cuda()))
    states = [sampler.state_dict() for sampler in samplers]
    assert torch.equal(states[0]["states"], states[1]["states"].cpu())
    assert torch.equal(states[0]["scalars"], states[1]["scalars"].cpu())


@pytest.mark.parametrize(("n", "batch_size"), [(5000, 60), (200_000, 128), (200_000, 4096)])
def test_caps_close_to_uniform(n, batch_size):
    samplers = [
        fastis.Sampler(
            n, batch_size, method=EMAIS(warmup_epochs=0, tau=5.0), seed=4, device=device,
            max_duplicates=1.01 * batch_size / n,
        )
        for device in ("cpu", "cuda")
    ]  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    everything = torch.empty(n).log_normal_(0, 2, generator=generator)
    for sampler in samplers:
        indices = torch.arange(n, device=sampler.device)
        batch = fastis.Batch(indices, torch.ones(n, device=sampler.device))
        sampler.update(batch, observe(everything.to(sampler.device)))
    for _ in range(20):
        score = torch.empty(batch_size).log_normal_(0, 2, generator=generator)
        batches = [sampler.sample() for sampler in samplers]
        assert torch.equal(batches[0].indices, batches[1].indices.cpu())
        assert torch.equal(batches[0].weights, batches[1].weights.cpu())
        samplers[0].update(batches[0], observe(score))
        samplers[1].update(batches[1], observe(score.cuda()))


@pytest.mark.parametrize("batch_size", [128, 4096])
def test_large_tables(batch_size):
    n = 2**22 + 5
    samplers = [
        fastis.Sampler(n, batch_size, method=EMAIS(warmup_epochs=0), seed=4, device=device)
        for device in ("cpu", "cuda")
    ]
    generator = torch.Generator().manual_seed(0)
    everything = torch.empty(n).log_normal_(0, 2, generator=generator)
    for sampler, device in zip(samplers, ("cpu", "cuda"), strict=True):
        batch = fastis.Batch(torch.arange(n, device=device), torch.ones(n, device=device))
        sampler.update(batch, observe(everything.to(device)))
    for _ in range(5):
        score = torch.empty(batch_size).log_normal_(0, 3, generator=generator)
        batches = [sampler.sample() for sampler in samplers]
        assert torch.equal(batches[0].indices, batches[1].indices.cpu())
        samplers[0].update(batches[0], observe(score))
        samplers[1].update(batches[1], observe(score.cuda()))


def test_a_sample_drawn_many_times_is_observed_once_on_the_device():
    indices = torch.randint(50, (4096,), generator=torch.Generator().manual_seed(0))
    score = torch.rand(4096, generator=torch.Generator().manual_seed(1))
    samplers = [
        fastis.Sampler(100, 16, method=EMAIS(warmup_epochs=0), device=d) for d in ("cpu", "cuda")
    ]
    samplers[0].update(fastis.Batch(indices, torch.ones(4096)), observe(score))
    batch = fastis.Batch(indices.cuda(), torch.ones(4096, device="cuda"))
    samplers[1].update(batch, observe(score.cuda()))
    states = [sampler.state_dict() for sampler in samplers]
    assert torch.equal(states[0]["states"], states[1]["states"].cpu())


def test_the_same_step_gives_the_same_bits_a_hundred_times():
    sampler = fastis.Sampler(20_000, 4096, method=EMAIS(warmup_epochs=0), seed=1, device="cuda")
    generator = torch.Generator(device="cuda").manual_seed(0)
    score = torch.empty(4096, device="cuda").log_normal_(0, 2, generator=generator)
    for _ in range(10):
        sampler.update(sampler.sample(), observe(score))
    state = sampler.state_dict()
    first = None
    for _ in range(100):
        sampler.load_state_dict(state)
        batch = sampler.sample()
        sampler.update(batch, observe(score, score[:10]))
        after = [*batch, *(v for v in sampler.state_dict().values() if torch.is_tensor(v))]
        after = [tensor.view(torch.uint8) for tensor in after]
        first = after if first is None else first
        assert all(torch.equal(a, b) for a, b in zip(first, after, strict=True))


def test_a_capture_as_the_very_first_use():
    """Nothing that the capture records may undo what the replay before it has done."""
    arguments = {"method": EMAIS(warmup_epochs=0), "seed": 5}
    host, sampler = (fastis.Sampler(2000, 64, device=d, **arguments) for d in ("cpu", "cuda"))
    score = torch.linspace(0.1, 3.0, 64)
    on_device = observe(score.cuda())
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        batch = sampler.sample()
        sampler.update(batch, on_device)
    for _ in range(3):
        graph.replay()
        expected = host.sample()
        host.update(expected, observe(score))
        assert torch.equal(batch.indices.cpu(), expected.indices)
        assert torch.equal(batch.weights.cpu(), expected.weights)


def test_a_captured_step_goes_on_as_an_eager_one():
    sampler = fastis.Sampler(3000, 64, seed=2, device="cuda")  # two epochs of warm-up first
    score = torch.rand(64, device="cuda") + 0.1
    kept = []

    def step():
        kept[:] = [sampler.sample()]
        sampler.update(kept[0], observe(score))

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    twin = fastis.Sampler(3000, 64, seed=2)
    twin.load_state_dict(sampler.state_dict())
    for _ in range(120):  # over the border between the phases, which the device decides
        graph.replay()
        expected = twin.sample()
        assert torch.equal(kept[0].indices.cpu(), expected.indices)
        assert torch.equal(kept[0].weights.cpu(), expected.weights)
        twin.update(expected, observe(score.cpu()))
    assert sampler.step == twin.step == 123


def test_a_graph_goes_on_with_the_state_loaded():
    sampler, twin = (fastis.Sampler(300, 16, seed=2, device=d) for d in ("cuda", "cpu"))
    score = torch.rand(16, device="cuda") + 0.1
    kept = []

    def step():
        kept[:] = [sampler.sample()]
        sampler.update(kept[0], observe(score))

    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    for _ in range(70):
        twin.update(twin.sample(), observe(torch.rand(16)))
    sampler.load_state_dict(twin.state_dict())
    for _ in range(20):
        graph.replay()
        expected = twin.sample()
        assert torch.equal(kept[0].indices.cpu(), expected.indices)
        twin.update(expected, observe(score.cpu()))


@pytest.mark.parametrize("batch_size", [64, 1000])
@pytest.mark.parametrize("flatten", ["cap", "mix"])
def test_update_and_sample_equals_the_cpus_two_calls(batch_size, flatten):
    arguments = {"method": EMAIS(warmup_epochs=0), "flatten": flatten, "seed": 5}
    cpu, cuda = (fastis.Sampler(9000, batch_size, device=d, **arguments) for d in ("cpu", "cuda"))
    expected, batch = cpu.sample(), cuda.sample()
    generator = torch.Generator().manual_seed(0)
    for _ in range(40):
        score = torch.empty(batch_size).log_normal_(0, 2, generator=generator)
        cpu.update(expected, observe(score))
        expected, batch = cpu.sample(), cuda.update_and_sample(batch, observe(score.cuda()))
        assert torch.equal(expected.indices, batch.indices.cpu())
        assert torch.equal(expected.weights, batch.weights.cpu())


@pytest.mark.parametrize("name", sorted(set(BY_NAME) - {"presampling"}))
@pytest.mark.parametrize("steps_before", [3, 100])  # in the warm-up, and behind it
def test_no_step_waits_for_the_device(name, steps_before):
    """Of an epoch of 46 minibatches; RAIS fits at the end of one here."""
    method = RAIS(refit_epochs=1.0) if name == "rais" else name
    sampler = fastis.Sampler(3000, 64, method=method, device="cuda")
    score = torch.rand(64, device="cuda")
    for _ in range(steps_before):
        sampler.update(sampler.sample(), observe(score))
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(5):
            sampler.update(sampler.sample(), observe(score))
            sampler.lr_factor()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("name", sorted(set(BY_NAME) - {"presampling"}))
def test_rows_out_of_range_are_left_out_on_the_device(name):
    samplers = [fastis.Sampler(300, 16, method=name, seed=3, device="cuda") for _ in range(2)]
    for _ in range(40):
        batch = samplers[0].sample()
        assert torch.equal(batch.indices, samplers[1].sample().indices)
        score = 1.0 + (batch.indices % 7).float()
        samplers[0].update(batch, observe(score))
        outside = torch.tensor([300, -1, 2**40], device="cuda")
        more = fastis.Batch(
            torch.cat([batch.indices, outside]),
            torch.cat([batch.weights, batch.weights.new_ones(3)]),
        )
        samplers[1].update(more, observe(torch.cat([score, score.new_ones(3)])))
        assert samplers[0].step == samplers[1].step


def test_the_device_is_served():
    assert kernels.missing("cuda", "table", "cuda") == ""
    assert kernels.kernels_for("categorical", "cuda") is cuda_categorical


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("shape", [(128, 10), (300, 1001), (5, 8, 33)])
@pytest.mark.parametrize("rows", [False, True])
def test_scaling_of_gradients_on_the_device(dtype, shape, rows):
    grad = torch.randn(shape, generator=seeded()).to(dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    scale = torch.rand(shape[0] if rows else (), dtype=wide, generator=seeded(1))
    outs = [dtype, torch.float16] if dtype == torch.float32 else [dtype]
    for after in outs:
        out = torch.empty(shape, dtype=after, device="cuda")
        cuda_scale.scale(grad.cuda(), scale.cuda(), out)
        assert torch.equal(out.cpu(), reference_loss.scale_grad(grad, scale, after))
    here = grad.cuda()
    assert cuda_scale.scale(here, torch.ones((), dtype=wide, device="cuda"), here) is here
    assert torch.equal(here.cpu(), grad)


def test_a_refused_launch_does_not_spoil_the_next():
    sampler = fastis.Sampler(300, 16, device="cuda")
    launch = (sampler._table.device_handle, *(t.data_ptr() for t in sampler.sample()))
    assert _C.cuda_draw(*launch, 10_000, 0) != 0  # no such device
    weights = torch.rand(10_000, device="cuda")
    assert len(fastis.AliasTable(weights)) == 10_000
