"""States that no run can have written are refused, and nothing has changed then."""

from __future__ import annotations

import random

import pytest
import torch
from conftest import Observation, drive, scores
from torch.testing._internal.two_tensor import TwoTensor

import fastis
from fastis import methods, saved
from fastis.methods import EMAIS

N = 53


def trained(method="emais", seed=1, steps=None):
    """A sampler after some steps; of emais so few that samples are left unseen."""
    if method == "presampling":
        method = methods.Presampling(scores, tau_threshold=1.0)
    if method == "emais":
        method, steps = EMAIS(warmup_epochs=0), steps or 6
    sampler = fastis.Sampler(N, 5, method=method, seed=seed)
    drive(sampler, steps or 40)
    return sampler


def bits_of(sampler):
    state = sampler.state_dict()
    return {
        name: value.reshape(-1).view(torch.uint8).tolist() if torch.is_tensor(value) else value
        for name, value in state.items()
    }


def refuses(sampler, state, error, message):
    before = bits_of(sampler)
    with pytest.raises(error, match=message):
        sampler.load_state_dict(state)
    assert bits_of(sampler) == before
    batch = sampler.sample()
    assert bool(((batch.indices >= 0) & (batch.indices < N)).all())
    assert bool((batch.weights.isfinite() & (batch.weights >= 0)).all())


def set_at(name, *place_and_value):
    *place, value = place_and_value

    def change(state):
        state[name][tuple(place)] = value

    return change


def set_float(column, value):
    def change(state):
        state["states"].view(torch.float32)[seen_row(state), column] = value

    return change


def set_int(column, value):
    def change(state):
        row = state["states"][seen_row(state)]
        row[column] = value(int(row[column])) if callable(value) else value

    return change


def seen_row(state):
    return int((state["states"][:, 2] >= 0).nonzero()[0])


def unseen_row(state):
    return int((state["states"][:, 2] < 0).nonzero()[0])


def of_unseen(column, value):
    def change(state):
        state["states"][unseen_row(state), column] = value

    return change


def scale(position, factor):
    def change(state):
        state["scalars"][position] *= factor

    return change


def replaced(name, make):
    def change(state):
        state[name] = make(state[name])

    return change


def without_storage(tensor):
    tensor = tensor.clone()
    tensor.untyped_storage().resize_(0)
    return tensor


def consistent_but_too_heavy(state):
    """States and total that agree, in a sum beyond 64 bits."""
    e0 = int(state["scalars"][3])
    state["states"][:, 0] = torch.tensor(2.0**60).view(torch.int32)
    state["states"][:, 1] = 0
    state["states"][:, 2] = 0
    state["states"][:, 3] = (e0 + 46 + 127) << 23
    state["scalars"][5] = N


CHANGES = {
    # what the state is
    "no version": (lambda s: s.pop("version"), ValueError, "version 3, got None"),
    "version 4": (lambda s: s.update(version=4), ValueError, "version 3, got 4"),
    "version True": (lambda s: s.update(version=True), ValueError, "version 3, got True"),
    "version tensor": (lambda s: s.update(version=torch.ones(2)), ValueError, "version 3"),
    "settings None": (lambda s: s.update(settings=None), ValueError, "dict of settings, got None"),
    "settings list": (lambda s: s.update(settings=[]), ValueError, "dict of settings, got list"),
    "setting tensor": (
        lambda s: s["settings"].update(num_samples=torch.tensor([N, N])),
        ValueError,
        "num_samples=53",
    ),
    "options None": (lambda s: s["settings"].update(options=None), ValueError, "options="),
    "option": (lambda s: s["settings"]["options"].update(floor=0.5), ValueError, "options="),
    "seed": (lambda s: s["settings"].update(seed=-1), ValueError, "seed must be in"),
    "seed bool": (lambda s: s["settings"].update(seed=True), TypeError, "seed must be an int"),
    # what the tensors are
    "missing": (lambda s: s.pop("states"), ValueError, "must have 'states'"),
    "list": (replaced("scalars", lambda t: t.tolist()), TypeError, "'scalars'.* got list"),
    "meta": (replaced("states", lambda t: t.to("meta")), TypeError, "'states'.* on meta"),
    "meta variance": (replaced("variance", lambda t: t.to("meta")), TypeError, "on meta"),
    "sparse": (replaced("states", lambda t: t.to_sparse()), TypeError, "got torch.sparse_coo"),
    "csr": (replaced("states", lambda t: t.to_sparse_csr()), TypeError, "got torch.sparse_csr"),
    "nested": (
        replaced("variance", lambda t: torch.nested.nested_tensor([t])),
        TypeError,
        "got nested",
    ),
    "parameter": (
        replaced("variance", lambda t: torch.nn.Parameter(t)),
        TypeError,
        "torch.Tensor, got Parameter",
    ),
    "subclass": (replaced("states", lambda t: TwoTensor(t, t)), TypeError, "got TwoTensor"),
    "no storage": (replaced("states", without_storage), ValueError, "have memory for its 212"),
    "zerotensor": (
        replaced("variance", lambda t: torch._efficientzerotensor(12, dtype=t.dtype)),
        ValueError,
        "'variance'",
    ),
    "dtype": (replaced("scalars", lambda t: t.int()), TypeError, "dtype torch.int64"),
    "shape": (replaced("states", lambda t: t[:-1]), ValueError, r"shape \[53, 4\]"),
    "length": (
        replaced("scalars", lambda t: torch.cat([t, t])),
        ValueError,
        r"shape \[8\], got \[16\]",
    ),
    # clocks and totals
    "draws below 0": (set_at("scalars", 0, -5), ValueError, "draws in .*, got -5"),
    "draws at the end": (set_at("scalars", 0, 2**63 - 1), ValueError, "draws in"),
    "updates below 0": (set_at("scalars", 1, -1), ValueError, "updates in"),
    "updates at the end": (set_at("scalars", 1, 2**62), ValueError, "updates in"),
    "updates of the past": (set_at("scalars", 1, 1), ValueError, r"last in \[-2, 1\], .*in row"),
    "skipped": (set_at("scalars", 2, -1), ValueError, "skipped in"),
    "exponent": (set_at("scalars", 3, -300), ValueError, "exponent in"),
    "exponent of none": (set_at("scalars", 3, -1000), ValueError, "exponent in"),
    "exponent below": (set_at("scalars", 3, -199), ValueError, "exponents of codes"),
    "exponent above": (set_at("scalars", 3, 60), ValueError, "exponents of codes"),
    "total twice": (scale(4, 2), ValueError, "total=[0-9]+, as its states have"),
    "total less": (
        lambda s: s["scalars"][4].sub_(1),
        ValueError,
        "total=",
    ),
    "total 0": (set_at("scalars", 4, 0), ValueError, "total="),
    "total below 0": (scale(4, -1), ValueError, "total in"),
    "seen fewer": (lambda s: s["scalars"][5].sub_(1), ValueError, "seen=[0-9]+, as its"),
    "seen more": (set_at("scalars", 5, N + 1), ValueError, "seen in"),
    "seen 0": (set_at("scalars", 5, 0), ValueError, "exponent in"),
    "beyond 64 bits": (consistent_but_too_heavy, ValueError, "must have"),
    # states
    "last of the future": (set_int(2, 2**31 - 1), ValueError, "last in .*last=2147483647"),
    "last to come": (set_int(2, 7), ValueError, r"last in \[-2, 6\]"),
    "last below": (set_int(2, -3), ValueError, "last=-3"),
    "excluded with a score": (set_int(2, -2), ValueError, "zeros where nothing was seen"),
    "mean NaN": (set_float(0, torch.nan), ValueError, "means within .*mean=nan"),
    "mean inf": (set_float(0, torch.inf), ValueError, "means within .*mean=inf"),
    "mean large": (set_float(0, -1e19), ValueError, "means within"),
    "var NaN": (set_float(1, torch.nan), ValueError, "variances in .*var=nan"),
    "var inf": (set_float(1, torch.inf), ValueError, "variances in"),
    "var below 0": (set_float(1, -1.0), ValueError, "variances in"),
    "var large": (set_float(1, 3e38), ValueError, "variances in"),
    "mean above code": (set_float(0, 1e9), ValueError, "no less than mean and var give"),
    "code 0": (set_int(3, 0), ValueError, "codes of 16 significant bits"),
    "code flagged": (set_int(3, lambda c: c - 2**31), ValueError, "16 significant bits"),
    "code odd": (set_int(3, lambda c: c | 1), ValueError, "codes of 16 significant bits"),
    "code inf": (set_int(3, 0x7F800000), ValueError, "exponents of codes"),
    "code tiny": (set_int(3, 0x00800000), ValueError, "exponents of codes"),
    "code lower": (set_int(3, lambda c: c - 0x400), ValueError, "codes no less|total="),
    "code higher": (set_int(3, lambda c: c + 0x100), ValueError, "total="),
    "unseen with code": (of_unseen(3, 0x3F800000), ValueError, "zeros where nothing was seen"),
    "unseen with mean": (of_unseen(0, 0x3F800000), ValueError, "zeros where nothing was seen"),
    "seen forgotten": (set_int(2, -1), ValueError, "zeros where nothing was seen"),
    # averages
    "weight": (set_at("variance", 0, 1.5), ValueError, "got 1.5 at position 0"),
    "weight NaN": (set_at("variance", 0, torch.nan), ValueError, "nan at position 0"),
    "moment inf": (set_at("variance", 2, torch.inf), ValueError, "inf at position 2"),
    "factor 0": (set_at("variance", 10, 0.0), ValueError, "got 0.0 at position 10"),
    "factor NaN": (set_at("variance", 10, torch.nan), ValueError, "nan at position 10"),
    "factor inf": (set_at("variance", 10, torch.inf), ValueError, "inf at position 10"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_hostile_state_changes_nothing(any_backend, name):
    change, error, message = CHANGES[name]
    state = trained(seed=2).state_dict()
    change(state)
    refuses(trained(seed=1), state, error, message)


@pytest.mark.parametrize("state", [None, [1], "state"])
def test_what_is_no_dict_changes_nothing(state):
    refuses(trained(), state, TypeError, f"must be a dict, got {type(state).__name__}")


def byte_2(tensor):
    tensor.view(torch.uint8)[3] = 2
    return tensor


MEMORY = {
    "rais": {
        "buffered": (-1, 2**62 + 1),
        "history": (torch.nan, -1.0, 1e38),
        "buffer": (torch.inf, torch.nan),
        "first": (torch.nan,),
        "c": (-1.0, torch.inf, 1e300),
        "d": (-1.0, torch.nan),
        "moments": (torch.nan,),
        "gain": (0.0, -1.0, torch.inf),
        "effective_iterations": (-1.0, torch.nan),
    },
    "presampling": {"tau": (-1.0, torch.nan, torch.inf)},
    "confidence": {"visits": (-1, 2**31 - 1), "mean": (torch.nan, 1e30), "squares": (torch.inf,)},
    "confvar": {"visits": (-7,)},
    "self_paced": {"losses": (torch.inf, -1e30), "threshold": (torch.nan, -torch.inf)},
    "online_batch": {"losses": (torch.nan,)},
    "prioritized": {"largest": (torch.nan, -1.0, torch.inf), "known": (byte_2,)},
}


@pytest.mark.parametrize(
    ("method", "name", "value"),
    [(m, n, v) for m, names in MEMORY.items() for n, values in names.items() for v in values],
)
def test_memory_outside_of_its_range_changes_nothing(method, name, value):
    state = trained(method, seed=2).state_dict()
    if callable(value):
        value(state[f"memory.{name}"])
    else:
        state[f"memory.{name}"].reshape(-1)[-1] = value
    refuses(
        trained(method, seed=1), state, ValueError, rf"state_dict\['memory.{name}'\] must be in"
    )


def test_every_memory_has_a_range():
    for name, method in methods.BY_NAME.items():
        sampler = trained(name, steps=1)
        assert sampler._table.memory.keys() == method.memory_ranges.keys()


def test_views_of_any_kind_are_read_as_what_they_are(any_backend):
    theirs, sampler = trained("prioritized", seed=2), trained("prioritized", seed=1)
    state = theirs.state_dict()
    loaded = {
        **state,
        "states": state["states"].t().contiguous().t(),
        "variance": torch._neg_view(-state["variance"]),
        "memory.largest": state["memory.largest"].clone().requires_grad_(),
    }
    sampler.load_state_dict(loaded)
    assert bits_of(sampler) == bits_of(theirs)


# Both checks of the states, and both against what the kernels do ---------------------------------


def tampered(state, generator):
    """``state`` with a few bits or words of its tensors changed."""
    names = [name for name, value in state.items() if torch.is_tensor(value)]
    for _ in range(generator.choice((1, 1, 1, 2, 4))):
        tensor = state[generator.choice(names)]
        if tensor.numel() == 0:
            continue
        flat = tensor.reshape(-1).view(torch.uint8)
        assert flat.data_ptr() == tensor.data_ptr()
        size = tensor.element_size()
        at = generator.randrange(tensor.numel()) * size
        kind = generator.choice(("bit", "bit", "byte", "word", "swap"))
        if kind == "bit":
            flat[at + generator.randrange(size)] ^= 1 << generator.randrange(8)
        elif kind == "byte":
            flat[at + generator.randrange(size)] = generator.choice((0, 1, 127, 128, 255))
        elif kind == "word":
            flat[at : at + size] = generator.choice((0, 127, 128, 255))
        else:
            other = generator.randrange(tensor.numel()) * size
            flat[at : at + size] = flat[other : other + size].clone()
    return state


@pytest.mark.parametrize(
    "method", ["emais", "rais", "prioritized", "presampling", "scan", "confidence"]
)
def test_a_damaged_state_is_refused_or_can_be_drawn_from(any_backend, method):
    generator = random.Random(method)
    theirs = trained(method, seed=2)
    loaded = 0
    for _ in range(72):  # 504 in all
        sampler = trained(method, seed=1, steps=3)
        before = bits_of(sampler)
        try:
            sampler.load_state_dict(tampered(theirs.state_dict(), generator))
        except (TypeError, ValueError):
            assert bits_of(sampler) == before
            continue
        loaded += 1
        for _ in range(20):
            batch = sampler.sample()
            assert bool(((batch.indices >= 0) & (batch.indices < N)).all())
            assert bool((batch.weights.isfinite() & (batch.weights > 0)).all())
            value = scores(batch.indices)
            sampler.update(batch, Observation(value, value, torch.full((4,), 0.1)))
    assert 0 < loaded < 72


@pytest.mark.parametrize("kind", [0, 1])
def test_both_checks_of_the_records_agree(kind):
    importance = ("rms", "sum")[kind]
    sampler = fastis.Sampler(N, 5, method=EMAIS(warmup_epochs=0, importance=importance))
    drive(sampler, 6)
    generator = random.Random(kind)
    rows = set()
    for trial in range(400):
        state = sampler.state_dict()
        if trial:
            tampered({"states": state["states"]}, generator)
        updates, e0 = int(state["scalars"][1]), int(state["scalars"][3])
        if generator.random() < 0.2:
            updates = generator.choice((0, 1, 2**31 - 1, 2**31, 2**40))
        arguments = state["states"], updates, e0, kind
        expected = saved.reference_first_bad(*arguments)
        found = saved.compiled_first_bad(*arguments)
        assert found[0] == expected[0]
        assert expected[0] >= 0 or found == expected
        rows.add(expected[0])
    assert -1 in rows
    assert len(rows) > 20
