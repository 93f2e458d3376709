"""The CUDA backend's Python on tensors without data: whatever would wait for a device is an error.

On ``device="meta"`` reading a number on the host raises by itself, and so do operations whose
result's shape depends on data; :class:`NoCopies` adds copies from the host, which wait as well.
Launches are recorded instead of made.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import fastis.loss
from fastis import kernels
from fastis.kernels.cuda import categorical as cuda_categorical
from fastis.kernels.cuda import scale as cuda_scale
from fastis.kernels.cuda import table as cuda_table

META = torch.device("meta")


class NoCopies(TorchDispatchMode):
    """Raises where a tensor of the host's is copied to the device."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        done = function(*args, **(kwargs or {}))
        name = function.overloadpacket.__name__
        if name in ("_to_copy", "copy_", "lift_fresh_copy"):
            ends = [t.device for t in (done, *args) if isinstance(t, Tensor)]
            if len(set(ends)) > 1:
                raise RuntimeError(f"{name} between {ends[0]} and {ends[-1]} waits for the device")
        return done


class EntryPoints:
    """Stands for fastis._C, which may have been built without CUDA: names in place of functions."""

    def __getattr__(self, name: str):
        if name.endswith("_bytes"):
            return lambda *_: 64
        return name


def on_meta(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Lets the CUDA backend serve meta tensors; the names of what would be launched."""
    launched: list[str] = []
    for module in (cuda_categorical, cuda_scale, cuda_table):
        monkeypatch.setattr(module, "launch", lambda entry, *_: launched.append(entry))
        monkeypatch.setattr(module, "_C", EntryPoints())
    monkeypatch.setitem(kernels._chosen, ("table", "meta"), cuda_table)
    monkeypatch.setitem(kernels._chosen, ("categorical", "meta"), cuda_categorical)
    return launched


def losses_on_meta(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The same for the losses."""
    from fastis.kernels.triton import loss as triton_loss

    launched = on_meta(monkeypatch)
    monkeypatch.setitem(kernels._chosen, ("loss", "meta"), triton_loss)
    monkeypatch.setattr(fastis.loss, "needs_operator", lambda *_: False)
    monkeypatch.setattr(triton_loss, "_dispatch_modes", lambda: 0)
    monkeypatch.setattr(
        triton_loss, "_launch", lambda kernel, *_, **__: launched.append(kernel.__name__)
    )
    return launched


@contextlib.contextmanager
def no_host_reads() -> Iterator[None]:
    """Inside, what would wait for a device raises. Tensors from numbers are not dispatched."""

    def refuse(*_, **__):
        raise RuntimeError("numbers of the host's become a tensor on the device: that is a copy")

    tensor = mock.patch.object(torch, "tensor", refuse)
    with NoCopies(), tensor, mock.patch.object(Tensor, "new_tensor", refuse):
        yield
