"""What goes round between a training loop and the table: a minibatch, and what it has shown.

A loss's output is checked and made ready for the kernels here, before anything changes; where all
is as it should be that is a handful of comparisons.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from fastis import check
from fastis.kernels.layout import LATE, UPDATES, Table, may_read
from fastis.kernels.table import Batch, Observation

_int64, _float32, _cpu = torch.int64, torch.float32, torch.device("cpu")
_FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_new_tuple = tuple.__new__  # half the time of a named tuple's own


class Scored(Protocol):
    """What the sampler needs of a loss: :class:`fastis.ScoredLoss` is one."""

    @property
    def losses(self) -> Tensor: ...
    @property
    def score(self) -> Tensor: ...
    @property
    def mean_grad(self) -> Tensor | None: ...


class Folding(Protocol):
    """What is asked of a method here."""

    @property
    def folds(self) -> bool: ...
    @property
    def name(self) -> str: ...


class _Scores(NamedTuple):
    """Scores in place of a scored loss."""

    losses: Tensor
    score: Tensor
    mean_grad: Tensor | None = None


def observe(
    device: torch.device,
    observed_of: Callable[[Scored], Tensor] | None,
    batch: Batch,
    out: Scored | Sequence[Scored] | Tensor,
) -> Observation:
    """The observation of ``batch`` from its scored loss, from its parts in order, or from scores.

    ``observed_of`` gives what the table keeps averages of; None: the score.

    Raises
    ------
    TypeError, ValueError
        naming the argument of ``Sampler.update``, what was expected and what came.
    """
    try:
        indices, weights = batch
    except (TypeError, ValueError):
        raise TypeError(f"batch must be a Batch, got {type(batch).__name__}") from None
    try:
        score, mean_grad = out.score, out.mean_grad  # type: ignore[union-attr]
        observed = score if observed_of is None else _observed(observed_of, "out", out)  # type: ignore[arg-type]
    except AttributeError:
        observed, score, mean_grad = _join(observed_of, out)
    observation = _new_tuple(Observation, (indices, weights, observed, score, mean_grad))
    return observation if _is_ready(device, observation) else _made_ready(device, observation)


def folded(
    table: Table, method: Folding, indices: Tensor, scores: Tensor, iteration: int
) -> Observation:
    """The observation of scores that another process computed, for ``Sampler.fold``.

    Raises
    ------
    TypeError, ValueError
        naming its argument, what was expected and what came.
    """
    if not method.folds:
        raise ValueError(
            "fold needs a method whose table is one of scores (emais, loss, distributed), got "
            f"{method.name!r}"
        )
    check.integer("iteration", iteration, 0)
    device = table.device
    if may_read(device):
        now = int(table.scalars[UPDATES])
        if not 0 <= now - iteration < LATE:
            raise ValueError(
                f"iteration must be in [{max(0, now - LATE + 1)}, {now}], the sampler's step, got "
                f"{iteration}"
            )
    i = check.tensor("indices", indices).detach().to(device, non_blocking=True)
    x = check.tensor("scores", scores).detach().to(device, non_blocking=True)
    i = check.vector("indices", i, None, (_int64,), device)
    x = check.vector("scores", x, len(i), _FLOATS, device).float()
    return Observation(i, torch.ones_like(x), x, x, None)


def with_coefficients(observation: Observation, correction: float) -> Observation:
    """The observation with 1/(N p) for weights, which are that to the power of ``correction``.

    At 0 all weights are 1, and stay so. Near 0 rounding would be magnified: not beyond 1000 times.
    """
    exponent = 1 / max(correction, 1e-3)
    return observation._replace(weights=observation.weights.pow(exponent))


def _observed(observed_of: Callable[[Scored], Tensor], name: str, out: Scored) -> Tensor:
    """``observed_of(out)``, which may compute with the losses."""
    check.readable(f"{name}.losses", out.losses)
    return observed_of(out)


def _join(
    observed_of: Callable[[Scored], Tensor] | None, parts: Scored | Sequence[Scored] | Tensor
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Parts of one minibatch, in order: concatenated, mean gradients weighted by their sizes.

    A tensor is the scores, and the losses of methods that go by these.
    """
    if isinstance(parts, Tensor):
        score = _vector("out", parts)
        return score if observed_of is None else observed_of(_Scores(score, score)), score, None
    if not isinstance(parts, Sequence) or not all(hasattr(part, "score") for part in parts):
        raise TypeError(
            "out must be a ScoredLoss (of fastis.cross_entropy and the like), a sequence of them, "
            f"or a tensor of scores, got {type(parts).__name__}"
        )
    if not parts:
        raise ValueError("out must have at least one part, got an empty sequence")
    scores, all_observed, shares = [], [], []
    for i, part in enumerate(parts):
        name = f"out[{i}]"
        scores.append(_vector(f"{name}.score", part.score))
        if observed_of is not None:
            observed = _observed(observed_of, name, part)
            all_observed.append(_vector(f"{name}.losses", observed))
        if part.mean_grad is not None:
            mean_grad = _vector(f"{name}.mean_grad", part.mean_grad)
            shares.append(mean_grad * part.score.numel())
    score = torch.cat(scores)
    observed = torch.cat(all_observed) if all_observed else score
    if len(shares) < len(parts):
        return observed, score, None
    if len({len(share) for share in shares}) > 1:
        lengths = [len(share) for share in shares]
        raise ValueError(f"out.mean_grad must have one length in all parts, got {lengths}")
    return observed, score, torch.stack(shares).sum(0) / score.numel()


def _vector(name: str, value: object) -> Tensor:
    """A floating vector without graph, whose memory can be read."""
    tensor = check.readable(name, value).detach()
    if tensor.dtype not in _FLOATS and not tensor.is_complex():
        tensor = tensor.float()
    return check.vector(name, tensor, None, _FLOATS, tensor.device)


def _is_ready(device: torch.device, observation: Observation) -> bool:
    """Whether the kernels can take it as it is; what fails here may still be legal.

    Wrappers of other tensors have no address.
    """
    indices, weights, observed, score, mean_grad = observation
    try:
        shape = score.shape
        if len(shape) != 1 or shape != indices.shape or shape != weights.shape:
            return False
        vectors = [indices, weights, score]
        if observed is not score:
            if observed.shape != shape:
                return False
            vectors.append(observed)
        if mean_grad is not None:
            if mean_grad.dim() != 1:
                return False
            vectors.append(mean_grad)
        dtype, on_cpu = _int64, device == _cpu
        for vector in vectors:
            if (
                vector.dtype is not dtype
                or not (vector.is_cpu if on_cpu else vector.device == device)
                or not vector.is_contiguous()
                or vector.requires_grad
                or vector.data_ptr() == 0
                or vector.is_neg()  # lazily
            ):
                return False
            dtype = _float32
    except (AttributeError, RuntimeError):  # no tensor, or one without memory
        return False
    return True


def _made_ready(device: torch.device, observation: Observation) -> Observation:
    """Converts what is legal and explains what is not."""
    observation = _moved(device, observation)
    ready: dict[str, Tensor] = {}
    length: int | None = None
    for field, name, dtype in (
        ("indices", "batch.indices", _int64),
        ("weights", "batch.weights", _float32),
        ("score", "out.score", None),
        ("observed", "out.losses", None),
    ):
        value = getattr(observation, field)
        tensor = check.readable(name, value).detach()  # a memory must not hold graphs
        if dtype is None and not tensor.is_complex():
            tensor = tensor.float()
        check.vector(name, tensor, length, (dtype or _float32,), device)
        if not tensor.is_contiguous():
            raise ValueError(f"{name} must be contiguous, got strides {tensor.stride()}")
        length = len(tensor)
        ready[field] = tensor
    if observation.mean_grad is not None:
        mean_grad = check.readable("out.mean_grad", observation.mean_grad).detach()
        ready["mean_grad"] = check.vector("out.mean_grad", mean_grad, None, _FLOATS, device).float()
    return observation._replace(**ready)


def _moved(device: torch.device, observation: Observation) -> Observation:
    """The observation on the sampler's device, wherever its tensors were computed.

    A sampler on the host has to wait for a GPU's scores: once, for all of them. No other way waits.
    """
    moved: dict[int, Tensor] = {}
    gpus = set()
    for value in observation:
        if isinstance(value, Tensor) and value.device != device and not value.is_meta:
            to_or_from_gpu = value.is_cuda or device.type == "cuda"
            moved[id(value)] = value.detach().to(device, non_blocking=to_or_from_gpu)
            if value.is_cuda and device == _cpu:
                gpus.add(value.device)
    for gpu in gpus:
        torch.cuda.current_stream(gpu).synchronize()
    return Observation(*(moved.get(id(value), value) for value in observation))  # type: ignore[arg-type]
