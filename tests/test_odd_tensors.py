"""Tensors whose memory does not hold their values: the result is torch's, or the argument is named.

Each loss and ``Sampler.update``, with each of their tensors in turn replaced by an odd one. In a
process of its own, because what is wrong here reads address 0.
"""

from __future__ import annotations

import functools
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fastis

torch.manual_seed(0)
Z, Y, P = torch.randn(4, 3), torch.tensor([0, 1, 2, 0]), torch.rand(4, 3)
R, C = torch.rand(4) + 0.5, torch.rand(3) + 0.5


def two_tensor(t: Tensor) -> Tensor:
    from torch.testing._internal.two_tensor import TwoTensor

    return TwoTensor(t.clone(), t.clone())


def fake(t: Tensor) -> Tensor:
    from torch._subclasses.fake_tensor import FakeTensorMode

    return FakeTensorMode().from_tensor(t)


def freed(t: Tensor) -> Tensor:
    t = t.clone()
    t.untyped_storage().resize_(0)
    return t


def named_only(t: Tensor) -> Tensor:
    return t.as_subclass(type("Named", (Tensor,), {}))


# What torch computes with, and what it computes with in its place; then what has no values.
RESOLVED = {
    "negated": (torch._neg_view, torch.neg),
    "zero": (lambda t: torch._efficientzerotensor(t.shape, dtype=t.dtype), torch.zeros_like),
    "wrapper": (two_tensor, torch.clone),
    "named": (named_only, torch.clone),
    "parameter": (lambda t: torch.nn.Parameter(t, requires_grad=False), torch.clone),
}
REFUSED = {
    "freed": freed,
    "sparse": lambda t: t.to_sparse(),
    "csr": lambda t: t.to_sparse_csr() if t.dim() == 2 else t.to_sparse(),
    "mkldnn": lambda t: t.to_mkldnn() if t.is_floating_point() else t.to_sparse(),
    "fake": fake,
    "meta": lambda t: t.to("meta"),
    "list": lambda t: t.tolist(),
    "none": lambda t: None,
}


def cross_entropy(logits, target, weights, class_weights):
    return fastis.cross_entropy(logits, target, weights, class_weights=class_weights)


def bce(logits, target, weights, pos_weight):
    return fastis.binary_cross_entropy_with_logits(logits, target, weights, pos_weight=pos_weight)


def mse(prediction, target, weights):
    return fastis.mse_loss(prediction, target, weights)


LOSSES = {
    "cross_entropy": (cross_entropy, {"logits": Z, "target": Y, "weights": R, "class_weights": C}),
    "soft": (cross_entropy, {"logits": Z, "target": P, "weights": R, "class_weights": C}),
    "bce": (bce, {"logits": Z, "target": P, "weights": R, "pos_weight": C}),
    "mse": (mse, {"prediction": Z, "target": P, "weights": R}),
}
OPTIONAL = {"weights", "class_weights", "pos_weight"}


def complaint(call) -> str:
    """The message of the TypeError or ValueError that ``call`` must raise."""
    try:
        result = call()
    except (TypeError, ValueError) as error:
        return str(error)
    raise AssertionError(f"not refused: {result}")


def check_resolved(kind: str) -> None:
    odd, plain = RESOLVED[kind]
    for loss, arguments in LOSSES.values():
        for name, value in arguments.items():
            if kind in ("zero", "negated") and value.dtype == torch.int64:
                continue  # torch makes these of floats only
            expected = loss(**{**arguments, name: plain(value)})
            found = loss(**{**arguments, name: odd(value)})
            for a, b in zip(found, expected, strict=True):
                torch.testing.assert_close(getattr(a, "a", a).as_subclass(Tensor), b)


def check_refused(kind: str) -> None:
    for loss, arguments in LOSSES.values():
        for name, value in arguments.items():
            if kind == "none" and name in OPTIONAL:
                continue
            if kind == "meta" and name in ("logits", "prediction"):
                continue  # then it is the others that are on the wrong device
            odd = {**arguments, name: REFUSED[kind](value)}
            try:
                message = complaint(functools.partial(loss, **odd))
            except AssertionError as error:  # torch's own, of a fake tensor among real ones
                if "convert all Tensors to FakeTensors" not in str(error):
                    raise
            else:
                assert message.startswith(f"{name} must"), (name, message)


def check_update(kind: str, method: str) -> None:
    """Refused, naming the argument, with nothing changed; or taken."""
    sampler = fastis.Sampler(10, 4, method=method)
    before = sampler.state_dict()
    parts = {
        "batch.indices": Y,
        "batch.weights": R,
        "out.losses": R,
        "out.score": R,
        "out.mean_grad": C,
    }
    make = REFUSED[kind] if kind in REFUSED else RESOLVED[kind][0]
    for name, value in parts.items():
        if kind == "none" and name == "out.mean_grad":
            continue
        if kind == "negated" and name == "batch.indices":
            continue  # torch negates floats only
        new = {**parts, name: make(value)}
        batch = fastis.Batch(new["batch.indices"], new["batch.weights"])
        out = fastis.ScoredLoss(
            torch.ones(()), new["out.losses"], new["out.score"], new["out.mean_grad"]
        )
        unused = name == "out.losses" and method == "emais"
        for call in (sampler.update, sampler.update_and_sample):
            if unused or (kind in RESOLVED and kind != "wrapper"):
                fastis.Sampler(10, 4, method=method).update(batch, out)
                continue
            for given in (out, [out]):
                message = complaint(lambda c=call, b=batch, o=given: c(b, o))
                assert name.replace("out", "", 1) in message, (name, message)
    for name, value in sampler.state_dict().items():
        if isinstance(value, Tensor):
            torch.testing.assert_close(value, before[name], rtol=0, atol=0, equal_nan=True)


def check_update_of_negated(method: str) -> None:
    """What is resolved counts with its sign."""
    plain, negated = (fastis.Sampler(10, 4, method=method) for _ in range(2))
    values = [R, R + 1, R + 2, C]
    for sampler, floats in ((plain, values), (negated, [torch._neg_view(-v) for v in values])):
        weights, losses, score, mean_grad = floats
        for _ in range(3):
            sampler.update(
                fastis.Batch(Y, weights),
                fastis.ScoredLoss(torch.ones(()), losses, score, mean_grad),
            )
    for a, b in zip(plain.state_dict().values(), negated.state_dict().values(), strict=True):
        if isinstance(a, Tensor):
            torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


def check_incoming(kind: str) -> None:
    odd, _ = RESOLVED[kind]
    logits = Z.clone().requires_grad_()
    grads = []
    for loss in (fastis.cross_entropy(logits, Y).loss, F.cross_entropy(logits, Y)):
        (g,) = torch.autograd.grad(loss, logits, odd(torch.ones(())))
        grads.append(getattr(g, "a", g))
    torch.testing.assert_close(*grads)


METHODS = ("emais", "loss", "confidence")
CHECKS = {
    "resolved": [(check_resolved, kind) for kind in RESOLVED],
    "refused": [(check_refused, kind) for kind in REFUSED],
    "update": [(check_update, kind, m) for kind in (*REFUSED, *RESOLVED) for m in METHODS],
    "negated": [(check_update_of_negated, method) for method in METHODS],
    "incoming": [(check_incoming, kind) for kind in ("negated", "wrapper", "zero")],
}


@pytest.mark.parametrize("name", CHECKS)
def test_of_odd_tensors(name):
    code = f"import sys; sys.path[:0] = {sys.path!r}; import test_odd_tensors as t; t.run({name!r})"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    last = result.stdout.strip().splitlines()[-1:]
    assert result.returncode == 0, f"{result.returncode} at {last}\n{result.stderr}"


def run(name: str) -> None:
    for check, *arguments in CHECKS[name]:
        print(check.__name__, *arguments, flush=True)
        check(*arguments)


@pytest.mark.parametrize("batch", [None, 3, torch.ones(()), (Y,), (Y, R, R)])
def test_a_batch_is_a_pair(batch):
    sampler = fastis.Sampler(10, 4)
    with pytest.raises(TypeError, match="batch must be a Batch, got"):
        sampler.update(batch, fastis.cross_entropy(Z, Y))
    assert sampler.step == 0


@pytest.mark.parametrize("out", [None, 3, [R], []])
def test_an_output_is_a_scored_loss(out):
    sampler = fastis.Sampler(10, 4)
    with pytest.raises((TypeError, ValueError), match="out must"):
        sampler.update(fastis.Batch(Y, R), out)
    assert sampler.step == 0
