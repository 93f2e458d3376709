"""A network that carries derivatives along, and the gradient norm of every point on the way.

A jet is a value with its derivatives (v, v_t, v_x, v_xx), a tensor ``[4, B, H]``. A linear layer
maps each of the four alike; for a = tanh(z + b) with s = 1 - a^2::

    a_t = s z_t      a_x = s z_x      a_xx = s (z_xx - 2 a z_x^2)

so one forward pass has all that a residual of first order in t and second in x needs (Taylor mode),
with no graph of a graph. The backward pass is written out, too, since it holds delta_c = d loss_i /
d z_c of every layer, channel c and point i: the gradient of loss_i by a layer's weights is the sum
over c of delta_c h_c^T, whose squared norm is::

    sum_{c,c'} (delta_c . delta_c') (h_c . h_c')      and by its bias   |delta_0|^2

(Goodfellow 2015, arXiv 1510.01799, with four rows a sample): exact, from what is there anyway. For
the last layer alone delta is known before any backward pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Tape(NamedTuple):
    """What a backward pass needs of a layer: h ``[4, B, I]``; with tanh z ``[4, B, O]``, a and s
    ``[B, O]``."""

    h: Tensor
    z: Tensor
    a: Tensor | None = None
    s: Tensor | None = None


class JetMLP:
    """A multilayer perceptron with tanh, of jets: ``[4, B, sizes[0]]`` -> ``[4, B]``.

    All parameters are one vector, ``theta``, which one fused step of Adam is enough for.
    """

    def __init__(self, sizes: Sequence[int], scale: float = 1.0) -> None:
        shapes = list(zip(sizes[1:], sizes[:-1], strict=True))
        lengths = [length for out, into in shapes for length in (out * into, out)]
        self.theta = torch.nn.Parameter(torch.zeros(sum(lengths)))
        self.theta.grad = torch.zeros_like(self.theta)
        parts = self.theta.detach().split(lengths), self.theta.grad.split(lengths)
        views = [
            [(p[2 * i].view(shape), p[2 * i + 1]) for i, shape in enumerate(shapes)] for p in parts
        ]
        self.layers, self._grads = views
        for weight, _ in self.layers:
            torch.nn.init.xavier_normal_(weight)
        self.layers[0][0].mul_(scale)

    @torch.no_grad()
    def forward(self, jets: Tensor) -> tuple[Tensor, list[Tape]]:
        """The output ``[4, B]``, and every layer's tape."""
        h, tapes = jets, []
        for weight, bias in self.layers[:-1]:
            z = h @ weight.T
            h, tape = tanh_forward(h, z, bias)
            tapes.append(tape)
        weight, bias = self.layers[-1]
        z = (h @ weight.T)[..., 0]
        z[0] += bias
        return z, [*tapes, Tape(h, z)]

    @torch.no_grad()
    def backward(self, tapes: Sequence[Tape], delta: Tensor, norms: bool = False) -> Tensor | None:
        """Sets ``theta.grad`` from ``delta [4, B]``, d loss / d output.

        Returns, if wanted, ``[B]``: the norms of the gradients that the points contribute.
        """
        back, squares = delta[..., None], []
        for layer in reversed(range(len(tapes))):
            tape, (weight, _) = tapes[layer], self.layers[layer]
            if tape.a is not None:
                back = tanh_backward(tape, back)
            if norms:
                squares.append(squared_norms(tape.h, back))
            of_weight, of_bias = self._grads[layer]
            torch.mm(back.flatten(0, 1).T, tape.h.flatten(0, 1), out=of_weight)
            torch.sum(back[0], 0, out=of_bias)
            if layer:
                back = back @ weight
        return torch.stack(squares).sum(0).sqrt() if norms else None


def tanh_forward(h: Tensor, z: Tensor, bias: Tensor) -> tuple[Tensor, Tape]:
    """The jet of tanh(z + bias), ``[4, B, O]``, and the tape."""
    out = torch.empty_like(z)
    a = torch.tanh(z[0] + bias, out=out[0])
    s = 1 - a * a
    torch.mul(z[1:], s, out=out[1:])
    out[3].addcmul_(a * s, z[2] * z[2], value=-2)
    return out, Tape(h, z, a, s)


def tanh_backward(tape: Tape, g: Tensor) -> Tensor:
    """d loss / d z, ``[4, B, O]``, from that by the jet of tanh(z + bias)."""
    z, a, s = tape.z, tape.a, tape.s
    assert a is not None
    assert s is not None
    second = a * s  # tanh'' = -2 a s
    curved = g[3] * z[2]
    back = g * s
    back[0].addcmul_(second, (g[1:] * z[1:]).sum(0), value=-2)
    back[0].addcmul_(s * (4 - 6 * s), curved * z[2])  # tanh''' = s (4 - 6 s)
    back[2].addcmul_(second, curved, value=-4)
    return back


def squared_norms(h: Tensor, delta: Tensor) -> Tensor:
    """``[B]``: of each point's gradient by a layer's weights and bias, from ``[4, B, I]`` and
    ``[4, B, O]``."""
    if delta.shape[-1] == 1:
        return (delta * h).sum(0).square().sum(1) + delta[0, :, 0].square()
    h, delta = h.transpose(0, 1), delta.transpose(0, 1)
    grams = torch.bmm(h, h.mT) * torch.bmm(delta, delta.mT)
    return grams.sum((1, 2)) + delta[:, 0].square().sum(1)
