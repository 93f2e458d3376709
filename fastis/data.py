"""A DataLoader whose minibatches are the sampler's: each Batch comes back with its data.

It is torch's in all that concerns workers. What it changes is who says which samples come next
(:class:`fastis.in_flight.InFlight`), what a worker loads (:class:`_Loading`), and what one pass
counts and saves (:class:`_Pass`).
"""

from __future__ import annotations

import contextlib
import copy
import weakref
from collections.abc import Iterator, Mapping
from typing import Any, NoReturn

import torch
from torch.utils.data import IterableDataset
from torch.utils.data import Sampler as TorchSampler
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from fastis import check
from fastis.in_flight import InFlight, Minibatch
from fastis.kernels.table import Batch
from fastis.sampler import Sampler

_STATE_VERSION = 1
# Arguments of torch's loader that say which samples make a minibatch, and what to do instead.
_NOT_TAKEN = {
    "batch_size": "the sampler has it: fastis.Sampler(num_samples, batch_size)",
    "shuffle": "the sampler draws at random",
    "batch_sampler": "the sampler draws whole minibatches",
    "drop_last": "the sampler's minibatches all have batch_size samples",
}


class DataLoader(torch.utils.data.DataLoader[Any]):
    """torch's DataLoader with the minibatches of a :class:`fastis.Sampler`.

    ``for batch, data in loader:`` gives a :class:`fastis.Batch` on the host and what ``collate_fn``
    made of its samples. The Batch goes to the worker and comes back with the data, so that they
    can't part, whatever is skipped, interrupted or resumed.

    A pass is ``len(loader)`` minibatches, num_samples // batch_size, or the rest of a pass that was
    saved. The next pass goes on drawing. What was drawn and not handed out, at an early ``break``,
    comes first in the next pass: nothing that was drawn is lost. Only one pass can be under way: a
    new one ends the one before.

    Workers load ahead, so a minibatch is drawn :attr:`ahead` minibatches before it is handed out.
    Its coefficients are those of its draw; only the scores are older.

    Parameters
    ----------
    dataset : torch.utils.data.Dataset
        map-style: ``dataset[i]`` for i in [0, N), and ``len(dataset) == sampler.num_samples``.
        ``dataset.__getitems__(indices)``, where there is one, gets a whole minibatch's indices.
    sampler : fastis.Sampler
        of which minibatches; one loader a sampler.
    **torch_arguments
        ``num_workers``, ``collate_fn``, ``pin_memory``, ``timeout``, ``worker_init_fn``,
        ``multiprocessing_context``, ``generator``, ``prefetch_factor`` and ``persistent_workers``,
        as in torch. With ``pin_memory`` the Batch is pinned too.

    Raises
    ------
    TypeError, ValueError
        for arguments that would choose other samples (``batch_size``, ``shuffle``,
        ``batch_sampler``, ``drop_last``, ``in_order=False``), for an iterable data set, and for one
        of another length than the sampler's.

    Equivalent to, without workers::

        for _ in range(sampler.num_samples // sampler.batch_size):
            batch = sampler.sample()
            yield batch, collate_fn([dataset[i] for i in batch.indices.tolist()])

    Example
    -------
    >>> sampler = fastis.Sampler(len(dataset), batch_size=128)
    >>> loader = fastis.DataLoader(dataset, sampler, num_workers=4, pin_memory=True)
    >>> for batch, (inputs, target) in loader:
    ...     batch = batch.to("cuda", non_blocking=True)
    ...     out = fastis.cross_entropy(model(inputs.cuda()), target.cuda(), batch.weights)
    ...     sampler.update(batch, out)
    """

    sampler: Sampler

    def __init__(self, dataset: Any, sampler: Sampler, **torch_arguments: Any) -> None:
        _check_sampler(sampler)
        _check_arguments(torch_arguments)
        _check_dataset(dataset, sampler)
        super().__init__(dataset, batch_sampler=_OwnMinibatches(sampler), **torch_arguments)
        # Past torch's guard, which keeps others from replacing them.
        self.__dict__.update(sampler=sampler, batch_size=sampler.batch_size)
        self._in_flight = InFlight(sampler)
        self._position: int | None = None  # at which the next pass goes on; None: a whole pass
        self._pass: weakref.ref[_Pass] | None = None  # gone when its loop was left
        self.ahead = self.num_workers * (self.prefetch_factor or 0)
        if sampler.device.type != "cpu":
            self.ahead += 1  # indices come to the host while the minibatch before is trained on

    @property
    def ahead(self) -> int:
        """How many minibatches are drawn before they are handed out.

        ``num_workers * prefetch_factor``, and one more for a sampler on a GPU. It decides which
        scores a draw knows, so it is part of the state: a resumed run keeps the saved one, with
        however many workers. Set it, once the state is loaded, to let more of them work at a time.
        """
        return self._ahead

    @ahead.setter
    def ahead(self, value: int) -> None:
        self._ahead = check.integer("ahead", value, 0)

    def __len__(self) -> int:
        """Minibatches in a whole pass."""
        return _batches_per_epoch(self.sampler)

    def __iter__(self) -> Iterator[tuple[Batch, Any]]:  # type: ignore[override]
        _check_dataset(self.dataset, self.sampler)
        self._pass = None
        new = _Pass(self)
        self._pass = weakref.ref(new)
        return new

    def _begin(self) -> tuple[Iterator[Any], int]:
        """torch's iterator of a pass, and the place in it at which it begins."""
        begin = self._position or 0
        self._in_flight.begin(len(self) - begin)
        self._in_flight.fill(self.ahead)
        resumed = self._position is not None
        with _kept(self.generator, begin) if resumed else contextlib.nullcontext():
            iterator = super().__iter__()
        self._position = None
        return iterator, begin

    def _get_iterator(self) -> Any:
        """torch's iterator, of a view of this loader: with what workers need in place of what users
        see. It reads attributes when it is made, and keeps none of the loader."""
        view = copy.copy(self)
        view.__dict__.update(
            dataset=_Loading(self.dataset, self.collate_fn),
            batch_sampler=self._in_flight,
            collate_fn=_as_it_is,
            worker_init_fn=_WorkerInit(self.worker_init_fn),
        )
        return super(DataLoader, view)._get_iterator()

    # Saving --------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs: the sampler's state, the minibatches under way, the place.

        Saved in the body of the loop, the resumed run's next pass is the rest of this one;
        otherwise, also after a ``break``, it is a whole pass. Tensors, numbers and strings only:
        fit for ``torch.save`` and ``weights_only=True``. The sampler need not be saved again.
        """
        under_way = self._under_way()
        return {
            "version": _STATE_VERSION,
            "sampler": self.sampler.state_dict(),
            **self._in_flight.state_dict(),
            "ahead": self.ahead,
            "position": self._position if under_way is None else under_way.position,
            "generator": None if self.generator is None else self.generator.get_state(),
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Takes over :meth:`state_dict`, also of a loader with another number of workers.

        The next minibatches are those that were under way, with their coefficients, then those that
        the saved run would have drawn. A pass that is under way here ends, or begins anew if it has
        handed out nothing yet. ``generator`` gets its state back, where both loaders have one;
        workers' seeds follow from it as in torch, and are others in a resumed pass.

        Raises
        ------
        TypeError, ValueError
            for what no loader with such a sampler can have saved; nothing has changed then.
        """
        if not isinstance(state_dict, Mapping):
            raise TypeError(f"state_dict must be a dict, got {type(state_dict).__name__}")
        version = state_dict.get("version")
        if version != _STATE_VERSION or not {"sampler", "ahead"} <= state_dict.keys():
            raise ValueError(
                f"state_dict must be a fastis.DataLoader's, of version {_STATE_VERSION}, got "
                f"version {version!r} with {', '.join(map(repr, state_dict))}"
            )
        batches = self._in_flight.checked(state_dict)
        ahead = check.integer("state_dict['ahead']", state_dict["ahead"], 0)
        position = state_dict.get("position")
        if position is not None:
            position = check.integer("state_dict['position']", position, 0, len(self))
        generator = _restored(self.generator, state_dict.get("generator"))
        self.sampler.load_state_dict(state_dict["sampler"])
        under_way = self._under_way()
        self._in_flight.replace(batches)
        self.ahead, self._position = ahead, position
        if generator is not None:
            self.generator.set_state(generator)
        if under_way is not None and under_way.position == under_way.begun_at:
            under_way.begin()
        else:
            self._pass = None

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles: workers and a pass that is under way stay behind."""
        return {**self.__dict__, "_iterator": None, "_pass": None}

    def _under_way(self) -> _Pass | None:
        return None if self._pass is None else self._pass()


class _Pass(Iterator[tuple[Batch, Any]]):
    """One pass over a loader, around torch's iterator of one."""

    def __init__(self, loader: DataLoader) -> None:
        self._loader, self._length = loader, len(loader)
        self.begin()

    def begin(self) -> None:
        """Where the loader stands, also anew: it may have loaded a state since."""
        self._iterator, self.begun_at = self._loader._begin()
        self.position = self.begun_at  # of the minibatch that is handed out next

    def __next__(self) -> tuple[Batch, Any]:
        loader = self._loader
        if self.position == self._length:
            return self._end()
        if loader._under_way() is not self:
            raise RuntimeError(
                "this pass over the fastis.DataLoader is over: another one has begun, a state was "
                "loaded, or an error came; iterate over the loader again"
            )
        loader._in_flight.fill(loader.ahead + 1)
        self._send()
        try:
            minibatch, data = next(self._iterator)
            batch = loader._in_flight.hand_out(minibatch)
        except BaseException as error:
            # The minibatch stays first, for a pass with workers of its own.
            loader._pass = loader._iterator = None
            if isinstance(error, StopIteration):  # which would end the pass without a word
                raise RuntimeError("the data set must not raise StopIteration") from error
            raise
        self.position += 1
        return batch, data

    def _send(self) -> None:
        """Hands the workers what has been drawn, as far as torch wants to have it.

        torch's iterator asks for a task only when it is made and when data came; so while fewer are
        under way than it may have, each of them has to be brought.
        """
        workers, in_flight = self._iterator, self._loader._in_flight
        if isinstance(workers, _MultiProcessingDataLoaderIter):
            most = workers._prefetch_factor * workers._num_workers
            while in_flight.sent < most and in_flight.can_send():
                workers._try_put_index()

    def _end(self) -> NoReturn:
        if self._loader._under_way() is self:
            self._loader._pass = None
            next(self._iterator, None)  # torch ends its workers then
        raise StopIteration


class _Loading:
    """The data set in a worker: of minibatches, each with its data collated."""

    def __init__(self, dataset: Any, collate_fn: Any) -> None:
        self.dataset, self.collate_fn = dataset, collate_fn

    def __getitems__(self, minibatch: Minibatch) -> tuple[Minibatch, Any]:
        indices = minibatch.batch.indices.tolist()
        get_all = getattr(self.dataset, "__getitems__", None)
        items = get_all(indices) if get_all else [self.dataset[i] for i in indices]
        return minibatch, self.collate_fn(items)


def _as_it_is(loaded: tuple[Minibatch, Any]) -> tuple[Minibatch, Any]:
    """In place of ``collate_fn``, which :class:`_Loading` has called."""
    return loaded


class _WorkerInit:
    """``worker_init_fn``, which finds the user's data set in ``get_worker_info()``."""

    def __init__(self, function: Any) -> None:
        self.function = function

    def __call__(self, worker_id: int) -> None:
        info = torch.utils.data.get_worker_info()
        loading: Any = info.dataset  # type: ignore[union-attr]
        object.__setattr__(info, "dataset", loading.dataset)  # past its guard
        if self.function is not None:
            self.function(worker_id)


class _OwnMinibatches:
    """``loader.batch_sampler``: says to trainers that the minibatches are not theirs to hand on.

    Those that shard a loader or skip its minibatches build another one around its batch sampler,
    which would get indices alone.
    """

    drop_last = True

    def __init__(self, sampler: Any, batch_size: Any = None, drop_last: Any = None) -> None:
        if not isinstance(sampler, Sampler):  # Lightning's, in place of this one
            self._refuse()
        self.sampler, self.batch_size = sampler, sampler.batch_size

    def __len__(self) -> int:
        return _batches_per_epoch(self.sampler)

    def __iter__(self) -> NoReturn:
        self._refuse()

    @staticmethod
    def _refuse() -> NoReturn:
        raise RuntimeError(
            "a fastis.DataLoader can't be taken apart: its minibatches were about to be given to "
            "another DataLoader, where their coefficients would be lost. Iterate over the "
            "fastis.DataLoader itself; under Accelerate prepare it by "
            "fastis.integrations.accelerate.prepare(accelerator, loader), for Hugging Face's "
            "Trainer use fastis.integrations.transformers.Trainer; keep a trainer from putting in "
            "a sampler of its own (Lightning: Trainer(use_distributed_sampler=False)); to resume, "
            "load the loader's state_dict instead of skipping minibatches"
        )


def _batches_per_epoch(sampler: Sampler) -> int:
    return sampler._table.constants.batches_per_epoch


def _check_sampler(sampler: Any) -> None:
    if isinstance(sampler, Sampler):
        return
    advice = "make one by fastis.Sampler(num_samples=len(dataset), batch_size=...)"
    if isinstance(sampler, TorchSampler):
        advice += "; a trainer that puts in its own sampler (a DistributedSampler, say) must not"
    raise TypeError(f"sampler must be a fastis.Sampler, got {type(sampler).__name__}: {advice}")


def _check_arguments(arguments: Mapping[str, Any]) -> None:
    for name, reason in _NOT_TAKEN.items():
        if name in arguments:
            raise TypeError(f"{name} must be left out, got {arguments[name]!r}: {reason}")
    if arguments.get("in_order", True) is not True:
        raise ValueError(
            f"in_order must be True, got {arguments['in_order']!r}: minibatches that overtake one "
            "another would make a run depend on its workers' speed"
        )


def _check_dataset(dataset: Any, sampler: Sampler) -> None:
    if isinstance(dataset, IterableDataset):
        raise TypeError(
            "dataset must be map-style (dataset[i], len(dataset)), got an IterableDataset: a "
            "stream has no indices to remember scores by"
        )
    try:
        length = len(dataset)
    except TypeError:
        raise TypeError(
            f"dataset must have a length (__len__), got {type(dataset).__name__}"
        ) from None
    if length != sampler.num_samples:
        raise ValueError(
            f"dataset must have the sampler's num_samples={sampler.num_samples} samples, got "
            f"{length}: make the sampler by fastis.Sampler(num_samples=len(dataset), ...); if the "
            "data set has grown, load the old one's state into that (load_state_dict)"
        )


def _restored(generator: torch.Generator | None, state: Any) -> torch.Tensor | None:
    """The state for ``generator``, when it can take it; None where one of the two is missing."""
    if generator is None or state is None:
        return None
    try:
        torch.Generator(generator.device).set_state(state)
    except (TypeError, RuntimeError) as error:
        raise ValueError(f"state_dict['generator'] must be a generator's state: {error}") from error
    return state  # type: ignore[no-any-return]


@contextlib.contextmanager
def _kept(generator: torch.Generator | None, position: int) -> Iterator[None]:
    """Leaves the generator as it is: the pass that goes on has had its seed for the workers.

    Inside, numbers come that neither this nor the next pass has had.
    """
    generator = torch.default_generator if generator is None else generator
    state = generator.get_state()
    seed = int(torch.empty((), dtype=torch.int64, device="cpu").random_(generator=generator))
    generator.manual_seed((seed + position + 1) % 2**63)
    try:
        yield
    finally:
        generator.set_state(state)
