"""BatchNorm whose statistics are those of the training set, not of what was drawn.

Under importance sampling a minibatch holds more hard samples than the training set does, and so do
the statistics that BatchNorm normalises with. Weighted by the coefficients r of the minibatch,
they estimate those of the training set (the self-normalised estimate: consistent, its bias falls
as 1/B). With R = sum_b r_b and S spatial positions

    mean_c = sum_b r_b sum_s x_bcs / (R S)
    var_c  = sum_b r_b sum_s (x_bcs - mean_c)^2 / (R S)

:func:`weighted_batch_norm` converts a model's layers, :class:`batch_weights` gives them r.
"""

from __future__ import annotations

import math
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules.batchnorm import _BatchNorm

from fastis.coefficients import backward_number, batch_weights, correction, is_compiling, local
from fastis.kernels import kernels_for
from fastis.kernels.batch_norm import Running
from fastis.kernels.formats import compute_dtype

Model = TypeVar("Model", bound=nn.Module)

_dispatch_modes = torch._C._len_torch_dispatch_stack
_functorch_active = torch._C._are_functorch_transforms_active


def _formula(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    share: Tensor,
    eps: float,
    running: Running | None,
) -> Tensor:
    """The layer by differentiable operators, for whatever traces or transforms them."""
    after = (1,) * (x.dim() - 2)
    by_sample = share.view(-1, 1, *after) / x.shape[2:].numel()
    others = (0, *range(2, x.dim()))
    mean = (by_sample * x).sum(others, keepdim=True)
    var = (by_sample * (x - mean).square()).sum(others, keepdim=True)
    if running is not None:
        running.move(mean.detach().flatten(), var.detach().flatten())
    y = (x - mean) * torch.rsqrt(var + eps)
    if weight is not None:
        y = y * weight.view(-1, *after)
    if bias is not None:
        y = y + bias.view(-1, *after)
    return y.to(x.dtype)


class _Processes:
    """What SyncBatchNorm's processes tell each other: their moments, then sums of gradients."""

    def __init__(self, group: Any, weights: Tensor, spatial: int) -> None:
        self.group = group
        self._sizes = torch.stack([weights.sum(), weights.square().sum()]) * spatial

    def moments(self, mean: Tensor, var: Tensor) -> tuple[Tensor, Tensor]:
        """The moments of all; keeps this process's ``fraction`` of the weight."""
        own = torch.cat([mean, var, self._sizes])
        every = own.new_empty(dist.get_world_size(self.group), len(own))
        dist.all_gather(list(every.unbind()), own, self.group)
        means, variances, sizes = every.split([len(mean), len(var), 2], 1)
        total, squares = sizes.sum(0)
        self.fraction = self._sizes[0] / total
        self.correction = correction(total.square() / squares)
        share = sizes[:, :1] / total
        mean = (share * means).sum(0)
        return mean, (share * (variances + (means - mean).square())).sum(0)

    def sums(self, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
        both = torch.stack([first, second])
        dist.all_reduce(both, group=self.group)
        return both[0], both[1]


class _Normalize(torch.autograd.Function):
    """The layer by the kernels."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        share: Tensor,
        eps: float,
        running: Running | None,
        processes: _Processes | None,
    ) -> Tensor:
        kernels = kernels_for("batch_norm", x.device.type)
        gamma, beta = _as(weight, share.dtype), _as(bias, share.dtype)
        y: Tensor
        if processes is None:
            y, mean, var = kernels.forward(x, share, gamma, beta, eps, running)
        else:
            y, mean, var = kernels.forward(x, share, gamma, beta, eps, None, processes.moments)
            share = share * processes.fraction
            if running is not None:
                running._replace(correction=processes.correction).move(mean, var)
        ctx.save_for_backward(x, weight, bias)
        # Of this call's own, which nothing else can write: saving them would only take time.
        ctx.kept = share, mean, var
        ctx.run, ctx.eps, ctx.processes = kernels.backward, eps, processes
        ctx.set_materialize_grads(False)
        return y

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor | None) -> Any:
        if grad_output is None:
            return (None,) * 7
        x, weight, bias = ctx.saved_tensors
        share, mean, var = ctx.kept
        if torch.is_grad_enabled():  # create_graph=True
            return *_differentiable(ctx, grad_output, (x, weight, bias), share), *(None,) * 4
        merge = None if ctx.processes is None else ctx.processes.sums
        gamma, with_input = _as(weight, share.dtype), ctx.needs_input_grad[0]
        grad, grad_weight, grad_bias = ctx.run(
            grad_output, x, share, gamma, mean, var, ctx.eps, with_input, merge
        )
        if weight is None:
            grad_weight = None
        if bias is None:
            grad_bias = None
        return grad, grad_weight, grad_bias, None, None, None, None


def _differentiable(
    ctx: Any, grad_output: Tensor, inputs: tuple[Any, ...], share: Tensor
) -> tuple[Tensor | None, ...]:
    """The gradients, with a graph of their own."""
    if ctx.processes is not None:
        raise RuntimeError("a weighted SyncBatchNorm has a first derivative only")
    x, weight, bias = inputs
    y = _formula(x, weight, bias, share, ctx.eps, None)
    wanted = ctx.needs_input_grad[:3]
    of = [tensor for tensor, want in zip(inputs, wanted, strict=True) if want]
    found = iter(torch.autograd.grad(y, of, grad_output, create_graph=True))
    return tuple(next(found) if want else None for want in wanted)


def _as(parameter: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    if parameter is None or parameter.dtype is dtype:
        return parameter
    return parameter.to(dtype)


def _kernels_can_read(x: Tensor) -> bool:
    """Nothing watches torch's dispatcher, which the kernels go past, and ``x`` is what it seems."""
    if (
        is_compiling()
        or (type(x) is not Tensor and type(x) is not nn.Parameter)
        or _dispatch_modes() != 0
        or forward_ad._current_level >= 0
        or _functorch_active()
    ):
        return False
    try:
        return x.data_ptr() != 0 and not x.is_neg()
    except RuntimeError:  # of a tensor without memory
        return False


class _Weighted(_BatchNorm):
    """What the weighted layers share."""

    def forward(self, input: Tensor) -> Tensor:
        active = local.active
        if active is not None and not active.used:
            active.used = True
        if not self.training:
            return self._unweighted(input)
        if active is None or not (is_compiling() or active.backward == backward_number()):
            self._refuse_context(active)
        weights = active.weights
        if weights is None:
            return self._unweighted(input)
        self._check_input_dim(input)
        batch, channels = input.shape[:2]
        same = len(weights) == batch and weights.device == input.device
        if not same or channels != self.num_features:
            self._refuse_input(input, weights)
        spatial = math.prod(input.shape[2:])
        processes = self._processes(weights, spatial, input.dtype)
        if processes is None and batch * spatial < 2:
            return self._unweighted(input)  # an error, or an empty minibatch
        share, unbiasing = active.shares(compute_dtype(input.dtype), spatial)
        running = self._running(unbiasing)
        arguments = input, self.weight, self.bias, share, self.eps, running
        if processes is None and not _kernels_can_read(input):
            return _formula(*arguments)
        y: Tensor = _Normalize.apply(*arguments, processes)
        return y

    def _unweighted(self, input: Tensor) -> Tensor:
        y: Tensor = super().forward(input)
        return y

    def _refuse_context(self, active: batch_weights | None) -> NoReturn:
        name = type(self).__name__
        keywords = "use_reentrant=False and context_fn=fastis.batch_weights.for_checkpoint"
        if active is None:
            raise RuntimeError(
                f"{name} in training mode needs the minibatch's coefficients: run the model within "
                "`with fastis.batch_weights(batch.weights):` (batch_weights(None) for a minibatch "
                "drawn uniformly), in the same thread; under activation checkpointing pass "
                + keywords
            )
        raise RuntimeError(
            f"{name} runs within a backward pass, in a context of batch_weights that was opened "
            "outside of it and may be of another minibatch: under activation checkpointing pass "
            + keywords
        )

    def _refuse_input(self, input: Tensor, weights: Tensor) -> NoReturn:
        shape = list(input.shape)
        if shape[1] != self.num_features:
            raise ValueError(f"expected {self.num_features} channels, got an input of {shape}")
        if len(weights) != shape[0]:
            raise ValueError(
                f"batch_weights must have one coefficient for each sample: expected [{shape[0]}] "
                f"for an input of {shape}, got [{len(weights)}]"
            )
        raise ValueError(f"batch_weights must be on {input.device}, got {weights.device}")

    def _processes(self, weights: Tensor, spatial: int, dtype: torch.dtype) -> _Processes | None:
        return None

    def _running(self, correction: Tensor) -> Running | None:
        """The running statistics that this forward pass moves; counts it."""
        mean, var, batches = self.running_mean, self.running_var, self.num_batches_tracked
        if not self.track_running_stats or mean is None or var is None:
            return None
        momentum: Any = self.momentum
        if batches is not None:
            batches.add_(1)
            if momentum is None:  # the mean over all; a tensor: nothing waits for the device
                momentum = batches.to(mean.dtype).reciprocal()
        return Running(mean, var, 0.0 if momentum is None else momentum, correction)


class WeightedBatchNorm1d(_Weighted, nn.BatchNorm1d):
    """``torch.nn.BatchNorm1d`` with statistics weighted by :class:`batch_weights`."""


class WeightedBatchNorm2d(_Weighted, nn.BatchNorm2d):
    """``torch.nn.BatchNorm2d`` with statistics weighted by :class:`batch_weights`."""


class WeightedBatchNorm3d(_Weighted, nn.BatchNorm3d):
    """``torch.nn.BatchNorm3d`` with statistics weighted by :class:`batch_weights`."""


class WeightedSyncBatchNorm(_Weighted, nn.SyncBatchNorm):
    """``torch.nn.SyncBatchNorm`` with statistics weighted by :class:`batch_weights`.

    The sums run over the minibatches of all processes, each with its own coefficients.
    """

    def _processes(self, weights: Tensor, spatial: int, dtype: torch.dtype) -> _Processes | None:
        if not dist.is_available() or not dist.is_initialized():
            return None
        group = self.process_group or dist.group.WORLD
        if dist.get_world_size(group) == 1:
            return None
        return _Processes(group, weights.to(compute_dtype(dtype)), spatial)


_WEIGHTED: dict[type[nn.Module], type[nn.Module]] = {
    nn.BatchNorm1d: WeightedBatchNorm1d,
    nn.BatchNorm2d: WeightedBatchNorm2d,
    nn.BatchNorm3d: WeightedBatchNorm3d,
    nn.SyncBatchNorm: WeightedSyncBatchNorm,
}


def weighted_batch_norm(model: Model, weighted: bool = True) -> Model:
    """Make a model's BatchNorm layers take statistics weighted by the minibatch's coefficients.

    ::

        model = fastis.weighted_batch_norm(model)
        with fastis.batch_weights(batch.weights):
            logits = model(x[batch.indices])

    The layers are converted in place: parameters, buffers, hooks and the keys of ``state_dict``
    stay, ``isinstance(layer, torch.nn.BatchNorm2d)`` too, and evaluation is unchanged. With equal
    coefficients they compute what torch's layers do. Training without :class:`batch_weights` is an
    error. Converted twice is converted once.

    Parameters
    ----------
    model : torch.nn.Module
        with BatchNorm1d, BatchNorm2d, BatchNorm3d or SyncBatchNorm layers, or one itself. Call
        ``convert_sync_batchnorm`` before, not after: it makes plain layers of all.
    weighted : bool
        False converts back, to torch's layers.

    Returns
    -------
    torch.nn.Module
        ``model``.

    Raises
    ------
    TypeError
        for a layer that is derived from torch's BatchNorm classes and may compute otherwise. Then
        nothing was converted.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    classes = _WEIGHTED if weighted else {new: old for old, new in _WEIGHTED.items()}
    layers = []
    for name, layer in model.named_modules():
        if type(layer) in classes:
            layers.append(layer)
        elif weighted and isinstance(layer, _BatchNorm) and not isinstance(layer, _Weighted):
            raise TypeError(
                f"model must have BatchNorm layers of torch's own classes, got "
                f"{type(layer).__name__} at {name or 'its root'!r} (a lazy layer becomes one by "
                "its first forward pass)"
            )
    for layer in layers:
        layer.__class__ = classes[type(layer)]
    return model
