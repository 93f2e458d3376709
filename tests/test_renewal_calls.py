"""Samples that come and go while a sampler is used in any order of calls, on every backend.

Random calls in any order are made on all backends at once. They must draw the same, with the
probabilities that follow from the states in Python's integers.
"""

from __future__ import annotations

import contextlib
import math
import random
from fractions import Fraction

import pytest
import torch
from conftest import observe
from test_device import BACKWARDS, SCRAMBLED, Emulator, assert_exact_tree
from test_tree import assert_tree

import fastis
from fastis import kernels
from fastis.kernels.code import exponent_of, mantissa_of
from fastis.kernels.flatten import distribution
from fastis.kernels.layout import (
    EXCLUDED,
    EXPONENT,
    LAST,
    LAST_EXCLUDED,
    LAST_UNSEEN,
    SEEN,
    TOTAL,
)
from fastis.methods import EMAIS, Distributed, Loss, Prioritized

RENEWING = [EMAIS, Loss, Prioritized, Distributed]
FLATTENS = [("cap", 2.0), ("mix", 2.0), ("cap", 0.6), ("mix", 1.2), ("cap", math.inf)]


@contextlib.contextmanager
def on(backend):
    """A backend by its name, or an object in place of the CPU's kernels."""
    if isinstance(backend, str):
        with fastis.backend(backend):
            yield
        return
    kernels._chosen.clear()
    kernels._chosen["table", "cpu"] = backend
    yield
    kernels._chosen.clear()


BACKENDS = ["reference", "cpu", Emulator(SCRAMBLED), Emulator(BACKWARDS)]


def expected_probabilities(table) -> list[Fraction]:
    """Of the next importance draw, from the states alone."""
    constants, e0 = table.constants, int(table.scalars[EXPONENT])
    last, codes = table.column(LAST).tolist(), table.codes()
    shifts, mantissas = (exponent_of(codes) - e0).tolist(), mantissa_of(codes).tolist()
    seen = [m << s for m, s, t in zip(mantissas, shifts, last, strict=True) if t >= 0]
    assert int(table.scalars[TOTAL]) == sum(seen)
    assert int(table.scalars[SEEN]) == len(seen)
    assert int(table.scalars[EXCLUDED]) == last.count(LAST_EXCLUDED)
    mean = sum(seen) // len(seen) if seen else 1 << 15
    weights = [
        {LAST_UNSEEN: mean, LAST_EXCLUDED: 0}.get(t, m << s if t >= 0 else 0)
        for m, s, t in zip(mantissas, shifts, last, strict=True)
    ]
    active = sum(t != LAST_EXCLUDED for t in last)
    alike = [int(t != LAST_EXCLUDED) for t in last]
    most = Fraction(constants.cap_numerator, constants.cap_denominator) / constants.batch_size
    if constants.flatten != 0 and active < len(last) and active * most <= 1:
        weights = alike
    elif constants.flatten == 1:
        rest, theta = sum(weights), 0
        for above, largest in enumerate(sorted(weights, reverse=True)):
            theta = math.floor(most * rest / (1 - above * most))
            if largest <= theta:
                break
            rest -= largest
        weights = [min(w, theta) for w in weights]
    elif constants.flatten == 2:
        over = (max(weights) - most * sum(weights)) / (active * most - 1)
        offset = max(0, math.ceil(over))
        fits = sum(weights) + active * offset < 2**62
        weights = [(w + offset) * a for w, a in zip(weights, alike, strict=True)] if fits else alike
    total = sum(weights)
    return [Fraction(w, total) for w in weights]


class Session:
    """Samplers with the same arguments, one a backend, and what is done with all of them."""

    def __init__(self, seed: int, n: int, b: int, backends=None, **arguments) -> None:
        self.random = random.Random(seed)
        self.generator = torch.Generator().manual_seed(seed)
        self.backends = BACKENDS if backends is None else backends
        self.arguments = {"num_samples": n, "batch_size": b, "seed": seed, **arguments}
        self.samplers = [fastis.Sampler(**self.arguments) for _ in self.backends]
        self.n, self.pending, self.scale = n, [], 1.0
        self.late = self.alike = 0
        self.excluded: set[int] = set()

    def run(self, length: int) -> None:
        few = [self.exclude, self.reset, self.refresh, self.save, self.uniform, self.check]
        for _ in range(length):
            self.random.choice([self.step] * 6 + [self.ahead] + few)()
        self.check()

    def all(self, call) -> list:
        found = []
        for sampler, backend in zip(self.samplers, self.backends, strict=True):
            with on(backend):
                found.append(call(sampler))
        return found

    # Calls -------------------------------------------------------------------------------------

    def draw(self) -> fastis.Batch:
        if len(self.excluded) == self.n:
            for sampler, backend in zip(self.samplers, self.backends, strict=True):
                if isinstance(backend, str):
                    before = sampler.state_dict()
                    with on(backend), pytest.raises(ValueError, match=r"all \d+ are excluded"):
                        sampler.sample()
                    assert_same(before, sampler.state_dict())
            self.reset()
            return self.draw()
        by_importance = self.samplers[0].phase == "importance"
        first, *others = self.all(lambda s: s.sample())
        for batch in others:
            assert torch.equal(batch.indices, first.indices)
            assert torch.equal(batch.weights, first.weights)
        assert self.excluded.isdisjoint(first.indices.tolist())
        if by_importance:
            self.check_trees()
        return first

    def check_trees(self) -> None:
        """After a draw by importance; not where all are drawn alike, by no tree of weights."""
        table = self.samplers[0]._table
        drawn, flatten = distribution(table), table.constants.flatten
        if drawn.total == drawn.active:
            self.alike += 1
            return
        for ours, backend in zip(self.samplers, self.backends, strict=True):
            if backend == "cpu":
                assert_tree(ours)
            elif backend != "reference" and flatten == 1:
                assert_exact_tree(ours)

    def step(self) -> None:
        self.update(self.pending.pop(0) if self.pending else self.draw())

    def ahead(self) -> None:
        self.pending.append(self.draw())

    def update(self, batch: fastis.Batch) -> None:
        self.late += len(self.excluded.intersection(batch.indices.tolist()))
        out = observe(self.scores(len(batch.indices)), torch.full((3,), 0.1))
        self.all(lambda s: s.update(batch, out))

    def scores(self, count: int) -> torch.Tensor:
        if self.random.random() < 0.05:
            self.scale = 10.0 ** self.random.uniform(-20, 12)
        score = torch.empty(count).log_normal_(0, 2, generator=self.generator) * self.scale
        score[torch.rand(count, generator=self.generator) < 0.03] = torch.nan
        return score

    def some(self) -> torch.Tensor:
        """Indices, perhaps some of them twice, or all of them."""
        most = self.random.choice([1, 3, self.n // 2 + 1, 2 * self.n])
        return torch.randint(self.n, (self.random.randrange(most + 1),), generator=self.generator)

    def exclude(self) -> None:
        indices = self.some()
        if self.random.random() < 0.4:  # all but about as many as can only be drawn alike
            order = torch.randperm(self.n, generator=self.generator)
            most = self.samplers[0]._table.constants.max_alike
            indices = order[self.random.randrange(most + 3) :]
        self.all(lambda s: s.exclude(indices))
        self.excluded.update(indices.tolist())

    def reset(self) -> None:
        indices = torch.arange(self.n) if self.random.random() < 0.2 else self.some()
        self.all(lambda s: s.reset(indices))
        self.excluded.difference_update(indices.tolist())

    def refresh(self) -> None:
        if self.samplers[0].method.folds:
            indices = self.some()
            score = self.scores(len(indices))
            self.all(lambda s: s.refresh(indices, score))

    def uniform(self) -> None:
        wanted = self.random.random() < 0.4
        for sampler in self.samplers:
            sampler.uniform = wanted

    def save(self) -> None:
        states = self.all(lambda s: s.state_dict())
        for state in states[1:]:
            assert_same(states[0], state, exactly=False)
        if self.random.random() < 0.5:  # over one that has excluded others
            self.all(lambda s: s.exclude(torch.arange(self.n // 2)))
        else:
            self.samplers = [fastis.Sampler(**self.arguments) for _ in self.backends]
        for sampler, backend in zip(self.samplers, self.backends, strict=True):
            with on(backend):
                sampler.load_state_dict(states[-1])

    def check(self) -> None:
        excluded = self.excluded
        for sampler in self.samplers:
            assert (
                set((sampler.last_seen == LAST_EXCLUDED).nonzero().flatten().tolist()) == excluded
            )
        sampler = self.samplers[0]
        expected = [Fraction(0)] * self.n
        if len(excluded) < self.n:
            expected = expected_probabilities(sampler._table)
            if sampler.phase != "importance":
                equal = Fraction(1, self.n - len(excluded))
                expected = [Fraction(0) if i in excluded else equal for i in range(self.n)]
        for p in self.all(lambda s: s.probabilities()):
            assert p.tolist() == pytest.approx([float(q) for q in expected], rel=1e-14, abs=0)


def assert_same(before: dict, after: dict, exactly: bool = True) -> None:
    """Backends add up a minibatch's moments in another order."""
    for name, value in before.items():
        if torch.is_tensor(value):
            exact = {} if name == "variance" and not exactly else {"rtol": 0, "atol": 0}
            torch.testing.assert_close(value, after[name], equal_nan=True, msg=name, **exact)


def any_session(seed: int, flatten, scheme) -> Session:
    rng = random.Random(f"{seed} {flatten} {scheme}")
    n = rng.choice([7, 24, 65, 150])
    b = rng.choice([k for k in (3, 5, 16, 40) if k <= n])
    name, most = flatten
    kind = rng.choice([EMAIS, EMAIS, EMAIS, *RENEWING])
    options = {} if kind is Distributed else {"warmup_epochs": rng.choice([0, 1])}
    if kind is EMAIS and rng.random() < 0.4:  # pauses after a few steps
        options.update(smoothing=0.3, least_gain=rng.choice([1.0001, 2.0]))
    return Session(
        seed, n, b, method=kind(**options), flatten=name, max_duplicates=max(most, 1.2 * b / n),
        scheme=scheme,
    )  # fmt: skip


SCHEMES = ["multinomial", "stratified", "systematic"]


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("flatten", FLATTENS, ids=str)
def test_any_calls_in_any_order(flatten, scheme):
    late = alike = 0
    for seed in range(8):
        session = any_session(seed, flatten, scheme)
        session.run(60)
        late, alike = late + session.late, alike + session.alike
    assert late > 0, "updates of samples that were excluded in the meantime"
    assert alike > 0 or flatten[1] == math.inf, "fewer samples than the cap can be met with"


@pytest.mark.slow
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("flatten", FLATTENS, ids=str)
def test_a_hundred_thousand_calls(flatten, scheme):
    for seed in range(100, 130):
        any_session(seed, flatten, scheme).run(230)


@pytest.mark.parametrize("flatten", ["cap", "mix"])
@pytest.mark.parametrize("warmup_epochs", [0, 9])
def test_trees_of_several_levels(flatten, warmup_epochs):
    method = EMAIS(warmup_epochs=warmup_epochs)
    session = Session(1, 5003, 64, method=method, flatten=flatten)
    session.refresh()
    session.run(25)
    assert session.excluded
