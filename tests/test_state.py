"""Saving and loading: bit for bit, in one piece, across threads, processes and versions."""

from __future__ import annotations

import copy
import io
import pickle
from pathlib import Path

import pytest
import torch
from conftest import Observation, drive, observe, scores

import fastis
from fastis import methods
from fastis.kernels.layout import EXPONENT, NEVER, SEEN, TOTAL, UPDATES
from fastis.methods import EMAIS

WITH_WARMUP = {n for n, m in methods.BY_NAME.items() if "warmup_epochs" in m.__dataclass_fields__}
FIXTURE = Path(__file__).parent / "data" / "state_v1.pt"


def continue_both(a, b):
    for x, y in zip(drive(a, 40, seed=9), drive(b, 40, seed=9), strict=True):
        assert torch.equal(x.indices, y.indices)
        assert torch.equal(x.weights, y.weights)
    assert torch.equal(a.variance.trace_is, b.variance.trace_is)
    assert torch.equal(a.importance, b.importance) or a.method.name != "emais"


@pytest.mark.parametrize("method", ["emais", "scan", "uniform"])
@pytest.mark.parametrize("steps", [0, 7, 33, 90])
def test_a_resumed_run_continues_bit_for_bit(any_backend, method, steps):
    sampler = fastis.Sampler(200, 10, method=method, seed=3)
    drive(sampler, steps, decay=0.1)
    file = io.BytesIO()
    torch.save(sampler.state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    resumed = fastis.Sampler(200, 10, method=method, seed=99)
    drive(resumed, 5)
    resumed.load_state_dict(state)
    continue_both(sampler, resumed)


def test_saving_takes_a_copy_and_loads_many_times():
    sampler = fastis.Sampler(50, 5)
    drive(sampler, 30)
    state = sampler.state_dict()
    kept = copy.deepcopy(state)
    drive(sampler, 10)
    for name in ("states", "scalars", "variance"):
        assert torch.equal(state[name], kept[name])
    draws = []
    for _ in range(2):
        sampler.load_state_dict(state)
        draws.append(sampler.sample().indices)
    assert torch.equal(draws[0], draws[1])


def addresses(sampler):
    table = sampler._table
    tensors = [table.scalars, table.variance, table.states, *table._tree.values()]
    return [t.data_ptr() for t in (*tensors, *table.memory.values())]


@pytest.mark.parametrize("method", ["emais", "prioritized"])
def test_loading_goes_into_the_tensors_that_are_there(any_backend, method):
    theirs = fastis.Sampler(50, 5, method=method, seed=7)
    drive(theirs, 30)
    sampler = fastis.Sampler(50, 5, method=method, seed=1)
    drive(sampler, 35)
    before, traces = addresses(sampler), sampler.variance
    sampler.load_state_dict(theirs.state_dict())
    assert addresses(sampler) == before
    assert sampler.variance is traces
    assert "seed=7" in repr(sampler)
    for x, y in zip(drive(theirs, 20, seed=5), drive(sampler, 20, seed=5), strict=True):
        assert torch.equal(x.indices, y.indices)
        assert torch.equal(x.weights, y.weights)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda s: s.pop("variance"), ValueError, "state_dict must have 'variance'"),
        (lambda s: s.update(variance=s["variance"].float()), TypeError, "must have dtype"),
        (lambda s: s.update(states=s["states"][:3]), ValueError, "must have shape"),
        (lambda s: s["settings"].pop("seed"), TypeError, "state_dict's seed must be an int"),
        (lambda s: s.pop("settings"), ValueError, "dict of settings, got NoneType"),
    ],
)
def test_a_bad_state_changes_nothing(change, error, message):
    sampler, other = (fastis.Sampler(50, 5, seed=s) for s in (1, 2))
    drive(sampler, 20)
    before, state = sampler.state_dict(), other.state_dict()
    change(state)
    with pytest.raises(error, match=message):
        sampler.load_state_dict(state)
    after = sampler.state_dict()
    assert all(torch.equal(before[k], after[k]) for k in ("states", "scalars", "variance"))
    assert after["settings"] == before["settings"]


def test_samplers_pickle_and_copy():
    sampler = fastis.Sampler(200, 10, method=EMAIS(tau=50), seed=2**63, scheme="stratified")
    drive(sampler, 60)
    continue_both(pickle.loads(pickle.dumps(sampler)), copy.deepcopy(sampler))


def equal_states(a, b):
    assert a.keys() == b.keys()
    assert a["settings"] == b["settings"]
    for name, value in a.items():
        if isinstance(value, torch.Tensor):
            bits = value.reshape(-1).view(torch.uint8)
            assert torch.equal(bits, b[name].reshape(-1).view(torch.uint8)), name
    return True


def arguments_of(name):
    """Arguments of the samplers in the fixture: the defaults of then are the published ones."""
    return {
        "emais": {"method": methods.EMAIS.published()},
        "loss": {"method": methods.Loss.published(), "flatten": "mix"},
        "presampling": {"method": methods.Presampling(scores, tau_threshold=1.0)},
        "rais": {"method": methods.RAIS(buffer_size=64)},
        "confvar": {"scheme": "stratified"},
    }.get(name, {})


@pytest.mark.parametrize("name", sorted(methods.BY_NAME.keys() - {"distributed"}))  # is younger
def test_states_of_the_first_version_go_on_as_there(any_backend, name):
    """The fixture was written by version 0.1.0 at its first release.

    For every method: ``Sampler(60, 6, method=name, seed=2**63 + 5, **arguments_of(name))``, 33
    steps, ``state_dict()``, and the indices and weights of 12 further steps. A step is a draw, then
    an update with ``Observation(v, v, torch.full((4,), 0.1))``, v = conftest.scores(indices).
    """
    saved = torch.load(FIXTURE, weights_only=True)[name]
    sampler = fastis.Sampler(60, 6, **{"method": name, "seed": 1, **arguments_of(name)})
    sampler.load_state_dict(saved["state"])
    renamed = {"states" if k == "records" else k: v for k, v in saved["state"].items()}
    # Without a gain: until the next update the factor stands for it.
    renamed["variance"] = torch.cat([renamed["variance"], renamed["variance"][-1:]])
    # Nobody could ask for uniform draws, nothing paused, and the correction was 1.
    renamed["scalars"] = torch.cat([renamed["scalars"], torch.tensor([NEVER, 0])])
    renamed["variance"] = torch.cat([renamed["variance"], renamed["variance"].new_tensor([-1.0])])
    if "floor" in (options := renamed["settings"]["options"]):
        renamed["settings"] = {**renamed["settings"], "options": {**options, "least_gain": 0.0}}
    assert equal_states(sampler.state_dict(), {**renamed, "version": 3, "correction": 1.0})
    for indices, weights in zip(saved["indices"], saved["weights"], strict=True):
        batch = sampler.sample()
        assert torch.equal(batch.indices, indices)
        assert torch.equal(batch.weights, weights)
        v = scores(batch.indices)
        sampler.update(batch, Observation(v, v, torch.full((4,), 0.1)))


@pytest.mark.parametrize("name", sorted(methods.BY_NAME))
@pytest.mark.parametrize("warmup", [0, 2])
def test_no_state_of_a_run_is_refused(any_backend, name, warmup):
    options = {"warmup_epochs": warmup} if name in WITH_WARMUP else {}
    if name == "presampling":
        options = {"score_fn": lambda i: scores(i), "tau_threshold": 1.0}
    method = methods.BY_NAME[name](**options)
    batch_size = 1 if name in ("uniform", "emais") and warmup else 8
    sampler, other = (
        fastis.Sampler(50, batch_size, method=method, seed=s, max_duplicates=4.0) for s in (1, 2)
    )
    generator = torch.Generator().manual_seed(3)
    unusual = torch.tensor([torch.nan, torch.inf, 0.0, 1e-38, 1e-6, 1e6, 1e15])
    for step in range(200):
        if step % 7 == 0:
            other.load_state_dict(sampler.state_dict())
            assert equal_states(other.state_dict(), sampler.state_dict())
        batch = sampler.sample()
        score = torch.empty(batch_size).log_normal_(0, 2, generator=generator)
        picked = torch.randint(0, len(unusual), (batch_size,), generator=generator)
        often = torch.rand(batch_size, generator=generator) < 0.15
        sampler.update(batch, observe(torch.where(often, unusual[picked], score)))


def test_a_total_without_room_for_the_unseen_is_rescaled(any_backend):
    n, b = 2**16, 128
    sampler = fastis.Sampler(n, b, method=EMAIS(warmup_epochs=0))
    first = fastis.Batch(torch.arange(b), torch.ones(b))
    sampler.update(first, observe(torch.full((b,), 1e-5)))
    # As if a second minibatch had been seen by a version that counts the seen samples alone.
    state = sampler.state_dict()
    rows, scalars = state["states"][b : 2 * b], state["scalars"]
    rows[:, 0] = rows[:, 3] = torch.tensor(1.0).view(torch.int32)
    rows[:, 2] = 1
    e0 = int(scalars[EXPONENT])
    scalars[UPDATES], scalars[SEEN] = 2, 2 * b
    scalars[TOTAL] += b * (2**15 << -e0)
    total = int(scalars[TOTAL])
    limit = sampler._table.constants.total_limit
    assert total <= limit < total + (n - 2 * b) * (total // (2 * b))
    sampler.load_state_dict(state)
    after = sampler.state_dict()
    assert int(after["scalars"][TOTAL]) < total
    assert torch.equal(after["states"][:, :3], state["states"][:, :3])
    p = sampler.probabilities()
    assert float(p.sum()) == pytest.approx(1)
    batch = sampler.sample()
    torch.testing.assert_close(
        batch.weights.double(), 1 / (n * p[batch.indices]), rtol=2e-7, atol=0
    )


def test_an_interrupted_load_is_finished_first(monkeypatch):
    theirs, sampler = (fastis.Sampler(50, 5, method="rais", seed=s) for s in (1, 2))
    drive(theirs, 30)
    take, calls = sampler._table._take, []

    def interrupted(state, seed):
        calls.append(seed)
        if len(calls) == 1:
            raise KeyboardInterrupt
        take(state, seed)

    monkeypatch.setattr(sampler._table, "_take", interrupted)
    with pytest.raises(KeyboardInterrupt):
        sampler.load_state_dict(theirs.state_dict())
    loaded = sampler._table.snapshot()
    assert all(torch.equal(loaded[k], v) for k, v in theirs._table.snapshot().items())


@pytest.mark.parametrize("method", ["emais", "rais"])
def test_a_sampler_of_inference_mode_works_outside_of_it(any_backend, method):
    with torch.inference_mode():
        sampler = fastis.Sampler(50, 5, method=method)
        state = sampler.state_dict()
    drive(sampler, 25)
    sampler.load_state_dict(state)
    with torch.inference_mode():
        drive(sampler, 25)
        saved = sampler.state_dict()
    assert not any(v.is_inference() for v in saved.values() if isinstance(v, torch.Tensor))
    drive(sampler, 5)


def test_a_warm_up_without_end():
    sampler = fastis.Sampler(50, 5, method=EMAIS(warmup_epochs=10**30))
    drive(sampler, 40)
    assert (sampler.sample().weights == 1).all()
    file = io.BytesIO()
    torch.save(sampler.state_dict(), file)
    file.seek(0)
    sampler.load_state_dict(torch.load(file, weights_only=True))


@pytest.mark.parametrize("name", ["presampling", "emais"])
def test_clocks_near_their_end_can_be_drawn_with(name):
    pausing = methods.EMAIS(warmup_epochs=0, least_gain=1e9, smoothing=0.1)
    method = pausing if name == "emais" else methods.Presampling(scores)
    sampler = fastis.Sampler(50, 8, method=method)
    drive(sampler, 30)
    state = sampler.state_dict()
    state["scalars"][0] = 2**62 - 1000
    sampler.load_state_dict(state)
    drive(sampler, 5)
