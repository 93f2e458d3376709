"""Every complaint of the losses names the argument, what was expected and what came."""

import pytest
import torch

import fastis

Z = torch.randn(4, 3)
Y = torch.tensor([0, 1, 2, 0])
P = torch.rand(4, 3)
META = {"device": "meta"}


def bce(*args, **options):
    return fastis.binary_cross_entropy_with_logits(*args, **options)


def scored(loss_fn, *args, **options):
    return fastis.scored_loss(loss_fn, Z, Y, *args, **options)


def per_sample(z, y):
    return z.square().sum(1)


ce, mse = fastis.cross_entropy, fastis.mse_loss
CASES = [
    (TypeError, "logits must be a tensor, got", lambda: ce([1.0], Y)),
    (TypeError, r"got tuple of Tensor, Tensor: for several outputs there is scored", lambda: ce(
        (Z, Z), Y)),
    (TypeError, r"got dict of 'a', 'b': for several", lambda: ce({"a": Z, "b": 1}, Y)),
    (ValueError, r"got \[2, 5, 8, 8\]: the classes are the last dimension", lambda: ce(
        torch.randn(2, 5, 8, 8), torch.zeros(2, 8, 8).long())),
    (TypeError, "logits must be float32, .*int64", lambda: ce(Y[:, None], Y)),
    (ValueError, r"logits must have shape \[B, C\] or \[B, T, C\]", lambda: ce(Z[0], Y)),
    (ValueError, r"logits must have shape", lambda: ce(Z[:, :0], Y)),
    (TypeError, "target must be a tensor", lambda: ce(Z, [0, 1, 2, 0])),
    (TypeError, "target must hold int64 class indices", lambda: ce(Z, Y.int())),
    (ValueError, r"target must have shape \[4\] .*last one", lambda: ce(Z, Y[:3])),
    (ValueError, r"target must have shape \[2, 5\].*last", lambda: ce(
        torch.randn(2, 5, 3), torch.zeros(2, 3, dtype=torch.int64))),
    (ValueError, r"target must have shape \[4, 3\], got", lambda: ce(Z, P[:, :2])),
    (ValueError, "target must be on cpu", lambda: ce(Z, Y.to("meta"))),
    (ValueError, "target must be on cpu", lambda: ce(Z, P.to("meta"))),
    (ValueError, "target must not require grad", lambda: ce(Z, P.clone().requires_grad_())),
    (IndexError, r"target must hold class indices in \[0, 3\).*got 3 at", lambda: ce(Z, Y + 1)),
    (IndexError, r"got -1 at flat position 0", lambda: ce(Z, Y - 1)),
    (IndexError, r"got 7 at flat position 2", lambda: ce(
        torch.randn(1, 4, 3), torch.tensor([[0, 1, 7, -100]]))),
    (TypeError, "weights must be a tensor, got", lambda: ce(Z, Y, [1.0] * 4)),
    (TypeError, "weights must be a tensor of real", lambda: ce(Z, Y, torch.ones(4).cfloat())),
    (ValueError, r"weights must have shape \[4\], a co", lambda: ce(Z, Y, torch.ones(3))),
    (ValueError, r"weights must have shape \[4\], a co", lambda: mse(Z, P, torch.ones(4, 1))),
    (ValueError, r"weights must be on cpu, got meta \(batch.to\(device\)", lambda: ce(
        Z, Y, torch.ones(4, **META))),
    (ValueError, "weights must not require grad", lambda: ce(
        Z, Y, torch.ones(4, requires_grad=True))),
    (ValueError, r"class_weights must have shape \[3\]", lambda: ce(
        Z, Y, class_weights=torch.ones(4))),
    (TypeError, "class_weights must be a tensor", lambda: ce(Z, Y, class_weights=[1, 1, 1])),
    (ValueError, "class_weights must not require grad", lambda: ce(
        Z, Y, class_weights=torch.ones(3, requires_grad=True))),
    (ValueError, r"label_smoothing must be in \[0, 1\], got 1.5", lambda: ce(
        Z, Y, label_smoothing=1.5)),
    (TypeError, "label_smoothing must be a number, got str 'a'", lambda: ce(
        Z, Y, label_smoothing="a")),
    (ValueError, r"ignore_index must be in \[-2147483648, 2147483647\], got 10995", lambda: ce(
        Z, Y, ignore_index=2**40)),
    (TypeError, "ignore_index must be an int, got float 1.0", lambda: ce(Z, Y, ignore_index=1.0)),
    (ValueError, "reduction must be one of 'mean', 'sum', 'none', got 'max'", lambda: ce(
        Z, Y, reduction="max")),
    (ValueError, "reduction must be one of", lambda: bce(Z, P, reduction="x")),
    (ValueError, "reduction must be one of", lambda: mse(Z, P, reduction="x")),
    (ValueError, "denominator must be None with reduction='sum'", lambda: ce(
        Z, Y, reduction="sum", denominator=3.0)),
    (ValueError, "denominator must be one number", lambda: ce(Z, Y, denominator=torch.ones(2))),
    (TypeError, "denominator must be a number", lambda: ce(Z, Y, denominator="B")),
    (TypeError, "denominator must be a number", lambda: ce(Z, Y, denominator=True)),
    (ValueError, "denominator must be in .*, got nan", lambda: ce(
        Z, Y, denominator=float("nan"))),
    (TypeError, "logits must be a tensor", lambda: bce(1.0, P)),
    (ValueError, r"target must have shape \[4, 3\]", lambda: bce(Z, P[0])),
    (TypeError, "target must be a tensor", lambda: bce(Z, 0.5)),
    (ValueError, r"pos_weight must have shape \[3\]", lambda: bce(
        Z, P, pos_weight=torch.ones(4))),
    (TypeError, "pos_weight must be a tensor", lambda: bce(Z, P, pos_weight=2.0)),
    (ValueError, "label_reduction must be one of", lambda: bce(Z, P, label_reduction="none")),
    (ValueError, "label_reduction must be one of", lambda: mse(Z, P, label_reduction="none")),
    (TypeError, "prediction must be a tensor", lambda: mse(None, P)),
    (ValueError, r"prediction must have shape", lambda: mse(Z[0, 0], P[0, 0])),
    (ValueError, r"target must have shape \[4, 3\]", lambda: mse(Z, P[:, :1])),
    (ValueError, "target must not require grad", lambda: mse(Z, P.clone().requires_grad_())),
    (ValueError, r"loss_fn must return one loss per sample, shape \[4\].*reduction='none'",
     lambda: scored(lambda z, y: per_sample(z, y).mean())),
    (ValueError, "loss_fn must return one loss per sample", lambda: scored(lambda z, y: 3.0)),
    (ValueError, "loss_fn must return losses that are differentiable",
     lambda: scored(lambda z, y: torch.ones(4))),
    (ValueError, "weights must have shape", lambda: scored(per_sample, torch.ones(3))),
    (ValueError, "reduction must be one of", lambda: scored(per_sample, reduction="x")),
    (TypeError, "logits must be a tensor", lambda: fastis.scored_loss(per_sample, 1, Y)),
]  # fmt: skip


@pytest.mark.parametrize(("error", "message", "call"), CASES, ids=range(len(CASES)))
def test_error(error, message, call):
    with pytest.raises(error, match=message):
        call()


def test_bad_label_by_the_reference():
    with fastis.backend("reference"), pytest.raises(IndexError, match=r"got 3 at flat position 2"):
        ce(Z, Y + 1)


def test_ignored_labels_are_not_out_of_range():
    assert ce(Z, Y + 1, ignore_index=3).losses[2] == 0
