"""``fastis.DataLoader.state_dict``: a resumed run gets what the saved one would have got."""

from __future__ import annotations

import io
import warnings

import pytest
import torch
from test_data import (
    PER_PASS,
    B,
    Indices,
    N,
    WithWorker,
    assert_same,
    drawn_ahead,
    learn,
    make,
    run,
)

import fastis
from fastis.methods import EMAIS

TOTAL = 3 * PER_PASS


def through_a_file(state):
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def saved_after(loader: fastis.DataLoader, steps: int) -> dict:
    """In the body of the loop, as a checkpoint is."""
    done = 0
    while True:
        for batch, _ in loader:
            learn(loader, batch)
            done += 1
            if done == steps:
                return through_a_file(loader.state_dict())


@pytest.mark.parametrize(
    ("workers", "others"), [(0, [0, 1]), (1, [0, 3]), (2, [0, 1, 2])], ids=["0", "1", "2"]
)
@pytest.mark.parametrize("steps", [1, PER_PASS, 2 * PER_PASS + 7])
@pytest.mark.filterwarnings("ignore:This DataLoader will create 3 worker")
def test_a_resumed_run_goes_on_bit_for_bit(workers, others, steps):
    """From the middle of a pass, and from its end, with any number of workers."""
    state = saved_after(make(num_workers=workers), steps)
    expected = drawn_ahead(2 * workers, TOTAL)[steps:]
    for other in others:
        loader = make(seed=9, num_workers=other, persistent_workers=other > 1)
        loader.load_state_dict(state)
        assert loader.ahead == 2 * workers, "which decides what a draw knows"
        assert_same(run(loader, TOTAL - steps), expected)


def test_before_the_first_minibatch_and_between_passes():
    for steps in (0, PER_PASS, 2 * PER_PASS):
        loader = make(num_workers=1)
        run(loader, steps)
        state = through_a_file(loader.state_dict())
        other = make(seed=9)
        other.load_state_dict(state)
        assert_same(run(other, 30), run(loader, 30))


def passes(loader: fastis.DataLoader, count: int) -> list[int]:
    return [sum(1 for batch, _ in loader if learn(loader, batch) is None) for _ in range(count)]


@pytest.mark.parametrize(("steps", "rest"), [(1, 19), (7, 13), (20, 0), (27, 13)])
def test_the_next_pass_is_the_rest_of_the_one_that_was_saved(steps, rest):
    loader = make()
    loader.load_state_dict(saved_after(make(), steps))
    state = loader.state_dict()
    assert len(loader) == PER_PASS
    assert passes(loader, 3) == [rest, PER_PASS, PER_PASS]
    loader.load_state_dict(state)
    assert passes(loader, 2) == [rest, PER_PASS], "a state loaded and saved again is the same"


def test_after_a_break_the_next_pass_is_whole_in_the_resumed_run_too():
    loader = make(num_workers=1)
    for number, (batch, _) in enumerate(loader, 1):
        learn(loader, batch)
        if number == 7:
            break
    other = make()
    other.load_state_dict(loader.state_dict())
    assert passes(other, 1) == passes(loader, 1) == [PER_PASS]
    assert_same(run(other, 10), run(loader, 10))


def test_resumed_twice():
    first = saved_after(make(num_workers=2), 9)
    loader = make(num_workers=1)
    loader.load_state_dict(first)
    second = saved_after(loader, 20)
    loader = make()
    loader.load_state_dict(second)
    assert_same(run(loader, 25), drawn_ahead(4, 54)[29:])


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_a_pass_that_has_handed_out_nothing_begins_anew_from_the_state(workers):
    """Trainers may call ``iter`` before they load."""
    state = saved_after(make(num_workers=workers), 7)
    expected = drawn_ahead(2 * workers, PER_PASS)[7:]
    loader = make(seed=9, num_workers=workers, persistent_workers=workers == 2)
    passing = iter(loader)
    loader.load_state_dict(state)
    found = []
    for batch, _ in passing:
        learn(loader, batch)
        found.append(batch)
    assert len(found) == PER_PASS - 7
    assert_same(found, expected)
    assert passes(loader, 1) == [PER_PASS]


def test_a_state_is_of_its_moment():
    loader = make(num_workers=1)
    run(loader, 7)
    state = loader.state_dict()
    copy = through_a_file(state)
    expected = run(loader, 25)
    for one in (state, copy):
        other = make()
        other.load_state_dict(one)
        assert_same(run(other, 25), expected)


def test_loading_ends_the_pass_under_way():
    loader = make()
    state = loader.state_dict()
    passing = iter(loader)
    first = [next(passing)[0] for _ in range(3)]
    loader.load_state_dict(state)
    with pytest.raises(RuntimeError, match="a state was loaded"):
        next(passing)
    again = iter(loader)
    assert_same([next(again)[0] for _ in range(3)], first)


def test_a_resumed_run_may_use_more_workers_by_choice():
    state = saved_after(make(num_workers=1), 5)
    loader = make(num_workers=2)
    loader.load_state_dict(state)
    loader.ahead = loader.num_workers * loader.prefetch_factor
    run(loader, 2)
    assert len(loader.state_dict()["indices"]) == 4


# Random numbers ----------------------------------------------------------------------------------


def test_the_global_generator_is_that_of_a_run_without_interruption():
    """A pass takes its workers' seed from it, once: the resumed rest takes none."""

    def numbers(loader, steps):
        found, done = [], 0
        while True:
            for batch, _ in loader:
                learn(loader, batch)
                found.append(float(torch.rand(())))  # dropout, say
                done += 1
                if done == steps:
                    return found, loader.state_dict(), torch.get_rng_state()

    before = torch.get_rng_state()
    try:
        torch.manual_seed(0)
        expected, _, _ = numbers(make(), 30)
        torch.manual_seed(0)
        first, state, rng = numbers(make(), 13)
        torch.manual_seed(1)
        loader = make()
        loader.load_state_dict(state)
        torch.set_rng_state(rng)
        second, _, _ = numbers(loader, 17)
    finally:
        torch.set_rng_state(before)
    assert first + second == expected


def test_workers_of_a_resumed_pass_have_seeds_of_their_own():
    def augmented(state, count=1):
        loader = make(WithWorker(), num_workers=1, generator=torch.Generator().manual_seed(5))
        if state is not None:
            loader.load_state_dict(state)
        return [[float(data[3][0]) for _, data in loader] for _ in range(count)]

    def state(steps):
        loader = make(WithWorker(), num_workers=1, generator=torch.Generator().manual_seed(5))
        return saved_after(loader, steps)

    whole, following = augmented(None, 2)
    resumed, then = augmented(state(7), 2)
    again = augmented(state(11))[0]
    assert then == following, "the generator's state was saved, and left as it was"
    first = {numbers[0] for numbers in (whole, following, resumed, again)}
    assert len(first) == 4, "no stream of random numbers comes twice"


# Other data --------------------------------------------------------------------------------------


def test_the_data_set_may_have_grown():
    state = saved_after(make(), 27)
    loader = make(Indices(N + 50))
    with pytest.warns(UserWarning, match="samples from 200 on are taken to be new, and unseen"):
        loader.load_state_dict(state)
    assert int((loader.sampler.last_seen < 0).sum()) == 50
    batches = run(loader, 500)
    assert torch.cat([batch.indices for batch in batches]).max() >= N
    assert int((loader.sampler.last_seen < 0).sum()) < 10


# States that no loader can have saved ------------------------------------------------------------


def changed(**entries):
    return lambda state: {**state, **entries}


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda state: None, TypeError, "state_dict must be a dict, got NoneType"),
        (lambda state: state["sampler"], ValueError, "must be a fastis.DataLoader's, of version 1"),
        (changed(version=2), ValueError, "of version 1, got version 2"),
        (changed(sampler=None), TypeError, "state_dict must be a dict, got NoneType"),
        (changed(ahead=-1), ValueError, r"state_dict\['ahead'\] must be at least 0"),
        (changed(ahead=None), TypeError, r"state_dict\['ahead'\] must be an int"),
        (changed(position=21), ValueError, r"state_dict\['position'\] must be in \[0, 20\]"),
        (changed(generator=torch.ones(3)), ValueError, r"\['generator'\] must be a generator's"),
        (changed(indices=None), TypeError, r"state_dict\['indices'\] must be a tensor"),
        (
            changed(indices=torch.zeros(3, 2, dtype=torch.int64)),
            ValueError,
            r"state_dict\['indices'\] must be torch.int64 of shape \[n, 10\], got .*\[3, 2\]",
        ),
        (changed(indices=torch.zeros(2, B)), ValueError, "must be torch.int64 .*torch.float32"),
        (changed(indices=torch.full((2, B), N)), ValueError, r"must be in \[0, 200\), got .* 200"),
        (changed(indices=torch.full((2, B), -1)), ValueError, r"must be in \[0, 200\)"),
        (changed(weights=torch.full((2, B), torch.nan)), ValueError, "must be finite"),
        (changed(weights=torch.ones(3, B)), ValueError, "2 minibatches of indices and 3 of weig"),
    ],
)
def test_what_is_no_state_is_refused_and_changes_nothing(change, error, message):
    state = saved_after(make(num_workers=1), 5)
    loader = make(num_workers=1, generator=torch.Generator())
    passing = iter(loader)
    found = []
    for _ in range(4):
        found.append(next(passing)[0])
        learn(loader, found[-1])
    with pytest.raises(error, match=message):
        loader.load_state_dict(change(state))
    for _ in range(4):
        found.append(next(passing)[0])
        learn(loader, found[-1])
    assert_same(found, drawn_ahead(2, 8))


def test_a_state_of_another_sampler_is_refused():
    state = saved_after(make(), 5)
    sampler = fastis.Sampler(N, B, method=EMAIS(warmup_epochs=3))
    with pytest.raises(ValueError, match="options="):
        fastis.DataLoader(Indices(), sampler).load_state_dict(state)


def test_saving_costs_the_workers_nothing():
    """A state is read while they work: it neither waits for them nor draws."""
    loader = make(num_workers=2)
    found = []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for batch, _ in loader:
            learn(loader, batch)
            found.append(batch)
            loader.state_dict()
    assert_same(found, drawn_ahead(4, PER_PASS))
