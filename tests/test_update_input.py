"""What ``Sampler.update`` takes and refuses, and what torch's defaults must not change."""

from __future__ import annotations

import copy

import pytest
import torch
from conftest import batch_of, drive, losses_of, observe
from test_methods import make

import fastis
from fastis import methods

pytestmark = pytest.mark.filterwarnings("ignore:presampling will never switch on")


def four(mean_grad):
    return observe(torch.ones(2), mean_grad)


def squared_mean(mean_grad):
    """|G|^2 as the sampler has it: 4 for four ones."""
    sampler = fastis.Sampler(10, 2, method="uniform")
    sampler.update(batch_of(1, 2), four(mean_grad))
    # A = U = O^2 = 1 and B = 2: tr V_is is 2 (A - |G|^2).
    return 1 - float(sampler.variance.trace_is) / 2


@pytest.mark.parametrize(
    "mean_grad",
    [
        torch.ones(4),
        torch.ones(4, dtype=torch.float64),
        torch.ones(4, dtype=torch.float16),
        torch.ones(4, dtype=torch.bfloat16),
        torch.ones(()).expand(4),
        torch.tensor([1.0, 9.0] * 4)[::2],
        torch.ones(4, requires_grad=True),
    ],
)
def test_mean_grad_of_any_float_and_stride_is_read_right(any_backend, mean_grad):
    assert squared_mean(mean_grad) == pytest.approx(4)


@pytest.mark.parametrize(
    ("mean_grad", "error", "message"),
    [
        ([1.0] * 4, TypeError, "out.mean_grad must be a tensor, got list"),
        (torch.ones(4, dtype=torch.int64), TypeError, "out.mean_grad must have dtype .*int64"),
        (torch.ones(2, 2), ValueError, r"out.mean_grad must have shape \[n\], got \[2, 2\]"),
        (torch.ones(4, device="meta"), ValueError, "out.mean_grad must be on cpu, got meta"),
    ],
)
def test_a_wrong_mean_grad_is_refused_before_anything_changes(mean_grad, error, message):
    sampler = fastis.Sampler(10, 2)
    with pytest.raises(error, match=message):
        sampler.update(batch_of(1, 2), four(mean_grad))
    assert sampler.step == 0


def test_scores_must_be_tensors():
    with pytest.raises(TypeError, match=r"out\.\w+ must be a tensor, got ndarray"):
        fastis.Sampler(10, 2).update(batch_of(1, 2), observe(torch.ones(2).numpy()))


@pytest.mark.parametrize("name", methods.BY_NAME)
def test_no_memory_holds_a_graph(name):
    sampler = fastis.Sampler(30, 3, method=make(name))
    for _ in range(25):
        losses = torch.rand(3, requires_grad=True) * 2
        sampler.update(sampler.sample(), observe(losses, losses.mean().expand(4)))
    assert not any(tensor.requires_grad for tensor in sampler._table.durable().values())
    copy.deepcopy(sampler)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
@pytest.mark.parametrize("name", methods.BY_NAME)
def test_torchs_default_dtype_makes_no_difference(name, dtype):
    before = torch.get_default_dtype()
    expected = drive(fastis.Sampler(30, 3, method=make(name), seed=0), 40)
    try:
        torch.set_default_dtype(dtype)
        sampler = fastis.Sampler(30, 3, method=make(name), seed=0)
    finally:
        torch.set_default_dtype(before)
    for ours, theirs in zip(drive(sampler, 40), expected, strict=True):
        assert torch.equal(ours.indices, theirs.indices)
        assert torch.equal(ours.weights, theirs.weights)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_torchs_default_device_makes_no_difference(backend):
    logits, target = torch.randn(4, 3), torch.tensor([0, 1, 2, 0])
    weights, several = torch.ones(4), torch.rand(4, 3)
    scored = (
        lambda: fastis.cross_entropy(logits, target, weights),
        lambda: fastis.cross_entropy(logits, target),
        lambda: fastis.binary_cross_entropy_with_logits(logits, several),
        lambda: fastis.mse_loss(logits, several),
    )
    with fastis.backend(backend):
        expected = [loss().loss for loss in scored]
        torch.set_default_device("meta")
        try:
            found = [loss().loss for loss in scored]
            sampler = fastis.Sampler(40, 4, device="cpu")
            for _ in range(25):
                batch = sampler.sample()
                sampler.update(batch, fastis.cross_entropy(logits, target, batch.weights))
        finally:
            torch.set_default_device(None)
    assert torch.equal(torch.stack(found), torch.stack(expected))
    assert batch.indices.device.type == "cpu"


@pytest.mark.parametrize("name", methods.BY_NAME)
def test_what_is_not_finite_or_too_large_is_counted(name, any_backend):
    sampler = fastis.Sampler(30, 3, method=make(name))
    drive(sampler, 25)
    for loss in (float("nan"), float("inf"), 2.0**60):
        sampler.update(batch_of(3, 4, 5), losses_of(1.0, loss, 3.0))
    # exp(-loss) of the confidence methods is a number for large losses, and a root's base too.
    expected = 1 if name in ("confidence", "confvar") else 2 if name == "prioritized" else 3
    assert sampler.skipped == expected
    assert fastis.Sampler(3, 1, method=make(name)).skipped == 0


@pytest.mark.parametrize("method", ["emais", "loss", "rais", "prioritized"])
def test_a_tensor_is_the_scores(method):
    ours, theirs = (fastis.Sampler(30, 6, method=method, seed=1) for _ in range(2))
    for step in range(20):
        batch = ours.sample()
        assert torch.equal(batch.indices, theirs.sample().indices)
        score = torch.rand(6, generator=torch.Generator().manual_seed(step))
        ours.update(batch, score.clone().requires_grad_())
        theirs.update(batch, fastis.ScoredLoss(score.mean(), score, score))
    states = ours.state_dict(), theirs.state_dict()
    for name, tensor in states[0].items():
        if torch.is_tensor(tensor):
            torch.testing.assert_close(tensor, states[1][name], rtol=0, atol=0, equal_nan=True)


def test_what_is_no_vector_of_scores():
    sampler = fastis.Sampler(10, 2)
    batch = sampler.sample()
    for wrong, error, match in (
        (torch.ones(3), ValueError, r"out.score must have shape \[2\], got \[3\]"),
        (torch.ones(2, 1), ValueError, r"out must have shape \[n\], got \[2, 1\]"),
        (torch.ones(2, dtype=torch.complex64), TypeError, "out must have dtype"),
        (1.0, TypeError, "a sequence of them, or a tensor of scores, got float"),
    ):
        with pytest.raises(error, match=match):
            sampler.update(batch, wrong)
    assert sampler.step == 0


def test_a_scored_loss_goes_backward_itself():
    logits = torch.randn(4, 3, requires_grad=True)
    out = fastis.cross_entropy(logits, torch.tensor([0, 1, 2, 0]))
    assert out.item() == float(out.loss.detach())
    out.backward(retain_graph=True)
    (expected,) = torch.autograd.grad(out.loss, logits)
    assert torch.equal(logits.grad, expected)
