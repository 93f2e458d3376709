"""What a saved state must be to be loaded: no number of it is believed before it was checked.

The kernels trust their table: a total that isn't that of the states, a clock below 0 or an item
that weighs more than its table has room for would lead them out of its memory. So :func:`checked`
accepts the states that updates can have written and no others, before anything has changed.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastis import check
from fastis.kernels.code import code_of, exponent_of, weight_of
from fastis.kernels.extension import _C
from fastis.kernels.layout import (
    CODE,
    DURABLE_SCALARS,
    EXPONENT,
    FACTOR,
    GAIN,
    LAST,
    LAST_EXCLUDED,
    LAST_UNSEEN,
    MEAN,
    NEVER,
    NO_EXPONENT,
    PAUSE,
    PAUSED_EFFICIENCY,
    SECOND,
    SEEN,
    TOTAL,
    TRACE_IS,
    UNIFORM_FROM,
    UPDATES,
    VAR,
    WEIGHT,
    Table,
)
from fastis.kernels.reference import table as reference_table
from fastis.kernels.state import LARGEST_SCORE, importance_of

_SCALARS = ("draws", "updates", "skipped", "exponent", "total", "seen", "uniform_from", "pause")
_MOST = 2**62  # of a clock, a count or a total
_EXPONENTS = (-200, 64)  # of e0; importance itself is within 2^-100 and 2^62
# What an update can write, with a factor of 2 to spare (csrc/cpu/saved.cpp has the same numbers).
_MOST_MEAN = 2 * LARGEST_SCORE
_MOST_VAR = 8 * LARGEST_SCORE**2
_MOST_SHIFT = 46
_CHUNK = 1 << 18  # rows at a time: what is computed of them stays in the cache


class Range(NamedTuple):
    """The values that a tensor of a method's memory can have."""

    least: float
    most: float
    nan: bool = False


_LARGEST = torch.finfo(torch.float64).max
FINITE = Range(-_LARGEST, _LARGEST)
POSITIVE = Range(5e-324, _LARGEST)
NOT_NEGATIVE = Range(0.0, _LARGEST)


def upgraded(state: Mapping[str, Any]) -> Mapping[str, Any]:
    """A state of version 1 or 2 as one of version 3; anything else as it is.

    Version 1 called the samples' states records, and had no gain: until the next update it is taken
    to be the factor. Up to version 2 nobody could ask for uniform draws, none paused, and the
    correction was always 1.
    """
    if isinstance(state, Mapping) and _is_same(state.get("version"), 1):
        state = _with_gain(state)
    if not isinstance(state, Mapping) or not _is_same(state.get("version"), 2):
        return state
    scalars = state.get("scalars")
    if type(scalars) is Tensor and _dense("state_dict['scalars']", scalars).shape == (
        UNIFORM_FROM,
    ):
        scalars = _readable("state_dict['scalars']", scalars)
        state = {**state, "scalars": torch.cat([scalars, scalars.new_tensor([NEVER, 0])])}
    variance = state.get("variance")
    if type(variance) is Tensor and _dense("state_dict['variance']", variance).shape == (
        PAUSED_EFFICIENCY,
    ):
        variance = _readable("state_dict['variance']", variance)
        state = {**state, "variance": torch.cat([variance, variance.new_tensor([-1.0])])}
    settings = _never_pausing(state.get("settings"))
    return {**state, "settings": settings, "correction": 1.0, "version": 3}


def _never_pausing(settings: Any) -> Any:
    """Settings of before the option ``least_gain``, with its value for that."""
    options = settings.get("options") if isinstance(settings, Mapping) else None
    if not isinstance(options, Mapping) or "floor" not in options:
        return settings
    return {**settings, "options": {"least_gain": 0.0, **options}}


def _with_gain(state: Mapping[str, Any]) -> Mapping[str, Any]:
    """A state of version 1 as one of version 2."""
    renamed = {"states" if name == "records" else name: value for name, value in state.items()}
    variance = state.get("variance")
    if type(variance) is Tensor and _dense("state_dict['variance']", variance).shape == (GAIN,):
        variance = _readable("state_dict['variance']", variance)
        renamed["variance"] = torch.cat([variance, variance[FACTOR:]])
    return {**renamed, "version": 2}


def grown(
    table: Table, state: Mapping[str, Any], memory: Callable[[Table], dict[str, Tensor]]
) -> Mapping[str, Any]:
    """A state of fewer samples as one of the table's N, the last of which are new and unseen.

    Any other state as it is. ``memory`` makes the method's tensors of a new table.

    Raises
    ------
    ValueError
        for a state of more samples.
    """
    settings = state.get("settings") if isinstance(state, Mapping) else None
    if not isinstance(settings, Mapping):
        return state
    before, n = settings.get("num_samples"), table.constants.num_samples
    if type(before) is not int or before in (0, n):
        return state
    if before > n:
        raise ValueError(
            f"state_dict must be of at most num_samples={n} samples, got {before}: it does not say "
            "which are gone. Keep those in the data set; or make a new sampler and score the "
            "remaining samples, by update() with indices, weights of 1, and their losses"
        )
    new = {f"memory.{name}": tensor for name, tensor in memory(table).items()}
    if table.states is not None:
        new["states"] = torch.zeros_like(table.states)
        new["states"][:, LAST] = LAST_UNSEEN
    rows = {
        name: _with_rows_of(t, before, name, state[name])
        for name, t in new.items()
        if name in state
    }
    warnings.warn(
        f"the state is of {before} samples, the sampler of {n}: samples from {before} on are taken "
        "to be new, and unseen",
        stacklevel=3,
    )
    rows["scalars"] = _after_warmup(table, state.get("scalars"))
    return {**state, **rows, "settings": {**settings, "num_samples": n}}


def _after_warmup(table: Table, scalars: Any) -> Any:
    """``scalars`` whose uniform draws on demand begin where the table's warm-up has ended."""
    label = "state_dict['scalars']"
    if type(scalars) is not Tensor or _dense(label, scalars).shape != (DURABLE_SCALARS,):
        return scalars
    scalars = _readable(label, scalars).clone()
    if scalars.dtype == torch.int64:
        scalars[UNIFORM_FROM].clamp_(min=min(table.constants.warmup_draws, NEVER - 1))
    return scalars


def _with_rows_of(new: Tensor, before: int, name: str, value: Any) -> Any:
    """``value`` and the last rows of ``new``; as it is unless it has a row for each sample."""
    label = f"state_dict[{name!r}]"
    if type(value) is not Tensor or new.dim() == 0 or value.dtype != new.dtype:
        return value
    if _dense(label, value).shape != (before, *new.shape[1:]):
        return value
    return torch.cat([_readable(label, value).to(new.device), new[before:]])


def checked_seed(state: Mapping[str, Any], version: int, settings: dict[str, Any]) -> int:
    """The seed of a state of this version, when its other settings are the sampler's."""
    if not isinstance(state, Mapping):
        raise TypeError(f"state_dict must be a dict, got {type(state).__name__}")
    if not _is_same(state.get("version"), version):
        raise ValueError(f"state_dict must have version {version}, got {state.get('version')!r}")
    theirs = state.get("settings")
    if not isinstance(theirs, Mapping):
        raise ValueError(f"state_dict must have a dict of settings, got {type(theirs).__name__}")
    for name, value in settings.items():
        if name != "seed" and not _is_same(theirs.get(name), value):
            raise ValueError(f"state_dict must have {name}={value!r}, got {theirs.get(name)!r}")
    return check.integer("state_dict's seed", theirs.get("seed"), 0, 2**64 - 1)


def checked_correction(state: Mapping[str, Any], may_differ: bool) -> float:
    """The exponent of the coefficients; 1 for a method that has none."""
    correction = state.get("correction")
    if correction is None:
        raise ValueError("state_dict must have a correction, got None")
    least = 0.0 if may_differ else 1.0
    return check.number("state_dict's correction", correction, least, 1.0)


def _is_same(theirs: Any, ours: Any) -> bool:
    """Are two settings equal? Never by the ``==`` of a foreign type."""
    if isinstance(ours, dict):
        same_keys = isinstance(theirs, Mapping) and set(theirs) == set(ours)
        return same_keys and all(_is_same(theirs[name], ours[name]) for name in ours)
    if isinstance(ours, (int, float)) and not isinstance(ours, bool):
        return type(theirs) in (int, float) and bool(theirs == ours)
    return type(theirs) is type(ours) and bool(theirs == ours)


def checked(
    table: Table, state: Mapping[str, Any], ranges: Mapping[str, Range], may_exclude: bool = False
) -> dict[str, Tensor]:
    """The tensors of ``state`` that the table takes over, on its device, ready to be copied.

    ``ranges`` are those of the method's memory; ``may_exclude``: whether it can have excluded
    samples. A state of a version whose totals had less room to spare is rescaled.

    Raises
    ------
    TypeError, ValueError
        naming the tensor, what was expected, what came, and the row where there is one.
    """
    durable = table.durable()
    tensors = {name: _plain(name, state, like) for name, like in durable.items()}
    scalars = _check_scalars(table, tensors["scalars"])
    _check_variance(tensors["variance"])
    for name, values in ranges.items():
        _check_range(f"memory.{name}", tensors[f"memory.{name}"], values)
    if table.states is None:
        return tensors
    seen, total, excluded = check_states(
        table, tensors["states"], scalars[UPDATES], scalars[EXPONENT]
    )
    if excluded and not may_exclude:
        raise ValueError(
            f"state_dict['states'] must have no excluded samples for this sampler, got {excluded}"
        )
    for at, found in ((SEEN, seen), (TOTAL, total)):
        if scalars[at] != found:
            raise ValueError(
                f"state_dict['scalars'] must have {_SCALARS[at]}={found}, as its states have, "
                f"got {scalars[at]}"
            )
    unseen = table.constants.num_samples - excluded - seen
    if seen and total + unseen * (total // seen) > table.constants.total_limit:
        return {**tensors, **_rescaled(table, tensors)}
    return tensors


def _plain(name: str, state: Mapping[str, Any], like: Tensor) -> Tensor:
    """``state[name]`` as a dense tensor of its own memory on the device of ``like``."""
    label = f"state_dict[{name!r}]"
    if name not in state:
        raise ValueError(f"state_dict must have {name!r}, got {', '.join(map(repr, state))}")
    value = state[name]
    if type(value) is not Tensor:  # a subclass may have no memory, or mean something else by it
        raise TypeError(f"{label} must be a torch.Tensor, got {type(value).__name__}")
    if _dense(label, value).shape != like.shape:
        raise ValueError(f"{label} must have shape {list(like.shape)}, got {list(value.shape)}")
    if value.dtype != like.dtype:
        raise TypeError(f"{label} must have dtype {like.dtype}, got {value.dtype}")
    return _readable(label, value).to(like.device).contiguous()


def _dense(label: str, value: Tensor) -> Tensor:
    if value.layout is not torch.strided or value.is_nested or value.is_quantized or value.is_meta:
        kind = "nested" if value.is_nested else str(value.layout)
        raise TypeError(f"{label} must be a dense tensor, got {kind} on {value.device}")
    return value


def _readable(label: str, value: Tensor) -> Tensor:
    """A dense ``value`` without graph, when it has memory of its own."""
    try:
        if not _has_memory(value):
            raise ValueError(f"{label} must have memory for its {value.numel()} elements")
        return value.detach().resolve_neg()
    except (RuntimeError, NotImplementedError) as error:
        raise ValueError(f"{label} can't be read: {error}") from error


def _has_memory(value: Tensor) -> bool:
    """Does the storage reach as far as the tensor? One may have been resized since."""
    if value.numel() == 0:
        return True
    last = sum((n - 1) * stride for n, stride in zip(value.shape, value.stride(), strict=True))
    bytes_needed = (value.storage_offset() + last + 1) * value.element_size()
    return value.data_ptr() != 0 and value.untyped_storage().nbytes() >= bytes_needed


def _check_scalars(table: Table, scalars: Tensor) -> list[int]:
    values: list[int] = scalars.tolist()
    limits = [(0, _MOST - 1)] * DURABLE_SCALARS
    limits[SEEN] = (0, table.constants.num_samples if table.states is not None else 0)
    if values[SEEN] > 0:
        limits[EXPONENT] = _EXPONENTS
    else:
        limits[EXPONENT], limits[TOTAL] = (NO_EXPONENT, NO_EXPONENT), (0, 0)
    constants = table.constants
    may_be_uniform = constants.batch_size <= constants.num_samples
    limits[PAUSE] = (0, 2**63 - 1)
    limits[UNIFORM_FROM] = (
        min(constants.warmup_draws, NEVER - 1) if may_be_uniform else NEVER,
        NEVER,
    )
    for name, value, (least, most) in zip(_SCALARS, values, limits, strict=True):
        if not least <= value <= most:
            raise ValueError(
                f"state_dict['scalars'] must have {name} in [{least}, {most}], got {value}"
            )
    return values


def _check_variance(variance: Tensor) -> None:
    """The averages and the factor; the rest follows from them anew in every update."""
    for begin, end, values in (
        (WEIGHT, SECOND, Range(0.0, 1 + 1e-9)),
        (SECOND, TRACE_IS, FINITE),
        (FACTOR, GAIN + 1, POSITIVE),
        (PAUSED_EFFICIENCY, PAUSED_EFFICIENCY + 1, Range(-1.0, 1.0)),
    ):
        _check_range("variance", variance[begin:end], values, begin)


def _check_range(name: str, values: Tensor, legal: Range, first: int = 0) -> None:
    for start, chunk in _chunks(values.reshape(-1)):
        # A bool may be any byte in a file; integers are compared as such, floats exactly.
        if chunk.dtype is torch.bool:
            chunk = chunk.view(torch.uint8)
        elif chunk.dtype.is_floating_point:
            chunk = chunk.double()
        good = (chunk >= legal.least) & (chunk <= legal.most)
        if legal.nan:
            good |= chunk.isnan()
        if not bool(good.all()):
            at = int((~good).int().argmax())
            raise ValueError(
                f"state_dict[{name!r}] must be in [{legal.least:g}, {legal.most:g}]"
                f"{' or NaN' if legal.nan else ''}, got {chunk[at].item()!r} "
                f"at position {first + start + at}"
            )


def _chunks(values: Tensor) -> Iterator[tuple[int, Tensor]]:
    for start in range(0, len(values), _CHUNK):
        yield start, values[start : start + _CHUNK]


# Pickles -----------------------------------------------------------------------------------------


def as_arrays(state: dict[str, Any]) -> dict[str, Any]:
    """A state for other processes: torch would share its tensors with a spawned one by file
    descriptors, which close with the tensors, before the process has opened them."""
    return {k: v.numpy(force=True) if isinstance(v, Tensor) else v for k, v in state.items()}


def as_tensors(state: dict[str, Any]) -> dict[str, Any]:
    """The inverse of :func:`as_arrays`."""
    return {
        k: torch.from_numpy(v.copy()) if isinstance(v, np.ndarray) else v for k, v in state.items()
    }


# States -----------------------------------------------------------------------------------------


def check_states(table: Table, states: Tensor, updates: int, e0: int) -> tuple[int, int, int]:
    """How many of the ``states`` int32 [N, 4] are seen, the sum of their integer weights, and how
    many are excluded."""
    kind = table.constants.importance
    compiled = _C is not None and states.device.type == "cpu"
    first_bad = compiled_first_bad if compiled else reference_first_bad
    row, *found = first_bad(states, updates, e0, kind)
    if row >= 0:
        for expected, good in _conditions(states[row : row + 1], updates, e0, kind).items():
            if not bool(good):
                mean, var = states[row].view(torch.float32)[:2].tolist()
                last, code = states[row, 2:].tolist()
                raise ValueError(
                    f"state_dict['states'] must have {expected}, got mean={mean!r}, var={var!r}, "
                    f"last={last}, code={code & 0xFFFFFFFF:#x} in row {row}"
                )
    seen, total, excluded = found
    return seen, total, excluded


def compiled_first_bad(
    states: Tensor, updates: int, e0: int, kind: int
) -> tuple[int, int, int, int]:
    """:func:`reference_first_bad` by csrc/cpu/saved.cpp, in one pass."""
    found = torch.zeros(3, dtype=torch.int64, device="cpu")
    arguments = len(states), updates, e0, kind
    row = _C.check_states(states.data_ptr(), *arguments, found.data_ptr())
    seen, total, excluded = found.tolist()
    return row, seen, total, excluded


def reference_first_bad(
    states: Tensor, updates: int, e0: int, kind: int
) -> tuple[int, int, int, int]:
    """The first row that no update can have written, or -1; then also what check_states() says."""
    seen = total = excluded = 0
    for start, chunk in _chunks(states):
        good = torch.stack(list(_conditions(chunk, updates, e0, kind).values())).all(0)
        if not bool(good.all()):
            return start + int((~good).int().argmax()), 0, 0, 0
        weights = weight_of(chunk[:, CODE], e0)
        seen += int((chunk[:, CODE] != 0).sum())
        excluded += int((chunk[:, LAST] == LAST_EXCLUDED).sum())
        # In two halves, since the sum of a chunk may have more than 64 bits.
        total += (int((weights >> 32).sum()) << 32) + int((weights & 0xFFFFFFFF).sum())
    return -1, seen, total if total < 2**63 else -1, excluded


def _conditions(states: Tensor, updates: int, e0: int, kind: int) -> dict[str, Tensor]:
    """What must hold of every state, bool [n] each."""
    mean, var = (states.view(torch.float32)[:, at] for at in (MEAN, VAR))
    last, code = states[:, LAST], states[:, CODE]
    blank = (last == LAST_UNSEEN) | (last == LAST_EXCLUDED)
    shift = exponent_of(code) - e0
    least = code_of(importance_of(mean, var, kind), 0.0)
    latest = min(updates, 2**31 - 1)  # refresh()ed just now; the clock in a state is modulo 2^31
    return {
        f"last in [-2, {latest}]": (last >= LAST_EXCLUDED) & (last <= latest),
        "zeros where nothing was seen": ~blank | (states[:, (MEAN, VAR, CODE)] == 0).all(1),
        f"means within {_MOST_MEAN:g}": blank | (mean.abs() <= _MOST_MEAN),
        f"variances in [0, {_MOST_VAR:g}]": blank | ((var >= 0) & (var <= _MOST_VAR)),
        "codes of 16 significant bits": blank | ((code > 0) & (code & 0xFF == 0)),
        f"exponents of codes in [{e0}, {e0 + _MOST_SHIFT}]": blank
        | ((shift >= 0) & (shift <= _MOST_SHIFT)),
        "codes no less than mean and var give": blank | (code >= least),
    }


def _rescaled(table: Table, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Codes and totals with room for the unseen samples: in a table of their own, O(N)."""
    other = Table(table.constants, table.device)
    other.load(tensors, table.constants.seed)
    reference_table.rescale(other)
    return other.snapshot()
