"""The public losses: torch's own values, autograd in all its forms, operators."""

import math

import pytest
import torch
import torch.nn.functional as F
from conftest import LOSS_BACKENDS

import fastis
from fastis import operators


@pytest.fixture(params=LOSS_BACKENDS, autouse=True)
def backend(request):
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with fastis.backend(request.param):
        yield request.param
    torch.set_num_threads(before)


def batch_of(num_classes=10, batch=16, dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    logits = torch.randn(batch, num_classes, dtype=dtype, requires_grad=True)
    return logits, torch.randint(num_classes, (batch,)), torch.rand(batch) + 0.5


def value_and_grad(loss, logits):
    return loss.detach(), torch.autograd.grad(loss, logits)[0]


def same(ours, theirs, logits):
    for a, b in zip(value_and_grad(ours, logits), value_and_grad(theirs, logits), strict=True):
        torch.testing.assert_close(a, b, rtol=2e-6, atol=2e-7)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("smoothing", [0.0, 0.3])
@pytest.mark.parametrize("kind", ["index", "ignored", "uint8", "soft"])
@pytest.mark.parametrize("weighted", [False, True])
def test_cross_entropy_is_torchs(reduction, smoothing, kind, weighted):
    logits, target, _ = batch_of()
    if kind == "ignored":
        target[::3] = 4
    if kind == "soft":
        target = torch.rand(16, 10).softmax(1)
    options = {"label_smoothing": smoothing, "reduction": reduction}
    if kind == "ignored":
        options["ignore_index"] = 4
    w = torch.rand(10) + 0.1 if weighted else None
    ours = fastis.cross_entropy(
        logits, target.to(torch.uint8) if kind == "uint8" else target, class_weights=w, **options
    ).loss
    theirs = F.cross_entropy(logits, target, weight=w, **options)
    same(ours.sum() if reduction == "none" else ours,
         theirs.sum() if reduction == "none" else theirs, logits)  # fmt: skip
    if reduction == "none":
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_sequence_cross_entropy_is_torchs(reduction, soft):
    torch.manual_seed(0)
    logits = torch.randn(4, 6, 12, requires_grad=True)
    target = torch.randint(12, (4, 6))
    target[1, 2:] = -100
    if soft:
        target = torch.rand(4, 6, 12).softmax(2)
    ours = fastis.cross_entropy(logits, target, reduction=reduction).loss
    other = target.transpose(1, 2) if soft else target
    same(ours, F.cross_entropy(logits.transpose(1, 2), other, reduction=reduction), logits)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("shape", [(16,), (16, 1), (16, 7), (16, 2, 3)])
@pytest.mark.parametrize("pos", ["none", "one", "each"])
def test_elementwise_losses_are_torchs(reduction, shape, pos):
    torch.manual_seed(0)
    logits = torch.randn(shape, requires_grad=True)
    target = torch.rand(shape)
    pos_weight = {"none": None, "one": torch.tensor([2.5]), "each": torch.rand(shape[1:])}[pos]
    ours = fastis.binary_cross_entropy_with_logits(
        logits, target, pos_weight=pos_weight, reduction=reduction
    )
    theirs = F.binary_cross_entropy_with_logits(
        logits, target, pos_weight=pos_weight, reduction=reduction
    )
    same(ours.loss, theirs, logits)
    ours = fastis.mse_loss(logits, target, reduction=reduction)
    same(ours.loss, F.mse_loss(logits, target, reduction=reduction), logits)
    assert (ours.mean_grad is None) == (len(shape) > 2)


def test_label_reduction_holds_for_loss_and_norm_alike():
    logits, target = torch.randn(5, 4), torch.rand(5, 4)
    for loss in (fastis.mse_loss, fastis.binary_cross_entropy_with_logits):
        mean = loss(logits, target, label_reduction="mean")
        total = loss(logits, target, label_reduction="sum")
        torch.testing.assert_close(4 * mean.losses, total.losses)
        torch.testing.assert_close(4 * mean.score, total.score)
        torch.testing.assert_close(4 * mean.mean_grad, total.mean_grad)


def test_weighted_loss_divides_by_a_constant():
    logits, target, weights = batch_of()
    target[:5] = -100
    w = torch.rand(10)

    def weighted():
        return weights * F.cross_entropy(logits, target, weight=w, reduction="none")

    out = fastis.cross_entropy(logits, target, weights, class_weights=w)
    same(out.loss, weighted().sum() / 16, logits)
    for denominator in (3.5, torch.tensor(3.5), torch.tensor([3.5], dtype=torch.float64), 7):
        out = fastis.cross_entropy(
            logits, target, weights, class_weights=w, denominator=denominator
        )
        same(out.loss, weighted().sum() / float(denominator), logits)
    out = fastis.cross_entropy(logits, target, weights, class_weights=w, reduction="none")
    torch.testing.assert_close(out.loss, weighted())


def test_importance_weighted_loss_is_unbiased():
    """The mean over all draws, each with probability p and weight 1/(N p), is the data's mean."""
    logits, target, _ = batch_of(batch=6)
    p = torch.rand(6).softmax(0)
    expected = sum(
        p[i]
        * fastis.cross_entropy(logits[i : i + 1], target[i : i + 1], 1 / (6 * p[i : i + 1])).loss
        for i in range(6)
    )
    torch.testing.assert_close(expected, F.cross_entropy(logits, target))


def test_mean_grad_is_left_out_for_many_classes():
    logits, target, _ = batch_of(num_classes=4096, batch=3)
    assert fastis.cross_entropy(logits, target).mean_grad.shape == (4096,)
    logits, target, _ = batch_of(num_classes=4097, batch=3)
    assert fastis.cross_entropy(logits, target).mean_grad is None


def one_hot(y, z):
    return (y[:, None] == torch.arange(10)).to(z.dtype)  # F.one_hot does not vmap


LOSSES = {
    "cross_entropy": lambda z, y, r: fastis.cross_entropy(z, y, r),
    "smoothed": lambda z, y, r: fastis.cross_entropy(z, y, r, label_smoothing=0.2),
    "soft": lambda z, y, r: fastis.cross_entropy(z, one_hot(y, z), r),
    "none": lambda z, y, r: fastis.cross_entropy(z, y, r, reduction="none"),
    "bce": lambda z, y, r: fastis.binary_cross_entropy_with_logits(z, one_hot(y, z), r),
    "mse": lambda z, y, r: fastis.mse_loss(z, one_hot(y, z), r),
    "scored": lambda z, y, r: fastis.scored_loss(
        lambda a, b: F.multi_margin_loss(a, b, p=2, reduction="none"), z, y, r
    ),
}
FIRST_ORDER = [name for name in LOSSES if name != "scored"]


@pytest.mark.parametrize("name", LOSSES)
def test_gradcheck(name):
    logits, target, weights = batch_of(batch=5, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda z: LOSSES[name](z, target, weights).loss, logits)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_second_backward_through_a_retained_graph(name, scale):
    logits, target, weights = batch_of()
    loss = LOSSES[name](logits, target, weights).loss.sum() * scale
    (first,) = torch.autograd.grad(loss, logits, retain_graph=True)
    first = first.clone()
    loss.backward(retain_graph=True)
    torch.testing.assert_close(logits.grad, first)
    loss.backward(gradient=torch.tensor(2.0))
    torch.testing.assert_close(logits.grad, 3 * first)


@pytest.mark.parametrize("name", FIRST_ORDER)
def test_gradients_are_scaled_per_incoming_gradient(name):
    logits, target, weights = batch_of(dtype=torch.float64)
    loss = LOSSES[name](logits, target, weights).loss
    up = torch.rand_like(loss)
    (once,) = torch.autograd.grad(loss, logits, torch.ones_like(loss), retain_graph=True)
    (scaled,) = torch.autograd.grad(loss, logits, up)
    torch.testing.assert_close(scaled, once * (up[:, None] if up.dim() else up))


@pytest.mark.parametrize("name", FIRST_ORDER)
def test_second_derivative_raises_rather_than_being_zero(name):
    logits, target, weights = batch_of()
    loss = LOSSES[name](logits, target, weights).loss.sum()
    (g,) = torch.autograd.grad(loss, logits, create_graph=True)
    with pytest.raises(RuntimeError, match="first derivative only"):
        (g.square().sum() + logits.sum()).backward()


def test_scored_loss_reaches_parameters_of_the_loss_and_second_derivatives():
    logits, target, weights = batch_of(dtype=torch.float64)
    temperature = torch.tensor(1.5, dtype=torch.float64, requires_grad=True)

    def loss_fn(z, y):
        return F.cross_entropy(z / temperature, y, reduction="none")

    out = fastis.scored_loss(loss_fn, logits, target, weights)
    direct = (weights * loss_fn(logits, target)).mean()
    for a, b in zip(
        torch.autograd.grad(out.loss, (logits, temperature), create_graph=True),
        torch.autograd.grad(direct, (logits, temperature), create_graph=True),
        strict=True,
    ):
        torch.testing.assert_close(a, b)
    g = torch.autograd.grad(loss_fn(logits, target).sum(), logits)[0]
    torch.testing.assert_close(out.score, g.norm(dim=1))
    torch.testing.assert_close(out.mean_grad, (weights[:, None] * g).mean(0))


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients(name, mode):
    logits, target, weights = batch_of()
    with_grad = LOSSES[name](logits, target, weights)
    with mode():
        inside = LOSSES[name](logits + 0, target + 0, weights)
    detached = LOSSES[name](logits.detach(), target, weights)
    for out in (inside, detached):
        assert not out.loss.requires_grad
        for a, b in zip(out, with_grad, strict=True):
            torch.testing.assert_close(a, b.detach())
    assert with_grad.loss.requires_grad
    assert not any(t.requires_grad for t in with_grad[1:])


@pytest.mark.parametrize("name", FIRST_ORDER)
def test_float16_gradients_survive_loss_scaling(name):
    """1/B of a small gradient underflows float16; times GradScaler's 2^16 it must be there."""
    torch.manual_seed(0)
    logits = torch.randn(512, 10)
    target = torch.randint(10, (512,))
    logits[range(512), target] += 12.0
    half = logits.half().requires_grad_()
    weights = torch.full((512,), 0.01)
    wide = half.detach().double().requires_grad_()
    for z in (half, wide):
        (LOSSES[name](z, target, weights).loss.sum() * 65536).backward()
    assert half.grad.dtype == torch.float16
    torch.testing.assert_close(half.grad.double(), wide.grad, rtol=2e-3, atol=1e-7)


def test_grad_scaler_and_autocast():
    torch.manual_seed(0)
    model = torch.nn.Linear(20, 10)
    x, target = torch.randn(32, 20), torch.randint(10, (32,))
    grads = []
    for loss_fn in (
        lambda z: fastis.cross_entropy(z, target).loss,
        lambda z: F.cross_entropy(z, target),
    ):
        model.zero_grad()
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            z = model(x)
            assert z.dtype == torch.bfloat16
            loss = loss_fn(z)
        assert loss.dtype == torch.float32
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        grads.append(model.weight.grad.clone())
    torch.testing.assert_close(grads[0], grads[1], rtol=2e-2, atol=2e-4)


def test_gradient_reaches_a_model_and_frees_its_buffer():
    torch.manual_seed(0)
    model = torch.nn.Linear(5, 10)
    x, target = torch.randn(8, 5), torch.randint(10, (8,))
    loss = fastis.cross_entropy(model(x), target).loss
    theirs = torch.autograd.grad(F.cross_entropy(model(x), target), model.parameters())
    for a, b in zip(torch.autograd.grad(loss, model.parameters()), theirs, strict=True):
        torch.testing.assert_close(a, b)
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


def operator_arguments(name, logits, target, weights):
    tail = (4.0, None, True, True, True)
    if name == "cross_entropy":
        return (logits, target, weights, torch.rand(10), -100, 0.1, *tail)
    wanted = F.one_hot(target, 10).float()
    pos_weight = None if name == "mse_loss" else torch.rand(10)
    return (logits, wanted, weights, pos_weight, 10.0, *tail)


@pytest.mark.parametrize("name", ["cross_entropy", "binary_cross_entropy_with_logits", "mse_loss"])
def test_opcheck(name):
    arguments = operator_arguments(name, *batch_of(batch=4))
    torch.library.opcheck(getattr(torch.ops.fastis, name).default, arguments)
    absent = (*arguments[:-5], None, torch.tensor(3.0), False, False, False)
    if name == "cross_entropy":
        torch.library.opcheck(getattr(torch.ops.fastis, name).default, absent)


@pytest.mark.parametrize("name", ["cross_entropy", "soft", "none", "bce", "mse"])
def test_compile_fullgraph(name):
    torch._dynamo.reset()
    logits, target, weights = batch_of()

    def step(z, y, r):
        out = LOSSES[name](2 * z, y, r)
        return out.loss.sum(), out.losses, out.score, out.mean_grad

    eager = step(logits, target, weights)
    compiled = torch.compile(step, fullgraph=True)(logits, target, weights)
    for a, b in zip(eager, compiled, strict=True):
        torch.testing.assert_close(a, b)
    same(compiled[0], eager[0], logits)


@pytest.mark.parametrize("name", FIRST_ORDER)
def test_func_grad_and_vmap(name):
    logits, target, weights = batch_of()
    (expected,) = torch.autograd.grad(LOSSES[name](logits, target, weights).loss.sum(), logits)
    plain = logits.detach()
    ours = torch.func.grad(lambda z: LOSSES[name](z, target, weights).loss.sum())(plain)
    torch.testing.assert_close(ours, expected)

    def one(z, y):
        return LOSSES[name](z[None], y[None], None).loss.sum()

    each = torch.func.vmap(torch.func.grad(one))(plain, target)
    norm = LOSSES[name](plain, target, None).score
    torch.testing.assert_close(each.norm(dim=1), norm)


def test_eager_does_not_go_through_the_dispatcher(monkeypatch):
    def fail(*_):
        raise AssertionError("eager code called the registered operator")

    monkeypatch.setattr(operators, "call", fail)
    logits, target, weights = batch_of()
    fastis.cross_entropy(logits, target, weights).loss.backward()
    fastis.cross_entropy(torch.nn.Parameter(logits.detach()), target).loss.backward()


def test_subclasses_and_modes_go_through_the_dispatcher():
    from torch._subclasses.fake_tensor import FakeTensorMode

    logits, target, _ = batch_of()
    with FakeTensorMode() as mode:
        out = fastis.cross_entropy(mode.from_tensor(logits), mode.from_tensor(target))
    assert out.score.shape == (16,)
    assert out.mean_grad.shape == (10,)
    assert type(out.loss) is not torch.Tensor


def test_hessian_vector_products_by_func_raise():
    logits, target, _ = batch_of()

    def loss(z):
        return fastis.cross_entropy(z, target).loss

    with pytest.raises(RuntimeError):
        torch.func.hessian(loss)(logits.detach())


def test_losses_are_finite_where_the_gap_is_not():
    logits = torch.tensor([[1e30, -1e30], [-1e30, 1e30]], requires_grad=True)
    out = fastis.cross_entropy(logits, torch.zeros(2, dtype=torch.int64))
    assert out.losses[0] == 0
    assert math.isclose(float(out.losses[1]), 2e30, rel_tol=1e-6)
    assert out.score.tolist() == pytest.approx([0.0, math.sqrt(2)])
