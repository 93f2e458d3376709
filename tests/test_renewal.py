"""Sampler.reset and .exclude: what is drawn, learnt, saved and refused; test_renewal_calls.py has
calls in any order."""

from __future__ import annotations

import math

import pytest
import torch
from conftest import batch_of, drive, losses_of, observe, sweep
from no_host_reads import META, no_host_reads, on_meta
from test_device import SCRAMBLED, Emulator
from test_renewal_calls import BACKENDS, SCHEMES, assert_same, on

import fastis
from fastis import methods, steer
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
from fastis.methods import EMAIS, Distributed, prioritized

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
    assert sampler.mean[SOME].tolist() == [0] * 20
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
        ([1, 2.0], TypeError, "indices must be an int"),
        (3, TypeError, "indices must be a tensor, got int"),
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


def test_indices_may_be_a_list():
    sampler = fastis.Sampler(6, 2, seed=0)
    sampler.exclude([0, 2, 2])
    sampler.exclude(range(3, 5))
    assert sampler.last_seen.tolist() == [-2, -1, -2, -2, -2, -1]
    sampler.reset((4,))
    assert sampler.last_seen.tolist() == [-2, -1, -2, -2, -1, -1]
    for wrong, error in (
        ([1.5], TypeError),
        ([6], IndexError),
        ([1, -1], IndexError),
        ("1", TypeError),
    ):
        with pytest.raises(error, match="indices"):
            sampler.exclude(wrong)
    assert sampler.last_seen.tolist() == [-2, -1, -2, -2, -1, -1]
