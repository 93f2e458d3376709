"""Prioritized replay with a sampler as the ring buffer: double DQN on CartPole.

    python examples/replay.py [--steps 20000] [--capacity 10000] [--batch-size 64] [--seed 0]

Transitions are drawn in proportion to a power of their last TD error, with partly corrected
coefficients (Schaul et al. 2016; double DQN: van Hasselt et al. 2016). The sampler's table is the
tree of priorities: slots that hold nothing yet are excluded, and a slot that gets a new transition
is reset, which gives it the largest priority so far. Both take as long however large the buffer is.
"""

from __future__ import annotations

import argparse
import copy
import math
import random
from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

import fastis


class CartPole:
    """A pole on a cart that is pushed left or right (Barto, Sutton & Anderson 1983).

    A reward of 1 a step until the pole leans by 12 degrees or the cart is 2.4 away, 500 at most.
    """

    def __init__(self, seed: int) -> None:
        self._rng = random.Random(seed)

    def start(self) -> tuple[float, ...]:
        self._state = tuple(self._rng.uniform(-0.05, 0.05) for _ in range(4))
        self._steps = 0
        return self._state

    def step(self, action: int) -> tuple[tuple[float, ...], bool, bool]:
        """The next state; whether it is a failure; whether the episode ends."""
        x, v, angle, spin = self._state
        sine, cosine = math.sin(angle), math.cos(angle)
        push = (10.0 if action == 1 else -10.0) + 0.05 * spin * spin * sine
        push /= 1.1
        turn = (9.8 * sine - cosine * push) / (0.5 * (4 / 3 - 0.1 * cosine * cosine / 1.1))
        v_rate = push - 0.05 * turn * cosine / 1.1
        self._state = x + 0.02 * v, v + 0.02 * v_rate, angle + 0.02 * spin, spin + 0.02 * turn
        self._steps += 1
        failed = abs(self._state[0]) > 2.4 or abs(self._state[2]) > math.radians(12)
        return self._state, failed, failed or self._steps == 500


class Transitions(NamedTuple):
    """Of a minibatch, or all that a buffer has room for."""

    state: Tensor  # [B, 4]
    action: Tensor  # int64 [B]
    next_state: Tensor  # [B, 4]
    goes_on: Tensor  # [B]: 0 where the next state is a failure

    @classmethod
    def room_for(cls, count: int) -> Transitions:
        action = torch.zeros(count, dtype=torch.int64)
        return cls(torch.zeros(count, 4), action, torch.zeros(count, 4), torch.zeros(count))


class Replay(Protocol):
    """A buffer of transitions."""

    def add(self, state: object, action: int, next_state: object, goes_on: float) -> None: ...
    def sample(self) -> tuple[Transitions, Tensor]:
        """A minibatch and its coefficients ``[B]``."""

    def update(self, error: Tensor) -> None:
        """The absolute TD errors ``[B]`` of the minibatch that was drawn last."""


class PrioritizedReplay:
    """A ring buffer whose tree of priorities is a sampler's table."""

    def __init__(self, capacity: int, batch_size: int, method: fastis.methods.Method, seed: int):
        self.stored = Transitions.room_for(capacity)
        self.sampler = fastis.Sampler(
            capacity, batch_size, method=method, max_duplicates=batch_size, seed=seed
        )
        self.sampler.exclude(torch.arange(capacity))
        self.capacity, self.count = capacity, 0

    def add(self, state: object, action: int, next_state: object, goes_on: float) -> None:
        slot = self.count % self.capacity
        for column, value in zip(self.stored, (state, action, next_state, goes_on), strict=True):
            column[slot] = torch.as_tensor(value)
        self.sampler.reset(torch.tensor([slot]))
        self.count += 1

    def sample(self) -> tuple[Transitions, Tensor]:
        self.batch = self.sampler.sample()
        rows = (column[self.batch.indices] for column in self.stored)
        return Transitions(*rows), self.batch.weights

    def update(self, error: Tensor) -> None:
        self.sampler.update(self.batch, error)


def train(
    replay: Replay,
    steps: int,
    seed: int,
    *,
    lr: float = 1e-3,
    begin: int = 500,
    sync: int = 250,
    watch: Callable[[int, nn.Module, nn.Module], None] | None = None,
) -> list[float]:
    """The return of every episode. ``begin``: steps before learning starts; ``sync``: between two
    copies of the network to the target network; ``watch``: called with step, network and target
    after each step of learning."""
    torch.manual_seed(seed)
    rng, world = random.Random(seed), CartPole(seed)
    network = nn.Sequential(
        nn.Linear(4, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 2)
    )
    target = copy.deepcopy(network).requires_grad_(False)
    optimizer = torch.optim.Adam(network.parameters(), lr=lr)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.05, total_iters=steps - begin)
    returns, total, state = [], 0.0, world.start()
    for step in range(steps):
        explores = rng.random() < max(0.02, 1 - step / (0.2 * steps))
        with torch.no_grad():
            action = rng.randrange(2) if explores else int(network(torch.tensor(state)).argmax())
        next_state, failed, ended = world.step(action)
        replay.add(state, action, next_state, 1.0 - failed)
        state, total = next_state, total + 1
        if ended:
            returns.append(total)
            state, total = world.start(), 0.0
        if step < begin:
            continue
        drawn, weights = replay.sample()
        error = td_error(network, target, drawn)
        replay.update(error.detach().abs())
        optimizer.zero_grad()
        (
            weights * nn.functional.smooth_l1_loss(error, torch.zeros_like(error), reduction="none")
        ).mean().backward()
        optimizer.step()
        schedule.step()
        if step % sync == 0:
            target.load_state_dict(network.state_dict())
        if watch is not None:
            watch(step, network, target)
    return returns


def td_error(
    network: nn.Module, target: nn.Module, drawn: Transitions, discount: float = 0.99
) -> Tensor:
    """``[B]``: of double DQN, differentiable in the network."""
    with torch.no_grad():
        best = network(drawn.next_state).argmax(1, keepdim=True)
        value = target(drawn.next_state).gather(1, best)[:, 0]
        aim = 1.0 + discount * drawn.goes_on * value
    return network(drawn.state).gather(1, drawn.action[:, None])[:, 0] - aim


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=20_000)
    parser.add_argument("--capacity", type=int, default=10_000)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    method = fastis.methods.Prioritized(alpha=0.6, beta=0.4, total_steps=args.steps)
    replay = PrioritizedReplay(args.capacity, args.batch_size, method, args.seed)
    returns = train(replay, args.steps, args.seed)
    last = returns[-20:]
    print(
        f"{len(returns)} episodes, mean return of the last {len(last)}: {sum(last) / len(last):.1f}"
    )


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
