"""Triton without a GPU: what it takes and refuses, its launches, how gradients are scaled.

Triton decides on import whether it interprets its kernels, so the tests of values run in a process
of their own (``TRITON_INTERPRET=1``), which test_in_the_interpreter starts; there the tests of the
other backends run on this one too. Kernels are also compiled, for four architectures.
"""

from __future__ import annotations

import importlib.util
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import INTERPRETED, interpreted
from test_triton_loss import batch_of

import fastis
from fastis import kernels
from fastis.kernels.loss import CrossEntropyOptions, Wanted
from fastis.kernels.reference import loss as reference_loss

HERE = Path(__file__).parent
ROOT = HERE.parent
pytestmark = [
    pytest.mark.skipif(not importlib.util.find_spec("triton"), reason="needs triton"),
    pytest.mark.usefixtures("unwritten_memory_is_nan"),
]
if INTERPRETED:
    import triton  # (in the order of a user: the variable, then the import)

    from fastis.kernels.triton import loss as triton_loss


def python(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    """Python on this source tree, without the interpreter unless it is asked for."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    env |= {"OMP_NUM_THREADS": "1", **environment}
    command = [sys.executable, *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=env, cwd=ROOT)


@pytest.mark.skipif(INTERPRETED, reason="is this process")
@pytest.mark.parametrize(
    "name",
    ["triton", "triton_loss", pytest.param("loss_kernels", marks=pytest.mark.slow), "loss"],
)
def test_in_the_interpreter(name):
    options = ["-q", "-x", "-p", "no:cacheprovider", "-W", "ignore::RuntimeWarning"]
    done = python("-m", "pytest", *options, str(HERE / f"test_{name}.py"), TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]


@pytest.mark.slow
@pytest.mark.skipif(INTERPRETED, reason="compiles, which the interpreter does not")
def test_every_kernel_compiles_without_spills():
    done = python("bench/kernel_resources.py", "--check")
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]


@pytest.mark.skipif(INTERPRETED, reason="about a process without the interpreter")
def test_cpu_tensors_need_the_interpreter():
    z, y = torch.randn(3, 4), torch.tensor([0, 1, 2])
    with (
        fastis.backend("triton"),
        pytest.raises(RuntimeError, match=r"only in Triton's interpreter \(TRITON_INTERPRET=1"),
    ):
        fastis.cross_entropy(z, y)
    with (
        fastis.backend("triton"),
        pytest.raises(RuntimeError, match="has no table kernels for cpu tensors"),
    ):
        kernels.kernels_for("table", "cpu")
    assert kernels.kernels_for("loss", "cpu").__name__.endswith(("cpu.loss", "reference.loss"))


def test_missing_triton_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)  # as if it were not installed
    with (
        pytest.raises(RuntimeError, match="'triton' was asked for, but triton could not be imp"),
        fastis.backend("triton"),
    ):
        pass
    monkeypatch.setattr(kernels, "_chosen", {})
    assert kernels.missing("triton", "loss", "cuda").startswith("triton could not be imported")
    assert kernels.kernels_for("loss", "cuda") is reference_loss


def test_old_triton_is_named(monkeypatch):
    import triton

    monkeypatch.setattr(triton, "__version__", "3.1.0")
    assert "triton 3.1.0 is older than 3.6" in kernels.missing("triton", "loss", "cuda")
    monkeypatch.setattr(triton, "__version__", "3.10.0")
    assert not kernels.missing("triton", "loss", "cuda")


def test_cuda_tensors_are_tritons():
    assert not kernels.missing("triton", "loss", "cuda")
    assert "no categorical kernels for cuda" in kernels.missing("triton", "categorical", "cuda")
    done = python("-c", "import fastis; fastis.show_config()")
    assert "\ntriton 3." in done.stdout
    assert "triton: its kernels run on CPU tensors only in" in done.stdout


# ---- in the interpreter ----


@interpreted
def test_interpreter_is_on():
    assert triton.knobs.runtime.interpret
    with fastis.backend("triton"):
        assert kernels.kernels_for("loss", "cpu") is triton_loss


@interpreted
@pytest.mark.parametrize(
    ("shape", "weighted", "mean", "expected"),
    [((128, 10), False, True, 1), ((300, 100), True, True, 2), ((300, 100), False, True, 3),
     ((4, 4100), True, False, 2), ((3, 4, 10), False, False, 2), ((9, 400, 10), True, False, 2)],
)  # fmt: skip
def test_number_of_launches(monkeypatch, shape, weighted, mean, expected):
    launches = []
    monkeypatch.setattr(triton_loss, "_launch", lambda kernel, *_, **__: launches.append(kernel))
    logits, target, r, _ = batch_of(shape)
    weights, denominator = (r, 3.0) if weighted else (None, None)
    options, wanted = CrossEntropyOptions(None, 3), Wanted(denominator, True, True, mean)
    triton_loss.cross_entropy(logits, target, weights, options, wanted)
    assert len(launches) == expected


@interpreted
@pytest.mark.parametrize("programs", [1, 3])
@pytest.mark.parametrize("size", [1, 4096, 9001])
@pytest.mark.parametrize("scale", [1.0, 3.0, 0.0, math.nan])
def test_scale_grad_by_a_number(monkeypatch, programs, size, scale):
    monkeypatch.setattr(triton_loss, "_SCALE_PROGRAMS", programs)
    grad, up = torch.randn(size), torch.tensor(scale)
    before = grad.clone()
    out = triton_loss.scale_grad(grad, up)
    assert out.data_ptr() != grad.data_ptr()
    assert torch.equal(grad, before)
    torch.testing.assert_close(out, before * scale, equal_nan=True, rtol=0, atol=0)
    half = triton_loss.scale_grad(grad, up, torch.float16)
    assert half.dtype == torch.float16
    torch.testing.assert_close(half, (before * scale).half(), equal_nan=True)
    monkeypatch.setattr(triton_loss, "_keeps_graph", lambda: False)
    assert triton_loss.scale_grad(grad, up).data_ptr() == grad.data_ptr()
    torch.testing.assert_close(grad, before * scale, equal_nan=True, rtol=0, atol=0)


@interpreted
@pytest.mark.parametrize("shape", [(5, 3), (3, 5000), (2, 3, 4), (7, 1), (300, 20)])
@pytest.mark.parametrize("expanded", [False, True])
def test_scale_grad_by_rows(shape, expanded):
    grad = torch.randn(shape)
    up = torch.tensor(2.5).expand(shape[0]) if expanded else torch.randn(shape[0])
    expected = reference_loss.scale_grad(grad, up)
    assert torch.equal(triton_loss.scale_grad(grad, up), expected)
    strided = torch.stack([up, up], 1)[:, 0]
    assert torch.equal(triton_loss.scale_grad(grad, strided), expected)


@interpreted
def test_the_gradient_is_scaled_in_place_only_where_the_graph_is_freed(monkeypatch):
    addresses = []
    inner = triton_loss._launch

    def watch(kernel, grid, num_warps, *arguments, **constants):
        if kernel is triton_loss.scale_all_kernel:
            addresses.append((arguments[0].data_ptr(), arguments[1].data_ptr()))
        inner(kernel, grid, num_warps, *arguments, **constants)

    monkeypatch.setattr(triton_loss, "_launch", watch)
    logits, target, r, _ = batch_of((6, 5))
    logits.requires_grad_()
    with fastis.backend("triton"):
        loss = 2 * fastis.cross_entropy(logits, target, r).loss
        (first,) = torch.autograd.grad(loss, logits, retain_graph=True)
        kept = first.clone()
        (second,) = torch.autograd.grad(loss, logits, torch.tensor(3.0), retain_graph=True)
        (third,) = torch.autograd.grad(loss, logits)
    assert torch.equal(first, kept), "a later pass changed an earlier result"
    torch.testing.assert_close(second, 3 * kept)
    assert torch.equal(third, kept)
    assert [before == after for before, after in addresses] == [False, False, True]


@interpreted
def test_the_read_ceiling_reads_all():
    from bench.gpu_ceilings import check_read

    check_read(torch.randint(1 << 16, (3 * 4096,), dtype=torch.int32))
