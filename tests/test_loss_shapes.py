"""The losses at the ends of their range of shapes: nothing in a minibatch, millions in a row."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

import fastis

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
WIDE = 16385  # from here on less than a row is a chunk's least work
CLASSES = [(0, 3), (0, 100), (0, WIDE - 1), (0, WIDE), (0, 10**6), (2, WIDE), (17, WIDE),
           (0, 0, 5), (0, 4, 5), (3, 0, 5), (3, 0, WIDE), (0, 4, WIDE), (2, 1, WIDE)]  # fmt: skip
LABELS = [(0,), (0, 0), (0, 3), (0, WIDE), (3, 0), (0, 2, 3), (3, 0, 2), (3, 2, 0), (5,),
          (2, 1023), (2, 1024), (2, 1025), (3, WIDE)]  # fmt: skip


def check(ours, theirs, logits):
    torch.testing.assert_close(ours.float(), theirs.float(), rtol=2e-5, atol=1e-6, equal_nan=True)
    (g,) = torch.autograd.grad(ours.sum(), logits)
    assert g.shape == logits.shape


def run(reduction: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    for shape in CLASSES:
        z = torch.randn(shape, dtype=dtype, requires_grad=True)
        labels = torch.zeros(shape[:-1], dtype=torch.int64)
        shares = torch.rand(shape, dtype=wide)
        for target, smoothing in ((labels, 0.0), (labels, 0.1), (shares, 0.0)):
            print(shape, dtype, target.dtype, smoothing, flush=True)
            ours = fastis.cross_entropy(z, target, label_smoothing=smoothing, reduction=reduction)
            seen = z.detach().to(wide).movedim(-1, 1)
            other = target if target is labels else target.movedim(-1, 1)
            theirs = F.cross_entropy(seen, other, label_smoothing=smoothing, reduction=reduction)
            if reduction == "none":
                theirs = theirs.sum(1) if len(shape) == 3 else theirs
            check(ours.loss, theirs, z)
    for shape in LABELS:
        z, y = torch.randn(shape, dtype=dtype, requires_grad=True), torch.rand(shape, dtype=wide)
        for name in ("binary_cross_entropy_with_logits", "mse_loss"):
            print(shape, dtype, name, flush=True)
            ours = getattr(fastis, name)(z, y, reduction=reduction).loss
            theirs = getattr(F, name)(z.detach().to(wide), y, reduction=reduction)
            if reduction == "none" and len(shape) > 1:
                theirs = theirs.flatten(1).mean(1)
            check(ours, theirs, z)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_the_ends_of_the_range_are_torchs(reduction):
    """In a process of its own: a division by zero ends it."""
    code = f"import sys; sys.path[:0] = {sys.path!r}; import test_loss_shapes as t; "
    code += f"[t.run({reduction!r}, dtype) for dtype in t.DTYPES]"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    last = result.stdout.strip().splitlines()[-1:]
    assert result.returncode == 0, f"exit code {result.returncode} at {last}\n{result.stderr}"


@pytest.mark.parametrize("name", ["mse_loss", "binary_cross_entropy_with_logits", "soft"])
def test_a_row_of_ten_million_is_as_exact_as_torchs(any_backend, name):
    """Rounding to float32 is 6e-8; torch, which adds in pairs, is within 5e-7 here."""
    torch.manual_seed(0)
    z, y = torch.randn(1, 10**7), torch.rand(1, 10**7)
    loss = fastis.cross_entropy if name == "soft" else getattr(fastis, name)
    if name == "soft":
        y /= y.sum()
    out, exact = loss(z, y), loss(z.double(), y.double())
    torch.testing.assert_close(out.loss.double(), exact.loss, rtol=6e-7, atol=0)
    torch.testing.assert_close(out.score.double(), exact.score, rtol=6e-7, atol=0)


@pytest.mark.parametrize("total", [1.0, 4e4])
def test_a_smoothing_next_to_1_keeps_its_digits(any_backend, total):
    torch.manual_seed(0)
    z, y = torch.randn(8, 100), torch.rand(8, 100)
    y *= total / y.sum(1, keepdim=True)
    ours = fastis.cross_entropy(z, y, label_smoothing=0.999999).loss
    exact = F.cross_entropy(z.double(), y.double(), label_smoothing=0.999999)
    torch.testing.assert_close(ours.double(), exact, rtol=5e-7, atol=0)
