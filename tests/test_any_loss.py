"""Scored losses of the user's own: of several outputs, of losses computed elsewhere, and hints."""

from __future__ import annotations

from collections import namedtuple

import pytest
import torch
import torch.nn.functional as F
from conftest import drive

import fastis
from fastis.methods import EMAIS

B = 6
Heads = namedtuple("Heads", "a b")


def rows(*shape, dtype=torch.float32, grad=True):
    made = torch.randn(B, *shape, dtype=torch.float64)
    return made.to(dtype).requires_grad_(grad)


a, b, r = rows(3), rows(2, 4), torch.rand(B) + 0.5


def two(outputs, target):
    """[B] of outputs a [B, 3] and b [B, 2, 4], whichever way they come."""
    first, second = outputs.values() if isinstance(outputs, dict) else outputs[:2]
    return (first.double() - target).square().sum(1) + second.double().sin().sum((1, 2))


CONTAINERS = {
    "tuple": lambda: (a, b),
    "list": lambda: [a, b],
    "dict": lambda: {"a": a, "b": b},
    "named tuple": lambda: Heads(a, b),
    "with others": lambda: (a, b, None, torch.arange(B), "text"),
}


@pytest.mark.parametrize("kind", CONTAINERS)
@pytest.mark.parametrize("weights", [None, r])
def test_the_score_is_the_norm_over_all_outputs(kind, weights):
    out = fastis.scored_loss(two, CONTAINERS[kind](), 1.0, weights)
    together = torch.cat([a, b.flatten(1)], 1)
    expected = fastis.scored_loss(
        lambda z, t: two((z[:, :3], z[:, 3:].view(B, 2, 4)), t), together, 1.0, weights
    )
    for ours, theirs in zip(out[:3], expected[:3], strict=True):
        torch.testing.assert_close(ours, theirs)
    assert out.mean_grad is None
    assert out.weighted is (weights is not None)
    ours = torch.autograd.grad(out.loss, (a, b))
    theirs = torch.autograd.grad(expected.loss, (a, b))
    for g, h in zip(ours, theirs, strict=True):
        torch.testing.assert_close(g, h)


def test_outputs_within_outputs():
    nested = {"boxes": [a, (b,)], "n": 3}

    def loss(o, t):
        return two((o["boxes"][0], o["boxes"][1][0]), t) * o["n"]

    expected = fastis.scored_loss(two, (a, b), 1.0, r)
    torch.testing.assert_close(fastis.scored_loss(loss, nested, 1.0, r).score, 3 * expected.score)


def test_an_output_without_part_in_the_loss_adds_nothing():
    expected = fastis.scored_loss(two, (a, b), 1.0, r)
    torch.testing.assert_close(fastis.scored_loss(two, (a, b, rows(5)), 1.0, r), expected)
    with pytest.raises(ValueError, match="loss_fn must return losses that depend on the logits"):
        fastis.scored_loss(lambda o, t: rows().float(), (a, b), None)
    with pytest.raises(ValueError, match="loss_fn must return losses that depend on the logits"):
        fastis.scored_loss(lambda o, t: rows().float(), a, None)


def test_what_needs_no_gradient_does_not_count_while_a_graph_is_built():
    frozen = b.detach()
    out = fastis.scored_loss(two, (a, frozen), 1.0, r)
    torch.testing.assert_close(out.score, 2 * (a.double() - 1).norm(dim=1).float())
    with torch.no_grad():
        both = fastis.scored_loss(two, (a, b), 1.0, r)
        assert not both.loss.requires_grad
        assert both.weighted
        torch.testing.assert_close(fastis.scored_loss(two, (a, frozen), 1.0, r), both)
    torch.testing.assert_close(both.score, fastis.scored_loss(two, (a, b), 1.0, r).score)


@pytest.mark.parametrize(
    ("dtypes", "dtype"),
    [
        ((torch.float32, torch.bfloat16), torch.float32),
        ((torch.float16, torch.float64), torch.float64),
    ],
)
def test_dtypes_of_several_outputs(dtypes, dtype):
    out = fastis.scored_loss(two, (a.to(dtypes[0]), b.to(dtypes[1])), 1.0, r)
    assert out.losses.dtype == out.score.dtype == out.loss.dtype == dtype


def test_several_outputs_under_torch_func():
    def loss(first, second):
        return fastis.scored_loss(two, {"a": first, "b": second}, 1.0, r).loss

    expected = torch.autograd.grad(loss(a, b), (a, b))
    found = torch.func.grad(loss, (0, 1))(a.detach(), b.detach())
    for g, h in zip(found, expected, strict=True):
        torch.testing.assert_close(g, h)


@pytest.mark.parametrize(
    ("outputs", "error", "message"),
    [
        ((a, rows(2)[:4]), ValueError, r"logits\[1\] must have 6 rows, as another .*\[4, 2\]"),
        ({"x": a, "y": torch.ones(())}, ValueError, r"logits\['y'\] must have shape \[B, \.\.\.\]"),
        ((a, rows(2).to_sparse()), TypeError, r"logits\[1\] must be a dense tensor"),
        ((), TypeError, r"logits must be a tensor of floats, or a tuple, .* got tuple \(\)"),
        ([torch.arange(3)], TypeError, "logits must be a tensor of floats"),
    ],
)  # fmt: skip
def test_outputs_that_are_refused(outputs, error, message):
    with torch.no_grad(), pytest.raises(error, match=message):
        fastis.scored_loss(two, outputs, 1.0, r)


# A scalar loss -----------------------------------------------------------------------------------


class SoftTargetCrossEntropy(torch.nn.Module):
    """As timm has it: always the mean."""

    def forward(self, x, target):
        return torch.sum(-target * F.log_softmax(x, dim=-1), dim=-1).mean()


def test_the_advice_for_a_loss_that_is_always_a_mean_works():
    loss_fn, target = SoftTargetCrossEntropy(), rows(3).detach().softmax(1)
    with pytest.raises(ValueError, match="if it always returns the mean") as refused:
        fastis.scored_loss(loss_fn, a, target, r)
    advice = str(refused.value).split("sample: ")[1]
    per_sample = eval(advice, {"torch": torch, "loss_fn": loss_fn})
    out = fastis.scored_loss(per_sample, a, target, r)
    torch.testing.assert_close(out, fastis.cross_entropy(a, target, r))


# Losses that exist already -----------------------------------------------------------------------


@pytest.mark.parametrize("denominator", [None, 3.0, torch.tensor(3.0)])
@pytest.mark.parametrize("weights", [None, r])
def test_from_losses(weights, denominator):
    losses = a.square().sum(1)
    out = fastis.from_losses(losses, weights, denominator=denominator)
    ones = torch.ones(B) if weights is None else weights
    expected = (ones * losses).sum() / (B if denominator is None else denominator)
    torch.testing.assert_close(out.loss, expected)
    torch.testing.assert_close(
        *(torch.autograd.grad(loss, a, retain_graph=True) for loss in (out.loss, expected))
    )
    for detached in (out.losses, out.score):
        torch.testing.assert_close(detached, losses.detach())
        assert not detached.requires_grad
    assert out.mean_grad is None
    assert out.weighted is (weights is not None)
    score = torch.rand(B, dtype=torch.float64)
    assert torch.equal(fastis.from_losses(losses, weights, score).score, score.float())


@pytest.mark.parametrize(
    ("dtype", "result"), [(torch.bfloat16, torch.float32), (torch.float64, torch.float64)]
)
def test_dtypes_of_from_losses(dtype, result):
    out = fastis.from_losses(rows(dtype=dtype), r, rows(grad=False))
    assert out.loss.dtype == out.losses.dtype == out.score.dtype == result


def test_a_sampler_learns_from_losses():
    sampler = fastis.Sampler(60, B, method=EMAIS(warmup_epochs=0))
    drive(sampler, 3)
    batch = sampler.sample()
    out = fastis.from_losses(a.square().sum(1), batch.weights, score=torch.full((B,), 70.0))
    sampler.update(batch, out)
    out.backward()
    assert (sampler.mean[batch.indices] > 1).all()


LOSSES = a.square().sum(1)


@pytest.mark.parametrize(
    ("use", "error", "message"),
    [
        (lambda: fastis.from_losses(LOSSES.mean(), r), ValueError,
         r"losses must have shape \[B\], one loss per sample, got \[\]"),
        (lambda: fastis.from_losses([1.0], r), TypeError, "losses must be a tensor, got list"),
        (lambda: fastis.from_losses(LOSSES.long(), r), TypeError, "losses must be float32"),
        (lambda: fastis.from_losses(LOSSES, r[:4]), ValueError, r"weights must have shape \[6\]"),
        (lambda: fastis.from_losses(LOSSES, r, r[:4]), ValueError, r"score must have shape \[6\]"),
        (lambda: fastis.from_losses(LOSSES, r, LOSSES), ValueError, "score must not require grad"),
        (lambda: fastis.from_losses(LOSSES, r, denominator="B"), TypeError,
         "denominator must be a number"),
    ],
)  # fmt: skip
def test_wrong_arguments_of_from_losses(use, error, message):
    with pytest.raises(error, match=message):
        use()


# Habits from torch -------------------------------------------------------------------------------

y = torch.tensor([0, 1, 2, 0, 1, 2])


@pytest.mark.parametrize(
    ("use", "error", "message"),
    [
        (lambda: fastis.cross_entropy(a, y, weight=torch.ones(3)), TypeError,
         r"cross_entropy\(\) got an unexpected keyword argument 'weight': .* class_weights="),
        (lambda: fastis.mse_loss(a, a, size_average=True), TypeError, r"mse_loss\(\).*reduction="),
        (lambda: fastis.binary_cross_entropy_with_logits(a, a, colour=1), TypeError,
         r"binary_cross_entropy_with_logits\(\) got an unexpected keyword argument 'colour'$"),
        (lambda: fastis.cross_entropy(a, y, torch.ones(3)), ValueError, "class_weights="),
        (lambda: fastis.cross_entropy(a, y.int()), TypeError, r"pass target.long\(\)"),
        (lambda: fastis.cross_entropy(a, y).detach(), AttributeError, "use out.loss.detach$"),
        (lambda: fastis.cross_entropy(a, y).colour, AttributeError, "no attribute 'colour'$"),
        (lambda: fastis.cross_entropy(a, y) / 4, TypeError, "compute with out.loss"),
        (lambda: 2 * fastis.cross_entropy(a, y, r), TypeError, "compute with out.loss"),
        (lambda: fastis.cross_entropy(a, y, r) + a.sum(), TypeError, "compute with out.loss"),
        (lambda: sum([fastis.cross_entropy(a, y, r)] * 2), TypeError, "compute with out.loss"),
    ],
)  # fmt: skip
def test_advice(use, error, message):
    with pytest.raises(error, match=message):
        use()
