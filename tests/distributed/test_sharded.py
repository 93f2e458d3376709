"""Sharded tables: the ranks' draws together are those of one table of all samples, exactly.

Ranks are threads here; processes are in test_sharded_processes.py.
"""

from __future__ import annotations

from fractions import Fraction
from itertools import accumulate

import numpy as np
import pytest
import torch
from conftest import observe

import fastis
from distributed.sharded_ranks import in_threads
from fastis import ShardedSampler
from fastis.kernels import shards as shards_module
from fastis.kernels.code import exponent_of, mantissa_of
from fastis.kernels.constants import SCHEMES
from fastis.kernels.flatten import unflattened, water_level
from fastis.kernels.layout import EXPONENT, SEEN
from fastis.kernels.reference import table as reference_table
from fastis.kernels.shards import NO_CAP, Message, Shards, Theta
from fastis.kernels.table import ShardTotal
from fastis.methods import EMAIS
from fastis.ranks import Ranks

ALONE = Ranks(0, 1, lambda message: message[None])
COLD = EMAIS(warmup_epochs=0)


def scores(count, generator, sigma=2.0):
    return torch.empty(count).log_normal_(0, sigma, generator=generator)


def run_ranks(ranks, num_samples, batch_size, steps, spread=(1.0,), **arguments):
    """Samplers after some steps, and all minibatches; rank k's scores are spread[k] as large."""

    def run(exchange):
        sampler = ShardedSampler(num_samples, batch_size, group=exchange, seed=5, **arguments)
        generator = torch.Generator().manual_seed(exchange.rank)
        batches = []
        for _ in range(steps):
            batches.append(sampler.sample())
            score = scores(len(batches[-1].indices), generator)
            sampler.update(batches[-1], observe(score * spread[exchange.rank % len(spread)]))
        return sampler, batches

    return in_threads(ranks, run)


# One rank is a sampler on its own ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("scheme", "cap"), [("multinomial", 2.0), ("stratified", 1000.0), ("systematic", 0.14)]
)
def test_one_rank_draws_what_a_sampler_draws(any_backend, scheme, cap):
    arguments = {"seed": 3, "max_duplicates": cap, "scheme": scheme}
    alone = fastis.Sampler(500, 64, group=False, **arguments)
    sharded = ShardedSampler(500, 64, group=ALONE, **arguments)
    generator = torch.Generator().manual_seed(0)
    for _ in range(40):
        expected, found = alone.sample(), sharded.sample()
        assert torch.equal(found.indices, expected.indices)
        assert torch.equal(found.weights, expected.weights)
        score = scores(64, generator)
        alone.update(expected, observe(score))
        sharded.update(found, observe(score))
    assert torch.equal(alone.probabilities(), sharded.probabilities())
    # The states are equal but for the flags of capped items, which the reference doesn't set.
    assert torch.equal(alone.state_dict()["states"], sharded.state_dict()["states"])


@pytest.mark.parametrize("strategy", ["global", "stratified"])
def test_one_rank_starts_from_nothing_seen(any_backend, strategy):
    alone = fastis.Sampler(300, 16, group=False, method=COLD, seed=1)
    sharded = ShardedSampler(300, 16, group=ALONE, method=COLD, seed=1, strategy=strategy)
    for _ in range(30):
        expected, found = alone.sample(), sharded.sample()
        assert torch.equal(found.indices, expected.indices)
        assert torch.equal(found.weights, expected.weights)
        score = (expected.indices.float() + 1) * 1e3
        alone.update(expected, observe(score))
        sharded.update(found, observe(score))


# Many ranks are one table ------------------------------------------------------------------------

CASES = {
    "like shards": {},
    "a shard of scores 1e6 times the others'": {"spread": (1, 1e6, 1, 1)},
    "scores of 1e-30 and 1e15": {"spread": (1e-30, 1e15, 1, 1e4)},
    "a shard of zeros": {"spread": (1, 1, 0, 1)},
    "no cap": {"max_duplicates": 1e6},
    "nearly uniform": {"max_duplicates": 0.17},
    "shards of many sizes": {"num_samples": 389},
    "after the warm-up": {"method": EMAIS(warmup_epochs=2)},
}


def of_case(name, steps=30):
    arguments = {"num_samples": 400, "method": COLD, "spread": (1.0,), **CASES[name]}
    return run_ranks(4, batch_size=16, steps=steps, **arguments)


def one_table(samplers):
    """The integer weight of every sample as drawn, from the codes of all shards: Python's integers.

    theta is the samplers' own: whether it is where it belongs is another test.
    """
    tables = [sampler._table for sampler in samplers]
    (theta,) = {sampler._theta for sampler in samplers}
    seen = [int(table.scalars[SEEN]) for table in tables]
    least = min(int(t.scalars[EXPONENT]) for t, some in zip(tables, seen, strict=True) if some)
    cap = theta.on_scale(least)
    weights = []
    for table, some in zip(tables, seen, strict=True):
        codes = table.codes()
        exact = [
            int(m) << int(e) - least if c else 0
            for m, e, c in zip(mantissa_of(codes), exponent_of(codes), codes, strict=True)
        ]
        own = int(table.scalars[EXPONENT]) - least if some else 0
        mean = sum(exact) // some >> own << own if some else 0
        unseen = min(mean, theta.of_table(own + least) << own)
        weights += [min(w, cap) if w else unseen for w in exact]
    return weights


@pytest.mark.parametrize("name", CASES)
def test_probabilities_are_those_of_one_table(any_backend, name):
    samplers = [sampler for sampler, _ in of_case(name)]
    weights = one_table(samplers)
    found = torch.cat(in_threads(4, lambda exchange: samplers_at(samplers, exchange)))
    total = sum(weights)
    expected = torch.tensor([float(Fraction(w, total)) for w in weights], dtype=torch.float64)
    # Each is a quotient of two rounded integers.
    torch.testing.assert_close(found, expected, rtol=4e-16, atol=0)


def samplers_at(samplers, exchange):
    """Probabilities of a rank whose sampler now has this exchange."""
    samplers[exchange.rank]._exchange = exchange
    return samplers[exchange.rank].probabilities()


@pytest.mark.parametrize("name", CASES)
def test_backends_draw_the_same(name):
    runs = []
    for backend in ("reference", "cpu"):
        with fastis.backend(backend):
            runs.append(of_case(name, steps=20))
    for (one, ones), (other, others) in zip(*runs, strict=True):
        for batch, expected in zip(others, ones, strict=True):
            assert torch.equal(batch.indices, expected.indices)
            assert torch.equal(batch.weights, expected.weights)
        assert torch.equal(one.state_dict()["states"], other.state_dict()["states"])
        assert one._theta == other._theta


@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_draw_is_one_rank_s(any_backend, scheme):
    runs = run_ranks(3, 300, 8, 25, method=COLD, scheme=scheme, spread=(1.0, 1e3, 1e-3))
    for step in range(25):
        drawn = [batches[step] for _, batches in runs]
        rows = sum(int((batch.weights > 0).sum()) for batch in drawn)
        assert rows == 3 * 8
        for (sampler, _), batch in zip(runs, drawn, strict=True):
            assert (
                (batch.indices >= sampler.shard.start) & (batch.indices < sampler.shard.stop)
            ).all()


@pytest.mark.parametrize("name", CASES)
def test_every_interval_of_the_total(name):
    """Both ends of every interval belong to its sample, so its length is the sample's weight."""
    samplers = [sampler for sampler, _ in of_case(name)]
    weights = one_table(samplers)

    def find(exchange):
        sampler = samplers[exchange.rank]
        sampler._exchange = exchange
        table, share = sampler._table, sampler._gather(float("nan")).share
        held = reference_table._held_at(table, share.own_theta)
        capped = set(held.capped.tolist())
        order = sorted(range(len(sampler.shard)), key=lambda i: i not in capped)
        starts = list(accumulate((weights[i + sampler._begin] for i in order), initial=0))
        assert starts[-1] == share.own
        if int(table.scalars[SEEN]) > 0:
            for start, end, index in zip(starts, starts[1:], order, strict=False):
                found = reference_table._find_in_shard(held, share, [start, end - 1])
                assert found == [(index, end - start)] * 2
        return share.total, share.before, share.own

    shares = in_threads(4, find)
    ends = list(accumulate((own for _, _, own in shares), initial=0))
    assert [before for _, before, _ in shares] == ends[:-1]
    assert {total for total, _, _ in shares} == {ends[-1]} == {sum(weights)}


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("name", ["like shards", "shards of many sizes"])
def test_draws_follow_the_probabilities(name, scheme):
    """Chi-square over all samples; beyond 5 sigma about once in 3.5 million."""
    arguments = {"num_samples": 400, "method": COLD, **CASES[name]}
    runs = run_ranks(4, batch_size=16, steps=30, scheme=scheme, **arguments)
    samplers = [sampler for sampler, _ in runs]

    def draw(exchange):
        sampler = samplers[exchange.rank]
        sampler._exchange = exchange
        for _ in range(20):  # theta comes to rest
            sampler.sample()
        p = sampler.probabilities()
        counts = torch.zeros(len(p), dtype=torch.float64)
        for _ in range(400):
            batch = sampler.sample()
            own = batch.indices[batch.weights > 0] - sampler.shard.start
            counts += torch.bincount(own, minlength=len(p))
            torch.testing.assert_close(
                batch.weights[batch.weights > 0].double(),
                len(batch.indices) / 16 / (sampler.num_samples * p[own]),
                rtol=1e-6,
                atol=0,
            )
        return p, counts

    found = in_threads(4, draw)
    p = torch.cat([p for p, _ in found])
    counts, expected = torch.cat([c for _, c in found]), p * 400 * 64
    assert int(counts.sum()) == 400 * 64
    chi2, f = float(((counts - expected) ** 2 / expected).sum()), len(p) - 1
    sigma = (2 / (9 * f)) ** 0.5  # Wilson and Hilferty
    assert ((chi2 / f) ** (1 / 3) - (1 - 2 / (9 * f))) / sigma < 5


# theta lags --------------------------------------------------------------------------------------


def test_the_cap_is_met_once_theta_is_at_rest():
    samplers = [sampler for sampler, _ in of_case("like shards")]

    def rest(exchange):
        samplers[exchange.rank]._exchange = exchange
        for _ in range(20):
            samplers[exchange.rank].sample()

    in_threads(4, rest)
    weights = one_table(samplers)
    raw = [w for sampler in samplers for w in raw_weights(sampler, samplers)]
    expected = water_level(torch.tensor(raw), 64, 2, 1)
    assert max(weights) == expected
    assert 64 * max(weights) <= 2 * sum(weights)


def raw_weights(sampler, samplers):
    least = min(int(s._table.scalars[EXPONENT]) for s in samplers)
    own = int(sampler._table.scalars[EXPONENT]) - least
    return [int(w) << own for w in unflattened(sampler._table)]


@pytest.mark.parametrize("decades_a_step", [-1 / 30, -1 / 1000, 1 / 100])
def test_the_cap_is_nearly_met_on_the_way(decades_a_step):
    """What the lag of theta costs where a step scores 6 % of the samples anew, over decades: 13 %
    at most in eight runs, and 2.5 % in the median."""

    def run(exchange):
        sampler = ShardedSampler(1000, 16, group=exchange, seed=5)
        generator = torch.Generator().manual_seed(exchange.rank)
        found = []
        for step in range(2 * 15 + 80):
            batch = sampler.sample()
            score = scores(len(batch.indices), generator) * 10.0 ** (step * decades_a_step)
            sampler.update(batch, observe(score))
            if step >= 2 * 15:
                found.append(float(sampler.probabilities().max()))
        return found

    found = torch.tensor(in_threads(4, run)).amax(0) * 64 / 2
    assert float(found.max()) < 1.2
    assert float(found.median()) < 1.05


def test_theta_comes_back_from_anywhere():
    """From far above and far below the root; below it rises by a quarter a step at most."""
    shards = Shards(0, np.array([1000]), 64, 0, 0, Fraction(2))
    weights = (torch.arange(1, 1001).double() ** 4).long() + 2**15
    expected = water_level(weights, 64, 2, 1)
    for start in (NO_CAP, Theta(1, 0), Theta(expected // 1000, 0), Theta(expected * 1000, 0)):
        theta, before = start, start
        for _ in range(200):
            held = min(theta.of_table(0), 2**62)
            capped = weights > held
            total = ShardTotal(int(weights[~capped].sum()), int(capped.sum()))
            words = Message(total, 0, 0.0).packed()[None]
            before, theta = theta, shards.gather(words, theta).theta
            if before.on_scale(0) >= expected:  # from above it never passes the root
                assert theta.on_scale(0) >= expected
            else:
                assert theta.on_scale(0) <= before.on_scale(0) * 1.25 + 1
        assert theta == before
        assert theta.on_scale(0) == expected


# Many shards, by their totals alone --------------------------------------------------------------


def test_a_thousand_shards_of_ten_billion_samples():
    """1,024 ranks: intervals side by side without a gap, the same on all; shares as they should be.

    By counts alone: what a rank's messages say of its shard is made up.
    """
    ranks, per_rank, n = 1024, 128, 10**10
    generator = np.random.default_rng(0)
    sizes = np.diff(np.minimum(np.arange(ranks + 1) * -(-n // ranks), n))
    exponents = generator.integers(-30, -10, ranks)
    messages = [
        Message(ShardTotal(int(u), int(k)), None if rank % 100 == 99 else int(e), float(rank))
        for rank, (u, k, e) in enumerate(
            zip(
                generator.integers(2**55, 2**60, ranks),
                generator.integers(0, 100, ranks),
                exponents,
                strict=True,
            )
        )
    ]
    words = torch.stack([message.packed() for message in messages])
    theta = Theta(2**50 + 12345, -20)
    batch_size = ranks * per_rank
    shares = [
        Shards(rank, sizes, batch_size, 0, 7, Fraction(2)).gather(words, theta)
        for rank in range(ranks)
    ]
    # The total by Fractions: no scale, no integers.
    theta_here = theta.on_scale(min(m.exponent for m in messages if m.exponent is not None))
    unit = Fraction(2) ** int(min(m.exponent for m in messages if m.exponent is not None))
    known = [
        Fraction(m.total.uncapped) * Fraction(2) ** m.exponent + m.total.capped * theta_here * unit
        for m in messages
        if m.exponent is not None
    ]
    size_known = sum(int(s) for s, m in zip(sizes, messages, strict=True) if m.exponent is not None)
    mean = min(int(sum(known) / unit) // size_known, theta_here)
    totals = [
        known.pop(0) / unit if m.exponent is not None else Fraction(int(s) * mean)
        for s, m in zip(sizes, messages, strict=True)
    ]
    starts = list(accumulate(totals, initial=Fraction(0)))
    for found, own, start in zip(shares, totals, starts, strict=False):
        assert (found.share.total, found.share.before, found.share.own) == (starts[-1], start, own)
    assert len({found.theta for found in shares}) == 1
    assert {found.moment for found in shares} == {float(sum(range(ranks)))}
    # A minibatch of all ranks: every draw is in one interval, as often as the interval is long.
    table = fastis.Sampler(1, 1, method="uniform", group=False)._table
    points = [
        x
        for iteration in range(4)
        for x in reference_table._points_of_all(table, shares[0].share, iteration)
    ]
    owners = np.searchsorted(np.array([float(s) for s in starts[1:]]), np.array(points, float))
    counts = np.bincount(owners, minlength=ranks)
    expected = np.array([float(t / starts[-1]) for t in totals]) * len(points)
    some = expected > 5
    chi2, f = float(((counts - expected) ** 2 / expected)[some].sum()), int(some.sum()) - 1
    sigma = (2 / (9 * f)) ** 0.5  # beyond 5 sigma about once in 3.5 million
    assert abs((chi2 / f) ** (1 / 3) - (1 - 2 / (9 * f))) / sigma < 5


def test_messages_keep_every_bit():
    for uncapped, capped, exponent in ((0, 2**32 - 1, None), (2**63 - 1, 0, -200), (1, 7, 64)):
        message = Message(ShardTotal(uncapped, capped), exponent, -1.5)
        packed = message.packed()
        assert packed.numel() * packed.element_size() == 16
        found = shards_module._Messages(packed[None], np.array([2**32 - 1]))
        assert int(found.uncapped[0]) == uncapped
        assert int(found.capped[0]) == capped
        assert bool(found.seen[0]) == (exponent is not None)
        assert exponent is None or int(found.exponent[0]) == exponent
        assert float(found.moment[0]) == -1.5


@pytest.mark.parametrize("call", ["reset", "exclude"])
def test_samples_of_shards_do_not_come_and_go(call):
    sharded = ShardedSampler(500, 64, group=ALONE, seed=0)
    with pytest.raises(TypeError, match=rf"keeps the samples that it has: there is no {call}\(\)"):
        getattr(sharded, call)(torch.tensor([1]))
    state = sharded.state_dict()
    state["states"][3, 2] = -2
    with pytest.raises(ValueError, match="must have no excluded samples for this sampler, got 1"):
        sharded.load_state_dict(state)
