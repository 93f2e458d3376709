"""The Triton losses on a GPU: values on real shapes, equal bits, CUDA graphs. Else skipped."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import fastis
from fastis import kernels

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

FLOATS = [torch.float32, torch.bfloat16, torch.float16]
# Half an ulp of the gradient's dtype; float16 gradients are rounded in the backward pass.
ROUNDING = {torch.float32: 0.0, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
# Every kind of launch in bfloat16, and one of each in the other formats: each is compiled first.
SHAPES = [(128, 10), (4096, 10), (512, 1000), (300, 4096), (64, 4097), (96, 32000), (33, 50257),
          (64, 128256), (8, 262144), (16, 40, 300), (4, 8, 32000)]  # fmt: skip
SOME_SHAPES = [(128, 10), (512, 1000), (64, 128256), (16, 40, 300)]
CASES = [(shape, torch.bfloat16) for shape in SHAPES]
CASES += [(shape, dtype) for shape in SOME_SHAPES for dtype in (torch.float32, torch.float16)]


def batch_of(shape, dtype, soft=False, seed=0):
    generator = torch.Generator(device="cuda").manual_seed(seed)
    options = {"device": "cuda", "generator": generator}
    logits = (3 * torch.randn(shape, **options)).to(dtype)
    if soft:
        target = torch.randn(shape, **options).softmax(-1)
    else:
        target = torch.randint(shape[-1], shape[:-1], **options)
        target.view(-1)[::7] = -100
    r = torch.rand(shape[0], **options) + 0.5
    return logits, target, r, torch.rand(shape[-1], **options) + 0.1


def results(logits, target, *rest, backend, **options):
    """All results and the gradient, by one backend."""
    leaf = logits.detach().clone().requires_grad_()
    with fastis.backend(backend):
        out = fastis.cross_entropy(leaf, target, *rest, **options)
        (grad,) = torch.autograd.grad(out.loss.sum(), leaf)
    return {**out._asdict(), "grad": grad}


def agree(logits, target, *rest, **options):
    """Triton against the reference in float64."""
    ours = results(logits, target, *rest, backend="triton", **options)
    wide = target.double() if target.is_floating_point() else target
    truth = results(logits.double(), wide, *rest, backend="reference", **options)
    for name, theirs in truth.items():
        if theirs is None:
            assert ours[name] is None
            continue
        rtol = 1e-5 + (ROUNDING[logits.dtype] if name == "grad" else 0)
        # Gradients are compared beside the largest: |g| <= r / B.
        atol = 1e-6 * float(theirs.abs().nan_to_num(0).max()) if name == "grad" else 2e-6
        if logits.dtype == torch.float16 and name == "grad":
            atol += 2.0**-24
        torch.testing.assert_close(
            ours[name].detach().double(), theirs.detach().double(), rtol=rtol, atol=atol,
            equal_nan=True, msg=lambda m, n=name: f"{n}: {m}",
        )  # fmt: skip


def test_the_device_picks_triton():
    assert kernels.kernels_for("loss", "cuda").__name__.endswith("triton.loss")


@pytest.mark.parametrize(("shape", "dtype"), CASES, ids=str)
def test_class_labels(shape, dtype):
    logits, target, r, w = batch_of(shape, dtype)
    agree(logits, target)
    agree(logits, target, r, class_weights=w)


@pytest.mark.parametrize("shape", [(128, 10), (512, 1000), (8, 128256), (4, 9, 300)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("soft", [False, True])
def test_distributions(shape, dtype, soft):
    logits, target, r, w = batch_of(shape, dtype, soft)
    agree(logits, target, r, label_smoothing=0.1)
    agree(logits, target, r, label_smoothing=0.1, class_weights=w)


@pytest.mark.parametrize("shape", [(128, 10), (512, 1000), (4, 150528)])
@pytest.mark.parametrize("dtype", FLOATS)
def test_elementwise_losses(shape, dtype):
    logits, _, r, w = batch_of(shape, dtype)
    target = torch.rand(shape, device="cuda")
    for loss, options in (
        (fastis.binary_cross_entropy_with_logits, {"pos_weight": w}),
        (fastis.mse_loss, {}),
    ):
        with fastis.backend("triton"):
            ours = loss(logits, target, r, **options)
        with fastis.backend("reference"):
            theirs = loss(logits.double(), target.double(), r, **options)
        for a, b in zip(ours, theirs, strict=True):
            assert (a is None) == (b is None)
            if a is not None:
                torch.testing.assert_close(a.double(), b, rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("num_classes", [10, 1000, 5000])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_infinities_and_nan(num_classes, smoothing):
    inf, nan = float("inf"), float("nan")
    logits = torch.randn(9, num_classes, device="cuda")
    target = torch.zeros(9, dtype=torch.int64, device="cuda")
    logits[0, 1:] = -inf
    logits[1, 3:] = -inf
    logits[2, 0] = -inf
    logits[3, 5] = nan
    logits[4, 0] = nan
    logits[5, 5] = inf
    logits[6, 0] = inf
    logits[7] = -inf
    agree(logits, target, reduction="none", label_smoothing=smoothing)


@pytest.mark.parametrize("num_classes", [10, 1000, 5000])
@pytest.mark.parametrize("gap", [15.0, 60.0, 88.0])
def test_confident_rows_keep_their_score(num_classes, gap):
    """Subnormal results survive: flushing them to zero would lose the score at 88."""
    logits = torch.randn(64, num_classes, device="cuda")
    logits[:, 0] = logits[:, 1:].amax(1) + gap
    out = fastis.cross_entropy(logits, torch.zeros(64, dtype=torch.int64, device="cuda"))
    z = logits.double()
    rest = torch.exp(z[:, 1:] - z[:, :1])
    norm = torch.sqrt(rest.sum(1) ** 2 + (rest**2).sum(1)) / (1 + rest.sum(1))
    torch.testing.assert_close(out.score.double(), norm, rtol=1e-5, atol=0)
    torch.testing.assert_close(out.losses.double(), rest.sum(1).log1p(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("num_classes", [10, 5000])
def test_labels_out_of_range_lose_their_rows_alone(num_classes):
    logits, target, r, _ = batch_of((64, num_classes), torch.float32)
    wrong = target.clone()
    wrong[5], wrong[6] = num_classes, -1
    ours = results(logits, wrong, r, backend="triton", reduction="none")
    fine = results(logits, target, r, backend="triton", reduction="none")
    good = torch.ones(64, dtype=torch.bool, device="cuda")
    good[5:7] = False
    for name in ("losses", "score", "grad"):
        assert ours[name][~good].isnan().all()
        assert torch.equal(ours[name][good], fine[name][good])


def test_offsets_beyond_32_bits():
    """More than 2^31 logits: the last rows are as if they were alone."""
    rows, classes = 17000, 128256
    if torch.cuda.mem_get_info()[0] < 8 * rows * classes:
        pytest.skip("needs 18 GB of GPU memory")
    logits = torch.zeros(rows, classes, dtype=torch.bfloat16, device="cuda")
    logits[-40:].normal_()
    target = torch.randint(classes, (rows,), device="cuda")
    ours = results(logits, target, backend="triton", denominator=1.0)
    alone = results(logits[-40:], target[-40:], backend="triton", denominator=1.0)
    for name in ("losses", "score", "grad"):
        assert torch.equal(ours[name][-40:], alone[name])


@pytest.mark.parametrize("shape", [(128, 10), (4096, 10), (2048, 1000), (64, 128256), (8, 99, 777)])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_a_hundred_runs_give_equal_bits(shape, smoothing):
    logits, target, r, _ = batch_of(shape, torch.bfloat16)
    for rest in ((), (r,)):
        first = results(logits, target, *rest, backend="triton", label_smoothing=smoothing)
        for _ in range(100):
            again = results(logits, target, *rest, backend="triton", label_smoothing=smoothing)
            for name, value in first.items():
                assert value is None or torch.equal(value, again[name]), name


def test_nothing_waits_for_the_device():
    logits, target, r, w = batch_of((512, 1000), torch.bfloat16)
    logits.requires_grad_()
    denominator = torch.tensor(3.0, device="cuda")

    def steps():
        for rest in ({}, {"class_weights": w}, {"label_smoothing": 0.1}, {"ignore_index": 3}):
            fastis.cross_entropy(logits, target, **rest).loss.backward()
            out = fastis.cross_entropy(logits, target, r, denominator=denominator, **rest)
            (2 * out.loss).backward()
        fastis.binary_cross_entropy_with_logits(logits, logits.detach().sigmoid()).loss.backward()

    steps()  # compiling may wait
    torch.cuda.set_sync_debug_mode("error")
    try:
        steps()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("shape", [(128, 10), (2048, 1000), (64, 32000), (4, 50, 300)])
@pytest.mark.parametrize("weighted", [False, True])
def test_forward_and_backward_in_a_cuda_graph(shape, weighted):
    """A captured step, replayed on other data, equals the step run eagerly."""
    logits, target, r, _ = batch_of(shape, torch.bfloat16)
    logits.requires_grad_()
    rest = (r,) if weighted else ()

    def step():
        logits.grad = None
        out = fastis.cross_entropy(logits, target, *rest)
        out.loss.backward()
        return out

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    captured_grad = logits.grad
    for seed in (1, 2):
        data = batch_of(shape, torch.bfloat16, seed=seed)
        with torch.no_grad():
            for static, fresh in zip((logits, target, r), data, strict=False):
                static.copy_(fresh)
        graph.replay()
        eager = results(logits, target, *rest, backend="triton")
        for name in ("loss", "losses", "score", "mean_grad"):
            value = getattr(captured, name)
            assert value is None or torch.equal(value.detach(), eager[name].detach()), name
        assert torch.equal(captured_grad, eager["grad"])


def test_retained_graphs_and_scaled_gradients():
    logits, target, r, _ = batch_of((96, 5000), torch.float32)
    logits.requires_grad_()
    loss = 2 * fastis.cross_entropy(logits, target, r).loss
    (first,) = torch.autograd.grad(loss, logits, retain_graph=True)
    kept = first.clone()
    up = torch.tensor(3.0, device="cuda")
    (second,) = torch.autograd.grad(loss, logits, up, retain_graph=True)
    (third,) = torch.autograd.grad(loss, logits)
    assert torch.equal(first, kept)
    assert torch.equal(third, kept)
    torch.testing.assert_close(second, 3 * kept)
    plain = logits.detach().double().requires_grad_()
    theirs = F.cross_entropy(plain, target, reduction="none", ignore_index=-100)
    (2 * (r * theirs).mean()).backward()
    torch.testing.assert_close(kept.double(), plain.grad, rtol=1e-5, atol=1e-9)


def test_grad_scaler():
    logits, target, r, _ = batch_of((256, 100), torch.float16)
    logits.requires_grad_()
    out = fastis.cross_entropy(logits, target, r)
    (grad,) = torch.autograd.grad(65536.0 * out.loss, logits)
    assert grad.dtype == torch.float16
    wide = results(logits.double(), target, r, backend="reference")["grad"] * 65536
    torch.testing.assert_close(grad.double(), wide, rtol=2.0**-10, atol=1e-5)


def test_compiled():
    logits, target, r, _ = batch_of((256, 1000), torch.bfloat16)

    @torch.compile(fullgraph=True)
    def step(z, y, weights):
        out = fastis.cross_entropy(z, y, weights)
        return out.loss, out.score

    leaf = logits.clone().requires_grad_()
    loss, score = step(leaf, target, r)
    loss.backward()
    eager = results(logits, target, r, backend="triton")
    torch.testing.assert_close(loss, eager["loss"], rtol=0, atol=0)
    torch.testing.assert_close(score, eager["score"], rtol=0, atol=0)
    torch.testing.assert_close(leaf.grad, eager["grad"], rtol=2.0**-7, atol=1e-9)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two devices")
def test_another_device_than_the_current_one():
    logits, target, r, _ = batch_of((64, 1000), torch.float32)
    here = results(logits, target, r, backend="triton")
    there = results(*(t.to("cuda:1") for t in (logits, target, r)), backend="triton")
    for name, value in here.items():
        assert torch.equal(value, there[name].to(value.device)), name
