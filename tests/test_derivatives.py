"""Derivatives of the losses in every mode of torch: right, or refused; never silently 0."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import forward_ad
from torch.autograd import functional as functional
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vmap

import fastis

torch.manual_seed(0)
Z, T = torch.randn(4, 3, dtype=torch.float64), torch.randn(4, 3, dtype=torch.float64)
Y, P, R = torch.tensor([0, 1, 2, 0]), torch.rand(4, 3, dtype=torch.float64), torch.rand(4).double()

LOSSES = {
    "cross_entropy": lambda z: fastis.cross_entropy(z, Y, R).loss,
    "soft": lambda z: fastis.cross_entropy(z, P, R).loss,
    "none": lambda z: fastis.cross_entropy(z, Y, R, reduction="none").loss.sum(),
    "bce": lambda z: fastis.binary_cross_entropy_with_logits(z, P, R).loss,
    "mse": lambda z: fastis.mse_loss(z, P, R).loss,
}


def in_the_tape(z):
    return (R * F.cross_entropy(z, Y, reduction="none")).mean()


def scored(z):
    return fastis.scored_loss(lambda a, b: F.cross_entropy(a, b, reduction="none"), z, Y, R).loss


def dual(f, requires_grad=False):
    with forward_ad.dual_level():
        z = Z.clone().requires_grad_(requires_grad)
        return forward_ad.unpack_dual(f(forward_ad.make_dual(z, T))).tangent


def dual_backward(f):
    with forward_ad.dual_level():
        z = forward_ad.make_dual(Z.clone().requires_grad_(), T)
        (g,) = torch.autograd.grad(f(z), z)
        return forward_ad.unpack_dual(g).tangent


def create_graph(f):
    z = Z.clone().requires_grad_()
    (g,) = torch.autograd.grad(f(z), z, create_graph=True)
    return torch.autograd.grad(g.square().sum(), z)[0]


def in_a_mode(f):
    from torch.utils._python_dispatch import TorchDispatchMode

    class Mode(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            return function(*args, **(kwargs or {}))

    with Mode():
        return create_graph(f)


FORWARD = {
    "jvp": lambda f: jvp(f, (Z,), (T,))[1],
    "dual": dual,
    "dual that requires grad": lambda f: dual(f, True).detach(),
    "jacfwd": lambda f: jacfwd(f)(Z),
    "functional.jvp": lambda f: functional.jvp(f, Z, T)[1],
}
SECOND = {
    "grad of grad": lambda f: grad(lambda z: grad(f)(z).square().sum())(Z),
    "jacrev of jacrev": lambda f: jacrev(jacrev(f))(Z),
    "hessian": lambda f: hessian(f)(Z),
    "jacrev of jacfwd": lambda f: jacrev(jacfwd(f))(Z),
    "backward of a dual": dual_backward,
    "create_graph": create_graph,
    "create_graph in a mode": in_a_mode,
    "functional.hvp": lambda f: functional.hvp(f, Z, T)[1],
    "functional.hessian": lambda f: functional.hessian(f, Z),
}


@pytest.mark.parametrize("how", [*FORWARD, *SECOND])
@pytest.mark.parametrize("name", LOSSES)
def test_what_was_not_computed_is_refused(name, how):
    with pytest.raises(RuntimeError, match="first derivative only"):
        {**FORWARD, **SECOND}[how](LOSSES[name])


@pytest.mark.parametrize("how", [*FORWARD, *SECOND])
def test_scored_loss_is_right_to_any_order(how):
    derivative = {**FORWARD, **SECOND}[how]
    torch.testing.assert_close(derivative(scored), derivative(in_the_tape))


def test_second_derivatives_under_vmap_are_refused():
    def one(z, y):
        return fastis.cross_entropy(z[None], y[None]).loss

    def penalty(z):
        return vmap(grad(one))(z, Y).square().sum()

    with pytest.raises(RuntimeError, match="first derivative only"):
        grad(penalty)(Z)
    expected = vmap(grad(lambda z, y: F.cross_entropy(z[None], y[None])))(Z, Y)
    torch.testing.assert_close(vmap(grad(one))(Z, Y), expected)
    torch.testing.assert_close(grad(lambda z: vmap(one)(z, Y).sum())(Z), expected)


@pytest.mark.parametrize("argument", ["target", "weights"])
def test_tangents_of_constants_are_refused(argument):
    with forward_ad.dual_level():
        arguments = {"target": P, "weights": R}
        value = arguments[argument]
        arguments[argument] = forward_ad.make_dual(value, torch.ones_like(value))
        for loss in (fastis.cross_entropy, fastis.mse_loss):
            with pytest.raises(RuntimeError, match="first derivative only"):
                loss(Z, **arguments)


def test_a_dual_level_without_tangents_changes_nothing():
    expected = fastis.cross_entropy(Z, Y)
    with forward_ad.dual_level():
        found = fastis.cross_entropy(Z, Y)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_jvp_is_refused_under_compile():
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda z: jvp(LOSSES["cross_entropy"], (z,), (T,))[1], backend="aot_eager"
    )
    with pytest.raises(RuntimeError, match="first derivative only"):
        compiled(Z)


def test_losses_and_score_are_detached():
    out = fastis.cross_entropy(Z.clone().requires_grad_(), Y)
    assert not any(tensor.requires_grad for tensor in out[1:])


def test_batched_incoming_gradients():
    z = Z.float().requires_grad_()
    grads = []
    for loss in (fastis.cross_entropy(z, Y).loss, F.cross_entropy(z, Y)):
        ups = torch.tensor([1.0, 2.0])
        grads += torch.autograd.grad(loss, z, ups, is_grads_batched=True)
    torch.testing.assert_close(*grads)
