"""One sampler in several processes: draws, tables and traces are those of one process."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import Observation, scores

import fastis
from distributed.processes import errors, run, start
from fastis import exchange
from fastis.methods import EMAIS

N, WHOLE = 240, 16


def score_of(indices: torch.Tensor, step: int) -> torch.Tensor:
    """Of these samples in this step, the same in any minibatch."""
    noise = torch.frac((indices + 1) * (step + 1) * 0.6180339887).float()
    return scores(indices) * (0.8 + 0.4 * noise)


def learn(sampler: fastis.Sampler, batch: fastis.Batch, step: int) -> None:
    score = score_of(batch.indices, step)
    sampler.update(batch, Observation(2 * score, score))


def drawn(sampler: fastis.Sampler, steps: int, step: Callable[..., Any] = learn) -> list[Any]:
    """The loop; its minibatches."""
    batches = []
    for number in range(steps):
        batch = sampler.sample()
        step(sampler, batch, number)
        batches.append(tuple(batch))
    return batches


def in_group(group: Any, steps: int, step: Callable[..., Any], options: dict[str, Any]) -> Any:
    sampler = fastis.Sampler(N, WHOLE // group.size(), group=group, **options)
    batches = drawn(sampler, steps, step)
    return batches, sampler.state_dict(), {name: float(v) for name, v in sampler.stats().items()}


def alone(steps: int, step: Callable[..., Any], options: dict[str, Any]) -> Any:
    sampler = fastis.Sampler(N, WHOLE, **options)
    return drawn(sampler, steps, step), sampler.state_dict(), sampler.stats()


def assert_same_state(found: dict, expected: dict, variance_within: float = 0.0) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        if name == "variance" and variance_within > 0:
            torch.testing.assert_close(
                found[name], value, rtol=variance_within, atol=1e-12, equal_nan=True
            )
        elif isinstance(value, torch.Tensor):
            same = [t.reshape(-1).view(torch.uint8) for t in (found[name], value)]
            assert torch.equal(*same), name
        else:
            assert found[name] == value, name


def assert_as_one(folder, size, steps, options, step=learn, variance_within=0.0):
    """What all processes draw, one after the other, one process draws."""
    expected, state, stats = alone(steps, step, options)
    found = run(folder, size, in_group, steps, step, options)
    for number, whole in enumerate(expected):
        parts = [batches[number] for batches, _, _ in found]
        assert torch.equal(torch.cat([indices for indices, _ in parts]), whole[0]), number
        assert torch.equal(torch.cat([weights for _, weights in parts]), whole[1]), number
    for _, theirs, their_stats in found:
        assert_same_state(theirs, found[0][1])
        assert_same_state(theirs, state, variance_within)
        assert str(their_stats) == str(found[0][2]), "the learning rate's factor among them"
    return found, stats


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("scheme", ["multinomial", "systematic"])
def test_processes_draw_what_one_draws(tmp_path, size, scheme):
    _, stats = assert_as_one(tmp_path, size, 80, {"seed": 3, "scheme": scheme})
    assert stats["phase"] == 1
    assert stats["efficiency"] < 0.5, "importance sampling, in effect"


def test_on_the_reference_backend_too(tmp_path):
    with fastis.backend("reference"):
        assert_as_one(tmp_path, 2, 50, {"seed": 3})


@pytest.mark.parametrize("method", ["emais", "loss"])
def test_minibatches_of_one_sample_each(tmp_path, method):
    """Odd numbers of scores, which leave room at the end of a message."""

    def draws(group):
        sampler = fastis.Sampler(N, 2 if group is None else 1, group=group, method=method, seed=2)
        return drawn(sampler, 300, with_losses), sampler.state_dict()

    (first, state), (second, _) = run(tmp_path, 2, draws)
    expected, expected_state = draws(None)
    for one, other, whole in zip(first, second, expected, strict=True):
        assert torch.equal(torch.cat([one[0], other[0]]), whole[0])
    assert_same_state(state, expected_state)


# Ways to update ----------------------------------------------------------------------------------


def in_parts(sampler, batch, step):
    score = score_of(batch.indices, step)
    parts = [Observation(2 * part, part) for part in score.chunk(2)]
    sampler.update(batch, parts)


def by_scores(sampler, batch, step):
    sampler.update(batch, score_of(batch.indices, step))


def with_non_finite_scores(sampler, batch, step):
    score = score_of(batch.indices, step)
    sampler.update(batch, torch.where(batch.indices % 7 == step % 7, torch.nan, score))


def while_samples_come_and_go(sampler, batch, step):
    """Also some of the minibatch that is being learnt from."""
    if step % 3 == 0:
        sampler.exclude(torch.arange(step, step + 40))
    if step % 5 == 4:
        sampler.reset(torch.arange(step, N, 4))
    learn(sampler, batch, step)
    if step % 7 == 6:
        sampler.reset(torch.arange(step))


def with_correction(sampler, batch, step):
    sampler.correction = 0.5 + step / 200
    learn(sampler, batch, step)


def uniform_for_a_while(sampler, batch, step):
    sampler.uniform = 40 <= step < 60
    learn(sampler, batch, step)


def read_at_once(sampler, batch, step):
    """What is under way is waited for by whatever depends on it."""
    learn(sampler, batch, step)
    assert sampler.step == step + 1
    if step % 20 == 0:
        sampler.state_dict()


def with_new_tensors(sampler, batch, step):
    """A plain Batch: indices and weights have to go round."""
    learn(sampler, fastis.Batch(*(tensor.clone() for tensor in batch)), step)


def written_to(sampler, batch, step):
    batch.weights.clamp_(max=1.5)
    learn(sampler, batch, step)


def moved(sampler, batch, step):
    there = batch.to("cpu", non_blocking=True)
    assert there.is_as_drawn if sampler._processes > 1 else True
    learn(sampler, there, step)


STEPS = [
    *(in_parts, by_scores, with_non_finite_scores, with_correction, uniform_for_a_while),
    *(read_at_once, with_new_tensors, written_to, moved, while_samples_come_and_go),
]


@pytest.mark.parametrize("step", STEPS, ids=lambda step: step.__name__)
def test_ways_to_update(tmp_path, step):
    found, _ = assert_as_one(tmp_path, 2, 80, {"seed": 5}, step)
    if step is with_non_finite_scores:
        assert found[0][2]["skipped"] > 50


def ahead(sampler, steps, count=3):
    batches = [sampler.sample() for _ in range(count)]
    for step in range(steps):
        batches.append(sampler.sample())
        learn(sampler, batches[step], step)
    return [tuple(batch) for batch in batches]


def drawn_by_update_and_sample(sampler, steps):
    batches = [sampler.sample()]
    for step in range(steps):
        score = score_of(batches[-1].indices, step)
        batches.append(sampler.update_and_sample(batches[-1], score))
    return [tuple(batch) for batch in batches]


@pytest.mark.parametrize("loop", [ahead, drawn_by_update_and_sample])
def test_ways_to_draw(tmp_path, loop):
    def draws(group):
        return loop(fastis.Sampler(N, WHOLE // 2, group=group, seed=4), 60)

    parts = run(tmp_path, 2, draws)
    expected = loop(fastis.Sampler(N, WHOLE, seed=4), 60)
    assert len(expected) > 60
    for one, *several in zip(expected, *parts, strict=True):
        for tensor, *their in zip(one, *several, strict=True):
            assert torch.equal(torch.cat(their), tensor)


def test_a_minibatch_of_mixed_pairs(tmp_path):
    """Each process mixes its own part: one process with that permutation of the whole."""
    half = WHOLE // 2

    def step(sampler, batch, number):
        generator = torch.Generator().manual_seed(number)
        local = torch.randperm(half, generator=generator)
        parts = len(batch.indices) // half
        learn(sampler, batch.mix(torch.cat([local + half * i for i in range(parts)])), number)

    assert_as_one(tmp_path, 2, 60, {"seed": 6}, step)


def test_minibatches_that_were_not_drawn(tmp_path):
    """An evaluation sweep, of which each process has another number of samples, one none."""
    ones = torch.ones(N)
    limits = [0, 100, 100, 239, 240]

    def sweep(sampler, begin, end):
        indices = torch.arange(N)[begin:end]
        score = score_of(indices, 0)
        grad = (score.sum() / max(1, end - begin)).expand(3) * torch.tensor([1.0, 2.0, -3.0])
        sampler.update(fastis.Batch(indices, ones[begin:end]), Observation(score, score, grad))
        sampler.update(fastis.Batch(indices[:0], ones[:0]), score[:0])  # none has any: no iteration
        return sampler.state_dict()

    def swept(group):
        rank = group.rank()
        sampler = fastis.Sampler(N, 4, group=group, seed=1)
        return sweep(sampler, limits[rank], limits[rank + 1])

    expected = sweep(fastis.Sampler(N, 16, seed=1), 0, N)
    for found in run(tmp_path, 4, swept):
        assert_same_state(found, expected, variance_within=1e-6)
    assert expected["scalars"][[1, 5]].tolist() == [1, N], "one update, all seen"


# The mean gradient -------------------------------------------------------------------------------


def with_mean_grad(classes):
    def step(sampler, batch, number):
        score = score_of(batch.indices, number)
        directions = torch.sin(torch.outer(batch.indices + 1.0, torch.arange(1.0, classes + 1)))
        directions[:, 0] += 1
        grads = directions * (score / directions.norm(dim=1))[:, None]
        mean = (batch.weights[:, None] * grads).mean(0)
        sampler.update(batch, Observation(score, score, mean))

    return step


@pytest.mark.parametrize("size", [1, 2, 4])
def test_the_mean_gradient_is_that_of_the_global_minibatch(tmp_path, size):
    """Up to 16 numbers: what is left is the rounding of its mean."""
    within = 0.0 if size == 1 else 1e-5
    assert_as_one(tmp_path, size, 60, {"seed": 3}, with_mean_grad(10), within)


def test_a_long_mean_gradient_goes_round_as_a_sketch(tmp_path):
    """|G|^2 has the same expectation: near to one process's after averaging."""
    steps, options = 300, {"seed": 3, "method": EMAIS(smoothing=0.995)}
    _, state, _ = alone(steps, with_mean_grad(40), options)
    found = run(tmp_path, 2, in_group, steps, with_mean_grad(40), options)
    for _, theirs, _ in found:
        assert_same_state(theirs, found[0][1])
    one, several = (s["variance"][4] / s["variance"][0] for s in (state, found[0][1]))
    # Of 300 sketches: sqrt(2 / 16 / 200) relative, times 4.
    assert abs(several / one - 1) < 4 * (2 / 16 / 200) ** 0.5


def test_sketches_keep_the_squared_norm():
    generator = torch.Generator().manual_seed(0)
    short = torch.randn(16, generator=generator)
    assert torch.equal(exchange.sketch(short, torch.tensor(5)), short)
    assert torch.equal(exchange.sketch(short[:3], torch.tensor(5)), short[:3])
    for length in (17, 100, 4096):
        grads = torch.randn(length, generator=generator), torch.ones(length)
        for grad in grads:
            ratios = (
                torch.stack(
                    [exchange.sketch(grad, torch.tensor(t)).square().sum() for t in range(2000)]
                )
                / grad.square().sum()
            )
            deviation = ratios.std()
            assert deviation <= 1.1 * (2 / 16) ** 0.5
            assert abs(ratios.mean() - 1) < 4 * deviation / 2000**0.5
    signs = exchange.random_signs(1000, torch.tensor(3))
    assert signs.abs().eq(1).all()
    assert abs(signs.mean()) < 0.15
    assert not torch.equal(signs, exchange.random_signs(1000, torch.tensor(4)))


def test_traces_that_are_kept_are_those_of_the_last_update(tmp_path):
    """``sampler.variance``, held for long, waits for what is under way."""

    def read(group):
        sampler = fastis.Sampler(N, WHOLE // 2, group=group, seed=0)
        variance, found = sampler.variance, []
        for step in range(40):
            learn(sampler, sampler.sample(), step)
            found.append(float(variance.trace_is))
        return found

    one = fastis.Sampler(N, WHOLE, seed=0)
    expected = []
    for step in range(40):
        learn(one, one.sample(), step)
        expected.append(float(one.variance.trace_is))
    assert run(tmp_path, 2, read) == [expected] * 2


# Methods -----------------------------------------------------------------------------------------


def with_losses(sampler, batch, step):
    score = score_of(batch.indices, step)
    sampler.update(batch, Observation(torch.frac(3 * score), score))


def with_losses_of_its_own(sampler, batch, step):
    with_losses(sampler, fastis.Batch(*(tensor.clone() for tensor in batch)), step)


METHODS = sorted(set(fastis.methods.BY_NAME) - {"presampling"})


@pytest.mark.parametrize("name", METHODS)
def test_methods(tmp_path, name):
    assert_as_one(tmp_path, 2, 70, {"seed": 2, "method": name}, with_losses)


def test_losses_of_minibatches_that_were_not_drawn(tmp_path):
    assert_as_one(tmp_path, 2, 50, {"seed": 2, "method": "loss"}, with_losses_of_its_own)


SCORING = [
    fastis.methods.Presampling(score_fn=float),
    EMAIS(score_fn=float, refresh_every=5),
    fastis.methods.OnlineBatch(score_fn=float),
]


@pytest.mark.parametrize("method", SCORING, ids=lambda method: method.name)
def test_methods_that_score_by_themselves_are_refused(tmp_path, method):
    found = errors(start(tmp_path, 2, lambda g: fastis.Sampler(N, 8, group=g, method=method)))
    for name, message in found:
        assert name == "ValueError"
        assert "method must have no score_fn in a group" in message
