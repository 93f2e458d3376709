"""Launching Triton kernels, with a driver that has no GPU behind it: compiled once, then launched
without Triton's Python; refused for the first time in a capture."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from conftest import INTERPRETED

pytestmark = [
    pytest.mark.skipif(not importlib.util.find_spec("triton"), reason="needs triton"),
    pytest.mark.skipif(INTERPRETED, reason="compiles, which the interpreter does not"),
]


@pytest.fixture
def gpu(monkeypatch):
    """A fake driver in which nothing was compiled yet."""
    import fake_triton_driver
    from triton.runtime import driver

    from fastis.kernels.triton import launch as triton_launch
    from fastis.kernels.triton import reduce as triton_reduce

    monkeypatch.setattr(triton_launch, "_ready", {})
    # (The kernels that Triton keeps belong to a device: an index of its own is a fresh one.)
    fake = fake_triton_driver.FakeDriver()
    fake.device = len(triton_reduce.scale_all_kernel.device_caches) + 100
    monkeypatch.setattr(driver, "_active", fake)
    monkeypatch.setattr(fake_triton_driver, "launches", launches := [])
    monkeypatch.setattr(fake_triton_driver, "compiled", compiled := [])
    return launches, compiled


def scale(grad, factor=2.0):
    from fastis.kernels.triton import loss as triton_loss

    return triton_loss.scale_grad(grad, torch.tensor(factor))


def test_a_kernel_is_bound_once(gpu, monkeypatch):
    launches, compiled = gpu
    from fastis.kernels.triton import reduce as triton_reduce

    grad = torch.rand(64, 16)
    scale(grad)
    assert len(launches) == len(compiled) == 1
    monkeypatch.setattr(triton_reduce.scale_all_kernel, "run", None)  # Triton's slow way
    scale(grad)
    scale(torch.rand(128, 16))
    assert (len(launches), len(compiled)) == (3, 1)
    # Grid, stream, function, ..., then what the kernel was called with, constants and all.
    assert launches[1][:4] == launches[0][:4]
    assert len(launches[1]) == len(launches[0])
    assert launches[0][-4:] == launches[1][-4:]


@pytest.mark.parametrize(
    "other",
    [lambda: torch.rand(64, 16).half(), lambda: torch.rand(64, 17)[:, 1:].contiguous()[1:, :7],
     lambda: torch.rand(1024 * 16 + 1)[1:], lambda: torch.rand(1)],
    ids=["dtype", "size", "alignment", "one"],
)  # fmt: skip
def test_what_triton_specialises_on_is_a_kernel_of_its_own(gpu, other):
    launches, compiled = gpu
    scale(torch.rand(1024, 16))
    grad = other()
    scale(grad)
    scale(other())
    assert (len(launches), len(compiled)) == (3, 2)


def test_another_device_has_kernels_of_its_own(gpu):
    """Compiled code is loaded for one device: the key must name it."""
    from fastis.kernels.triton import launch as triton_launch

    scale(torch.rand(64, 16))
    (key,) = triton_launch._ready
    assert torch.device("cpu") in key


def test_the_first_launch_in_a_capture_says_what_to_do(gpu, monkeypatch):
    from fastis.kernels.triton import launch as triton_launch

    launches, _ = gpu
    grad = torch.rand(64, 16)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    monkeypatch.setattr(triton_launch, "_is_cuda", lambda device: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: None)  # a cpu tensor's index
    with pytest.raises(RuntimeError, match=r"scale_all_kernel .* call the loss once .* before the"):
        scale(grad)
    assert not launches
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    scale(grad)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    scale(grad)
    scale(torch.rand(4096, 16))  # other sizes, the same kernel
    assert len(launches) == 3
