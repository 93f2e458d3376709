"""Sharded tables in training: weights that DDP's mean makes right, traces of the minibatch of all
ranks, the stratified strategy, saving. Ranks are threads here."""

from __future__ import annotations

import itertools
import pickle

import pytest
import torch
from conftest import observe

import fastis
from distributed.sharded_ranks import in_threads
from fastis import ShardedSampler
from fastis.kernels.layout import TRACE_IS, WEIGHT
from fastis.kernels.reference import table as reference_table
from fastis.kernels.variance import Moments, traces_of
from fastis.methods import EMAIS
from fastis.ranks import Ranks

ALONE = Ranks(0, 1, lambda message: message[None])
COLD = EMAIS(warmup_epochs=0)


def with_scores(exchange, num_samples, batch_size, score=None, **arguments):
    """A sampler whose rank has scored all of its shard once."""
    arguments = {"method": COLD, "seed": 2, **arguments}
    sampler = ShardedSampler(num_samples, batch_size, group=exchange, **arguments)
    rows = torch.tensor(list(sampler.shard))
    score = (rows.float() + 1) ** 2 if score is None else score[rows]
    for part in rows.split(batch_size):
        own = score[part - sampler.shard.start]
        sampler.update(fastis.Batch(part, torch.ones(len(part))), observe(own))
    return sampler


# Weights under DDP's mean of gradients -----------------------------------------------------------


def mean_over_ranks(batches, values):
    """What DDP makes of the ranks' weighted mean losses, of gradients ``values``."""
    own = [(b.weights.double() * values[b.indices]).mean() for b in batches]
    return torch.stack(own).mean()


@pytest.mark.parametrize(("num_samples", "ranks", "batch_size"), [(5, 2, 1), (7, 2, 1), (7, 3, 1)])
def test_ddp_s_gradient_is_that_of_the_data_by_enumeration(
    monkeypatch, num_samples, ranks, batch_size
):
    """All minibatches of all ranks, each with its probability, shares of 0 rows among them."""
    values = torch.arange(1.0, num_samples + 1).double() ** 3
    draws = ranks * batch_size

    def make(exchange):
        sampler = with_scores(exchange, num_samples, batch_size, max_duplicates=1.6)
        for _ in range(20):
            sampler.sample()
        return sampler, sampler.probabilities(), sampler._gather(float("nan")).share

    with fastis.backend("reference"):
        made = in_threads(ranks, make)
        p = torch.cat([p for _, p, _ in made])
        total = made[0][2].total
        starts = [0, *itertools.accumulate(round(float(q) * total) for q in p)]
        points = {i: (starts[i] + starts[i + 1]) // 2 for i in range(num_samples)}
        chosen = []
        monkeypatch.setattr(
            reference_table, "_points_of_all", lambda *_: [at_point[i] for i in chosen]
        )
        at_point = in_order(made, points)
        mean, sum_p, empty = 0.0, 0.0, 0
        for minibatch in itertools.product(range(num_samples), repeat=draws):
            chosen[:] = minibatch
            batches = in_threads(ranks, lambda exchange: draw(made, exchange))
            probability = float(torch.stack([p[i] for i in minibatch]).prod())
            mean += probability * float(mean_over_ranks(batches, values))
            sum_p += probability
            empty += sum(not bool((b.weights > 0).any()) for b in batches)
    assert sum_p == pytest.approx(1, abs=1e-12)
    assert empty > 0
    # Weights are float32.
    assert mean == pytest.approx(float(values.mean()), rel=3e-7)


def draw(made, exchange):
    sampler = made[exchange.rank][0]
    sampler._exchange = exchange
    return sampler.sample()


def in_order(made, points):
    """A point of the total in every sample's interval: capped samples come first in a shard."""
    found = {}
    for sampler, _, share in made:
        held = reference_table._held_at(sampler._table, share.own_theta)
        capped = set(held.capped.tolist())
        at = share.before
        for index in sorted(range(len(sampler.shard)), key=lambda i: i not in capped):
            weight = share.theta if index in capped else int(held.weights[index]) << share.shift
            found[index + sampler.shard.start] = at + weight // 2
            at += weight
    return found


@pytest.mark.parametrize("strategy", ["global", "stratified"])
def test_an_epoch_of_the_warm_up_is_the_mean_of_the_data(any_backend, strategy):
    """Shards of 10, 10 and 8 samples have 2 a minibatch each, weighted by the shard's size."""
    values = torch.arange(28.0).double().square()

    def run(exchange):
        method = EMAIS(warmup_epochs=1)
        sampler = ShardedSampler(28, 2, group=exchange, method=method, strategy=strategy)
        assert sampler._table.constants.warmup_draws == 5
        epoch = [sampler.sample() for _ in range(len(sampler.shard) // 2)]
        for _ in range(5 - len(epoch)):
            sampler.sample()
        indices = torch.cat([batch.indices for batch in epoch])
        assert sorted(indices.tolist()) == list(sampler.shard)
        return mean_over_ranks(epoch, values)

    found = torch.stack(in_threads(3, run)).mean()
    assert float(found) == pytest.approx(float(values.mean()), rel=1e-6)


def test_a_rank_that_drew_nothing_has_a_row_without_weight(any_backend):
    """One shard holds all the importance; the other's rows can be trained on and learnt from."""

    def run(exchange):
        score = torch.cat([torch.full((50,), 1e-3), torch.full((50,), 1e3)])
        sampler = with_scores(exchange, 100, 4, score)
        found = []
        for _ in range(30):
            found.append(sampler.sample())
            sampler.update(found[-1], observe(score[found[-1].indices]))
        return sampler, found

    (sampler, batches), (_, others) = in_threads(2, run)
    empty = [not bool((b.weights > 0).any()) for b in batches]
    assert sum(empty) > 10
    for batch, other, nothing in zip(batches, others, empty, strict=True):
        rows = 0 if nothing else len(batch.indices)
        assert rows + len(other.indices) == 8
        if nothing:
            assert batch.indices.tolist() == [0]
            assert batch.weights.tolist() == [0.0]
    assert sampler.step == 30 + 13


# Traces of all ranks -----------------------------------------------------------------------------


def test_traces_are_of_the_sums_of_all_ranks(any_backend):
    """By hand, from the minibatches of all ranks: windows of four, sent in the four steps after."""

    def run(exchange):
        sampler = ShardedSampler(200, 8, group=exchange, method=COLD, seed=4)
        seen = []
        for step in range(24):
            batch = sampler.sample()
            score = 1 + (batch.indices % 7).float() + step % 3
            r, x = batch.weights.double() * 8 / len(batch.indices), score.double()
            sampler.update(batch, observe(score))
            seen.append(torch.stack([(r * x).square().sum(), (r * x * x).sum(), (r * x).sum()]))
        return sampler, torch.stack(seen)

    runs = in_threads(3, run)
    tables = [sampler._table for sampler, _ in runs]
    sums = sum(seen for _, seen in runs)
    keep, n = 0.99**4, 4 * 24
    expected = torch.zeros(4, dtype=torch.float64)
    for window in range(5):  # the sixth has not been sent
        a, u, o = sums[4 * window : 4 * window + 4].sum(0) / n
        expected = keep * expected + (1 - keep) * torch.stack([torch.ones_like(a), a, u, o * o])
    for table in tables:
        assert torch.equal(table.variance, tables[0].variance)
        # Sums go as 16 bits of a mantissa.
        torch.testing.assert_close(table.variance[:4], expected, rtol=3e-5, atol=0)
    v = tables[0].variance
    moments = Moments(*(v[1:TRACE_IS] / v[WEIGHT]))
    torch.testing.assert_close(v[TRACE_IS : TRACE_IS + 3], torch.stack(traces_of(moments, n, True)))
    assert float(v[8]) == pytest.approx(24 * float(v[6] / v[5]))  # N_ems of minibatches of 24


def test_the_square_of_the_mean_gradient_of_all_ranks():
    """|G|^2 of a sum of vectors that no rank has: by its projection on random signs."""
    means = torch.tensor([[3.0, 0, 1, 0], [3.0, 1.0, 0, 0]])
    windows = 250

    def run(exchange):
        method = fastis.methods.Uniform(smoothing=0.99999)  # the plain mean of all windows
        sampler = ShardedSampler(64, 8, group=exchange, method=method, seed=4)
        for _ in range(4 * windows + 4):
            batch = sampler.sample()
            # The same sum of r g of the rank, whatever it drew.
            sampler.update(batch, observe(torch.ones(len(batch.indices)), means[exchange.rank]))
        return sampler._table.variance[4] / sampler._table.variance[0]

    found = in_threads(2, run)
    assert torch.equal(found[0], found[1])
    total = means.double().mean(0)
    # Var (s . G)^2 = 2 (|G|^4 - sum of G_c^4). The squares of the ranks' own add up to half of it.
    square = float(total.square().sum())
    sigma = (2 * (square**2 - float((total**4).sum())) / windows) ** 0.5
    assert abs(float(found[0]) - square) < 5 * sigma < 0.2 * square


def test_the_warm_up_leaves_no_trace_in_the_averages():
    def run(exchange):
        method = EMAIS(warmup_epochs=1)
        sampler = ShardedSampler(64, 8, group=exchange, method=method, seed=4)
        factors = []
        for step in range(40):
            batch = sampler.sample()
            factors.append(float(sampler.lr_factor(rule="linear")))
            # Scores of 1e6 in the warm-up: traces of later ones would show them.
            scores = torch.rand(len(batch.indices)) + 1 + (1e6 if step < 4 else 0)
            sampler.update(batch, observe(scores))
        return sampler, factors

    (sampler, factors), (other, others) = in_threads(2, run)
    assert factors == others
    assert factors[:12] == [1.0] * 12
    assert factors[-1] != 1.0
    assert float(sampler.variance.trace_uniform) < 1e3
    assert torch.equal(sampler._table.variance, other._table.variance)


# Stratified --------------------------------------------------------------------------------------


def test_stratified_draws_a_rank_s_batch_from_its_own(any_backend):
    def run(exchange):
        def none(message):
            raise AssertionError("an exchange")

        sampler = with_scores(exchange, 100, 8, strategy="stratified", max_duplicates=1.5)
        sampler._exchange = exchange._replace(gather=none)
        p = sampler.probabilities()
        counts = torch.zeros(100)
        for _ in range(500):
            batch = sampler.sample()
            assert len(batch.indices) == 8
            r = 1 / (100 * p[batch.indices - sampler.shard.start])
            torch.testing.assert_close(batch.weights.double(), r, rtol=1e-6, atol=0)
            counts += torch.bincount(batch.indices, minlength=100)
        return p, counts

    found = in_threads(3, run)  # shards of 34, 34 and 32
    p = torch.cat([p for p, _ in found])
    assert [float(part.sum()) for part, _ in found] == pytest.approx([1 / 3] * 3)
    assert float(p.max()) * 24 <= 1.5 * (1 + 1e-6)
    expected = p * 500 * 24
    chi2 = float(((sum(c for _, c in found) - expected) ** 2 / expected).sum())
    f = 100 - 3
    sigma = (2 / (9 * f)) ** 0.5  # beyond 5 sigma about once in 3.5 million
    assert ((chi2 / f) ** (1 / 3) - (1 - 2 / (9 * f))) / sigma < 5


def test_stratified_ranks_draw_by_other_numbers():
    def run(exchange):
        sampler = with_scores(exchange, 400, 8, torch.ones(400), strategy="stratified")
        return torch.cat([sampler.sample().indices - sampler.shard.start for _ in range(40)])

    one, other = in_threads(2, run)
    assert int((one == other).sum()) < 20  # 1.6 on average


def test_stratified_traces_come_when_asked_for():
    def run(exchange):
        sampler = with_scores(exchange, 90, 8, strategy="stratified")
        sampler.share_moments()
        for step in range(50):
            batch = sampler.sample()
            sampler.update(batch, observe((batch.indices.float() + 1) ** 2))
            if step == 20:
                before = float(sampler.lr_factor(rule="linear"))
        sampler.share_moments()
        return sampler, before

    runs = in_threads(2, run)
    assert len({before for _, before in runs}) == 1
    assert torch.equal(runs[0][0]._table.variance, runs[1][0]._table.variance)
    assert float(runs[0][0].lr_factor(rule="linear")) != runs[0][1]


# Saving ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", ["global", "stratified"])
@pytest.mark.parametrize("at", [3, 22, 41])
def test_a_rank_s_state_goes_on_bit_for_bit(tmp_path, any_backend, strategy, at):
    method = EMAIS(warmup_epochs=2)

    def steps(sampler, exchange, number):
        sampler._exchange = exchange
        found = []
        for _ in range(number):
            found.append(sampler.sample())
            sampler.update(found[-1], observe((found[-1].indices.float() + 1) ** 2))
            if sampler.step % 9 == 0:
                sampler.share_moments()
        return found

    def run(exchange):
        arguments = {
            "method": method,
            "strategy": strategy,
            "group": exchange,
            "max_duplicates": 0.3,
        }
        sampler = ShardedSampler(100, 8, seed=3, **arguments)
        steps(sampler, exchange, at)
        torch.save(sampler.state_dict(), tmp_path / f"{exchange.rank}.pt")
        expected = steps(sampler, exchange, 20)
        resumed = ShardedSampler(100, 8, **arguments)
        resumed.load_state_dict(torch.load(tmp_path / f"{exchange.rank}.pt", weights_only=True))
        return sampler, expected, resumed, steps(resumed, exchange, 20)

    for sampler, expected, resumed, found in in_threads(2, run):
        for one, other in zip(expected, found, strict=True):
            assert torch.equal(one.indices, other.indices)
            assert torch.equal(one.weights, other.weights)
        assert torch.equal(sampler._table.variance, resumed._table.variance) or torch.equal(
            sampler._table.variance.nan_to_num(), resumed._table.variance.nan_to_num()
        )
        assert torch.equal(sampler.state_dict()["states"], resumed.state_dict()["states"])


# Errors ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"strategy": "local"}, "strategy must be one of 'global', 'stratified', got 'local'"),
        ({"method": "rais"}, "method must be 'emais', 'loss', 'scan' or 'uniform' in shards"),
        ({"flatten": "mix"}, "flatten must be 'cap' with strategy='global', got 'mix'"),
        ({"batch_size": 26}, "batch_size must be at most 25, the size of the smallest shard"),
        ({"num_samples": 3}, "num_samples must be at least 4"),
        ({"max_duplicates": 0.1}, "max_duplicates must be at least"),
        ({"num_samples": 2**34 + 4}, "num_samples must be below 2.32 a rank"),
    ],
)
def test_wrong_arguments(arguments, message):
    four = Ranks(0, 4, lambda m: m[None].expand(4, -1))
    with pytest.raises((ValueError, TypeError), match=message):
        ShardedSampler(**{"num_samples": 100, "batch_size": 8, "group": four, **arguments})


def test_wrong_groups():
    with pytest.raises(ValueError, match=r"group must be a torch.* process group, or None"):
        ShardedSampler(100, 8)


def test_ranks_with_other_arguments():
    def run(exchange):
        with pytest.raises(ValueError, match=r"the same on all ranks, got others on ranks \[1\]"):
            ShardedSampler(100, 8, group=exchange, max_duplicates=2.0 + exchange.rank)

    in_threads(2, run)


def test_the_first_rank_s_seed_is_everybody_s():
    def run(exchange):
        return ShardedSampler(100, 8, group=exchange)._arguments["seed"]

    one, other = in_threads(2, run)
    assert one == other


def test_samples_of_other_ranks_are_refused():
    sampler = ShardedSampler(100, 8, group=Ranks(1, 2, lambda m: m[None].expand(2, -1)))
    before = sampler.state_dict()
    batch = fastis.Batch(torch.tensor([49, 60]), torch.ones(2))
    with pytest.raises(IndexError, match=r"this rank's shard, \[50, 100\), got values from 49 to"):
        sampler.update(batch, observe(torch.ones(2)))
    assert torch.equal(sampler.state_dict()["states"], before["states"])
    with pytest.raises(TypeError, match="can't be pickled"):
        pickle.dumps(sampler)


def test_states_of_another_rank_are_refused():
    samplers = [
        ShardedSampler(100, 8, group=Ranks(rank, 2, lambda m: m[None].expand(2, -1)))
        for rank in (0, 1)
    ]
    state = samplers[0].state_dict()
    with pytest.raises(ValueError, match=r"state_dict must have rank=1, got 0"):
        samplers[1].load_state_dict(state)
    with pytest.raises(ValueError, match=r"theta.* must be an integer in"):
        samplers[0].load_state_dict({**state, "theta": torch.tensor([0, 5])})
    with pytest.raises(ValueError, match=r"moments.* must be a tensor of"):
        samplers[0].load_state_dict({**state, "moments": torch.zeros(3)})
    samplers[0].load_state_dict(state)
