"""What is saved of a :class:`fastis.ShardedSampler`: a rank's state, or the table of all ranks for
torch.distributed.checkpoint, whose planner gives other ranks other rows of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NoReturn

import torch
from torch import Tensor

from fastis import check, saved
from fastis.kernels.code import exponent_of, weight_of
from fastis.kernels.layout import (
    CODE,
    DRAWS,
    EXPONENT,
    LAST,
    NEVER,
    NO_EXPONENT,
    PAUSE,
    SEEN,
    SKIPPED,
    TOTAL,
    UNIFORM_FROM,
    UPDATES,
    Table,
)
from fastis.kernels.reference import table as reference_table
from fastis.kernels.shards import Theta

VERSION = 1
# Of the settings: what a run on other ranks may have otherwise.
_OF_RANKS = ("rank", "ranks", "batch_size", "max_duplicates", "scheme", "flatten", "seed")
_CLOCKS = (DRAWS, UPDATES, UNIFORM_FROM, PAUSE)  # the same on all ranks
_MOST_SHIFT = 61 - 16  # of a mantissa in a sum


# A rank's own ------------------------------------------------------------------------------------


def of_rank(sampler: Any) -> dict[str, Any]:
    """Everything that this rank needs to go on bit for bit, as new tensors."""
    with torch.inference_mode(False), sampler._table.lock:
        return {
            "version": VERSION,
            "settings": sampler._settings(),
            "correction": sampler.correction,
            "theta": torch.tensor(sampler._theta, dtype=torch.int64, device="cpu"),
            "moments": sampler._moments.state(),
            **sampler._table.snapshot(),
        }


def load_rank(sampler: Any, state: Mapping[str, Any]) -> None:
    """Takes :func:`of_rank` over; nothing has changed when it raises."""
    seed = saved.checked_seed(state, VERSION, sampler._settings())
    correction = saved.checked_correction(state, sampler.method.has_coefficients)
    theta = _theta_of(_tensor(state, "theta", torch.int64, (2,)))
    moments = _tensor(state, "moments", torch.float64, sampler._moments.state().shape)
    with torch.inference_mode(False):
        tensors = saved.checked(sampler._table, state, sampler.method.memory_ranges)
        _load(sampler, tensors, seed, theta, correction)
        sampler._moments.load(moments)


def _load(
    sampler: Any, tensors: dict[str, Tensor], seed: int, theta: Theta, correction: float
) -> None:
    with sampler._table.lock:
        sampler._arguments["seed"] = seed
        sampler._table.load(tensors, sampler._own_seed())
        sampler._use_shards()
        sampler._theta = theta
        sampler._moments.restart_clock()
        sampler._watch.learnt()
    sampler.correction = correction


def _tensor(state: Mapping[str, Any], name: str, dtype: torch.dtype, shape: Any) -> Tensor:
    value = state.get(name)
    if type(value) is not Tensor or value.dtype != dtype or value.shape != torch.Size(shape):
        raise ValueError(
            f"state_dict[{name!r}] must be a tensor of {dtype} and shape {list(shape)}, got "
            f"{check.describe(value)}"
        )
    return value.detach().cpu()


def _theta_of(values: Tensor) -> Theta:
    integer, exponent = values.tolist()
    if not (1 <= integer <= 1 << 62 and -400 <= exponent <= 2000):
        raise ValueError(
            "state_dict['theta'] must be an integer in [1, 2^62] and an exponent in [-400, 2000], "
            f"got {integer} and {exponent}"
        )
    return Theta(integer, exponent)


# The table of all ranks --------------------------------------------------------------------------


class GlobalState:
    """A ``Stateful`` of torch.distributed.checkpoint: ``sampler.as_stateful()``.

    ``states`` is a DTensor int32 [N, 4], a row a sample, of which every rank holds its shard; the
    rest is the same on all ranks.
    """

    def __init__(self, sampler: Any) -> None:
        if sampler._exchange.group is None:
            raise ValueError("group must be a process group for torch.distributed.checkpoint")
        self._sampler = sampler

    def state_dict(self) -> dict[str, Any]:
        """Collective, as torch.distributed.checkpoint itself is: the ranks' counts of skipped
        scores are added up. O(len(shard))."""
        sampler = self._sampler
        with torch.inference_mode(False), sampler._table.lock:
            tensors = sampler._table.snapshot()
        scalars = tensors["scalars"].cpu()
        skipped = int(sampler._exchange.gather(scalars[SKIPPED : SKIPPED + 1]).sum())
        clocks = [*(int(scalars[at]) for at in _CLOCKS), skipped]
        state = {
            "version": VERSION,
            "settings": _same_everywhere(sampler._settings()),
            "correction": sampler.correction,
            "seed": int(sampler._arguments["seed"]),
            "clocks": torch.tensor(clocks, dtype=torch.int64, device="cpu"),
            "theta": torch.tensor(sampler._theta, dtype=torch.int64, device="cpu"),
            "variance": tensors["variance"],
        }
        if "states" in tensors:
            state["states"] = self._as_rows_of_all(tensors["states"])
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes over what any number of ranks saved; every row is checked. O(len(shard)).

        The moments of minibatches under way are dropped. ``max_duplicates`` and ``scheme`` are the
        sampler's own; theta goes on from what it was.

        Raises
        ------
        TypeError, ValueError
            as :meth:`fastis.Sampler.load_state_dict`; nothing has changed then.
        """
        sampler, table = self._sampler, self._sampler._table
        settings = {**_same_everywhere(sampler._settings()), "seed": state.get("seed")}
        theirs = {**dict(state.get("settings", {})), "seed": state.get("seed")}
        seed = saved.checked_seed({**state, "settings": theirs}, VERSION, settings)
        correction = saved.checked_correction(state, sampler.method.has_coefficients)
        theta = _theta_of(_tensor(state, "theta", torch.int64, (2,)))
        clocks = _tensor(state, "clocks", torch.int64, (len(_CLOCKS) + 1,)).tolist()
        with torch.inference_mode(False):
            own = {"variance": state["variance"], "scalars": _scalars(sampler, clocks)}
            if table.states is not None:
                own["states"] = state["states"].to_local().contiguous()
                _complete(table, own)
            tensors = saved.checked(table, own, sampler.method.memory_ranges)
            _load(sampler, tensors, seed, theta, correction)

    def _as_rows_of_all(self, states: Tensor) -> Any:
        from torch.distributed.device_mesh import DeviceMesh
        from torch.distributed.tensor import DTensor, Shard

        sampler = self._sampler
        mesh = DeviceMesh.from_group(sampler._exchange.group, sampler.device.type)
        shape = torch.Size((sampler.num_samples, states.shape[1]))
        return DTensor.from_local(
            states, mesh, [Shard(0)], run_check=False, shape=shape, stride=(states.shape[1], 1)
        )


def _same_everywhere(settings: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in settings.items() if name not in _OF_RANKS}


def _scalars(sampler: Any, clocks: list[int]) -> Tensor:
    """The clocks as this rank's table has them; what was skipped counts on the first rank."""
    scalars = torch.zeros_like(sampler._table.durable()["scalars"])
    for at, value in zip(_CLOCKS, clocks, strict=False):
        scalars[at] = value
    warmup = min(sampler._table.constants.warmup_draws, NEVER - 1)  # as these ranks count it
    scalars[UNIFORM_FROM] = max(clocks[_CLOCKS.index(UNIFORM_FROM)], warmup)
    scalars[SKIPPED] = clocks[-1] if sampler._exchange.rank == 0 else 0
    scalars[EXPONENT] = NO_EXPONENT
    return scalars


def _complete(table: Table, own: dict[str, Tensor]) -> None:
    """e0 and the totals of these rows, whose codes stay as they are.

    e0 leaves as much below the least code as the total allows. Rows that are too far apart for one
    e0 (of shards that were) are rescaled: the floor is raised.
    """
    codes = own["states"][:, CODE]
    codes = codes[own["states"][:, LAST] >= 0]
    if len(codes) == 0:
        return
    exponents = exponent_of(codes)
    least, most = int(exponents.min()), int(exponents.max())
    bits = (table.constants.num_samples - 1).bit_length()
    for headroom in range(table.constants.headroom, -1, -1):
        e0 = least - headroom
        if most - e0 > _MOST_SHIFT - bits:
            continue
        total = int(weight_of(codes, e0).sum())
        unseen = table.constants.num_samples - len(codes)
        if total + unseen * (total // len(codes)) <= table.constants.total_limit:
            for at, value in ((EXPONENT, e0), (TOTAL, total), (SEEN, len(codes))):
                own["scalars"][at] = value
            return
    other = Table(table.constants, table.device)
    other.load(own, table.constants.seed)
    reference_table.rescale(other)
    own.update({name: t for name, t in other.snapshot().items() if name in ("states", "scalars")})


# The sampler's methods ---------------------------------------------------------------------------


class ResumableShards:
    """What of a :class:`fastis.ShardedSampler` can be saved and loaded."""

    def state_dict(self) -> dict[str, Any]:
        """This rank's state: with as many ranks the run goes on bit for bit.

        For another number of ranks see :meth:`as_stateful`.
        """
        return of_rank(self)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes over :meth:`state_dict` of the same rank of as many, with the same arguments.

        Raises
        ------
        TypeError, ValueError
            as :meth:`fastis.Sampler.load_state_dict`; nothing has changed then.
        """
        load_rank(self, state)

    def as_stateful(self) -> GlobalState:
        """The table of all ranks for torch.distributed.checkpoint, which reshards it::

            dcp.save({"model": ..., "sampler": sampler.as_stateful()}, checkpoint_id=path)
            dcp.load({"model": ..., "sampler": sampler.as_stateful()}, checkpoint_id=path)

        Any number of ranks can load it: the states of all samples, and so the probabilities, are
        the same bit for bit; the draws that follow are others.
        """
        return GlobalState(self)

    def __getstate__(self) -> NoReturn:
        raise TypeError(
            "a ShardedSampler can't be pickled or copied, since it belongs to a process group: "
            "save its state_dict(), or as_stateful() by torch.distributed.checkpoint"
        )
