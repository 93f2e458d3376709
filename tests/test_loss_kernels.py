"""Values: every loss by every backend against float64 truth, in every dtype and awkward size.

A tolerance is PyTorch's own error in that dtype on the same data, plus a stated slack.
"""

import math

import pytest
import torch
import torch.nn.functional as F
from conftest import INTERPRETED, LOSS_BACKENDS
from hypothesis import given, settings
from hypothesis import strategies as st

import fastis
from fastis.kernels.formats import compute_dtype

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
CLASSES = [1, 2, 3, 7, 8, 9, 10, 16, 17, 33, 64, 65, 100, 1000]
# Slack on PyTorch's own error: a few roundings of the result's dtype.
SLACK = {torch.float64: 1e-14, torch.float32: 5e-7, torch.bfloat16: 5e-7, torch.float16: 5e-7}
# Half an ulp of gradients of at most 1, which are rounded once to the logits' dtype; a whole one in
# Triton's interpreter, which truncates to bfloat16.
ROUNDING = {
    torch.float64: 0.0,
    torch.float32: 0.0,
    torch.bfloat16: 2.0**-7 if INTERPRETED else 2.0**-8,
    torch.float16: 2.0**-11,
}


@pytest.fixture(params=LOSS_BACKENDS, autouse=True)
def backend(request):
    """One backend at a time, on one thread: the tensors are small and the machine may be shared."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with fastis.backend(request.param):
        yield request.param
    torch.set_num_threads(before)


def close(ours, truth, theirs=None, slack=1e-6, what=""):
    """|ours - truth| <= |theirs - truth| + slack (1 + |truth|), NaN and inf equal in place."""
    ours, truth = ours.double(), truth.double()
    assert torch.equal(ours.isnan(), truth.isnan()), (what, ours, truth)
    finite = truth.isfinite()
    assert torch.equal(ours[~finite & ~truth.isnan()], truth[~finite & ~truth.isnan()]), what
    error = (ours - truth)[finite].abs()
    allowed = slack * (1 + truth[finite].abs())
    if theirs is not None and error.numel():
        allowed = allowed + (theirs.double() - truth)[finite].abs().nan_to_num(0).max()
    assert bool((error <= allowed).all()), (what, error.max(), ours, truth)


def truth_of(loss_none, logits):
    """Per-sample losses, gradients of their sum and norms, in float64."""
    z = logits.detach().double().requires_grad_()
    losses = loss_none(z)
    (g,) = torch.autograd.grad(losses.sum(), z)
    return losses.detach(), g, g.flatten(1).norm(dim=1)


def check_scored(out, logits, loss_none, weights, denominator, theirs=None):
    """Everything a weighted loss returns, against truth."""
    dtype = logits.dtype
    slack = SLACK[dtype]
    losses, g, norm = truth_of(loss_none, logits)
    batch = logits.shape[0]
    r = torch.ones(batch, dtype=torch.float64) if weights is None else weights.double()
    close(out.losses, losses, theirs, slack, "losses")
    close(out.score, norm, None, 4 * slack, "score")
    close(out.loss, (r * losses).sum() / denominator, theirs, 4 * slack, "loss")
    wide = r.view(-1, *[1] * (g.dim() - 1)) * g
    if out.mean_grad is not None:
        close(out.mean_grad, wide.mean(0).flatten(), None, 4 * slack, "mean_grad")
    if logits.requires_grad:
        (grad,) = torch.autograd.grad(out.loss, logits)
        assert grad.dtype == dtype
        assert grad.shape == logits.shape
        scale = float((r.abs() / denominator).max()) if batch else 1.0
        close(
            grad.double() / scale,
            wide / denominator / scale,
            None,
            4 * slack + ROUNDING[dtype],
            "grad",
        )
    expected = torch.float64 if dtype == torch.float64 else torch.float32
    for result in (out.loss, out.losses, out.score):
        assert result.dtype == expected


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_classes", CLASSES)
def test_cross_entropy_sizes(dtype, num_classes):
    torch.manual_seed(num_classes)
    for batch in (1, 3, 33) if INTERPRETED and num_classes > 60 else (1, 3, 33, 128):
        logits = (3 * torch.randn(batch, num_classes)).to(dtype).requires_grad_()
        target = torch.randint(num_classes, (batch,))
        weights = torch.rand(batch) + 0.5
        theirs = F.cross_entropy(logits.detach(), target, reduction="none")

        def truth(z, target=target):
            return F.cross_entropy(z, target, reduction="none")

        for r in (None, weights):
            out = fastis.cross_entropy(logits, target, r)
            check_scored(out, logits, truth, r, batch, theirs)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_classes", [1, 2, 7, 10, 16, 33, 100])
@pytest.mark.parametrize("soft", [False, True])
def test_cross_entropy_options(dtype, num_classes, soft):
    torch.manual_seed(num_classes)
    batch = 19
    logits = (3 * torch.randn(batch, num_classes)).to(dtype).requires_grad_()
    class_weights = torch.rand(num_classes) + 0.1
    target = torch.randint(num_classes, (batch,))
    if soft:
        target = torch.rand(batch, num_classes).softmax(1)
    else:
        target[::5] = -100
    weights = torch.rand(batch) + 0.5
    for smoothing in (0.0, 0.1, 1.0):
        for w in (None, class_weights):
            wide = None if w is None else w.double()

            def truth(z, wide=wide, smoothing=smoothing):
                t = target.double() if soft else target
                return F.cross_entropy(
                    z, t, weight=wide, reduction="none", label_smoothing=smoothing
                )

            options = {"class_weights": w, "label_smoothing": smoothing}
            for r, denominator in ((None, 7.0), (weights, batch), (weights, 5.5)):
                given = None if denominator == batch else denominator
                out = fastis.cross_entropy(logits, target, r, denominator=given, **options)
                check_scored(out, logits, truth, r, denominator)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_labels", [1, 2, 3, 7, 8, 9, 17, 100, 1500])
def test_elementwise_losses(dtype, num_labels):
    torch.manual_seed(num_labels)
    for batch in (1, 3) if INTERPRETED and num_labels > 100 else (1, 3, 40):
        logits = (4 * torch.randn(batch, num_labels)).to(dtype).requires_grad_()
        target = torch.rand(batch, num_labels)
        weights = torch.rand(batch) + 0.5
        pos_weight = torch.rand(num_labels) * 3

        def bce(z, target=target, pos_weight=pos_weight):
            return F.binary_cross_entropy_with_logits(
                z, target.double(), pos_weight=pos_weight.double(), reduction="none"
            ).mean(1)

        def mse(z, target=target):
            return F.mse_loss(z, target.double(), reduction="none").mean(1)

        for r in (None, weights):
            out = fastis.binary_cross_entropy_with_logits(logits, target, r, pos_weight=pos_weight)
            check_scored(out, logits, bce, r, batch)
            out = fastis.mse_loss(logits, target, r)
            check_scored(out, logits, mse, r, batch)
            out = fastis.mse_loss(logits, target, r, label_reduction="sum")
            check_scored(out, logits, lambda z, f=mse: f(z) * num_labels, r, batch)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("num_classes", [3, 10, 70])
def test_sequences(dtype, smoothing, num_classes):
    torch.manual_seed(0)
    batch, tokens = 6, 5
    logits = torch.randn(batch, tokens, num_classes).to(dtype).requires_grad_()
    target = torch.randint(num_classes, (batch, tokens))
    target[0, 1:] = -100
    target[3] = -100
    weights = torch.rand(batch) + 0.5

    def truth(z):
        return F.cross_entropy(
            z.transpose(1, 2), target, reduction="none", label_smoothing=smoothing
        ).sum(1)

    out = fastis.cross_entropy(logits, target, weights, label_smoothing=smoothing)
    assert out.mean_grad is None
    assert out.score[3] == 0
    check_scored(out, logits, truth, weights, batch * tokens)
    ours = fastis.cross_entropy(logits, target, label_smoothing=smoothing)
    check_scored(ours, logits, truth, None, float((target != -100).sum()))


@pytest.mark.parametrize("num_classes", [2, 10, 100])
@pytest.mark.parametrize("gap", [0.0, 5.0, 15.0, 30.0, 60.0, 88.0])
def test_confident_samples_keep_their_score(gap, num_classes, backend):
    """float32 to 1e-5 where 1 - 2 p_y + sum p_j^2 is exactly 0."""
    torch.manual_seed(1)
    rows = []
    for sign in (1, -1):
        row = torch.randn(40, num_classes)
        row[:, 0] = row[:, 1:].amax(1) + sign * gap
        rows.append(row)
    logits = torch.cat(rows)
    target = torch.zeros(80, dtype=torch.int64)
    out = fastis.cross_entropy(logits, target)
    z = logits.double()
    rest = torch.exp(z[:, 1:] - z[:, :1])  # p_j / p_y
    s = rest.sum(1)
    loss = torch.log1p(s)
    norm = torch.sqrt(s**2 + (rest**2).sum(1)) / (1 + s)
    torch.testing.assert_close(out.losses.double(), loss, rtol=1e-5, atol=0)
    torch.testing.assert_close(out.score.double(), norm, rtol=1e-5, atol=0)


@pytest.mark.parametrize("kind", ["one-hot", "bce"])
def test_confident_soft_targets_and_elements(kind):
    gaps = torch.tensor([15.0, 30.0, 60.0, 80.0])
    if kind == "bce":
        out = fastis.binary_cross_entropy_with_logits(gaps[:, None], torch.ones(4, 1))
        expected = torch.exp(-gaps.double())
    else:
        logits = torch.zeros(4, 3)
        logits[:, 1] = gaps
        target = F.one_hot(torch.ones(4, dtype=torch.int64), 3).float()
        out = fastis.cross_entropy(logits, target)
        expected = torch.exp(-gaps.double()) * math.sqrt(6)
    torch.testing.assert_close(out.score.double(), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_classes", [5, 70])
@pytest.mark.parametrize("smoothing", [0.0, 0.25])
def test_infinities_and_nan_are_torchs(dtype, num_classes, smoothing):
    torch.manual_seed(0)
    logits = torch.randn(10, num_classes).to(dtype)
    logits[0, 1:] = -math.inf  # only the label is possible
    logits[1, 2:] = -math.inf
    logits[2, 0] = -math.inf  # the label is impossible
    logits[3, 3] = math.nan
    logits[4, 0] = math.nan  # at the label
    logits[5, 3] = math.inf
    logits[6, 0] = math.inf
    logits[7] = -math.inf
    logits[8, num_classes - 1] = -math.inf
    logits.requires_grad_()
    target = torch.zeros(10, dtype=torch.int64)
    out = fastis.cross_entropy(logits, target, label_smoothing=smoothing, reduction="none")
    truth, g, norm = truth_of(
        lambda z: F.cross_entropy(z, target, reduction="none", label_smoothing=smoothing), logits
    )
    close(out.losses, truth)
    (ours,) = torch.autograd.grad(out.loss.sum(), logits)
    close(ours, g, None, 2 * ROUNDING[dtype] + 1e-6)
    close(out.score, norm)
    assert out.score[0] == 0 or smoothing
    assert (ours[1, 2:] + smoothing / num_classes).abs().max() < 1e-2
    if smoothing == 0:
        assert (ours[1, 2:] == 0).all()


def test_one_class_is_certain():
    out = fastis.cross_entropy(torch.randn(5, 1), torch.zeros(5, dtype=torch.int64))
    assert out.losses.tolist() == [0.0] * 5
    assert out.score.tolist() == [0.0] * 5


@pytest.mark.parametrize("num_classes", [10, 100])
def test_all_rows_ignored(num_classes):
    logits = torch.full((4, num_classes), math.nan, requires_grad=True)
    target = torch.full((4,), 3)
    out = fastis.cross_entropy(logits, target, torch.ones(4), ignore_index=3)
    assert out.loss == 0
    assert out.score.tolist() == [0.0] * 4
    (grad,) = torch.autograd.grad(out.loss, logits)
    assert (grad == 0).all()
    assert (out.mean_grad == 0).all()
    unweighted = fastis.cross_entropy(logits, target, ignore_index=3)
    assert unweighted.loss.isnan()  # 0 / 0, as torch
    assert (unweighted.mean_grad == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("num_classes", [10, 100])
def test_class_weights_that_add_up_to_0(num_classes, dtype):
    """The mean has no denominator then; the sums of gradients have none either way."""
    logits = torch.randn(4, num_classes, dtype=dtype, requires_grad=True)
    target = torch.tensor([0, 1, 2, 2])
    class_weights = torch.zeros(num_classes, dtype=logits.dtype).to(compute_dtype(dtype))
    for weights in (class_weights, class_weights.index_put((target[:2],), class_weights.new_tensor(
        [2.0, -2.0]
    ))):  # fmt: skip
        with fastis.backend("reference"):
            expected = fastis.cross_entropy(logits, target, class_weights=weights)
            (theirs,) = torch.autograd.grad(expected.loss, logits)
        out = fastis.cross_entropy(logits, target, class_weights=weights)
        torch.testing.assert_close(out.mean_grad, expected.mean_grad, equal_nan=True)
        (ours,) = torch.autograd.grad(out.loss, logits)
        torch.testing.assert_close(ours, theirs, equal_nan=True)


@pytest.mark.parametrize("shape", [(0, 5), (0, 4, 5), (3, 0, 5)])
def test_empty_batches(shape):
    logits = torch.zeros(shape, requires_grad=True)
    target = torch.zeros(shape[:-1], dtype=torch.int64)
    theirs = F.cross_entropy(logits.flatten(0, -2), target.flatten())
    ours = fastis.cross_entropy(logits, target)
    assert theirs.isnan()
    assert ours.loss.isnan()
    assert fastis.cross_entropy(logits, target, reduction="sum").loss == 0
    assert ours.losses.shape == ours.score.shape == shape[:1]
    ours.loss.backward()
    assert logits.grad.shape == shape
    if len(shape) == 2:
        assert fastis.mse_loss(logits, torch.zeros(shape)).loss.isnan()


@settings(max_examples=60, deadline=None)
@given(
    batch=st.integers(1, 70),
    num_classes=st.integers(1, 90),
    dtype=st.sampled_from(DTYPES),
    layout=st.sampled_from(["dense", "transposed", "sliced", "stepped", "expanded"]),
    shift=st.floats(-50, 50),
    seed=st.integers(0, 2**31),
)
@pytest.mark.parametrize("name", LOSS_BACKENDS)
def test_properties(name, batch, num_classes, dtype, layout, shift, seed):
    """Strides do not matter, gradients sum to 0, a shift of all logits changes nothing."""
    torch.manual_seed(seed)
    if layout == "transposed":
        logits = torch.randn(num_classes, batch).to(dtype).t()
    elif layout == "sliced":
        logits = torch.randn(batch, num_classes + 5).to(dtype)[:, 2 : num_classes + 2]
    elif layout == "stepped":
        logits = torch.randn(2 * batch, 3 * num_classes).to(dtype)[::2, ::3]
    elif layout == "expanded":
        logits = torch.randn(1, num_classes).to(dtype).expand(batch, num_classes)
    else:
        logits = torch.randn(batch, num_classes).to(dtype)
    target = torch.randint(num_classes, (batch,))
    with fastis.backend(name):
        out = fastis.cross_entropy(logits, target)
        dense = logits.clone(memory_format=torch.contiguous_format).requires_grad_()
        again = fastis.cross_entropy(dense, target)
        for ours, theirs in zip(out, again, strict=True):
            assert torch.equal(ours, theirs)
        # Per class mean gradients sum to 0 as each row's do.
        assert abs(float(out.mean_grad.sum())) < 1e-5
        if dtype == torch.float64:
            moved = fastis.cross_entropy(logits + shift, target)
            torch.testing.assert_close(moved.score, out.score, rtol=1e-10, atol=1e-12)
            torch.testing.assert_close(moved.losses, out.losses, rtol=1e-10, atol=1e-10)
        assert bool((out.score <= math.sqrt(2) * (1 + 1e-6)).all())
        assert bool((out.losses >= 0).all())


@pytest.mark.parametrize("num_classes", [10, 200])
@pytest.mark.parametrize("dtype", DTYPES)
def test_threads_do_not_change_a_bit(num_classes, dtype, backend):
    if backend != "cpu":
        pytest.skip("a promise of the compiled kernels alone")
    torch.manual_seed(0)
    logits = torch.randn(600000 // num_classes, num_classes).to(dtype).requires_grad_()
    target = torch.randint(num_classes, logits.shape[:1])
    labels = torch.rand(logits.shape)

    def run(threads):
        torch.set_num_threads(threads)
        results = []
        for out in (
            fastis.cross_entropy(logits, target),
            fastis.cross_entropy(logits, target, label_smoothing=0.1),
            fastis.binary_cross_entropy_with_logits(logits, labels),
        ):
            results += [*out, *torch.autograd.grad(out.loss, logits)]
        return results

    before = torch.get_num_threads()
    try:
        first, *others = [run(threads) for threads in (1, 2, 3)]
    finally:
        torch.set_num_threads(before)
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))
