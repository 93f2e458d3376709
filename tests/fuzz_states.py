"""Cases of ``load_state_dict`` with numbers that no run has left: refused, or safe to use."""

from __future__ import annotations

import math
from typing import Any

import torch
from fuzz import ERRORS, Case
from fuzz_sampler import any_method, same, some_scores
from torch import Tensor

import fastis

WORDS = (0, 1, -1, -5, 2**31 - 1, -(2**31), 2**61, 2**62, 2**63 - 1, -(2**63))


def run(case: Case) -> None:
    with case.may_raise():
        n = case.size(1000)
        sampler = fastis.Sampler(
            n,
            case.size(min(n, 64)),
            method=any_method(case),
            max_duplicates=case.pick(2.0, 1.0, math.inf),
            flatten=case.pick("cap", "mix"),
            scheme=case.pick("multinomial", "stratified", "systematic"),
            seed=case.random.getrandbits(64),
        )
        for _ in range(case.random.randrange(6)):
            case.count("update")
            step(sampler)
        for _ in range(5):
            tamper(case, sampler)


def step(sampler: fastis.Sampler) -> None:
    batch = sampler.sample()
    assert 0 <= int(batch.indices.min()) <= int(batch.indices.max()) < sampler.num_samples
    assert bool(batch.weights.isfinite().all()), "a weight is not finite"
    score = some_scores(batch.indices)
    sampler.update(batch, fastis.ScoredLoss(score, score, score, None))


def tamper(case: Case, sampler: fastis.Sampler) -> None:
    state = changed(case, sampler.state_dict())
    before = sampler.state_dict()
    arguments = {**sampler._arguments, "seed": 1}
    other = sampler if case.chance(0.5) else fastis.Sampler(**arguments)
    untouched = other.state_dict()
    case.count("tampered")
    try:
        other.load_state_dict(state)
    except ERRORS:
        case.count_error()
        assert same(untouched, other.state_dict()), "changed by a state that was refused"
        return
    for _ in range(4):
        case.count("update")
        step(other)
        p = other.probabilities()
        assert abs(float(p.sum()) - 1) < 1e-6, f"probabilities add up to {float(p.sum())}"
    if other is sampler:
        sampler.load_state_dict(before)


def changed(case: Case, state: dict[str, Any]) -> dict[str, Any]:
    """The state with one to three words, or the nature of one of its tensors, changed."""
    names = [name for name, value in state.items() if isinstance(value, Tensor)]
    for _ in range(case.random.randrange(1, 4)):
        name = case.pick(*names, "scalars", "states" if "states" in names else "scalars")
        value = state[name]
        if case.chance(0.1):
            state[name] = case.pick(
                value.to("meta"), value.to(torch.float16), value[None], value.tolist(), None,
                value.flatten()[:-1], torch.zeros_like(value, dtype=torch.bool),
            )  # fmt: skip
            return state
        if not isinstance(value, Tensor) or value.numel() == 0:
            continue
        words = value.reshape(-1)
        if words.dtype == torch.bool:
            words[case.random.randrange(len(words))] ^= True
            continue
        size = {4: torch.int32, 8: torch.int64}.get(words.itemsize)
        if size is None:
            continue
        words = words.view(size)
        at = case.random.randrange(len(words))
        bits = words.itemsize * 8
        word = int(words[at])
        word = case.pick(
            word ^ (1 << case.random.randrange(bits)), word * 2, word + 1, word - 1, -word,
            case.pick(*WORDS), case.random.getrandbits(bits), len(state), 1000,
            int(torch.tensor(case.pick(math.nan, math.inf, -1.0, 1e30)).view(torch.int32)),
        )  # fmt: skip
        word %= 1 << bits
        words[at] = word - (1 << bits) if word >= 1 << (bits - 1) else word
    return state
