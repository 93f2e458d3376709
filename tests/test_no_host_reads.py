"""What is promised not to wait for a GPU reads nothing on the host: run here on meta tensors."""

from __future__ import annotations

import pytest
import torch
from conftest import Observation
from no_host_reads import META, losses_on_meta, no_host_reads, on_meta
from torch import Tensor

import fastis
from fastis.kernels.layout import DRAWS, UPDATES
from fastis.methods import BY_NAME, EMAIS, RAIS, Distributed
from fastis.methods.base import Method

NUM_SAMPLES, BATCH_SIZE = 320, 16  # 20 minibatches an epoch
# The choice between uniform draws and a forward pass is the host's.
NEVER_WAIT = sorted(set(BY_NAME) - {"presampling"})


@pytest.fixture
def launched(monkeypatch):
    return on_meta(monkeypatch)


def sampler_on_meta(method: str | Method, flatten: str = "cap") -> fastis.Sampler:
    if method == "rais":  # which waits when it fits: here at the end of an epoch
        method = RAIS(refit_epochs=1.0)
    return fastis.Sampler(NUM_SAMPLES, BATCH_SIZE, method=method, flatten=flatten, device=META)


def observed(n: int = BATCH_SIZE) -> Observation:
    values = torch.empty(n, device=META)
    return Observation(values, values, torch.empty(10, device=META))


def steps(sampler: fastis.Sampler, count: int) -> None:
    for _ in range(count):
        batch = sampler.sample()
        sampler.update(batch, observed())
        sampler.update(sampler.update_and_sample(batch, observed()), observed())
        read = [sampler.lr_factor("sgd"), sampler.lr_factor("adam"), sampler.effective_iterations]
        read += [sampler.variance.efficiency, sampler.variance.effective_batch_size]
        assert all(tensor.device == META for tensor in read)


@pytest.mark.parametrize("name", NEVER_WAIT)
@pytest.mark.parametrize("epoch", [0, 2, 7])
def test_methods_read_nothing_inside_of_an_epoch(launched, name, epoch):
    sampler = sampler_on_meta(name)
    sampler._table.counts_on_host = {DRAWS: 20 * epoch + 5, UPDATES: 20 * epoch + 6}
    with no_host_reads():
        steps(sampler, 4)
    assert {"cuda_update", "cuda_draw"} <= set(launched)


@pytest.mark.parametrize("flatten", ["cap", "mix"])
@pytest.mark.parametrize("method", ["emais", "loss", "scan", "uniform", EMAIS(warmup_epochs=0)])
def test_fused_methods_read_nothing_ever(launched, flatten, method):
    sampler = sampler_on_meta(method, flatten)
    with no_host_reads():
        steps(sampler, 50)
    assert "cuda_update_and_draw" in launched


@pytest.mark.parametrize("name", NEVER_WAIT)
def test_asking_for_uniform_draws_reads_nothing(launched, name):
    sampler = sampler_on_meta(name)
    sampler._table.counts_on_host = {DRAWS: 41, UPDATES: 41}
    with no_host_reads():
        for uniform in (True, True, False):
            sampler.uniform = uniform
            assert sampler.uniform is uniform
            steps(sampler, 2)


@pytest.mark.parametrize("method", ["emais", "loss", Distributed(max_age=16)], ids=str)
def test_scores_from_elsewhere_read_nothing(launched, method):
    sampler = sampler_on_meta(method)
    indices = torch.empty(40, dtype=torch.int64, device=META)
    with no_host_reads():
        for iteration in range(20):
            sampler.update(sampler.sample(), observed())
            sampler.fold(indices, torch.empty(40, device=META), iteration)
    assert launched.count("cuda_update") == 40


@pytest.mark.parametrize("name", ["emais", "rais"])
def test_a_correction_reads_nothing(launched, name):
    sampler = sampler_on_meta(name)
    sampler._table.counts_on_host = {DRAWS: 41, UPDATES: 41}
    with no_host_reads():
        for correction in (0.0, 0.5, 1.0):
            sampler.correction = correction
            steps(sampler, 2)


def test_refreshes_read_nothing_in_between(launched):
    method = EMAIS(refresh_every=100, score_fn=lambda i: torch.empty(len(i), device=META))
    sampler = sampler_on_meta(method)
    with no_host_reads():
        steps(sampler, 20)
    assert sampler._table.counts_on_host[UPDATES] == 60


@pytest.mark.parametrize("name", NEVER_WAIT)
def test_parts_and_wide_scores_read_nothing(launched, name):
    sampler = sampler_on_meta(name)
    half = observed(BATCH_SIZE // 2)
    wide = Observation(*(t.double() for t in observed()))
    with no_host_reads():
        sampler.update(sampler.sample(), [half, half])
        sampler.update(sampler.sample(), wide)


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
@pytest.mark.parametrize("limits", [{}, {"max_factor": 3.0, "max_lr": 0.1}])
def test_a_rate_that_is_a_tensor_is_scaled_unread(launched, optimizer, limits):
    weight = torch.nn.Parameter(torch.empty(3, device=META))
    lr = torch.empty((), device=META)
    inner = torch.optim.SGD([weight], lr=0.1)  # which would read a tensor, once
    inner.param_groups[0]["lr"] = lr
    schedule = torch.optim.lr_scheduler.LambdaLR(inner, lambda step: 0.9**step)
    scheduler = fastis.EffectiveBatchLR(
        schedule, sampler_on_meta("emais"), optimizer=optimizer, **limits
    )
    with no_host_reads():
        for _ in range(3):
            inner.step()
            scheduler.step()
            lr *= 0.1  # by hand
    assert inner.param_groups[0]["lr"] is lr


# The checks themselves ---------------------------------------------------------------------------


def read_a_number(x: Tensor) -> object:
    return x[0].item()


def decide(x: Tensor) -> object:
    return bool((x > 0).any())


def index_by_a_mask(x: Tensor) -> object:
    return x[x > 0]


def list_all(x: Tensor) -> object:
    return x.tolist()


def to_the_host(x: Tensor) -> object:
    return x.cpu()


def find_distinct(x: Tensor) -> object:
    return x.unique()


def numbers_to_the_device(x: Tensor) -> object:
    return x + torch.tensor([1.0, 2.0], device=x.device).sum()


def new_numbers_on_the_device(x: Tensor) -> object:
    return x + x.new_tensor(1.0)


READS = [
    read_a_number, decide, index_by_a_mask, list_all, to_the_host, find_distinct,
    numbers_to_the_device, new_numbers_on_the_device,
]  # fmt: skip


@pytest.mark.parametrize("read", READS, ids=lambda f: f.__name__)
def test_a_read_put_in_on_purpose_is_noticed(launched, monkeypatch, read):
    def update(self, table, seen):
        read(seen.score)
        return Method.update(self, table, seen)

    monkeypatch.setattr(EMAIS, "update", update)
    sampler = sampler_on_meta("emais")
    with no_host_reads(), pytest.raises((RuntimeError, NotImplementedError)):
        sampler.update(sampler.sample(), observed())


# Losses ------------------------------------------------------------------------------------------


@pytest.fixture
def loss_launches(monkeypatch):
    pytest.importorskip("triton")
    return losses_on_meta(monkeypatch)


def logits_of(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=META, requires_grad=True)


SHAPES = [(128, 10), (8, 128256), (4, 9, 300), (512, 1000)]
OPTIONS = {
    "plain": {},
    "class weights": {"class_weights": True},
    "smoothing": {"label_smoothing": 0.1},
    "ignored": {"ignore_index": 3},
    "sum": {"reduction": "sum"},
    "none": {"reduction": "none"},
    "denominator": {"denominator": True},
}


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_cross_entropy_reads_nothing(loss_launches, shape, option, weighted, dtype):
    options = dict(OPTIONS[option])
    if "class_weights" in options:
        options["class_weights"] = torch.empty(shape[-1], device=META)
    if "denominator" in options:
        options["denominator"] = torch.empty((), device=META)
    logits = logits_of(*shape, dtype=dtype)
    target = torch.empty(shape[:-1], dtype=torch.int64, device=META)
    weights = torch.empty(shape[0], device=META) if weighted else None
    with no_host_reads():
        out = fastis.cross_entropy(logits, target, weights, **options)
        out.loss.backward(torch.empty_like(out.loss), retain_graph=True)
        out.loss.backward(torch.empty_like(out.loss))
        soft = torch.empty(shape, device=META)
        if option != "ignored":
            fastis.cross_entropy(logits, soft, weights, **options).loss.sum().backward()
    assert loss_launches


@pytest.mark.parametrize("loss", [fastis.binary_cross_entropy_with_logits, fastis.mse_loss])
@pytest.mark.parametrize("weighted", [False, True])
def test_elementwise_losses_read_nothing(loss_launches, loss, weighted):
    logits = logits_of(512, 100)
    weights = torch.empty(512, device=META) if weighted else None
    with no_host_reads():
        loss(logits, torch.empty(512, 100, device=META), weights).loss.backward()
    assert loss_launches


def test_a_read_in_a_loss_is_noticed(loss_launches, monkeypatch):
    from fastis.kernels.triton import loss as triton_loss

    plain = triton_loss.cross_entropy

    def reads(logits, target, *rest):
        assert int(target.max()) < logits.shape[-1]
        return plain(logits, target, *rest)

    monkeypatch.setattr(triton_loss, "cross_entropy", reads)
    target = torch.empty(128, dtype=torch.int64, device=META)
    with no_host_reads(), pytest.raises(RuntimeError, match="meta"):
        fastis.cross_entropy(logits_of(128, 10), target)
