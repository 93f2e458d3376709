"""The scaling of saved gradients on a device, run on the host, against torch."""

from __future__ import annotations

import pytest
import torch
from native import native

from fastis.kernels.cuda import scale as cuda_scale
from fastis.kernels.reference import loss as reference_loss

FORMATS = [
    (torch.float32, torch.float32),
    (torch.float64, torch.float64),
    (torch.bfloat16, torch.bfloat16),
    (torch.float32, torch.float16),
]
SHAPES = [(1, 1), (3, 5), (7, 16), (128, 10), (5, 8, 33), (300, 1000)]
STRIDES = [0, 1, 7919]  # backwards, forwards, scrambled


@pytest.fixture(params=STRIDES)
def emulated(request, monkeypatch):
    def launch(entry, device, *arguments):
        assert native().scale_grad(*arguments, request.param) == 0

    monkeypatch.setattr(cuda_scale, "launch", launch)
    monkeypatch.setattr(cuda_scale._C, "cuda_scale_grad", None, raising=False)


def values(shape, dtype, seed=0):
    """Of all sizes that the format has, and what is not a number."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    x = x * 10.0 ** torch.randint(-8, 5, shape, generator=generator)
    flat = x.view(-1)
    flat[:: max(1, flat.numel() // 3)] = torch.tensor(float("inf"))
    flat[-1] = float("nan")
    return x.to(dtype)


@pytest.mark.parametrize(("before", "after"), FORMATS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("rows", [False, True])
def test_products_are_torchs(emulated, before, after, shape, rows):
    grad = values(shape, before)
    wide = torch.float64 if before == torch.float64 else torch.float32
    scale = torch.rand(shape[0] if rows else (), dtype=wide) * 3
    ours = cuda_scale.scale(grad, scale, torch.empty(shape, dtype=after))
    theirs = reference_loss.scale_grad(grad, scale, after)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_in_place_and_unaligned_and_strided(emulated, dtype):
    memory = values((1001,), dtype)
    grad = memory[1:].view(20, 50)  # not aligned to a pack
    expanded, strided = torch.tensor(3.0).expand(20), torch.rand(20, 3)[:, 1]
    for scale in (torch.tensor(2.0), expanded, strided):
        expected = reference_loss.scale_grad(grad.clone(), scale)
        assert cuda_scale.scale(grad, scale, grad) is grad
        torch.testing.assert_close(grad, expected, rtol=0, atol=0, equal_nan=True)


def test_a_scale_of_one_in_place_touches_nothing(monkeypatch, emulated):
    grad = torch.tensor([float("nan"), 1.0])
    grad.view(torch.int32)[0] = 0x7FC01234  # arithmetic would not keep a NaN's payload
    cuda_scale.scale(grad, torch.tensor(1.0), grad)
    assert int(grad.view(torch.int32)[0]) == 0x7FC01234


def test_every_bfloat16(emulated):
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    out = cuda_scale.scale(every, torch.tensor(1.0), torch.empty_like(every))
    torch.testing.assert_close(out, every, rtol=0, atol=0, equal_nan=True)


def test_every_float16_and_what_lies_between(emulated):
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    x = bits.view(torch.float16)
    x = x[x.isfinite()].float().sort().values
    largest = x.new_tensor([65519.996, 65520.0, float("nan"), float("inf")])
    between = torch.cat([x, (x[1:] + x[:-1]) / 2, torch.nextafter(x, x + 1), largest])
    out = torch.empty_like(between, dtype=torch.float16)
    cuda_scale.scale(between, torch.tensor(1.0), out)
    torch.testing.assert_close(out, between.half(), rtol=0, atol=0, equal_nan=True)


def test_other_scales_are_converted(emulated):
    grad = torch.rand(4, 3)
    half = torch.tensor(0.5, dtype=torch.float64)
    assert torch.equal(cuda_scale.scale(grad, half, torch.empty(4, 3)), grad / 2)
