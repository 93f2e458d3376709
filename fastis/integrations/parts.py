"""A minibatch in the parts of gradient accumulation, for trainers that ask for these.

It is drawn whole. Each part is collated alone, carries its coefficients, and gives its scores to
the sampler with the others', in one update.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.utils.data import IterableDataset

from fastis.data import DataLoader
from fastis.kernels.table import Batch
from fastis.sampler import Sampler
from fastis.scored import ScoredLoss

KEY = "fastis_part"  # of the Part beside the model's inputs


class Part:
    """The coefficients of a part, beside its inputs.

    Neither tensor nor container: trainers that move and convert those hand it on as it is.

    Attributes
    ----------
    weights : Tensor
        ``[b]``, float32, on the host.
    step, number : int
        minibatches of the epoch, and parts of the minibatch, before it.
    """

    def __init__(self, batch: Batch, weights: Tensor, step: int, number: int) -> None:
        self.batch, self.weights, self.step, self.number = batch, weights, step, number
        self._outs: list[ScoredLoss] = []  # of all parts: the same list

    def learn(self, out: ScoredLoss, sampler: Sampler) -> None:
        """Keeps the part's scores. With the last part's the sampler is updated."""
        outs = self._outs
        outs.append(out)
        if sum(len(out.score) for out in outs) == len(self.batch.indices):
            sampler.update(self.batch, outs if len(outs) > 1 else out)
        else:
            outs[-1] = out._replace(loss=out.loss.detach())  # its graph can go


def split(batch: Batch, inputs: Sequence[Any], step: int) -> Iterator[dict[str, Any]]:
    """The inputs of each part, a dict, with its :class:`Part` under :data:`KEY`."""
    outs: list[ScoredLoss] = []
    weights = batch.weights.split(len(batch.weights) // len(inputs))
    for number, (found, r) in enumerate(zip(inputs, weights, strict=True)):
        if not isinstance(found, Mapping):
            raise TypeError(f"data_collator must return a dict, got {type(found).__name__}")
        part = Part(batch, r, step, number)
        part._outs = outs
        yield {**found, KEY: part}


class Parts(IterableDataset[Any]):
    """The minibatches of a fastis.DataLoader, part by part.

    A stream, because a Trainer that resumes can only skip one by reading it: what is to be skipped
    comes as None, and nothing is loaded for it.
    """

    def __init__(self, loader: DataLoader, parts: int) -> None:
        self.loader, self.parts = loader, parts

    def __len__(self) -> int:
        return len(self.loader) * self.parts

    def __iter__(self) -> Iterator[dict[str, Any] | None]:
        begin = self.loader._position or 0
        for _ in range(begin * self.parts):
            yield None
        for step, (batch, inputs) in enumerate(self.loader, begin):
            yield from split(batch, inputs, step)


class InParts:
    """A collator that calls another for each part of a minibatch alone.

    Parameters
    ----------
    collate : callable
        of a list of samples.
    size : int
        samples of a part.
    """

    def __init__(self, collate: Callable[[Any], Any], size: int) -> None:
        self.collate, self.size = collate, size

    def __call__(self, items: Any) -> list[Any]:
        if len(items) == self.size:
            return [self.collate(items)]
        return [self.collate(items[i : i + self.size]) for i in range(0, len(items), self.size)]


def check_complete(parts: Sequence[Any], first_step: int | None) -> None:
    """Refuses what is not the parts of one minibatch, all and in order.

    Parameters
    ----------
    parts : sequence
        what a trainer will train on; none is legal.
    first_step : int or None
        of the epoch: where a resumed run must go on.
    """
    found = [part[KEY] if isinstance(part, Mapping) and KEY in part else None for part in parts]
    numbers = [getattr(part, "number", None) for part in found]
    if numbers != list(range(len(found))) or len({id(part.batch) for part in found}) > 1:  # type: ignore[union-attr]
        raise RuntimeError(
            "the training loader must be that of get_train_dataloader() of this Trainer, which "
            f"gives all parts of a minibatch in order, got parts {numbers}"
        )
    steps = {part.step for part in found}  # type: ignore[union-attr]
    if first_step is not None and steps and steps != {first_step}:
        raise RuntimeError(
            f"the training loader must go on at step {first_step} of the epoch, got step {steps}"
        )
