"""The moments of minibatches that several ranks draw and score together, one number a step.

The averages of Kutsuna 2025, Proposition 4.1, are of sums over all ranks' draws, never of ratios:
``A = E[r^2 x^2]``, ``U = E[r x^2]``, ``O = E[r x]``. ``|G|^2`` is of a vector that no rank has; the
ranks send its projection on a direction of random signs, whose square has that expectation.

A window is :data:`WINDOW` minibatches taken as one. Its four sums wait until it is complete, and
are then sent one in each of the next steps.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastis.kernels.layout import DRAWS, TRACE_IS, UPDATES, Table
from fastis.kernels.table import Observation
from fastis.kernels.variance import Moments, average

WINDOW = 4  # minibatches; as many as there are sums
_LARGEST = 1e38  # of a number sent as float32
_MASK = 2**63 - 1
_NEVER = -1


class SharedMoments:
    """What one rank has to say about the minibatches, and what it has heard of all.

    ``batch_size`` is that of all ranks. The averages go into ``table.variance``, and are the same
    on all ranks, since they follow from what was exchanged alone.
    """

    def __init__(self, table: Table, batch_size: int, seed: int) -> None:
        self._table, self._batch_size, self._seed = table, batch_size, seed
        self._pending = torch.zeros(WINDOW, dtype=torch.float64, device=table.device)
        self._complete: Tensor | None = None
        self._sending = [math.nan] * WINDOW
        self._received = [math.nan] * WINDOW
        self._minibatches = 0  # in the pending sums
        self._updates = 0
        self._began = self._complete_began = _NEVER  # the first update of a window
        self._signs: tuple[int, Tensor] = (_NEVER, torch.empty(0))

    # What a rank has seen ------------------------------------------------------------------------

    def add(self, observation: Observation, sum_of_gradients: Tensor | None, window: int) -> None:
        """One minibatch: weights r and scores x of this rank's draws, the sum of their r g.

        ``window`` minibatches complete the sums; 0: :meth:`of_request` does.
        """
        if self._updates == self._table.constants.warmup_draws or self._minibatches == 0:
            self._pending.zero_()
            self._minibatches, self._began = 0, self._updates
        r, x = observation.weights.double(), observation.score.double()
        rx = r * x
        sums = [rx @ rx, rx @ x, rx.sum()]
        if sum_of_gradients is None:
            sums.append(sums[0].new_zeros(()))
        else:
            sums.append(sum_of_gradients.double() @ self._direction(len(sum_of_gradients)))
        self._pending += torch.stack(sums)
        self._minibatches += 1
        self._updates += 1
        if self._minibatches == window:
            self._complete, self._complete_began = self._pending.clone(), self._began
            self._minibatches = 0

    def _direction(self, length: int) -> Tensor:
        """Signs, +1 or -1: the same on all ranks for the whole window."""
        if self._signs[0] != self._began or len(self._signs[1]) != length:
            generator = torch.Generator(device="cpu")
            generator.manual_seed((self._seed + 0x9E3779B97F4A7C15 * (self._began + 1)) & _MASK)
            signs = torch.randint(2, (length,), generator=generator, device="cpu").double() * 2 - 1
            self._signs = self._began, signs.to(self._table.device)
        return self._signs[1]

    # One number a step ---------------------------------------------------------------------------

    def to_send(self, draw: int) -> float:
        """What goes with the messages before this draw; NaN where there is no complete window.

        NaN also for one of the warm-up when it is over.
        """
        turn = draw % WINDOW
        if turn == 0:
            warmup = self._table.constants.warmup_draws
            late = draw >= warmup and self._complete_began < warmup
            known = self._complete is not None and not late
            self._sending = self._complete.tolist() if known else [math.nan] * WINDOW  # type: ignore[union-attr]
            self._complete = None
        value = self._sending[turn]
        return value if abs(value) < _LARGEST else math.nan

    def receive(self, draw: int, total: float) -> None:
        """Takes the sum of what all ranks have sent before this draw; after the draw."""
        turn = draw % WINDOW
        self._received[turn] = total
        if turn < WINDOW - 1:
            return
        warmup = self._table.constants.warmup_draws
        if 0 < warmup <= draw < warmup + 2 * WINDOW:
            self._table.variance[:TRACE_IS] = 0.0  # another distribution from here on
        elif all(map(math.isfinite, self._received)):
            self._average(self._received, WINDOW)

    # All at once ---------------------------------------------------------------------------------

    def of_request(self) -> Tensor:
        """float64 [5], on the CPU: the four sums since the last request, and of how many
        minibatches."""
        sums = self._pending.tolist() if self._minibatches > 0 else [0.0] * WINDOW
        return torch.tensor([*sums, float(self._minibatches)], dtype=torch.float64, device="cpu")

    def answer(self, totals: Tensor, ranks: int) -> None:
        """Takes the sum of what ``ranks`` ranks gave, float64 [5]."""
        *sums, minibatches = totals.tolist()
        of_warmup = self._complete_began < self._table.constants.warmup_draws <= self._began
        if of_warmup:
            self._table.variance[:TRACE_IS] = 0.0
        self._complete_began, self._minibatches = self._began, 0
        if minibatches > 0 and all(map(math.isfinite, sums)):
            self._average(sums, round(minibatches / ranks))

    def _average(self, sums: list[float], minibatches: int) -> None:
        n = self._batch_size * minibatches
        means = torch.tensor(sums, dtype=torch.float64, device=self._table.device) / n
        moments = Moments(means[0], means[1], means[2].square(), means[3].square())
        keep = self._table.constants.smoothing**minibatches
        average(self._table, moments, n, self._batch_size, keep)

    # Saving --------------------------------------------------------------------------------------

    def state(self) -> Tensor:
        """float64 [4, 5]: all that a resumed run needs."""
        complete = [math.nan] * WINDOW if self._complete is None else self._complete.tolist()
        rows = [
            [*self._pending.tolist(), float(self._minibatches)],
            [*complete, float(self._complete_began)],
            [*self._sending, float(self._began)],
            [*self._received, 0.0],
        ]
        return torch.tensor(rows, dtype=torch.float64, device="cpu")

    def load(self, state: Tensor) -> None:
        """Takes :meth:`state` over, and the clock from the table."""
        pending, complete, sending, received = state.tolist()
        self._pending.copy_(torch.tensor(pending[:WINDOW], dtype=torch.float64))
        self._complete = None
        if all(map(math.isfinite, complete[:WINDOW])):
            self._complete = self._pending.new_tensor(complete[:WINDOW])
        self._sending, self._received = sending[:WINDOW], received[:WINDOW]
        self._minibatches, self._complete_began = int(pending[WINDOW]), int(complete[WINDOW])
        self._began = int(sending[WINDOW])
        self.restart_clock()

    def restart_clock(self) -> None:
        """After the table's clocks were loaded."""
        self._updates = int(self._table.scalars[UPDATES])

    def forget(self) -> None:
        """Drops what is under way: of ranks that owned other samples."""
        fresh = SharedMoments(self._table, self._batch_size, self._seed)
        self.load(fresh.state())

    @property
    def draws(self) -> int:
        """Of the table's clock."""
        return int(self._table.scalars[DRAWS])
