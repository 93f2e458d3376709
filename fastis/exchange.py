"""What the processes of a group tell one another in a step: one all-gather of what they have seen.

A message is a row of float32, the same length in every process and every step:

=====================  =============================================================================
``head``  22           as int64 [11]: what must be alike in all processes (the table's clocks and
                       totals, the minibatch, the form of the update), and a count
``sketch`` 16          of the mean gradient: :func:`sketch`
``scores`` B or 2 B    what is observed of every sample of this process's part; where that is not
                       the score, the scores too
=====================  =============================================================================

152 bytes a process, and 4 a drawn sample (8 for methods that observe something else).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from struct import pack, unpack
from threading import RLock
from typing import Any, NamedTuple, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import pad

from fastis.kernels.layout import DURABLE_SCALARS, UPDATES, Table
from fastis.kernels.table import Batch, Observation

# torch 2.13 has given it another name.
_all_gather: Any = getattr(dist, "all_gather_single", None) or getattr(
    dist, "all_gather_into_tensor", None
)
SKETCH = 16
_SCALARS = ("draws", "updates", "skipped", "exponent", "total", "seen", "uniform_from", "pause")
_MINIBATCH, _FORM, _COUNT = range(DURABLE_SCALARS, DURABLE_SCALARS + 3)  # in the head
_HEAD = DURABLE_SCALARS + 3
_COMPARED = _COUNT
_SCORES = 2 * _HEAD + SKETCH  # where they begin
_IN_STEP = (
    "all have to call sample(), update(), reset() and exclude(), and to set uniform and "
    "correction, in the same order, with loaders of as many workers. Nothing was learnt from this "
    "minibatch; to go on, load one state in all of them"
)


class Form(NamedTuple):
    """How an update is made: the same way in all processes."""

    own: bool  # of minibatches that each process brings, not of the one that was drawn
    mean_grad: int  # its length; -1: None
    correction: float

    @property
    def word(self) -> int:
        (bits,) = unpack("i", pack("f", self.correction))
        return int(bits) << 32 | (self.mean_grad + 1) << 1 | self.own

    @classmethod
    def of(cls, word: int) -> Form:
        (correction,) = unpack("f", pack("i", word >> 32))
        return cls(bool(word & 1), ((word & 0xFFFFFFFF) >> 1) - 1, correction)


def sketch(mean_grad: Tensor, updates: Tensor) -> Tensor:
    """float32 [min(C, 16)] of a mean gradient [C]: itself, or folded to 16 with random signs.

    Linear, so that the mean of the sketches is the sketch of the mean; and with the squared norm of
    what it is of, in expectation over the signs, which are others in every iteration and alike in
    all processes (AMS sketch: Alon, Matias & Szegedy 1996). The relative deviation of one is at
    most sqrt(2/16), a third; the traces take the mean over a hundred iterations and more.
    """
    length = len(mean_grad)
    if length <= SKETCH:
        return mean_grad
    signed = mean_grad * random_signs(length, updates)
    return pad(signed, (0, -length % SKETCH)).view(-1, SKETCH).sum(0)


def random_signs(length: int, key: Tensor) -> Tensor:
    """float32 [length] of 1 and -1, by the mixing of splitmix64 (Steele et al. 2014)."""
    z = torch.arange(1, length + 1, device=key.device) + key * (1 << 20)
    z = z * -0x61C8864680B583EB  # modulo 2^64, here and below
    z = (z ^ (z >> 30)) * -0x40A7B892E31B1A47
    z = (z ^ (z >> 27)) * -0x6B2FB644ECCEEE15
    return 1.0 - 2.0 * ((z >> 40) & 1)


class Message:
    """The memory of the messages of a table's processes, used anew in every step.

    Attributes
    ----------
    ours : Tensor
        float32 [n]: what this process sends.
    everyone : Tensor
        float32 [W n]: what all have sent, in the order of ranks.
    """

    def __init__(self, table: Table, size: int, batch_size: int, columns: int) -> None:
        self.batch_size = batch_size
        length = _SCORES + columns * batch_size
        length += length % 2  # rows begin at whole int64
        self.ours = torch.zeros(length, dtype=torch.float32, device=table.device)
        self.everyone = torch.zeros(size * length, dtype=torch.float32, device=table.device)
        self._scalars = table.scalars[:DURABLE_SCALARS]
        self._updates = table.scalars[UPDATES]
        ours, rows = self.ours[None], self.everyone.view(size, length)
        self._our_head, self._our_sketch, self._our_columns = _views(ours, batch_size, columns)
        self.heads, self._sketches, self._columns = _views(rows, batch_size, columns)
        self._our_scalars = self._our_head[0, :DURABLE_SCALARS]
        self._our_minibatch = self._our_head[0, _MINIBATCH]
        self._written: tuple[Form, int] | None = None

    def write(self, form: Form, global_batch: Batch | None, seen: Observation) -> None:
        """What this process has seen, into ``ours``."""
        if (form, len(seen.indices)) != self._written:  # else they are there
            self._write_form(form, len(seen.indices))
        self._our_scalars.copy_(self._scalars)
        if global_batch is None:
            self._our_minibatch.zero_()
        else:
            torch.sum(global_batch.indices, 0, out=self._our_minibatch)
            values = seen.observed, seen.score
            for column, value in zip(self._our_columns, values, strict=False):
                column.copy_(value)
        if seen.mean_grad is not None:
            self._our_gradient.copy_(sketch(seen.mean_grad, self._updates))

    def _write_form(self, form: Form, count: int) -> None:
        self._our_head[0, _FORM:].copy_(torch.tensor([form.word, count], device="cpu"))
        self._our_sketch.zero_()
        self._our_gradient = self._our_sketch[0, : min(max(form.mean_grad, 0), SKETCH)]
        self._written = form, count

    def observation(self, global_batch: Batch, form: Form) -> Observation:
        """Of the global minibatch; of one that its processes do not agree on, no usable score."""
        # Kernels go by addresses, and a column of one sample each reshapes without a copy.
        observed, *rest = (column.reshape(-1).contiguous() for column in self._columns)
        if not observed.is_cpu:  # nobody has looked yet
            agree = (self.heads[1:, :_COMPARED] == self.heads[:1, :_COMPARED]).all()
            observed = torch.where(agree, observed, torch.nan)
        score = rest[0] if rest else observed
        mean_grad = self._sketches.mean(0) if form.mean_grad >= 0 else None
        return Observation(global_batch.indices, global_batch.weights, observed, score, mean_grad)

    def own_minibatches(
        self, form: Form, seen: Observation, gather: Callable[[Tensor], Tensor]
    ) -> Observation:
        """Of the minibatches that the processes bring, one after the other. Waits for a device.

        ``gather`` makes [W, n] of [n].
        """
        counts, n = self.heads[:, _COUNT].tolist(), len(seen.indices)
        capacity = max(2, max(counts) + max(counts) % 2)  # rows begin at whole int64
        vectors = [seen.weights, seen.observed, seen.score][: 1 + len(self._columns)]
        ours = seen.weights.new_zeros((2 + len(vectors)) * capacity)
        ours[: 2 * capacity].view(torch.int64)[:n] = seen.indices
        for i, vector in enumerate(vectors, 2):
            ours[i * capacity : i * capacity + n] = vector
        rows = gather(ours)
        blocks = [
            rows[:, : 2 * capacity].view(torch.int64),
            *rows[:, 2 * capacity :].split(capacity, 1),
        ]
        indices, weights, observed, *rest = (
            torch.cat([row[:count] for row, count in zip(block, counts, strict=True)])
            for block in blocks
        )
        mean_grad = None
        if form.mean_grad >= 0:
            shares = self._sketches.new_tensor(counts) / max(1, sum(counts))
            mean_grad = (self._sketches * shares[:, None]).sum(0)
        return Observation(indices, weights, observed, rest[0] if rest else observed, mean_grad)

    def heads_to_host(self) -> tuple[Tensor, torch.cuda.Event]:
        """The heads on their way to the host, and the event after which they are there."""
        heads = torch.empty(self.heads.shape, dtype=torch.int64, device="cpu", pin_memory=True)
        heads.copy_(self.heads, non_blocking=True)
        return heads, torch.cuda.current_stream(self.heads.device).record_event()


def _views(rows: Tensor, batch_size: int, count: int) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Heads int64 [W, 11], sketches [W, 16] and ``count`` columns [W, B] of messages [W, n]."""
    begins = (_SCORES + i * batch_size for i in range(count))
    columns = [rows[:, begin : begin + batch_size] for begin in begins]
    heads = rows[:, : 2 * _HEAD].view(torch.int64)
    return heads, rows[:, 2 * _HEAD : _SCORES], columns


def check_alike(heads: Tensor) -> None:
    """Refuses heads int64 [W, 11], on the host, that are not those of one step.

    Raises
    ------
    RuntimeError
        naming what differs.
    """
    compared = heads[:, :_COMPARED]
    if not torch.equal(compared[1:], compared[:-1]):
        _name_difference(compared.tolist())


def _name_difference(heads: list[list[int]]) -> NoReturn:
    first = heads[0]
    rank = next(rank for rank, head in enumerate(heads) if head != first)
    found = heads[rank]
    both: dict[str, tuple[Any, Any]] = {
        name: (first[at], found[at]) for at, name in enumerate(_SCALARS)
    }
    ours, theirs = Form.of(first[_FORM]), Form.of(found[_FORM])
    both["correction"] = ours.correction, theirs.correction
    both["len(out.mean_grad)"] = ours.mean_grad, theirs.mean_grad
    both["update of another minibatch than was drawn"] = ours.own, theirs.own
    both["sum of the global minibatch's indices"] = first[_MINIBATCH], found[_MINIBATCH]
    name, (a, b) = next((name, pair) for name, pair in both.items() if pair[0] != pair[1])
    raise RuntimeError(
        f"the samplers of the group have come apart: {name} is {a} on rank 0 and {b} on rank "
        f"{rank}; {_IN_STEP}"
    )


class Exchange:
    """One process's end of the exchange between the samplers of a group.

    Attributes
    ----------
    table : Table
        that learns; with what is under way once :meth:`finish` has returned.
    rank, size : int
        which of how many processes this is.
    """

    table: Table
    _message: Message

    def __init__(self, group: Any) -> None:
        self._group = group
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        self._lock = RLock()  # the table may be asked for by another thread
        self._pending: _Pending | None = None
        self._unread: deque[tuple[Tensor, torch.cuda.Event]] = deque()

    def agree(self, arguments: Mapping[str, Any], seed: int) -> int:
        """Compares arguments with those of the other processes; the first one's ``seed``.

        Raises
        ------
        ValueError
            in all of them, naming the argument, when two have another.
        """
        ours = {name: repr(value) for name, value in arguments.items()}
        everyone: list[Any] = [None] * self.size
        dist.all_gather_object(everyone, (ours, seed), group=self._group)
        first, seed = everyone[0]
        for rank, (theirs, _) in enumerate(everyone):
            for name, value in theirs.items():
                if value != first[name]:
                    raise ValueError(
                        f"{name} must be the same in all processes of the group, got "
                        f"{first[name]} on rank 0 and {value} on rank {rank}"
                    )
        return seed

    def use(self, table: Table, batch_size: int, columns: int) -> None:
        """For minibatches of ``batch_size`` a process, with so many columns of scores."""
        self.table = table
        self._message = Message(table, self.size, batch_size, columns)

    def begin(
        self,
        global_batch: Batch | None,
        seen: Observation,
        correction: float,
        learn: Callable[[Observation, float], None],
    ) -> None:
        """Sends what this process has seen; :meth:`finish` learns from what all have.

        ``global_batch`` is the minibatch drawn, of which this process has seen its part; None: of a
        minibatch of its own. Then indices and weights go round too, which is waited for.
        """
        with self._lock:
            self.finish()
            length = -1 if seen.mean_grad is None else len(seen.mean_grad)
            form = Form(global_batch is None, length, correction)
            self._message.write(form, global_batch, seen)
            work = self._gather(self._message.ours, self._message.everyone)
            self._pending = _Pending(work, form, global_batch, seen, learn)
            if global_batch is None:
                self.finish()

    def finish(self) -> None:
        """Waits for what was sent, and learns from it; nothing where nothing is under way.

        Raises
        ------
        RuntimeError
            when a process is lost, or the samplers have come apart; nothing was learnt then.
        """
        if self._pending is None:
            return
        with self._lock:
            pending, self._pending = self._pending, None
            if pending is None:  # another thread was first
                return
            work, form, global_batch, seen, learn = pending
            work.wait()  # of a GPU it is the stream that waits
            self._check_alike(must_wait=global_batch is None)
            if global_batch is None:
                learn(self._message.own_minibatches(form, seen, self._gather_now), form.correction)
            else:
                learn(self._message.observation(global_batch, form), form.correction)

    def _check_alike(self, must_wait: bool) -> None:
        """Of a GPU the heads are looked at when they have come to the host."""
        if self._message.heads.is_cpu:
            check_alike(self._message.heads)
            return
        self._unread.append(self._message.heads_to_host())
        while self._unread and (must_wait or self._unread[0][1].query()):
            heads, arrived = self._unread.popleft()
            arrived.synchronize()
            check_alike(heads)

    def _gather(self, ours: Tensor, everyone: Tensor) -> Any:
        return _all_gather(everyone, ours, group=self._group, async_op=True)

    def _gather_now(self, ours: Tensor) -> Tensor:
        everyone = ours.new_empty(self.size * len(ours))
        self._gather(ours, everyone).wait()
        return everyone.view(self.size, -1)


class _Pending(NamedTuple):
    """What is under way. The observation is kept for its memory, which a GPU may yet read."""

    work: Any
    form: Form
    global_batch: Batch | None
    seen: Observation
    learn: Callable[[Observation, float], None]
