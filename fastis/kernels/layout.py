"""A sampler's memory: the state of every sample, two clocks, the variance averages.

It owns tensors and constants and does no arithmetic; the kernels of ``fastis.kernels`` do. The
layout is that of csrc/layout.h, position by position.

=============  ==============  =================================================================
``states``    int32 [N, 4]    mean (float32 bits), variance (float32 bits), iteration of the last
                               observation (-1: unseen, -2: excluded), code of the importance (see
                               csrc/code.h). One state is 16 bytes: one cache line a sample.
``scalars``    int64 [24]      clocks and totals, named below
``variance``   float64 [12]    minibatch moments, smoothed, and what follows from them
``memory``     dict            tensors that the method asked for, by name
``prefix`` ...                 the sampling tree of the compiled backends; always rebuilt from
                               the states, never saved
=============  ==============  =================================================================
"""

from __future__ import annotations

from dataclasses import asdict, replace
from functools import cached_property
from threading import RLock
from typing import Any

import torch
from torch import Tensor

from fastis.kernels.constants import Constants
from fastis.kernels.extension import _C
from fastis.kernels.memory import untouched_zeros, zeros

# Positions in `scalars`.
DRAWS, UPDATES, SKIPPED, EXPONENT, TOTAL, SEEN, UNIFORM_FROM, PAUSE, VALID = range(9)
OTHERS_SUM, OTHERS_NUMBER = 21, 22  # of the shards beside this one; the sum as float64
EXCLUDED = 23  # how many samples are never drawn; the others are active
NUM_SCALARS = 24
DURABLE_SCALARS = VALID  # the rest describes the structure and is rebuilt
# Positions in `variance`.
(
    WEIGHT,
    SECOND,
    UNIFORM,
    FIRST_SQUARED,
    MEAN_SQUARED,
    TRACE_IS,
    TRACE_UNIFORM,
    TRACE_OPTIMAL,
    EFFECTIVE_BATCH_SIZE,
    EFFICIENCY,
    FACTOR,
    GAIN,
    PAUSED_EFFICIENCY,
) = range(13)
# Columns of `states`.
MEAN, VAR, LAST, CODE = range(4)
# In place of an iteration; all else in such a state is 0.
LAST_UNSEEN, LAST_EXCLUDED = -1, -2

LEAF = 4  # states below a node of the sampling tree (kLeaf in csrc/layout.h)
LATEST = 2**31 - 1  # the iteration in a state is modulo one more
LATE = 1 << 20  # by so much a state may be ahead of an update that comes late
NO_EXPONENT = -1000  # e0 of a table that has seen nothing
NEVER = 1 << 62  # a draw that no run comes to
UNIFORM_WEIGHT = 1 << 15  # every item's integer weight in such a table


def may_read(device: torch.device) -> bool:
    """Whether the host knows what is in a tensor there without waiting for the device."""
    return device.type == "cpu"


def is_paused(word: int, draw: int) -> bool:
    """Whether draws pause from importance sampling: ``scalars[PAUSE]`` says from which draw on
    (bits 1 and up) they do or don't (bit 0); before that draw it was the other way."""
    return (draw >= word >> 1) == bool(word & 1)


def active(table: Table) -> int:
    """How many samples are drawn from, all but the excluded ones: the N of coefficients.

    Waits for a device.
    """
    return table.constants.num_samples - int(table.scalars[EXCLUDED])


def without_replacement(table: Table, draw: int) -> bool:
    """Whether that minibatch is drawn without replacement, with coefficients of 1."""
    uniform_from, word = int(table.scalars[UNIFORM_FROM]), int(table.scalars[PAUSE])
    in_warmup = draw < table.constants.warmup_draws
    return in_warmup or draw >= uniform_from or is_paused(word, draw)


class Table:
    """The tensors of one sampler on one device. See the module's docstring."""

    def __init__(self, constants: Constants, device: torch.device) -> None:
        self.constants = constants
        self.device = device
        self.scalars = torch.zeros(NUM_SCALARS, dtype=torch.int64, device=device)
        self.scalars[EXPONENT] = NO_EXPONENT
        self.scalars[UNIFORM_FROM] = NEVER
        self.uniform = False  # whether that is another draw
        self.variance = torch.full((13,), torch.nan, dtype=torch.float64, device=device)
        self.variance[:TRACE_IS] = 0.0
        self.variance[FACTOR:] = 1.0
        self.variance[PAUSED_EFFICIENCY] = -1.0
        self.excludes = False  # whether samples may be excluded, as far as the host knows
        self.memory: dict[str, Tensor] = {}
        # The clocks as :meth:`count_on_host` follows them; none: not known.
        self.counts_on_host = {DRAWS: 0, UPDATES: 0}
        self.states: Tensor | None = None
        if constants.has_states:
            padded = -(-constants.num_samples // LEAF) * LEAF  # whole leaves for the kernels
            states = zeros((padded, 4), torch.int32, device)
            states[:, LAST] = LAST_UNSEEN
            self.states = states[: constants.num_samples]
        self._tree: dict[str, Tensor] = {}
        self._view: Any = None  # of the compiled kernels
        # Held by whatever reads or writes the tensors in more than one step. Reentrant: functions
        # of the user's that a method calls may ask for the state.
        self.lock = RLock()
        if device.type == "cuda" and hasattr(_C, "cuda_update"):
            _ = self.device_handle  # in a CUDA graph the first fill would be repeated
            _C.cuda_load_sampler(device.index)  # what fails is told where the backend is chosen

    @cached_property
    def handle(self) -> int:
        """Address of the CPU kernels' view; the structure is allocated on first use."""
        nodes = _C.tree_nodes(self.constants.num_samples)
        n, b = self.constants.num_samples, self.constants.batch_size
        # Where a capped item is drawn at least once a minibatch, a list of them saves time.
        listed = b + 64 if self.constants.max_capped < b and not self.constants.shard else 0
        # Of many capped items many are near the cap.
        near = min(n, (2 if listed else 8) * b) + 1024
        return self._view_of(
            _C.Table,
            {
                "prefix": (nodes, torch.int64, 0),
                "unseen_prefix": (nodes, torch.int32, 0),
                "capped_prefix": (nodes, torch.int32, 0),
                "excluded_prefix": (nodes + 1, torch.int32, None),
                "near": (near, torch.int64, 0),
                "listed": (2 * listed, torch.int64, 0),
                "flipped": (listed, torch.int64, 0),
            },
            near_capacity=near,
            list_capacity=listed,
        )

    @cached_property
    def device_handle(self) -> int:
        """Address (on the host) of the device kernels' view; allocates on first use."""
        n = self.constants.num_samples
        nodes = _C.device_tree_nodes(n)
        return self._view_of(
            _C.DeviceTable,
            {
                "sums": (nodes, torch.int64, 0),
                "unseen": (nodes, torch.int32, 0),
                "capped": (nodes, torch.int32, 0),
                "excluded": (nodes, torch.int32, 0),
                "claims": (n, torch.int32, -1),
                "work": (_C.DEVICE_WORK, torch.int64, 0),
                "arrivals": (1, torch.int32, 0),
            },
        )

    def _view_of(
        self, view: Any, layout: dict[str, tuple[int, torch.dtype, int | None]], **constants: int
    ) -> int:
        """Allocates the structure (tables with states only) and describes all tensors.

        By name: size, dtype, and what it is filled with; None: zeros, not touched here.
        """
        with self.lock:  # a second view's tensors would take the place of the first's
            if type(self._view) is not view:
                self._view = self._new_view(view, layout, **constants)
            return int(self._view.address)

    def _new_view(
        self, view: type, layout: dict[str, tuple[int, torch.dtype, int | None]], **constants: int
    ) -> Any:
        if self.states is not None:
            for name, (size, dtype, fill) in layout.items():
                new = untouched_zeros if fill is None else zeros
                self._tree[name] = new((size,), dtype, self.device)
                if fill:
                    self._tree[name].fill_(fill)
        elif "arrivals" in layout:
            self._tree["arrivals"] = zeros((1,), torch.int32, self.device)
        tensors: dict[str, Tensor | None] = {
            **dict.fromkeys(layout),
            "states": self.states,
            "scalars": self.scalars,
            "variance": self.variance,
            **self._tree,
        }
        addresses = {name: 0 if t is None else t.data_ptr() for name, t in tensors.items()}
        return view(addresses, {**asdict(self.constants), **constants})

    def count_on_host(self, clock: int) -> int:
        """``scalars[clock]``, DRAWS or UPDATES, without waiting for a device: read after a load,
        else counted by :meth:`tick_on_host`. For methods that are not fused."""
        if may_read(self.device):
            return int(self.scalars[clock])
        if clock not in self.counts_on_host:
            self.counts_on_host[clock] = int(self.scalars[clock])
        return self.counts_on_host[clock]

    def tick_on_host(self, clock: int) -> None:
        """One more draw or update went to the device."""
        if clock in self.counts_on_host:
            self.counts_on_host[clock] += 1

    def draw_uniformly(self, wanted: bool) -> None:
        """From the next draw on without replacement, or as the method says. Waits for nothing."""
        with self.lock:
            if wanted and not self.uniform:
                first = min(self.constants.warmup_draws, NEVER - 1)
                self.scalars[UNIFORM_FROM] = self.scalars[DRAWS].clamp(min=first)
            elif not wanted:
                self.scalars[UNIFORM_FROM] = NEVER
            self.uniform = wanted

    def pause_below(self, least_gain: float) -> None:
        """The gain below which importance sampling pauses. With 0 it never does, and goes on at the
        next draw. Waits for nothing."""
        with self.lock:
            self.constants = replace(self.constants, least_gain=least_gain)
            if self._view is not None:
                self._view.least_gain = least_gain
            if least_gain > 0:
                return
            paused = self.variance[PAUSED_EFFICIENCY] >= 0
            word = self.scalars[PAUSE]
            self.scalars[PAUSE] = torch.where(paused, self.scalars[DRAWS] * 2, word)
            self.variance[:TRACE_IS] *= ~paused  # of another distribution
            self.variance[PAUSED_EFFICIENCY] = -1.0

    def check_indices(self, indices: Tensor, name: str = "batch.indices") -> None:
        """Raises IndexError unless all ``indices`` of a minibatch are those of samples.

        On a device it waits for that; kernels there leave other rows out instead.
        """
        if indices.numel() == 0:
            return
        least, most = (int(value) for value in torch.aminmax(indices))
        if least < 0 or most >= self.constants.num_samples:
            raise IndexError(
                f"{name} must be in [0, {self.constants.num_samples}), got values from "
                f"{least} to {most}"
            )

    def check_active(self) -> None:
        """Raises ValueError where all samples are excluded. On a device it waits for that."""
        if self.states is not None and active(self) == 0:
            n = self.constants.num_samples
            raise ValueError(
                f"there must be samples to draw from, but all {n} are excluded: reset() some first"
            )

    def is_active(self, indices: Tensor | slice = slice(None)) -> Tensor:
        """bool [N], or [n] of some samples: which can be drawn."""
        if self.states is None:
            every = torch.ones((), dtype=torch.bool, device=self.device)
            return every.expand(self.constants.num_samples)[indices]
        return self.column(LAST)[indices] != LAST_EXCLUDED

    def column(self, position: int) -> Tensor:
        """A view of one column of the states, float32 for mean and variance."""
        assert self.states is not None
        if position in (MEAN, VAR):
            return self.states.view(torch.float32)[:, position]
        return self.states[:, position]

    def last_seen(self) -> Tensor:
        """int64 [N]: iteration of the last observation (the latest of those that a state may mean);
        -1 if unseen, -2 if excluded."""
        last, latest = self.column(LAST).long(), self.scalars[UPDATES] + LATE
        return torch.where(last < 0, last, latest - ((latest - last) & LATEST))

    def codes(self) -> Tensor:
        """int32 [N]: the codes without the flag of capped items; 0 for samples without a score."""
        return self.column(CODE) & 0x7FFFFFFF

    def durable(self) -> dict[str, Tensor]:
        """The tensors that a resumed run needs, as they are: the codes may carry flags."""
        tensors = {"scalars": self.scalars[:DURABLE_SCALARS], "variance": self.variance}
        if self.states is not None:
            tensors["states"] = self.states
        return tensors | {f"memory.{name}": tensor for name, tensor in self.memory.items()}

    def snapshot(self) -> dict[str, Tensor]:
        """What a resumed run needs, as new tensors, all of the same moment."""
        durable = self.durable()
        copies = {name: torch.empty_like(tensor) for name, tensor in durable.items()}
        with self.lock:
            self._copy(durable, copies)
        return copies

    def load(self, state: dict[str, Tensor], seed: int) -> None:
        """Takes :meth:`snapshot` and the seed over, into the tensors that are there.

        The caller has checked the state (:func:`fastis.saved.checked`). The structure is rebuilt at
        the next draw.
        """
        rebuilt = torch.zeros_like(self.scalars)
        rebuilt[:DURABLE_SCALARS] = state["scalars"]
        if "states" in state:
            rebuilt[EXCLUDED] = (state["states"][:, LAST] == LAST_EXCLUDED).sum()
        with self.lock:
            try:
                self._take({**state, "scalars": rebuilt}, seed)
            except KeyboardInterrupt:  # the kernels must not meet half a state
                self._take({**state, "scalars": rebuilt}, seed)
                raise

    def _take(self, state: dict[str, Tensor], seed: int) -> None:
        self._copy(state, {**self.durable(), "scalars": self.scalars})
        self.uniform = bool(self.scalars[UNIFORM_FROM] != NEVER)
        self.excludes = bool(self.scalars[EXCLUDED] > 0)
        self.counts_on_host.clear()
        self.constants = replace(self.constants, seed=seed)
        if self._view is not None:
            self._view.seed = seed

    def _copy(self, source: dict[str, Tensor], target: dict[str, Tensor]) -> None:
        """Copies a state without the flags of the codes; the lock must be held.

        On the CPU one call that holds the GIL, since steps that are calls of this kind themselves
        do not take the lock.
        """
        names = set(source)
        if _C is not None and self.device.type == "cpu":
            sizes = len(source["scalars"]), 0 if self.states is None else len(self.states)
            _C.copy_state(*sizes, *_addresses(source), *_addresses(target))
            names -= {"scalars", "variance", "states"}
        for name in names:
            target[name].copy_(source[name])
        if "states" in names:
            target["states"][:, CODE] &= 0x7FFFFFFF


def _addresses(tensors: dict[str, Tensor]) -> tuple[int, int, int]:
    states = tensors.get("states")
    return (
        tensors["scalars"].data_ptr(),
        tensors["variance"].data_ptr(),
        0 if states is None else states.data_ptr(),
    )
