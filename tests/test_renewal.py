"""Sampler.reset and .exclude: samples that come and go, on every backend alike.

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
from conftest import batch_of, drive, losses_of, observe, sweep
from no_host_reads import META, no_host_reads, on_meta
from test_device import BACKWARDS, SCRAMBLED, Emulator, assert_exact_tree
from test_tree import assert_tree

import fastis
from fastis import kernels, methods, steer
from fastis.kernels.code import exponent_of, mantissa_of
from fastis.kernels.flatten import distribution
from fastis.kernels.layout import (
    EXCLUDED,
    EXPONENT,
    LAST,
    LAST_EXCLUDED,
    LAST_UNSEEN,
    NO_EXPONENT,
    SEEN,
    SKIPPED,
    TOTAL,
)
from fastis.methods import EMAIS, Distributed, Loss, Prioritized, prioritized

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


# What is drawn -----------------------------------------------------------------------------------

N, B = 60, 8
SOME = torch.arange(0, N, 3)  # 20 of them
OTHERS = [i for i in range(N) if i % 3]


def trained(steps=30, excluded=SOME, **options) -> fastis.Sampler:
    sampler = fastis.Sampler(N, B, **{"method": EMAIS(warmup_epochs=0), "seed": 3, **options})
    drive(sampler, steps)
    sampler.exclude(excluded)
    return sampler


@pytest.fixture(params=[0, 1, 2], ids=["reference", "cpu", "device"])
def any_kernels(request):
    with on(BACKENDS[request.param]):
        yield


def test_nothing_is_left_of_an_excluded_sample_and_a_reset_one_is_unseen(any_kernels):
    sampler = trained(0, excluded=torch.empty(0, dtype=torch.int64))
    sweep(sampler, torch.arange(10.0, N + 10))
    sampler.exclude(torch.tensor([4, 59, 4]))
    sampler.reset(torch.tensor([7, 7]))
    assert sampler.last_seen[[4, 59, 7, 8]].tolist() == [-2, -2, -1, 0]
    assert sampler.mean[[4, 59, 7, 8]].tolist() == [0, 0, 0, 18]
    mean = (float(torch.arange(10, N + 10).sum()) - 14 - 69 - 17) / (N - 3)
    expected = [0, 0, mean, 18]
    assert sampler.importance[[4, 59, 7, 8]].tolist() == pytest.approx(expected, rel=1e-4)
    p = sampler.probabilities()
    assert p[4] == p[59] == 0
    assert float(p[7] / p[8]) == pytest.approx(mean / 18, rel=1e-4)
    sampler.reset(torch.tensor([4]))
    assert float(sampler.probabilities()[4] / p[7]) == pytest.approx(57 / 58, rel=1e-3)


def test_coefficients_are_those_of_the_active_samples(any_kernels):
    sampler = trained()
    p = sampler.probabilities()
    assert p[OTHERS].min() > 0
    assert float(p.sum()) == pytest.approx(1)
    batch = sampler.sample()
    expected = (1 / (len(OTHERS) * p[batch.indices])).float()
    torch.testing.assert_close(batch.weights, expected, rtol=3e-7, atol=0)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("flatten", ["cap", "mix"])
def test_draws_follow_the_probabilities(flatten, scheme):
    """Chi-square with 39 degrees of freedom: above 83 once in 50,000 seeds."""
    sampler = trained(flatten=flatten, scheme=scheme)
    draws = 4000
    counts = torch.bincount(
        torch.cat([sampler.sample().indices for _ in range(draws)]), minlength=N
    )
    expected = draws * B * sampler.probabilities()
    assert not counts[SOME].any()
    others = ((counts - expected) ** 2 / expected)[OTHERS].sum()
    assert float(others) < 83


@pytest.mark.parametrize("kind", ["warm-up", "on demand"])
def test_uniform_epochs_are_those_of_the_active_samples(any_kernels, kind):
    sampler = trained(0, method=EMAIS(warmup_epochs=1 if kind == "warm-up" else 0))
    if kind == "on demand":
        sampler.uniform = True
    assert float(sampler.probabilities()[1]) == 1 / 40
    for _ in range(1 if kind == "warm-up" else 2):
        batches = [sampler.sample() for _ in range(5)]
        drawn = torch.cat([batch.indices for batch in batches])
        assert sorted(drawn.tolist()) == OTHERS
        assert all(bool((batch.weights == 1).all()) for batch in batches)


def test_fewer_samples_than_a_minibatch_come_equally_often(any_kernels):
    sampler = trained(0, excluded=torch.arange(3, N), method=EMAIS(warmup_epochs=9))
    for _ in range(4):
        batch = sampler.sample()
        assert torch.bincount(batch.indices).sort().values.tolist() == [2, 3, 3]
        assert batch.weights.tolist() == [1] * B


@pytest.mark.parametrize("flatten", ["cap", "mix"])
def test_where_the_cap_cannot_be_met_draws_are_uniform(any_kernels, flatten):
    sampler = trained(0, excluded=torch.empty(0, dtype=torch.int64), flatten=flatten)
    sweep(sampler, torch.tensor([1.0, 1.0, 1.0, 9.0]).repeat(N // 4))
    sampler.exclude(torch.arange(4, N))  # D 4 = B
    assert sampler.probabilities()[:4].tolist() == [0.25] * 4
    batch = sampler.sample()
    assert batch.weights.tolist() == [1] * B
    assert int(batch.indices.max()) < 4
    sampler.reset(torch.tensor([4, 5]))
    assert len(set(sampler.probabilities()[:6].tolist())) > 1


def test_the_scheme_is_honoured_there(any_kernels):
    sampler = trained(excluded=torch.arange(4, N), scheme="systematic")
    for _ in range(5):
        assert sampler.sample().indices.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]


def test_with_nothing_left_to_draw_from(any_kernels, request):
    sampler = trained(excluded=torch.arange(N))
    assert sampler.probabilities().tolist() == [0] * N
    before = sampler.state_dict()
    if request.node.callspec.params["any_kernels"] < 2:
        with pytest.raises(
            ValueError, match="samples to draw from, but all 60 are excluded: reset"
        ):
            sampler.sample()
        assert_same(before, sampler.state_dict())
    else:
        assert sampler.sample().weights.tolist() == [0] * B
    sampler.reset(torch.tensor([5]))
    assert sampler.sample().indices.tolist() == [5] * B


# What is learnt ----------------------------------------------------------------------------------


def test_scores_of_excluded_samples_are_left_out(any_kernels):
    sampler = trained()
    before = sampler.state_dict()
    sampler.update(batch_of(0, 3, 6), losses_of(5.0, math.nan, 1e30))
    sampler.refresh(torch.tensor([0, 9]), torch.tensor([1.0, math.nan]))
    sampler.fold(torch.tensor([0, 9]), torch.tensor([1.0, math.nan]), 28)
    after = sampler.state_dict()
    assert torch.equal(before["states"], after["states"])
    assert int(after["scalars"][SKIPPED]) == 0
    assert sampler.step == 31
    sampler.reset(torch.tensor([0]))
    sampler.update(batch_of(0, 3), losses_of(5.0, 7.0))
    assert sampler.mean[[0, 3]].tolist() == [5, 0]
    assert sampler.var[0] == 0


def test_with_the_last_score_gone_the_table_is_as_new(any_kernels):
    sampler, new = trained(), fastis.Sampler(N, B, method=EMAIS(warmup_epochs=0), seed=3)
    sampler.reset(torch.arange(N))
    for at, value in ((TOTAL, 0), (SEEN, 0), (EXCLUDED, 0), (EXPONENT, NO_EXPONENT)):
        assert int(sampler._table.scalars[at]) == value
    assert torch.equal(sampler.state_dict()["states"], new.state_dict()["states"])
    assert sampler.sample().weights.tolist() == [1] * B
    sampler.update(batch_of(3), losses_of(2.0))
    assert sampler.importance.tolist() == [2] * N


@pytest.mark.parametrize("call", ["reset", "exclude"])
def test_sums_hold_when_the_mean_rises(any_kernels, call):
    """Of many unseen samples, whose weight is the mean, which all but the largest go from."""
    n = 4096
    sampler = fastis.Sampler(n, 128, method=EMAIS(warmup_epochs=0), seed=0)
    limit = sampler._table.constants.total_limit
    score = torch.full((2048,), 1.0)
    score[:8] = 1.0 * 2 ** torch.linspace(4, 9, 8)
    sampler.update(fastis.Batch(torch.arange(2048), torch.ones(2048)), observe(score))
    for _ in range(8):  # higher and higher, in range of the exponent
        sampler.update(batch_of(0), losses_of(float(sampler.mean[0]) * 4))
    getattr(sampler, call)(torch.arange(1, 2048))
    scalars = sampler._table.scalars.tolist()
    unseen = n - scalars[EXCLUDED] - scalars[SEEN]
    assert scalars[TOTAL] + unseen * (scalars[TOTAL] // scalars[SEEN]) <= limit
    sampler.sample()


def test_scores_of_all_samples_are_asked_for_the_active_ones():
    asked = []

    def score_fn(indices):
        asked.append(indices)
        return 1.0 + indices.float()

    sampler = trained(method=EMAIS(warmup_epochs=0, refresh_every=31, score_fn=score_fn))
    sampler.update(batch_of(1), losses_of(1.0))
    assert torch.cat(asked).tolist() == OTHERS
    assert sampler.mean[SOME].tolist() == [0] * 20
    assert sampler.last_seen[SOME].tolist() == [-2] * 20


def test_new_samples_have_the_largest_priority(any_kernels):
    sampler = trained(60, method="prioritized", excluded=torch.empty(0, dtype=torch.int64))
    sampler.update(batch_of(0, 1), losses_of(1e3, 2.0))
    largest = float(sampler.importance[0])
    sampler.update(batch_of(0), losses_of(1.0))
    sampler.reset(torch.tensor([2, 50]))
    assert sampler.importance[[2, 50]].tolist() == [largest] * 2
    sampler.update(batch_of(2, 3), losses_of(1e-3, 1e6))  # the next iteration: it is observed
    assert sampler.importance[2] < largest / 10
    assert sampler.importance[50] == sampler.importance[3] == sampler.importance.max()


def test_excluded_samples_have_no_priority(any_kernels):
    sampler = trained(60, method="prioritized")
    sampler.update(batch_of(0, 1), losses_of(1e9, 1e6))
    assert sampler.importance[SOME].tolist() == [0] * 20
    sampler.reset(SOME[:1])
    assert sampler.importance[0] == sampler.importance[1], "not of the excluded sample's loss"


def test_a_ring_buffer(any_kernels):
    """Written to slot by slot while it is learnt from."""
    sampler = fastis.Sampler(N, B, method="prioritized", seed=0)
    sampler.exclude(torch.arange(N))
    for step in range(300):
        sampler.reset(torch.tensor([step % N]))
        batch = sampler.sample()
        assert int(batch.indices.max()) <= step
        sampler.update(batch, losses_of(*(1.0 + batch.indices % 5).tolist()))
    assert "share_excluded" not in sampler.stats()
    assert float(sampler.probabilities().min()) > 0


def test_distributed_sampling_pauses_by_the_active_samples(any_kernels):
    sampler = fastis.Sampler(N, B, method=Distributed(min_usable=0.5), seed=0)
    sampler.refresh(torch.arange(25), torch.ones(25))
    assert sampler.phase == "uniform"
    sampler.exclude(torch.arange(40, N))
    assert sampler.phase == "importance"
    sampler.reset(torch.arange(40, N))
    assert sampler.phase == "uniform"


# Its state ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [EMAIS(warmup_epochs=2), EMAIS(warmup_epochs=0), "prioritized"])
def test_a_resumed_run_goes_on_bit_for_bit(method, any_kernels):
    sampler, other = (trained(17, method=method) for _ in range(2))
    other.exclude(torch.arange(N))
    other.load_state_dict(sampler.state_dict())
    for _ in range(30):
        ours, theirs = sampler.sample(), other.sample()
        assert torch.equal(ours.indices, theirs.indices)
        assert torch.equal(ours.weights, theirs.weights)
        for each in (sampler, other):
            each.update(ours, losses_of(*(1.0 + ours.indices % 7).tolist()))


def test_a_grown_data_set_keeps_them_excluded():
    bigger = fastis.Sampler(N + 9, B, method=EMAIS(warmup_epochs=0))
    sampler = trained()
    with pytest.warns(UserWarning, match="from 60 on are taken to be new"):
        bigger.load_state_dict(sampler.state_dict())
    assert bigger.last_seen[SOME].tolist() == [-2] * 20
    assert bigger.last_seen[N:].tolist() == [-1] * 9
    assert bigger.stats()["share_excluded"] == 20 / 69
    assert float(bigger.probabilities()[N:].min()) > 0


def test_a_state_with_excluded_samples_is_not_for_methods_without(any_backend):
    sampler = fastis.Sampler(N, B, method="rais")
    drive(sampler, 3)
    state = sampler.state_dict()
    unseen = int((sampler.last_seen == LAST_UNSEEN).nonzero()[0])
    state["states"][unseen, LAST] = LAST_EXCLUDED
    with pytest.raises(ValueError, match="must have no excluded samples for this sampler, got 1"):
        sampler.load_state_dict(state)


def test_what_can_be_read(any_backend):
    sampler = trained(excluded=torch.empty(0, dtype=torch.int64))
    assert "share_excluded" not in sampler.stats()
    sampler.exclude(SOME)
    sampler.reset(SOME[:5])
    seen = int((sampler.last_seen >= 0).sum())
    stats, p = sampler.stats(full=True), sampler.probabilities()
    assert stats["share_excluded"] == 15 / 60
    assert stats["share_unseen"] == pytest.approx(1 - seen / 45)
    assert stats["largest_weight"] == pytest.approx(1 / (45 * float(p[p > 0].min())))
    assert repr(sampler)


def test_memory_for_the_counts_is_not_touched_before_it_is_needed():
    sampler = trained(excluded=torch.empty(0, dtype=torch.int64))
    sampler.sample()
    *_, touched = counts = sampler._table._tree["excluded_prefix"]
    assert not touched
    sampler.exclude(SOME)
    assert counts[-1]
    assert counts.any()
    sampler.reset(torch.arange(N))
    sampler.sample()  # with a new tree
    assert not counts.any()


# What is refused ---------------------------------------------------------------------------------


@pytest.mark.parametrize("call", ["reset", "exclude"])
@pytest.mark.parametrize(
    ("indices", "error", "message"),
    [
        ([1, 2], TypeError, "indices must be a tensor, got list"),
        (torch.ones(2), TypeError, "indices must have dtype torch.int64, got torch.float32"),
        (torch.ones(N, dtype=torch.bool), TypeError, "indices must have dtype torch.int64"),
        (torch.tensor(3), ValueError, r"indices must have shape \[n\], got \[\]"),
        (torch.tensor([3, N]), IndexError, r"^indices must be in \[0, 60\), got values from 3"),
        (torch.tensor([-1]), IndexError, "got values from -1 to -1"),
    ],
)  # fmt: skip
def test_what_is_wrong_changes_nothing(any_backend, call, indices, error, message):
    sampler = trained()
    before = sampler.state_dict()
    with pytest.raises(error, match=message):
        getattr(sampler, call)(indices)
    assert_same(before, sampler.state_dict())


def test_what_changes_nothing(any_kernels):
    sampler = trained()
    before = sampler.state_dict()
    sampler.exclude(SOME)
    sampler.exclude(torch.empty(0, dtype=torch.int64))
    assert_same(before, sampler.state_dict())


@pytest.mark.parametrize("call", ["reset", "exclude"])
@pytest.mark.parametrize("name", sorted(n for n, m in methods.BY_NAME.items() if not m.renews))
def test_methods_that_remember_more_say_so(name, call):
    made = methods.Presampling(torch.rand) if name == "presampling" else name
    sampler = fastis.Sampler(N, B, method=made)
    expected = rf"'{name}' remembers more .*: {call}\(\) is for emais, loss, distributed and prior"
    with pytest.raises(TypeError, match=expected):
        getattr(sampler, call)(torch.tensor([1]))


def test_a_device_leaves_out_what_is_out_of_range(monkeypatch):
    monkeypatch.setattr(steer, "may_read", lambda device: False)
    monkeypatch.setattr(prioritized, "may_read", lambda device: False)
    with on(Emulator(SCRAMBLED)):
        for method in (EMAIS(warmup_epochs=0), "prioritized"):
            sampler = trained(method=method, excluded=torch.tensor([N, 5, -1, 2**40, 5]))
            assert (sampler.last_seen == -2).nonzero().flatten().tolist() == [5]
            sampler.reset(torch.tensor([5, N, -(2**63)]))
            assert int((sampler.last_seen == -2).sum()) == 0
            assert bool((sampler._table._tree["claims"] == -1).all())


@pytest.mark.parametrize("method", ["emais", "loss", "prioritized", "distributed"])
def test_nothing_waits_for_a_gpu(monkeypatch, method):
    launched = on_meta(monkeypatch)
    sampler = fastis.Sampler(N, B, method=method, device=META)
    sampler._table.counts_on_host = {0: 40, 1: 40}
    indices = torch.empty(9, dtype=torch.int64, device=META)
    with no_host_reads():
        sampler.exclude(indices)
        sampler.reset(indices)
        assert launched.count("cuda_clear") == 2
        sampler.sample()
