"""The Triton losses without a GPU: interpreted against float64, compiled for four architectures.

Triton decides on import whether it interprets its kernels, so the tests of values run in a process
of their own (``TRITON_INTERPRET=1``), which test_in_the_interpreter starts; there the tests of the
other backends run on this one too. Uninitialised memory is NaN in it, so an element that no program
writes is seen.
"""

from __future__ import annotations

import importlib.util
import itertools
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import INTERPRETED

import fastis
from fastis import kernels
from fastis.kernels import reference_loss, triton_geometry
from fastis.kernels.triton_geometry import Sweeps, Tiles

HERE = Path(__file__).parent
ROOT = HERE.parent
pytestmark = pytest.mark.skipif(not importlib.util.find_spec("triton"), reason="needs triton")
interpreted = pytest.mark.skipif(
    not INTERPRETED, reason="for the process that test_in_the_interpreter starts"
)
if INTERPRETED:
    import triton  # (in the order of a user: the variable, then the import)

    from fastis.kernels import triton_loss

FLOATS = [torch.float32, torch.bfloat16, torch.float16]
# Of the gradient's rounding to the logits' dtype; the interpreter truncates to bfloat16. float16
# gradients wait in float32.
ROUNDING = {torch.float32: 0.0, torch.bfloat16: 2.0**-7, torch.float16: 0.0}


def python(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    """Python on this source tree, without the interpreter unless it is asked for."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    env |= {"OMP_NUM_THREADS": "1", **environment}
    command = [sys.executable, *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=env, cwd=ROOT)


@pytest.mark.skipif(INTERPRETED, reason="is this process")
def test_in_the_interpreter():
    suites = [str(HERE / f"test_{name}.py") for name in ("triton_loss", "loss_kernels", "loss")]
    options = ["-q", "-x", "-p", "no:cacheprovider", "-W", "ignore::RuntimeWarning"]
    done = python("-m", "pytest", *options, *suites, TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]


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
        pytest.raises(RuntimeError, match="has no update kernels for cpu tensors"),
    ):
        kernels.kernels_for("update", "cpu")
    assert kernels.kernels_for("loss", "cpu").__name__.endswith(("cpu_loss", "reference_loss"))


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
    assert "no sample kernels for cuda" in kernels.missing("triton", "sample", "cuda")
    done = python("-c", "import fastis; fastis.show_config()")
    assert "\ntriton 3." in done.stdout
    assert "triton: its kernels run on CPU tensors only in" in done.stdout


# ---- in the interpreter ----


@pytest.fixture(autouse=True)
def unwritten_memory_is_nan():
    """torch.empty fills with NaN while torch is to be deterministic."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=["planned", "tiles", "sweeps"])
def walk(request, monkeypatch):
    """Small matrices walked as planned (by one program), in tiles with a loop, or in sweeps."""
    if request.param != "planned":
        monkeypatch.setattr(triton_loss, "is_whole", lambda rows, columns: False)
    if request.param == "tiles":

        def tiles(rows, columns, *_, **__):
            return Tiles(2, triton_geometry.power_of_two(columns), 1, min(2, -(-rows // 2)))

        monkeypatch.setattr(triton_loss, "row_launch", tiles)
        monkeypatch.setattr(triton_loss, "label_launch", tiles)
        monkeypatch.setattr(triton_loss, "column_sums", lambda parts, columns:
                            triton_geometry.Sums(1, 4, 1, -(-columns // 4)))  # fmt: skip
    if request.param == "sweeps":

        def sweeps(rows, columns, *, aligned, with_grad, **_):
            return Sweeps(2, 8 // aligned, aligned, 1 if with_grad else 3, 1, rows)  # blocks of 16

        monkeypatch.setattr(triton_loss, "row_launch", sweeps)
    return request.param


def batch_of(shape, dtype=torch.float32, kind="labels", seed=0):
    """Logits with some spread, a target with ignored labels (3), coefficients, class weights."""
    torch.manual_seed(seed)
    logits = (3 * torch.randn(shape)).to(dtype)
    if kind == "soft":
        target = torch.rand(shape).softmax(-1)
    else:
        target = torch.randint(shape[-1], shape[:-1])
        target.view(-1)[1::4] = 3
    return logits, target, torch.rand(shape[0]) + 0.5, torch.rand(shape[-1]) + 0.1


def truth(logits, target, weights, class_weights, *options):
    """The reference in float64; labels out of range are the device's business, not the CPU's."""
    wide = [
        t.double() if t is not None and t.is_floating_point() else t
        for t in (logits, target, weights, class_weights)
    ]
    return reference_loss.cross_entropy(*wide, *options)


def agree(ours, theirs, dtype=torch.float32, slack=2e-6):
    """loss, losses, score, mean_grad, grad to a few float32 roundings, NaN and inf in place."""
    names = ("loss", "losses", "score", "mean_grad", "grad")
    for name, a, b in zip(names, ours, theirs, strict=True):
        assert (a is None) == (b is None), name
        if a is None:
            continue
        assert a.shape == b.shape, name
        assert a.is_contiguous(), name
        rtol = slack + (ROUNDING[dtype] if name == "grad" else 0)
        torch.testing.assert_close(
            a.double(), b, rtol=rtol, atol=slack, equal_nan=True, msg=lambda m, n=name: f"{n}: {m}"
        )


@interpreted
@pytest.mark.parametrize("kind", ["labels", "smoothed", "soft"])
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", [(5, 37), (2, 2, 34), (5, 1)])
def test_cross_entropy(walk, kind, dtype, shape):
    if dtype != torch.bfloat16 and (walk == "planned" or (walk, dtype) == ("sweeps", FLOATS[2])):
        pytest.skip("slow in the interpreter, and done in test_loss_kernels.py or as bfloat16")
    logits, target, r, w = batch_of(shape, dtype, kind)
    mean = len(shape) == 2 and walk != "sweeps"
    smoothing = 0.2 if kind != "labels" else 0.0
    cases = [
        (None, None, None, True),
        (r, None, 7.5, True),
        (None, w, None, True),
        (r, -w, torch.tensor(2.5), True),
        (r, w, 1.0, False),
    ]
    for weights, class_weights, denominator, reduce in cases:
        options = (3, smoothing, denominator, reduce, True, mean)
        ours = triton_loss.cross_entropy(logits, target, weights, class_weights, *options)
        agree(ours, truth(logits, target, weights, class_weights, *options), dtype)
        if denominator != 7.5:
            continue
        lean = triton_loss.cross_entropy(
            logits, target, weights, class_weights, *options[:4], False, False
        )
        assert lean[3] is lean[4] is None
        if dtype != torch.float16 or walk != "sweeps":  # (else in other blocks, as grads are wider)
            assert all(torch.equal(a, b) for a, b in zip(lean[:3], ours[:3], strict=True))


@interpreted
@pytest.mark.parametrize("name", ["binary_cross_entropy_with_logits", "mse_loss"])
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", [(6, 37), (5, 1)])
def test_label_losses(walk, name, dtype, shape):
    if walk == "sweeps" or (walk == "planned" and dtype != torch.bfloat16):
        pytest.skip("labels are never swept; as planned they are in test_loss_kernels.py")
    logits, _, r, w = batch_of(shape, dtype)
    target = torch.rand(shape)
    pos = [(w,), (None,)] if name.startswith("binary") else [()]
    cases = itertools.product(pos, (None, r), (7.5, torch.tensor(2.5)), (True, False))
    for middle, weights, denominator, reduce in cases:
        rest = (float(shape[1]), denominator if reduce else 1.0, reduce, True, True)
        ours = getattr(triton_loss, name)(logits, target, weights, *middle, *rest)
        wide = [None if t is None else t.double() for t in (logits, target, weights, *middle)]
        agree(ours, getattr(reference_loss, name)(*wide, *rest), dtype)


@interpreted
def test_label_losses_longer_than_a_tile():
    torch.manual_seed(0)
    logits, target = torch.randn(2, 9001), torch.rand(2, 9001)
    rest = (1.0, 3.0, True, True, False)
    ours = triton_loss.binary_cross_entropy_with_logits(logits, target, None, None, *rest)
    theirs = reference_loss.binary_cross_entropy_with_logits(
        logits.double(), target.double(), None, None, *rest
    )
    agree(ours, theirs, slack=1e-5)


@interpreted
@pytest.mark.parametrize("num_classes", [4097, 8192, 9001, 17000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["labels", "smoothed", "soft"])
def test_many_classes_as_planned(num_classes, dtype, kind):
    logits, target, r, w = batch_of((3, num_classes), dtype, kind)
    if kind != "soft":
        target[1] = num_classes - 1
        target[2] = 3
    options = (3, 0.1 if kind == "smoothed" else 0.0, None, True, True, False)
    ours = triton_loss.cross_entropy(logits, target, r, w, *options)
    agree(ours, truth(logits, target, r, w, *options), dtype, slack=5e-6)


@interpreted
@pytest.mark.parametrize("kind", ["labels", "smoothed", "soft"])
@pytest.mark.parametrize("dtype", FLOATS)
def test_special_rows(walk, kind, dtype):
    inf, nan = math.inf, math.nan
    _, target, r, _ = batch_of((18, 21), dtype, kind)
    logits = torch.randn(18, 21)
    if kind != "soft":
        target[:] = 0
    logits[0, 1:] = -inf  # only the label is possible
    logits[1, 4:] = -inf
    logits[2, 0] = -inf  # the label is impossible
    logits[3, :-1] = -inf
    logits[4, 5] = nan
    logits[5, 0] = nan  # at the label
    logits[6, 20] = inf
    logits[7, 0] = inf
    logits[8] = -inf
    logits[9] = nan
    logits[10, 8:16] = -inf  # whole blocks of a sweep
    logits[11, :16] = -inf
    logits[12] = 7.0
    logits[13, 0] = 300.0
    logits[14, 7] = 300.0
    logits[15] = -1e4
    logits[16, 1] = nan
    if kind != "soft":
        target[16] = 3  # ignored
    logits = logits.to(dtype)
    options = (3, 0.2 if kind == "smoothed" else 0.0, 1.0, True, True, walk != "sweeps")
    ours = triton_loss.cross_entropy(logits, target, r, None, *options)
    agree(ours, truth(logits, target, r, None, *options), dtype, slack=5e-6)


@interpreted
@pytest.mark.parametrize("gap", [0.0, 0.1, 5.0, 15.0, 30.0, 60.0, 88.0, 95.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_confident_rows_keep_their_score(walk, gap, dtype):
    """Where 1 - 2 p_y + sum p_j^2 is exactly 0, for losses as small as 1e-38. The difference of two
    logits is rounded at 2^-24 of the gap, its exponential by as much relatively: 5e-6 at 88."""
    logits, target, _, _ = batch_of((4, 21), dtype)
    target[:] = 2
    logits[:2, 2] = logits[:2].amax(1) + gap
    logits[2:, 2] = logits[2:].amin(1) - gap
    options = (-100, 0.0, 4.0, True, False, False)
    ours = triton_loss.cross_entropy(logits, target, None, None, *options)
    theirs = truth(logits, target, None, None, *options)
    # Beyond 87 the result is subnormal, with steps of 1.4e-45.
    for a, b in zip(ours[1:3], theirs[1:3], strict=True):
        torch.testing.assert_close(a.double(), b, rtol=6e-6, atol=2e-44)


@interpreted
@pytest.mark.parametrize("gap", [15.0, 60.0, 85.0])
def test_confident_distributions_keep_their_score(walk, gap):
    logits = torch.zeros(2, 21)
    logits[:, 17] = gap
    target = torch.zeros(2, 21)
    target[:, 17] = 1
    options = (-100, 0.0, 2.0, True, True, False)
    ours = triton_loss.cross_entropy(logits, target, None, None, *options)
    theirs = truth(logits, target, None, None, *options)
    for a, b in zip(ours[1:3], theirs[1:3], strict=True):
        torch.testing.assert_close(a.double(), b, rtol=6e-6, atol=2e-44)
    torch.testing.assert_close(ours[4].double(), theirs[4], rtol=6e-6, atol=2e-44)


@interpreted
def test_nothing_but_ignored_rows(walk):
    """torch's denominator is then 0: the loss is 0 / 0, the gradient 0."""
    logits, target, _, w = batch_of((5, 21))
    for smoothing in (0.0, 0.1):
        options = (3, smoothing, None, True, True, walk != "sweeps")
        ours = triton_loss.cross_entropy(logits, torch.full_like(target, 3), None, w, *options)
        agree(ours, truth(logits, torch.full_like(target, 3), None, w, *options))
        assert ours[0].isnan()
        assert not ours[4].any()


@interpreted
@pytest.mark.parametrize("gap", [15.0, 60.0, 88.0])
def test_confident_labels_keep_their_score(walk, gap):
    z = torch.tensor([[gap, -gap, gap]])
    y = torch.tensor([[1.0, 0.0, 1.0]])
    rest = (3.0, 1.0, True, True, False)
    ours = triton_loss.binary_cross_entropy_with_logits(z, y, None, None, *rest)
    expected = math.exp(-gap) / math.sqrt(3)
    score = torch.tensor([expected], dtype=torch.float64)
    torch.testing.assert_close(ours[2].double(), score, rtol=1e-6, atol=2e-44)


@interpreted
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_labels_out_of_range_make_their_rows_nan(walk, smoothing):
    """On the CPU the reference raises; where the host does not wait, only these rows are lost."""
    logits, target, r, w = batch_of((8, 21))
    bad = torch.tensor([2, 5, 6])
    wrong = target.clone()
    wrong[bad] = torch.tensor([21, -1, 2**40])
    mean = walk != "sweeps"
    options = (-100, smoothing, 4.0, True, True, mean)
    loss, losses, score, mean_grad, grad = triton_loss.cross_entropy(logits, wrong, r, w, *options)
    fine = triton_loss.cross_entropy(logits, target, r, w, *options)
    for ours, theirs in ((losses, fine[1]), (score, fine[2]), (grad, fine[4])):
        assert ours[bad].isnan().all()
        good = [i for i in range(8) if i not in bad]
        assert torch.equal(ours[good], theirs[good])
    assert loss.isnan()
    assert not mean or mean_grad.isnan().all()


@interpreted
@pytest.mark.parametrize("layout", ["sliced", "stepped rows", "stepped", "transposed", "expanded"])
def test_strides(walk, layout):
    torch.manual_seed(0)
    base = torch.randn(64, 64)
    logits = {
        "sliced": base[:5, 3:40],
        "stepped rows": base[::12, :37],
        "stepped": base[:5, ::2],
        "transposed": base.t()[:5, :37],
        "expanded": base[:1, :37].expand(5, 37),
    }[layout]
    target = torch.randint(logits.shape[1], logits.shape[:1])
    for smoothing in (0.0, 0.1) if layout == "sliced" else (0.0,):
        options = (-100, smoothing, 4.0, True, True, walk != "sweeps")
        ours = triton_loss.cross_entropy(logits, target, None, None, *options)
        agree(ours, truth(logits, target, None, None, *options))


@interpreted
@pytest.mark.parametrize("num_classes", [16, 4104])
def test_offsets_beyond_32_bits(num_classes):
    """Three rows 2^30 elements apart, in memory of which only they are ever touched."""
    torch.use_deterministic_algorithms(False)  # or all of it would be filled
    stride = 2**30
    storage = torch.empty(2 * stride + num_classes, dtype=torch.bfloat16)
    logits = storage.as_strided((3, num_classes), (stride, 1))
    logits.copy_(torch.randn(3, num_classes))
    target = torch.randint(num_classes, (3,))
    for smoothing in (0.0, 0.1):
        options = (-100, smoothing, 3.0, True, True, False)
        ours = triton_loss.cross_entropy(logits, target, None, None, *options)
        agree(ours, truth(logits.clone(), target, None, None, *options), torch.bfloat16)


@interpreted
def test_denominator_from_many_programs():
    """Above 4096 rows the labels' weights come in parts; the loss's parts exceed a block too."""
    logits, target, _, w = batch_of((9000, 3))
    options = (3, 0.0, None, True, True, True)
    ours = triton_loss.cross_entropy(logits, target, None, w, *options)
    agree(ours, truth(logits, target, None, w, *options), slack=1e-5)


@interpreted
def test_sequences_longer_than_a_block():
    logits, target, r, _ = batch_of((2, 1500, 2))
    logits[1] = torch.tensor([90.0, 0.0])  # squares of these scores are 0
    target[1] = 0
    options = (3, 0.0, None, True, True, False)
    ours = triton_loss.cross_entropy(logits, target, r, None, *options)
    theirs = truth(logits, target, r, None, *options)
    agree(ours, theirs, slack=1e-5)
    torch.testing.assert_close(ours[2].double(), theirs[2], rtol=1e-5, atol=0)


@interpreted
def test_equal_calls_give_equal_bits(walk):
    logits, target, r, w = batch_of((7, 37))
    runs = [
        triton_loss.cross_entropy(logits, target, r, w, 3, s, None, True, True, walk != "sweeps")
        for s in (0.0, 0.0, 0.1, 0.1)
    ]
    for a, b in ((0, 1), (2, 3)):
        for x, y in zip(runs[a], runs[b], strict=True):
            assert (x is y is None) or torch.equal(x, y)


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
    triton_loss.cross_entropy(logits, target, weights, None, 3, 0.0, denominator, True, True, mean)
    assert len(launches) == expected


@interpreted
def test_what_the_kernels_do_not_take_is_the_references(monkeypatch):
    monkeypatch.setattr(triton_loss, "_launch", None)
    double, single = torch.float64, torch.float32
    for dtype, shape in ((double, (4, 5)), (single, (0, 5)), (single, (3, 0, 5))):
        logits, target, r, _ = batch_of(shape, dtype)
        options = (-100, 0.0, 2.0, True, True, len(shape) == 2)
        ours = triton_loss.cross_entropy(logits, target, r.to(dtype), None, *options)
        agree(ours, truth(logits, target, r, None, *options), slack=1e-12)
    grad = torch.rand(3, 4, dtype=torch.float64)
    assert torch.equal(triton_loss.scale_grad(grad, torch.tensor(2.0).double()), 2 * grad)
    rest = (5.0, 1.0, True, True, True)
    for empty in (torch.zeros(0, 5), torch.zeros(3, 0)):
        assert triton_loss.mse_loss(empty, empty, None, *rest)[0] == 0


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


@interpreted
def test_interpreter_is_on():
    assert triton.knobs.runtime.interpret
    with fastis.backend("triton"):
        assert kernels.kernels_for("loss", "cpu") is triton_loss
