"""Every method: an example worked by hand."""

from __future__ import annotations

import math

import pytest
import torch
from conftest import Observation, batch_of, losses_of, observe, scores, train

import fastis
from fastis import methods

QUANTISED = 2.0**-15  # relative: a weight is rounded to 16 bits, and so is the mean


def probabilities(sampler):
    assert float(sampler.probabilities().sum()) == pytest.approx(1, abs=1e-12)
    return sampler.probabilities().tolist()


def normalised(*weights):
    return pytest.approx([w / sum(weights) for w in weights], rel=QUANTISED)


def test_loss_is_emais_on_the_loss():
    sampler = fastis.Sampler(4, 2, method=methods.Loss(warmup_epochs=0), max_duplicates=2)
    sweep_out = Observation(torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor([4.0, 3.0, 2.0, 1.0]))
    sampler.update(batch_of(0, 1, 2, 3), sweep_out)
    assert probabilities(sampler) == normalised(1, 2, 3, 4)


def test_emais_with_additional_updates():
    """Kutsuna 2025, sec. 9.8: all other samples are observed in the iteration of the minibatch."""
    calls = []

    def score_fn(indices):
        calls.append(indices)
        assert not torch.is_grad_enabled()
        return observe(scores(indices))

    method = methods.EMAIS.published(refresh_every=3, score_fn=score_fn, warmup_epochs=0)
    sampler = fastis.Sampler(50, 4, method=method)
    for step in range(3):
        assert not calls
        sampler.update(batch_of(0, 1, 2, 3), losses_of(8.0, 8.0, 8.0, 8.0 + step))
    assert torch.equal(torch.cat(calls), torch.arange(50))
    assert (sampler.last_seen == 2).all()
    expected = scores(torch.arange(50))
    assert torch.equal(sampler.mean[4:], expected[4:])  # their first observation
    alpha, mean, var = 1.0, 8.0, 0.0
    for t, x in ((1, 9.0), (2, 10.0)):
        alpha = math.exp(-1 / t)
        mean, var = mean + (1 - alpha) * (x - mean), alpha * (var + (1 - alpha) * (x - mean) ** 2)
    assert float(sampler.mean[3]) == pytest.approx(mean)  # what the minibatch said, not score_fn
    assert float(sampler.var[3]) == pytest.approx(var)
    weights = [8.0, 8.0, 8.0, math.hypot(mean, math.sqrt(var)), *expected[4:].tolist()]
    assert sampler.importance.tolist() == pytest.approx(weights, rel=QUANTISED)


def test_confidence_by_hand():
    sampler = fastis.Sampler(4, 2, method=methods.Confidence(warmup_epochs=0))
    for p in (0.9, 0.7):  # of sample 0; sample 1 has 0.5 twice
        sampler.update(batch_of(0, 1), losses_of(-math.log(p), -math.log(0.5)))
    # a = 0.2, 0.5; the others have their mean, 0.35, which is also the mean of all.
    assert probabilities(sampler) == normalised(0.55, 0.85, 0.70, 0.70)


def test_confvar_by_hand():
    sampler = fastis.Sampler(4, 2, method=methods.ConfVar(warmup_epochs=0))
    sampler.update(batch_of(0, 1), losses_of(-math.log(0.9), -math.log(0.5)))
    assert probabilities(sampler) == [0.25] * 4  # one visit has no variance
    sampler.update(batch_of(0, 1), losses_of(-math.log(0.5), -math.log(0.5)))
    a = math.sqrt(0.08 + 0.08**2)  # v = 0.08 of (0.9, 0.5), n = 2
    unseen = mean = a / 2
    assert probabilities(sampler) == normalised(a + mean, mean, unseen + mean, unseen + mean)


def test_self_paced_by_hand():
    sampler = fastis.Sampler(10, 5, method="self_paced", seed=1)
    loss = torch.arange(1.0, 11.0)
    selected = []
    for _ in range(5):
        counted = set()
        for _ in range(2):
            batch = sampler.sample()
            v = batch.weights > 0
            counted |= set(loss[batch.indices[v]].tolist())
            mean = float((batch.weights * loss[batch.indices]).mean())
            by_hand = float(loss[batch.indices[v]].sum()) / max(1, int(v.sum()))
            assert mean == pytest.approx(by_hand)
            sampler.update(batch, observe(loss[batch.indices]))
        selected.append(len(counted))
    # lambda: none, just above 6, 7.8, 10.1 and so no more selection.
    assert selected == [10, 6, 7, 10, 10]


def test_self_paced_by_the_last_known_loss():
    sampler = fastis.Sampler(4, 2, method=methods.SelfPaced(quantile=0.5), seed=1)
    for _ in range(2):
        batch = sampler.sample()
        sampler.update(batch, observe(torch.tensor([1.0, 5.0, 2.0, 6.0])[batch.indices]))
    batch = sampler.sample()
    assert torch.equal(batch.weights > 0, (batch.indices == 0) | (batch.indices == 2))


@pytest.mark.parametrize("least", [0.0, -2.0])
def test_self_paced_thresholds_grow_from_zero_and_below(least):
    sampler = fastis.Sampler(10, 5, method="self_paced", seed=1)
    loss = torch.tensor([least] * 7 + [1.0, 2.0, 3.0])
    selected = []
    for _ in range(5):
        counted = 0
        for _ in range(2):
            batch = sampler.sample()
            counted += int((batch.weights > 0).sum())
            sampler.update(batch, observe(loss[batch.indices]))
        selected.append(counted)
    # lambda: none, just above the least, just above 1, 1.3, 1.69.
    assert selected == [10, 7, 8, 8, 8]


def test_online_batch_by_hand():
    sampler = fastis.Sampler(4, 2, method=methods.OnlineBatch(), max_duplicates=2)
    assert probabilities(sampler) == [0.25] * 4
    loss = torch.tensor([1.0, 4.0, 2.0, 3.0])
    for _ in range(2):
        batch = sampler.sample()
        sampler.update(batch, observe(loss[batch.indices]))
    by_rank = [math.exp(-math.log(100) * rank / 4) for rank in (4, 1, 3, 2)]
    assert probabilities(sampler) == normalised(*by_rank)
    before = sampler.probabilities()
    sampler.update(batch_of(0, 1), losses_of(9.0, 0.1))  # counts from the end of the epoch on
    assert torch.equal(sampler.probabilities(), before)
    sampler.update(batch_of(0, 1), losses_of(9.0, 0.1))
    by_rank = [math.exp(-math.log(100) * rank / 4) for rank in (1, 4, 3, 2)]
    assert probabilities(sampler) == normalised(*by_rank)


def test_online_batch_pressure_falls_and_losses_are_recomputed():
    calls = []

    def score_fn(indices):
        calls.append(sampler.step)
        return scores(indices)

    method = methods.OnlineBatch(total_epochs=5, score_fn=score_fn)
    assert [method.pressure_in(e) for e in (1, 3, 5, 7)] == pytest.approx([100, 10, 1, 1])
    sampler = fastis.Sampler(40, 10, method=method)
    train(sampler, 20)
    assert calls == [3, 11, 19]  # before the updates that end epochs 1, 3 and 5 of four steps
    assert probabilities(sampler) == pytest.approx([1 / 40] * 40, rel=QUANTISED)


def test_distributed_by_hand(any_backend):
    method = methods.Distributed(constant=0.1, min_usable=0.5)
    sampler = fastis.Sampler(5, 1, method=method, max_duplicates=1)
    sampler.update(batch_of(0, 1), losses_of(1.0, 3.0))
    assert sampler.phase == "uniform"  # two of five are not half of them
    assert probabilities(sampler) == [0.2] * 5
    assert sampler.sample().weights.tolist() == [1.0]
    sampler.fold(torch.tensor([2, 4, 3]), torch.tensor([6.0, 10.0, math.nan]), 1)
    assert sampler.phase == "importance"
    weights = [1 + 0.2, 3 + 0.2, 6 + 0.2, 10 + 0.2]  # c a tenth of the mean score, which was 2
    mean = sum(weights) / 4
    assert probabilities(sampler) == normalised(*weights[:3], mean, weights[3])
    sampler.fold(torch.tensor([3]), torch.tensor([0.0]), 1)
    c = 0.1 * mean / 1.1  # the mean of the scores from that of the weights, which have c in them
    assert probabilities(sampler) == normalised(*weights[:3], c, weights[3])


def test_distributed_forgets_stale_scores(any_backend):
    method = methods.Distributed(constant=0.0, max_age=8, min_usable=0.0)  # looked for every step
    sampler = fastis.Sampler(4, 1, method=method, max_duplicates=1)
    sampler.update(batch_of(0, 1, 2), losses_of(2.0, 4.0, 6.0))
    for _ in range(7):
        sampler.update(batch_of(2), losses_of(6.0))
    assert sampler.last_seen.tolist() == [0, 0, 7, -1]
    assert probabilities(sampler) == normalised(2, 4, 6, 4)
    sampler.update(batch_of(2), losses_of(5.0))  # the next would be the ninth after the first
    assert sampler.last_seen.tolist() == [-1, -1, 8, -1]
    assert sampler.stats()["share_unseen"] == 0.75
    assert probabilities(sampler) == [0.25] * 4  # the mean of the seen
    sampler.fold(torch.tensor([0, 1]), torch.tensor([1.0, 1.0]), 9)
    assert probabilities(sampler) == normalised(1, 1, 5, 7 / 3)


def test_distributed_forgets_everything_and_starts_again(any_backend):
    sampler = fastis.Sampler(4, 2, method=methods.Distributed(constant=0.0, max_age=1))
    sampler.update(batch_of(0, 1), losses_of(1e20**0.5, 1.0))
    for _ in range(3):
        sampler.update(batch_of(3), losses_of(math.nan))
    assert sampler.importance.tolist() == [1] * 4
    assert sampler.phase == "uniform"
    again = fastis.Sampler(4, 2, method=sampler.method)
    again.load_state_dict(sampler.state_dict())
    again.update(batch_of(0, 1), losses_of(1.0, 3.0))
    assert probabilities(again) == normalised(1, 3, 2, 2)


def test_prioritized_by_hand():
    method = methods.Prioritized(total_steps=10)
    sampler = fastis.Sampler(3, 2, method=method, max_duplicates=2)
    assert probabilities(sampler) == pytest.approx([1 / 3] * 3)
    sampler.update(batch_of(0, 1), losses_of(1.0, 4.0))
    assert probabilities(sampler) == normalised(1, 4**0.6, 4**0.6)  # unseen: the largest so far
    sampler.update(batch_of(0, 1), losses_of(1.0, 2.0))
    assert probabilities(sampler) == normalised(1, 2**0.6, 4**0.6)
    p = sampler.probabilities()
    for draw in range(12):
        batch = sampler.sample()
        beta = 0.4 + 0.6 * min(1, draw / 10)
        by_hand = (1 / (3 * p[batch.indices])) ** beta
        torch.testing.assert_close(batch.weights, (by_hand / by_hand.max()).float())


def test_presampling_by_hand():
    n, b = 1000, 8
    seen = []

    def score_fn(indices):
        seen.append(indices)
        return scores(indices)

    sampler = fastis.Sampler(n, b, method=methods.Presampling(score_fn), seed=3)
    tau = 0.0
    peaked = torch.tensor([50.0, *[0.01] * 7])
    while tau <= 2:  # (M + 3 b) / (3 b) with M = 3 b
        batch = sampler.sample()
        assert (batch.weights == 1).all()
        assert not seen
        sampler.update(batch, observe(peaked))
        q = peaked.double() / peaked.double().sum()
        tau = 0.9 * tau + 0.1 * float((8 * q.square().sum()).sqrt())
        assert float(sampler.state_dict()["memory.tau"]) == pytest.approx(tau)
    with pytest.raises(ValueError, match="not known before its candidates are scored"):
        sampler.probabilities()
    batch = sampler.sample()
    (candidates,) = seen
    assert candidates.shape == (24,)
    assert set(batch.indices.tolist()) <= set(candidates.tolist())
    q = dict(zip(candidates.tolist(), (s := scores(candidates).double()) / s.sum(), strict=True))
    by_hand = [1 / (24 * float(q[i])) for i in batch.indices.tolist()]
    assert batch.weights.tolist() == pytest.approx(by_hand, rel=1e-5)
    tau = 0.9 * tau + 0.1 * float((24 * (s / s.sum()).square().sum()).sqrt())
    assert float(sampler.state_dict()["memory.tau"]) == pytest.approx(tau)
    sampler.update(batch, observe(scores(batch.indices)))  # not from these: they are not uniform
    assert float(sampler.state_dict()["memory.tau"]) == pytest.approx(tau)


def test_presampling_chooses_the_column_and_floors_zeros():
    out = Observation(torch.tensor([1.0, 2.0]), torch.tensor([3.0, 4.0]))
    for name, column in (("upper_bound", out.score), ("loss", out.losses)):
        assert methods.Presampling(scores, score=name).observed(out) is column
    sampler = fastis.Sampler(
        100, 4, method=methods.Presampling(lambda i: torch.zeros(len(i)), tau_threshold=0.0)
    )
    sampler.sample()
    sampler.update(sampler.sample(), losses_of(1.0, 0.0, 0.0, 0.0))
    assert sampler.sample().weights.tolist() == pytest.approx([1.0] * 4, rel=1e-6)  # all 0: q = 1/M


def test_presampling_warns_when_it_can_never_switch_on():
    with pytest.warns(UserWarning, match="tau is at most sqrt"):
        fastis.Sampler(100, 4, method=methods.Presampling(scores))


def test_rais_features_gain_and_effective_iterations_by_hand():
    sampler = fastis.Sampler(4, 2, method=methods.RAIS(warmup_epochs=0, refit_epochs=100))
    sampler.update(batch_of(0, 1), losses_of(1.0, 2.0))
    sampler.update(batch_of(0, 2), losses_of(3.0, 1.0))
    history = sampler.state_dict()["memory.history"]
    expected = [[9.0, 5.0, 1.8], [4.0, 4.0, 4.0], [1.0, 1.0, 1.0], [0.0, 0.0, 0.0]]
    torch.testing.assert_close(history, torch.tensor(expected))
    buffer = sampler.state_dict()["memory.buffer"][0]  # sample 0 at its second visit
    torch.testing.assert_close(buffer, torch.tensor([1.0, 1.0, 1.0, 2.5, 9.0, 1.0]))
    # Until the first fit by the slowest average; unseen samples have the mean weight.
    weights = [math.sqrt(1.8), 2.0, 1.0]
    assert probabilities(sampler) == normalised(*weights, sum(weights) / 3)
    assert float(sampler.lr_factor()) == 1

    r, x = torch.tensor([0.5, 2.0]), torch.tensor([3.0, 1.0])
    mean_grad = torch.tensor([0.3, 0.4])
    batch = fastis.Batch(torch.tensor([0, 1]), r)
    sampler.update(batch, Observation(x, x, mean_grad))
    extra = ((0.5 - 0.25) * 9 + (2 - 4) * 1) / 2 / 2
    before = (1 + 4) / 4, (9 + 1) / 4  # without mean_grad: E[r^2 x^2] / B
    share = 0.99
    smoothed = share**2 * before[0] + share * before[1] + 0.25
    gain = 1 + extra / smoothed
    assert float(sampler.lr_factor()) == pytest.approx(gain)
    assert float(sampler.lr_factor("adam")) == pytest.approx(math.sqrt(gain))
    assert float(sampler.effective_iterations) == pytest.approx(2 + gain)
