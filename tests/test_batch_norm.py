"""Weighted BatchNorm: torch's layer for equal coefficients, the formulas for all others."""

from __future__ import annotations

import copy
import io
import pickle
import threading
import warnings

import pytest
import torch
import torch.nn.functional as F
from no_host_reads import META, no_host_reads
from torch import nn
from torch.utils.checkpoint import checkpoint

import fastis
from fastis import batch_norm
from fastis.batch_norm import WeightedBatchNorm2d, _Weighted

LAYERS = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}
# Lengths off every vector's, and one that fills whole runs of them.
SHAPES = [(7, 5), (32, 67), (3, 4, 9), (6, 3, 5, 7), (5, 70, 2, 2), (4, 3, 16, 17), (3, 2, 2, 3, 5)]
TOLERANCE = {
    torch.float64: {"rtol": 1e-10, "atol": 1e-11},
    torch.float32: {"rtol": 2e-5, "atol": 2e-5},
    torch.bfloat16: {"rtol": 2e-2, "atol": 2e-2},  # three digits: 2^-8 of each rounded factor
    torch.float16: {"rtol": 4e-3, "atol": 4e-3},
}


def formula(x, r, weight, bias, eps):
    """The definition, in the dtype of ``x``: what the kernels are compared with."""
    others = [0, *range(2, x.dim())]
    r = r.to(x.dtype).view(-1, *[1] * (x.dim() - 1)).expand_as(x)
    mean = (r * x).sum(others, keepdim=True) / r.sum(others, keepdim=True)
    var = (r * (x - mean) ** 2).sum(others, keepdim=True) / r.sum(others, keepdim=True)
    after = (-1, *[1] * (x.dim() - 2))
    y = (x - mean) / (var + eps).sqrt()
    if weight is not None:
        y = y * weight.view(after) + bias.view(after)
    return y, mean.flatten(), var.flatten()


def layer_and_input(shape, dtype=torch.float32, channels_last=False, **options):
    generator = torch.Generator().manual_seed(sum(shape))
    layer = LAYERS[len(shape)](shape[1], dtype=dtype, **options)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    x = (3 + 2 * torch.randn(shape, generator=generator)).to(dtype)
    if channels_last:
        formats = {4: torch.channels_last, 5: torch.channels_last_3d}
        x = x.contiguous(memory_format=formats[len(shape)])
    return layer, x, torch.randn(shape, generator=generator).to(dtype)


def coefficients(batch, seed=0):
    return torch.empty(batch).log_normal_(0, 1, generator=torch.Generator().manual_seed(seed))


def step(layer, x, grad_output, weights):
    """y, the gradients in x and the parameters, and the buffers after a training step."""
    x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    with fastis.batch_weights(weights) if weights is not None else fastis.batch_weights(None):
        y = layer(x)
    y.backward(grad_output)
    return [y, x.grad, *(p.grad for p in layer.parameters()), *layer.buffers()]


def assert_same(found, expected, dtype):
    """Sums over n values may differ by the errors of sqrt(n) of them: torch's, with channels last,
    are further from float64's than ours."""
    assert len(found) == len(expected)
    tolerance = TOLERANCE[dtype]
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.dtype == theirs.dtype
        summed = max(1, found[0].numel() // max(1, theirs.numel())) if theirs.dim() == 1 else 1
        atol = tolerance["atol"] * summed**0.5
        torch.testing.assert_close(ours, theirs, rtol=tolerance["rtol"], atol=atol)


def plain(layer):
    return fastis.weighted_batch_norm(copy.deepcopy(layer), False)


# ---- values


@pytest.mark.parametrize("channels_last", [False, True], ids=["channels_first", "channels_last"])
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_torch_where_coefficients_are_equal(any_backend, shape, dtype, channels_last):
    if channels_last and len(shape) < 4:
        pytest.skip("a format of images")
    layer, x, grad_output = layer_and_input(shape, channels_last=channels_last)
    layer = layer.double() if dtype == torch.float64 else layer
    x, grad_output = x.to(dtype), grad_output.to(dtype)
    weighted = fastis.weighted_batch_norm(copy.deepcopy(layer))
    found = step(weighted, x, grad_output, torch.full((shape[0],), 0.7))
    expected = step(plain(layer), x, grad_output, None)
    assert_same(found, expected, dtype)
    assert found[0].stride() == expected[0].stride()


@pytest.mark.parametrize("channels_last", [False, True], ids=["channels_first", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_the_formulas(any_backend, shape, dtype, channels_last):
    if channels_last and len(shape) < 4:
        pytest.skip("a format of images")
    layer, x, grad_output = layer_and_input(shape, dtype, channels_last)
    r = coefficients(shape[0])
    weighted = fastis.weighted_batch_norm(copy.deepcopy(layer))
    y, grad, grad_weight, grad_bias, running_mean, running_var, _ = step(
        weighted, x, grad_output, r
    )
    leaves = [t.detach().double().requires_grad_() for t in (x, layer.weight, layer.bias)]
    truth, mean, var = formula(leaves[0], r, *leaves[1:], layer.eps)
    truth.backward(grad_output.double())
    expected = [truth, *(leaf.grad for leaf in leaves)]
    for ours, theirs in zip((y, grad, grad_weight, grad_bias), expected, strict=True):
        torch.testing.assert_close(ours, theirs.to(dtype), **TOLERANCE[dtype])
    n = max(2.0, float(r.sum() ** 2 / r.square().sum()) * x[0, 0].numel())  # Kish's
    torch.testing.assert_close(running_mean, (0.1 * mean).to(dtype), **TOLERANCE[torch.float32])
    moved = 0.9 + 0.1 * var * n / (n - 1)
    torch.testing.assert_close(running_var, moved.to(dtype), **TOLERANCE[torch.float32])


@pytest.mark.parametrize("shape", [(6, 3), (4, 2, 3, 2)], ids=str)
def test_gradients_are_those_of_the_function_and_have_gradients(any_backend, shape):
    layer, x, _ = layer_and_input(shape, torch.float64)
    layer = fastis.weighted_batch_norm(layer)
    r = coefficients(shape[0]).double()

    def function(x, weight, bias):
        with fastis.batch_weights(r):
            return torch.func.functional_call(layer, {"weight": weight, "bias": bias}, x)

    arguments = [t.detach().clone().requires_grad_() for t in (x, layer.weight, layer.bias)]
    assert torch.autograd.gradcheck(function, arguments)
    assert torch.autograd.gradgradcheck(function, arguments)


OPTIONS = {
    "no affine": {"affine": False},
    "no statistics": {"track_running_stats": False},
    "cumulative": {"momentum": None},
    "momentum 0": {"momentum": 0.0},
    "eps": {"eps": 0.1},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=list(OPTIONS))
def test_options_are_those_of_torch(any_backend, options):
    layer, x, grad_output = layer_and_input((6, 5, 3, 3), **options)
    weighted, theirs = fastis.weighted_batch_norm(copy.deepcopy(layer)), plain(layer)
    for k in range(3):
        found = step(weighted, x + k, grad_output, torch.ones(6))
        assert_same(found, step(theirs, x + k, grad_output, None), torch.float32)


def test_half_precision_parameters_and_autocast(any_backend):
    layer, x, grad_output = layer_and_input((6, 5, 4, 4))
    low, x, grad_output = layer.bfloat16(), x.bfloat16(), grad_output.bfloat16()
    found = step(fastis.weighted_batch_norm(copy.deepcopy(low)), x, grad_output, torch.ones(6))
    assert_same(found, step(plain(low), x, grad_output, None), torch.bfloat16)

    network = nn.Sequential(nn.Conv2d(5, 8, 3), nn.BatchNorm2d(8))
    twin = fastis.weighted_batch_norm(copy.deepcopy(network))
    with torch.autocast("cpu", torch.bfloat16), fastis.batch_weights(torch.ones(6)):
        ours, theirs = twin(x.float()), network(x.float())
    assert ours.dtype == theirs.dtype == torch.bfloat16
    torch.testing.assert_close(ours, theirs, **TOLERANCE[torch.bfloat16])


def test_frozen_parts_get_no_gradient(any_backend):
    layer, x, grad_output = layer_and_input((6, 5, 3, 3))
    layer = fastis.weighted_batch_norm(layer)
    layer.weight.requires_grad_(False)
    with fastis.batch_weights(coefficients(6)):
        layer(x).backward(grad_output)  # x needs none
    assert layer.weight.grad is None
    assert layer.bias.grad is not None


def test_odd_gradients_and_inputs(any_backend):
    """Expanded, negated lazily, zeros without memory, permuted, and in place on the output."""
    layer, x, _ = layer_and_input((6, 5, 3, 4))
    r, layer = coefficients(6), fastis.weighted_batch_norm(layer)

    def gradient(x, of):
        x = x.detach().requires_grad_()
        with fastis.batch_weights(r):
            y = layer(x)
        return torch.autograd.grad(y, x, of(y))[0]

    ones = gradient(x, torch.ones_like)
    assert_same([gradient(x, lambda y: y.new_ones(()).expand_as(y))], [ones], torch.float32)
    negated = gradient(x, lambda y: torch._neg_view(-torch.ones_like(y)))
    assert_same([negated], [ones], torch.float32)
    assert not gradient(x, lambda y: torch._efficientzerotensor(y.shape)).any()
    permuted = x.permute(0, 1, 3, 2)
    found = gradient(permuted, torch.ones_like).permute(0, 1, 3, 2)
    assert_same([found], [ones], torch.float32)
    with fastis.batch_weights(r):
        y = layer(x)
        assert (F.relu_(layer(x)) == F.relu(y)).all()


def test_odd_parameters_and_buffers(any_backend):
    """Every second element of their memory."""
    layer, x, grad_output = layer_and_input((6, 5, 3, 4))
    layer = fastis.weighted_batch_norm(layer)
    odd = copy.deepcopy(layer)
    for name, tensor in layer.state_dict().items():
        if tensor.dim():
            strided = torch.stack([tensor, tensor - 100], 1)[:, 0]
            is_parameter = name in ("weight", "bias")
            setattr(odd, name, nn.Parameter(strided) if is_parameter else strided)
    r = coefficients(6)
    found, expected = step(odd, x, grad_output, r), step(layer, x, grad_output, r)
    assert_same(found, expected, torch.float32)


@pytest.mark.parametrize("channels_last", [False, True], ids=["channels_first", "channels_last"])
@pytest.mark.parametrize("shape", [(70, 70, 8, 9), (70, 140, 5, 6)], ids=str)  # sliced, and not
def test_threads_divide_the_work_and_change_no_bit(shape, channels_last, threads_and_data):
    layer, x, grad_output = layer_and_input(shape, channels_last=channels_last)
    r, found = coefficients(70), []
    for threads, backend in ((1, "cpu"), (3, "cpu"), (1, "reference")):
        torch.set_num_threads(threads)
        with fastis.backend(backend):
            weighted = fastis.weighted_batch_norm(copy.deepcopy(layer))
            found.append(step(weighted, x, grad_output, r))
    one, three, reference = found
    assert all((a == b).all() for a, b in zip(one, three, strict=True))
    assert_same(one, reference, torch.float32)


def test_large_mean_cancels_nothing(any_backend):
    """A one-pass variance E[x^2] - E[x]^2 would have no digit left."""
    _, x, _ = layer_and_input((64, 33))
    layer = fastis.weighted_batch_norm(nn.BatchNorm1d(33, momentum=1.0))
    r = coefficients(64)
    with fastis.batch_weights(r):
        layer(x + 10_000)
        found = layer.running_var.clone()
        layer(x)
    torch.testing.assert_close(found, layer.running_var, rtol=2e-3, atol=0)  # x + 1e4: 3 digits


def test_a_sample_of_coefficient_0_has_no_say(any_backend):
    layer, x, _ = layer_and_input((6, 5, 3, 3))
    r = torch.tensor([1.0, 1, 1, 1, 1, 0])
    weighted = fastis.weighted_batch_norm(copy.deepcopy(layer))
    with fastis.batch_weights(r):
        y = weighted(x)
    torch.testing.assert_close(y[:5], plain(layer)(x[:5]), **TOLERANCE[torch.float32])
    with fastis.batch_weights(torch.tensor([0.0, 0, 0, 1, 0, 0])):  # n is not below 2
        weighted(x.mean((2, 3), keepdim=True))
    assert torch.isfinite(weighted.running_var).all()


# ---- what it is for


def test_statistics_are_those_of_the_training_set_in_expectation():
    """10,000 draws of 64: the weighted means are within five standard errors of the population's
    (6e-7 a comparison, 1e-5 for all 16 by chance) after the bias of a ratio, which is below 1/B;
    unweighted ones are not."""
    generator = torch.Generator().manual_seed(0)
    data = torch.randn(1000, 8, generator=generator)
    data[:, 0] = data[:, 0].abs() * 3  # hard samples are unlike the others
    p = (0.2 + data[:, 0]).clamp(min=0.2)
    p /= p.sum()
    population = torch.stack([data.mean(0), data.var(0)])
    layer = fastis.weighted_batch_norm(nn.BatchNorm1d(8, momentum=1.0, affine=False))
    theirs = nn.BatchNorm1d(8, momentum=1.0, affine=False)
    weighted, unweighted = [], []
    indices = torch.multinomial(p, 10_000 * 64, True, generator=generator).view(-1, 64)
    for i in indices:
        with fastis.batch_weights(1 / (1000 * p[i])), torch.no_grad():
            layer(data[i])
            theirs(data[i])
        weighted.append(torch.stack([layer.running_mean, layer.running_var]))
        unweighted.append(torch.stack([theirs.running_mean, theirs.running_var]))

    def distance(found):
        found = torch.stack(found)
        error = 5 * found.std(0) / len(found) ** 0.5
        return (found.mean(0) - population).abs() - error

    assert (distance(weighted) < population[1] / 64).all()
    assert (distance(unweighted)[:, 0] > 10 * population[1, 0] / 64).all()


def test_with_a_sampler():
    torch.manual_seed(0)
    x, y = torch.randn(512, 1, 8, 8), torch.randint(10, (512,))
    network = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten())
    network = fastis.weighted_batch_norm(network.append(nn.Linear(144, 10)))
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    sampler = fastis.Sampler(512, 32, seed=0)
    for _ in range(64):
        batch = sampler.sample()
        with fastis.batch_weights(batch.weights):
            logits = network(x[batch.indices])
        out = fastis.cross_entropy(logits, y[batch.indices], batch.weights)
        sampler.update(batch, out)
        optimizer.zero_grad()
        out.loss.backward()
        optimizer.step()
    assert sampler.phase == "importance" if hasattr(sampler, "phase") else True
    assert all(torch.isfinite(p).all() for p in network.parameters())
    assert int(network[1].num_batches_tracked) == 64


# ---- the converter


def network():
    return nn.Sequential(
        nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3)),
        nn.Flatten(),
        nn.Linear(3 * 36, 5),
        nn.BatchNorm1d(5),
        nn.SyncBatchNorm(5),
    )


def test_converts_in_place_and_back():
    model = network()
    parameters, layer = list(model.parameters()), model[0][1]
    assert fastis.weighted_batch_norm(model) is model
    assert fastis.weighted_batch_norm(model) is model  # twice is once
    assert type(model[0][1]) is WeightedBatchNorm2d
    assert model[0][1] is layer
    assert isinstance(layer, nn.BatchNorm2d)
    assert isinstance(model[4], nn.SyncBatchNorm)
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(copied[0][1]) is WeightedBatchNorm2d
    fastis.weighted_batch_norm(model, False)
    assert [type(m) for m in model.modules()] == [type(m) for m in network().modules()]
    assert type(fastis.weighted_batch_norm(nn.BatchNorm2d(3))) is WeightedBatchNorm2d


def test_states_are_torchs():
    model, weighted = network(), fastis.weighted_batch_norm(network())
    assert list(model.state_dict()) == list(weighted.state_dict())
    for source, target in ((model, weighted), (weighted, network())):
        file = io.BytesIO()
        torch.save(source.state_dict(), file)
        file.seek(0)
        target.load_state_dict(torch.load(file, weights_only=True))
        for a, b in zip(target.state_dict().values(), model.state_dict().values(), strict=True):
            assert (a == b).all()


def test_evaluation_is_unchanged_with_and_without_coefficients():
    model = network().eval()
    x = torch.randn(4, 1, 8, 8)
    expected = model(x)
    weighted = fastis.weighted_batch_norm(model)
    assert (weighted(x) == expected).all()
    with fastis.batch_weights(coefficients(4)):
        assert (weighted(x) == expected).all()
    no_statistics = nn.BatchNorm1d(5, track_running_stats=False).eval()
    x = torch.randn(4, 5)
    expected = no_statistics(x)
    assert (fastis.weighted_batch_norm(no_statistics)(x) == expected).all()


def test_uniform_minibatches_have_torchs_bits():
    layer, x, grad_output = layer_and_input((6, 5, 3, 3))
    found = step(fastis.weighted_batch_norm(copy.deepcopy(layer)), x, grad_output, None)
    layer.zero_grad()
    x.requires_grad_()
    y = layer(x)
    y.backward(grad_output)
    expected = [y, x.grad, *(p.grad for p in layer.parameters()), *layer.buffers()]
    assert all((a == b).all() for a, b in zip(found, expected, strict=True))


def test_update_bn_works_on_uniform_data():
    model = fastis.weighted_batch_norm(nn.Sequential(nn.BatchNorm1d(3)))
    data = [torch.randn(8, 3) for _ in range(4)]
    with fastis.batch_weights(None):
        torch.optim.swa_utils.update_bn(data, model)
    torch.testing.assert_close(model[0].running_mean, torch.stack(data).mean((0, 1)))


# ---- errors, and what must not be silent


class Own(nn.BatchNorm2d):
    def forward(self, input):
        return super().forward(input).relu()


def test_refuses_layers_that_may_compute_otherwise():
    for layer in (Own(3), nn.LazyBatchNorm2d()):
        model = nn.Sequential(nn.BatchNorm1d(3), nn.Sequential(layer))
        with pytest.raises(TypeError, match=r"model.*own classes.*at '1\.0'"):
            fastis.weighted_batch_norm(model)
        assert type(model[0]) is nn.BatchNorm1d
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got int"):
        fastis.weighted_batch_norm(3)


@pytest.mark.parametrize(
    ("weights", "error", "match"),
    [
        ([1.0], TypeError, "weights must be a tensor or None, got list"),
        (torch.ones(2, 2), ValueError, r"shape \[B\], got \[2, 2\]"),
        (torch.ones(2).int(), TypeError, r"float32 or float64, got torch\.int32"),
        (torch.ones(2, requires_grad=True), ValueError, "constants"),
    ],
)
def test_refuses_weights(weights, error, match):
    with pytest.raises(error, match=match):
        fastis.batch_weights(weights)


def test_errors_of_a_layer_come_before_anything_changes():
    layer = fastis.weighted_batch_norm(nn.BatchNorm2d(3))
    state = copy.deepcopy(layer.state_dict())
    x = torch.randn(4, 3, 2, 2)
    with pytest.raises(RuntimeError, match="needs the minibatch's coefficients"):
        layer(x)
    with fastis.batch_weights(torch.ones(5)):
        with pytest.raises(ValueError, match=r"expected \[4\].*got \[5\]"):
            layer(x)
        with pytest.raises(ValueError, match="expected 4D input"):
            layer(torch.randn(5, 3))
        with pytest.raises(ValueError, match="expected 3 channels"):
            layer(torch.randn(5, 4, 2, 2))
        with pytest.raises(ValueError, match="must be on meta, got cpu"):
            layer(torch.randn(5, 3, 2, 2, device="meta"))
    assert all(
        (a == b).all() for a, b in zip(state.values(), layer.state_dict().values(), strict=True)
    )


def test_one_value_a_channel_and_none_are_as_in_torch():
    layer = fastis.weighted_batch_norm(nn.BatchNorm1d(3))
    with fastis.batch_weights(torch.ones(1)), pytest.raises(ValueError, match="more than 1 value"):
        layer(torch.randn(1, 3))
    with fastis.batch_weights(torch.ones(1)):
        assert layer(torch.randn(1, 3, 2)).shape == (1, 3, 2)
    with fastis.batch_weights(torch.ones(0)):
        assert layer(torch.randn(0, 3)).shape == (0, 3)


def test_contexts_nest_and_end():
    layer = fastis.weighted_batch_norm(nn.BatchNorm1d(3, momentum=1.0))
    a, b = torch.randn(4, 3), torch.randn(5, 3)
    with fastis.batch_weights(torch.ones(4)):
        with fastis.batch_weights(torch.ones(5)):
            layer(b)
        layer(a)
        with pytest.raises(KeyError), fastis.batch_weights(torch.ones(5)):
            raise KeyError
        layer(a)
    with (twice := fastis.batch_weights(torch.ones(4))), twice:
        layer(a)
    with pytest.raises(RuntimeError, match="needs the minibatch's coefficients"):
        layer(a)


def test_coefficients_may_be_written_anew():
    layer = fastis.weighted_batch_norm(nn.BatchNorm1d(3, momentum=1.0))
    x, r = torch.randn(4, 3), torch.ones(4)
    with fastis.batch_weights(r):
        layer(x)
        r.copy_(torch.tensor([0.0, 0, 1, 1]))
        layer(x)
    torch.testing.assert_close(layer.running_mean, x[2:].mean(0))


def test_threads_have_contexts_of_their_own():
    """As the replicas of DataParallel, whose minibatch is a part of the one with coefficients."""
    layer = fastis.weighted_batch_norm(nn.BatchNorm1d(3))
    caught = []

    def replica():
        try:
            layer(torch.randn(4, 3))
        except RuntimeError as error:
            caught.append(str(error))

    with fastis.batch_weights(torch.ones(4)):
        layer(torch.randn(4, 3))
        thread = threading.Thread(target=replica)
        thread.start()
        thread.join()
    assert "in the same thread" in caught[0]


def test_coefficients_that_no_layer_saw_are_heard_of():
    plain = nn.BatchNorm1d(3)
    heard = pytest.warns(UserWarning, match="no weighted BatchNorm layer")
    with heard, fastis.batch_weights(torch.ones(4)):
        plain(torch.randn(4, 3))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with fastis.batch_weights(None):
            plain(torch.randn(4, 3))
        with fastis.batch_weights(torch.ones(4)):
            fastis.weighted_batch_norm(plain).eval()(torch.randn(4, 3))


# ---- ways to run a model


@pytest.mark.parametrize("parts", [1, 2])
def test_checkpointing_computes_again_with_the_same_coefficients(parts):
    """Parts of a minibatch, each within its context; all backward passes after the last."""
    x, r = torch.randn(8, 3), coefficients(8)
    model = fastis.weighted_batch_norm(nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 2)))

    def gradients(run):
        model.zero_grad()
        outputs = []
        for part, own in zip(x.chunk(parts), r.chunk(parts), strict=True):
            with fastis.batch_weights(own):
                outputs.append(run(part))
        torch.cat(outputs).square().sum().backward()
        return [p.grad.clone() for p in model.parameters()]

    def again(part):
        context = fastis.batch_weights.for_checkpoint
        return checkpoint(model, part, use_reentrant=False, context_fn=context)

    assert_same(gradients(again), gradients(model), torch.float32)
    with pytest.raises(RuntimeError, match="coefficients"):
        gradients(lambda part: checkpoint(model, part, use_reentrant=False))
    with pytest.raises(RuntimeError, match="coefficients"):
        gradients(lambda part: checkpoint(model, part.requires_grad_(), use_reentrant=True))


def test_checkpointing_in_the_context_of_another_minibatch_is_an_error():
    model = fastis.weighted_batch_norm(nn.BatchNorm1d(3))
    with fastis.batch_weights(coefficients(4)):
        y = checkpoint(model, torch.randn(4, 3), use_reentrant=False)
    with fastis.batch_weights(coefficients(4, seed=1)):
        model(torch.randn(4, 3))
        with pytest.raises(RuntimeError, match="within a backward pass"):
            y.square().sum().backward()


def test_transforms_and_forward_mode():
    layer, x, _ = layer_and_input((6, 5), torch.float64, track_running_stats=False)
    layer = fastis.weighted_batch_norm(layer)
    r, tangent = coefficients(6), torch.randn(6, 5, dtype=torch.float64)

    def run(x):
        with fastis.batch_weights(r):
            return layer(x)

    _, found = torch.func.jvp(run, (x,), (tangent,))
    _, expected = torch.autograd.functional.jvp(run, x, tangent)  # by two backward passes
    torch.testing.assert_close(found, expected)
    gradient = torch.func.grad(lambda x: run(x).square().sum())(x)
    x.requires_grad_()
    (expected,) = torch.autograd.grad(run(x).square().sum(), x)
    torch.testing.assert_close(gradient, expected)


@pytest.mark.slow
@pytest.mark.parametrize("inside", [False, True], ids=["context outside", "context inside"])
def test_compiles_whole_and_sees_every_minibatch(inside):
    layer, x, grad_output = layer_and_input((8, 5, 4, 4))
    model = nn.Sequential(fastis.weighted_batch_norm(copy.deepcopy(layer)))
    eager = copy.deepcopy(model)

    def run(x, r):
        if not inside:
            return model(x)
        with fastis.batch_weights(r):
            return model(x)

    compiled = torch.compile(run, fullgraph=True)
    for seed in range(3):
        r = coefficients(8, seed)
        x = x.detach().requires_grad_()
        with fastis.batch_weights(r):
            y, expected = compiled(x, r), eager(x)
        (grad,), (truth,) = (torch.autograd.grad(t, x, grad_output) for t in (y, expected))
        assert_same([y, grad], [expected, truth], torch.float32)
        assert_same([*model[0].buffers()], [*eager[0].buffers()], torch.float32)


@pytest.mark.parametrize("momentum", [0.1, None])
def test_nothing_waits_for_a_device(monkeypatch, momentum):
    """torch's operators on tensors without data: reading a number on the host raises."""
    monkeypatch.setattr(batch_norm, "_kernels_can_read", lambda x: True)
    layer = fastis.weighted_batch_norm(nn.BatchNorm2d(5, momentum=momentum, device=META))
    x = torch.empty(6, 5, 4, 4, device=META, requires_grad=True)
    r = torch.empty(6, device=META)
    with no_host_reads():
        with fastis.batch_weights(r):
            y = layer(x)
        y.backward(torch.empty_like(y))
    assert x.grad.shape == x.shape


# ---- several processes


def sync_process(rank, address, results):
    """A part of the minibatch; the gradients are those of a sum over all processes."""
    torch.distributed.init_process_group("gloo", f"file://{address}", rank=rank, world_size=2)
    layer, x, grad_output, r = sync_problem()
    part = slice(0, 3) if rank == 0 else slice(3, 8)
    layer = fastis.weighted_batch_norm(nn.SyncBatchNorm.convert_sync_batchnorm(layer))
    results.put(
        (rank, [t.detach().numpy() for t in step(layer, x[part], grad_output[part], r[part])])
    )
    torch.distributed.destroy_process_group()


def sync_problem():
    return *layer_and_input((8, 5, 3, 4)), coefficients(8)


def test_sync_batch_norm_is_one_process_with_the_whole_minibatch(tmp_path):
    context = torch.multiprocessing.get_context("spawn")
    results = context.Queue()
    arguments = [(rank, str(tmp_path / "store"), results) for rank in range(2)]
    processes = [context.Process(target=sync_process, args=a, daemon=True) for a in arguments]
    for process in processes:
        process.start()
    found = dict(results.get(timeout=120) for _ in processes)
    for process in processes:
        process.join()
    layer, x, grad_output, r = sync_problem()
    y, grad, *gradients, mean, var, count = step(
        fastis.weighted_batch_norm(layer), x, grad_output, r
    )
    first, second = ([torch.from_numpy(t) for t in found[rank]] for rank in range(2))
    for k, whole in enumerate((y, grad)):
        torch.testing.assert_close(torch.cat([first[k], second[k]]), whole, rtol=1e-5, atol=1e-5)
    for k, whole in enumerate(gradients, 2):
        torch.testing.assert_close(first[k] + second[k], whole, rtol=1e-5, atol=1e-5)
    for part in (first, second):
        for ours, theirs in zip(part[-3:], (mean, var, count), strict=True):
            torch.testing.assert_close(ours, theirs)


def test_layers_of_one_process_need_no_group():
    layer, x, grad_output = layer_and_input((6, 5, 3, 3))
    one = fastis.weighted_batch_norm(nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(layer)))
    r = coefficients(6)
    expected = step(fastis.weighted_batch_norm(layer), x, grad_output, r)
    assert isinstance(one, _Weighted)
    assert_same(step(one, x, grad_output, r), expected, torch.float32)
