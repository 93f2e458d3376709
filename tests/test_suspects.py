"""Which samples are most likely mislabelled: a ranking of what the table has learnt."""

from __future__ import annotations

import pytest
import torch
from conftest import batch_of, drive, losses_of, observe, sweep
from test_monitor import method_named

import fastis
from fastis import methods
from fastis.methods import EMAIS, Distributed, Loss

N, B = 40, 4


def seen_in_part(**options):
    """Ten of forty samples have been seen, of scores that rise with the index but for a tie."""
    sampler = fastis.Sampler(N, B, method=EMAIS(warmup_epochs=0, **options))
    indices = torch.arange(10, 20)
    score = torch.arange(1.0, 11.0)
    score[4] = score[5]
    sampler.refresh(indices, score)
    return sampler


def test_the_largest_mean_comes_first_and_the_unseen_never(any_backend):
    found = fastis.suspects(seen_in_part())
    assert found.dtype == torch.int64
    assert found.tolist() == [19, 18, 17, 16, 14, 15, 13, 12, 11, 10], "ties: by the index"


def test_as_many_as_asked_for_and_seen():
    sampler = seen_in_part()
    assert fastis.suspects(sampler, 3).tolist() == [19, 18, 17]
    assert fastis.suspects(sampler, count=N).tolist() == fastis.suspects(sampler).tolist()


def test_it_is_the_mean_that_counts():
    """Not the importance, in which a floor makes many alike, and a variance may count for more."""
    sampler = seen_in_part(floor=1.0)
    assert len(sampler.importance[10:14].unique()) == 1
    assert fastis.suspects(sampler).tolist()[-4:] == [13, 12, 11, 10]
    restless = fastis.Sampler(2, 1, method=EMAIS(warmup_epochs=0, tau=2.0, floor=1e-3))
    for score in (1.0, 3.0, 0.1):  # of sample 0; sample 1 stays at 1.3
        restless.update(batch_of(0, 1), losses_of(score, 1.3))
    assert restless.importance.argmax() == 0
    assert fastis.suspects(restless).tolist() == [1, 0]


def test_equals_what_its_docstring_says():
    sampler = fastis.Sampler(400, 20, seed=1)
    drive(sampler, 11)  # some are unseen yet
    seen = (sampler.last_seen >= 0).nonzero().flatten()
    assert 0 < len(seen) < 400
    expected = seen[sampler.mean[seen].argsort(descending=True, stable=True)]
    assert torch.equal(fastis.suspects(sampler), expected)
    assert torch.equal(fastis.suspects(sampler, 7), expected[:7])


def test_looking_changes_nothing():
    samplers = [fastis.Sampler(400, 20, seed=1) for _ in range(2)]
    for sampler in samplers:
        drive(sampler, 60)
    fastis.suspects(samplers[0])
    drawn = [drive(sampler, 10) for sampler in samplers]
    for one, other in zip(*drawn, strict=True):
        assert torch.equal(one.indices, other.indices)


@pytest.mark.parametrize("method", [Loss(), Distributed()])
def test_the_other_methods_that_keep_scores(method):
    sampler = fastis.Sampler(N, B, method=method)
    sweep(sampler, torch.arange(N).float())
    assert fastis.suspects(sampler).tolist() == list(range(N))[::-1]


def test_finds_the_labels_that_were_made_wrong():
    """Two clouds of points, and a linear network that cannot fit what was flipped."""
    generator = torch.Generator().manual_seed(0)
    y = torch.randint(2, (1000,), generator=generator)
    x = torch.randn(1000, 5, generator=generator) + 4 * y[:, None]
    wrong = torch.randperm(1000, generator=generator)[:100]
    y[wrong] = 1 - y[wrong]
    model = torch.nn.Linear(5, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    sampler = fastis.Sampler(1000, 50, seed=0)
    for _ in range(300):
        batch = sampler.sample()
        out = fastis.cross_entropy(model(x[batch.indices]), y[batch.indices], batch.weights)
        sampler.update(batch, out)
        optimizer.zero_grad()
        out.backward()
        optimizer.step()
    found = set(fastis.suspects(sampler, 100).tolist())
    assert len(found & set(wrong.tolist())) >= 98


def test_a_score_that_is_no_number_accuses_nobody():
    sampler = seen_in_part()
    sampler.update(batch_of(25, 12), observe(torch.tensor([float("nan"), float("inf")])))
    assert fastis.suspects(sampler).tolist() == fastis.suspects(seen_in_part()).tolist()


@pytest.mark.parametrize("name", sorted(methods.BY_NAME))
def test_methods_that_keep_no_scores_say_so(name):
    sampler = fastis.Sampler(N, B, method=method_named(name), seed=1)
    drive(sampler, 30)
    if name in ("emais", "loss", "distributed"):
        assert len(fastis.suspects(sampler)) == int((sampler.last_seen >= 0).sum())
        return
    with pytest.raises(ValueError, match=rf"sampler must have a method that keeps .*got '{name}'"):
        fastis.suspects(sampler)


@pytest.mark.parametrize(
    ("sampler", "count", "error", "message"),
    [
        ({}, None, TypeError, "sampler must be a fastis.Sampler, got dict"),
        (fastis.Sampler(N, B), None, ValueError, "sampler must have seen samples, got one without"),
        (seen_in_part(), 0, ValueError, r"count must be in \[1, 40\], got 0"),
        (seen_in_part(), 41, ValueError, r"count must be in \[1, 40\], got 41"),
        (seen_in_part(), 3.0, TypeError, "count must be an int, got float 3.0"),
        (seen_in_part(), True, TypeError, "count must be an int, got bool True"),
    ],
)
def test_what_cannot_be_ranked(sampler, count, error, message):
    with pytest.raises(error, match=message):
        fastis.suspects(sampler, count)
