"""The Triton losses without a GPU: interpreted against float64.

They run in the process that test_triton.py starts. Uninitialised memory is NaN in it, so an element
that no program writes is seen.
"""

from __future__ import annotations

import importlib.util
import itertools
import math

import pytest
import torch
from conftest import INTERPRETED, interpreted

from fastis.kernels.loss import CrossEntropyOptions, ElementwiseOptions, Wanted
from fastis.kernels.reference import loss as reference_loss
from fastis.kernels.triton import geometry as triton_geometry
from fastis.kernels.triton.geometry import Sweeps, Tiles

pytestmark = [
    pytest.mark.skipif(not importlib.util.find_spec("triton"), reason="needs triton"),
    pytest.mark.usefixtures("unwritten_memory_is_nan"),
]
if INTERPRETED:
    from fastis.kernels.triton import loss as triton_loss

FLOATS = [torch.float32, torch.bfloat16, torch.float16]
# Of the gradient's rounding to the logits' dtype; the interpreter truncates to bfloat16. float16
# gradients wait in float32.
ROUNDING = {torch.float32: 0.0, torch.bfloat16: 2.0**-7, torch.float16: 0.0}


@pytest.fixture(params=["planned", "tiles", "sweeps"])
def walk(request, monkeypatch):
    """Small matrices walked as planned (by one program), in tiles with a loop, or in sweeps."""
    if request.param != "planned":
        monkeypatch.setattr(triton_loss, "is_single_block", lambda rows, columns: False)
    if request.param == "tiles":

        def tiles(rows, columns, *_, **__):
            return Tiles(2, triton_geometry.power_of_two(columns), 1, min(2, -(-rows // 2)))

        monkeypatch.setattr(triton_loss, "row_launch", tiles)
        monkeypatch.setattr(triton_loss, "elementwise_launch", tiles)
        monkeypatch.setattr(triton_loss, "column_sums", lambda parts, columns:
                            triton_geometry.Sums(1, 4, 1, -(-columns // 4)))  # fmt: skip
    if request.param == "sweeps":

        def sweeps(rows, columns, *, vector, with_grad, **_):
            return Sweeps(2, 8 // vector, vector, 1 if with_grad else 3, 1, rows)  # blocks of 16

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


def cross_entropy(module, logits, target, weights, class_weights, ignore_index, smoothing, *wanted):
    options = CrossEntropyOptions(class_weights, ignore_index, smoothing)
    return module.cross_entropy(logits, target, weights, options, Wanted(*wanted))


def elementwise(function, logits, target, weights, pos_weight, divisor, *wanted):
    options = ElementwiseOptions(pos_weight, divisor)
    return function(logits, target, weights, options, Wanted(*wanted))


def truth(logits, target, weights, class_weights, *options):
    """The reference in float64; labels out of range are the device's business, not the CPU's."""
    wide = [
        t.double() if t is not None and t.is_floating_point() else t
        for t in (logits, target, weights, class_weights)
    ]
    return cross_entropy(reference_loss, *wide, *options)


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
        ours = cross_entropy(triton_loss, logits, target, weights, class_weights, *options)
        agree(ours, truth(logits, target, weights, class_weights, *options), dtype)
        if denominator != 7.5:
            continue
        lean = cross_entropy(
            triton_loss, logits, target, weights, class_weights, *options[:4], False, False
        )
        assert lean[3] is lean[4] is None
        if dtype != torch.float16 or walk != "sweeps":  # (else in other blocks, as grads are wider)
            assert all(torch.equal(a, b) for a, b in zip(lean[:3], ours[:3], strict=True))


@interpreted
@pytest.mark.parametrize("name", ["binary_cross_entropy_with_logits", "mse_loss"])
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", [(6, 37), (5, 1)])
def test_elementwise_losses(walk, name, dtype, shape):
    if walk == "sweeps" or (walk == "planned" and dtype != torch.bfloat16):
        pytest.skip("elements are never swept; as planned they are in test_loss_kernels.py")
    logits, _, r, w = batch_of(shape, dtype)
    target = torch.rand(shape)
    pos = (w, None) if name.startswith("binary") else (None,)
    cases = itertools.product(pos, (None, r), (7.5, torch.tensor(2.5)), (True, False))
    for pos_weight, weights, denominator, reduce in cases:
        rest = (float(shape[1]), denominator if reduce else 1.0, reduce, True, True)
        tensors = logits, target, weights, pos_weight
        ours = elementwise(getattr(triton_loss, name), *tensors, *rest)
        wide = [None if t is None else t.double() for t in tensors]
        agree(ours, elementwise(getattr(reference_loss, name), *wide, *rest), dtype)


@interpreted
def test_elementwise_losses_longer_than_a_tile():
    torch.manual_seed(0)
    logits, target = torch.randn(2, 9001), torch.rand(2, 9001)
    rest = (1.0, 3.0, True, True, False)
    ours = elementwise(
        triton_loss.binary_cross_entropy_with_logits, logits, target, None, None, *rest
    )
    theirs = elementwise(
        reference_loss.binary_cross_entropy_with_logits,
        *(logits.double(), target.double(), None, None),
        *rest,
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
    ours = cross_entropy(triton_loss, logits, target, r, w, *options)
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
    ours = cross_entropy(triton_loss, logits, target, r, None, *options)
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
    ours = cross_entropy(triton_loss, logits, target, None, None, *options)
    theirs = truth(logits, target, None, None, *options)
    # Beyond 87 the result is subnormal, with steps of 1.4e-45.
    for a, b in zip(ours[1:3], theirs[1:3], strict=True):
        torch.testing.assert_close(a.double(), b, rtol=6e-6, atol=2e-44)


@interpreted
@pytest.mark.parametrize("shift", [20.0, -20.0, 1000.0, 3e5, -1e8, 6e8, -1e9, 1e30, -3.4e38])
def test_rows_far_from_zero(walk, shift):
    """The product with log2(e) in the exponent is rounded at 2^-24 of the shift: that is put right
    once a row. Beyond 2^29 the product is not taken, and up to the largest number it must not
    overflow: rows masked by -1e9 or by the smallest number in every class have a softmax too."""
    logits, target, r, _ = batch_of((6, 37))
    logits += torch.tensor(shift)
    logits[4:] = shift
    options = (3, 0.0, 4.0, True, True, walk != "sweeps")
    ours = cross_entropy(triton_loss, logits, target, r, None, *options)
    agree(ours, truth(logits, target, r, None, *options))


@interpreted
@pytest.mark.parametrize("mask", [-1e9, -1e10, -1e30, -3.4e38, -math.inf])
def test_masked_classes_count_for_nothing(walk, mask):
    """Whole lanes and blocks of a sweep see nothing but the mask."""
    logits, target, r, _ = batch_of((6, 70))
    target[:] = 69
    logits[1:, :40] = mask
    logits[2:4, 40:69] = mask  # the label alone is left
    logits[5, 69] = mask  # the label itself is masked
    target[0] = 3
    options = (-100, 0.0, 4.0, True, True, walk != "sweeps")
    rows = slice(0, 5) if mask < -1e30 else slice(None)  # (beyond, a loss of 1e38 overflows)
    ours = cross_entropy(triton_loss, logits[rows], target[rows], r[rows], None, *options)
    agree(ours, truth(logits[rows], target[rows], r[rows], None, *options))


@interpreted
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("columns", "stride"), [(37, 37), (40, 43), (37, 40), (33, 41)])
def test_rows_that_begin_anywhere(walk, dtype, columns, stride):
    """Heads and tails of rows around their aligned bodies, the label in each of them."""
    base, target, r, _ = batch_of((12, stride), dtype)
    logits = base[:, :columns]
    target[:] = torch.tensor([0, 1, 2, 6, 7, 8, 15, 16, 31, 32, columns - 2, columns - 1])
    options = (-100, 0.0, 4.0, True, True, walk != "sweeps")
    ours = cross_entropy(triton_loss, logits, target, r, None, *options)
    agree(ours, truth(logits, target, r, None, *options), dtype)


@interpreted
@pytest.mark.parametrize("gap", [15.0, 60.0, 85.0])
def test_confident_soft_targets_keep_their_score(walk, gap):
    logits = torch.zeros(2, 21)
    logits[:, 17] = gap
    target = torch.zeros(2, 21)
    target[:, 17] = 1
    options = (-100, 0.0, 2.0, True, True, False)
    ours = cross_entropy(triton_loss, logits, target, None, None, *options)
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
        ours = cross_entropy(triton_loss, logits, torch.full_like(target, 3), None, w, *options)
        agree(ours, truth(logits, torch.full_like(target, 3), None, w, *options))
        assert ours[0].isnan()
        assert not ours[4].any()


@interpreted
@pytest.mark.parametrize("gap", [15.0, 60.0, 88.0])
def test_confident_labels_keep_their_score(walk, gap):
    z = torch.tensor([[gap, -gap, gap]])
    y = torch.tensor([[1.0, 0.0, 1.0]])
    rest = (3.0, 1.0, True, True, False)
    ours = elementwise(triton_loss.binary_cross_entropy_with_logits, z, y, None, None, *rest)
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
    loss, losses, score, mean_grad, grad = cross_entropy(triton_loss, logits, wrong, r, w, *options)
    fine = cross_entropy(triton_loss, logits, target, r, w, *options)
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
        ours = cross_entropy(triton_loss, logits, target, None, None, *options)
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
        ours = cross_entropy(triton_loss, logits, target, None, None, *options)
        agree(ours, truth(logits.clone(), target, None, None, *options), torch.bfloat16)


@interpreted
def test_denominator_from_many_programs():
    """Above 4096 rows the labels' weights come in parts; the loss's parts exceed a block too."""
    logits, target, _, w = batch_of((9000, 3))
    options = (3, 0.0, None, True, True, True)
    ours = cross_entropy(triton_loss, logits, target, None, w, *options)
    agree(ours, truth(logits, target, None, w, *options), slack=1e-5)


@interpreted
def test_sequences_longer_than_a_block():
    logits, target, r, _ = batch_of((2, 1500, 2))
    logits[1] = torch.tensor([90.0, 0.0])  # squares of these scores are 0
    target[1] = 0
    options = (3, 0.0, None, True, True, False)
    ours = cross_entropy(triton_loss, logits, target, r, None, *options)
    theirs = truth(logits, target, r, None, *options)
    agree(ours, theirs, slack=1e-5)
    torch.testing.assert_close(ours[2].double(), theirs[2], rtol=1e-5, atol=0)


@interpreted
def test_equal_calls_give_equal_bits(walk):
    logits, target, r, w = batch_of((7, 37))
    runs = [
        cross_entropy(triton_loss, logits, target, r, w, 3, s, None, True, True, walk != "sweeps")
        for s in (0.0, 0.0, 0.1, 0.1)
    ]
    for a, b in ((0, 1), (2, 3)):
        for x, y in zip(runs[a], runs[b], strict=True):
            assert (x is y is None) or torch.equal(x, y)


@interpreted
def test_what_the_kernels_do_not_take_is_the_references(monkeypatch):
    monkeypatch.setattr(triton_loss, "_launch", None)
    double, single = torch.float64, torch.float32
    for dtype, shape in ((double, (4, 5)), (single, (0, 5)), (single, (3, 0, 5))):
        logits, target, r, _ = batch_of(shape, dtype)
        options = (-100, 0.0, 2.0, True, True, len(shape) == 2)
        ours = cross_entropy(triton_loss, logits, target, r.to(dtype), None, *options)
        agree(ours, truth(logits, target, r, None, *options), slack=1e-12)
    grad = torch.rand(3, 4, dtype=torch.float64)
    assert torch.equal(triton_loss.scale_grad(grad, torch.tensor(2.0).double()), 2 * grad)
    rest = (5.0, 1.0, True, True, True)
    for empty in (torch.zeros(0, 5), torch.zeros(3, 0)):
        assert elementwise(triton_loss.mse_loss, empty, empty, None, None, *rest)[0] == 0
