"""Cases of ``fastis.sample`` and ``AliasTable``, against Python's integers and fractions."""

from __future__ import annotations

import copy
import math
import pickle
from fractions import Fraction

import torch
from fuzz import Case
from torch import Tensor

import fastis

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
SUM_BITS = 61


def run(case: Case) -> None:
    with fastis.backend("reference" if case.chance(0.2) else "cpu"):
        weights = any_weights(case)
        if case.chance(0.15):
            return wrong_weights(case, weights)
        if not bool((weights > 0).any()):
            case.must_raise(lambda: fastis.AliasTable(weights))
            return case.must_raise(lambda: fastis.sample(weights, 3))
        before = weights.clone()
        values = integer_weights(weights)
        case.pick(alias, alias, categorical, race, capped)(case, weights, values)
        assert torch.equal(weights, before)


def any_weights(case: Case) -> Tensor:
    n = case.size(case.pick(1, 2, 70, 70, 70, 300, 5000))
    dtype = case.pick(*DTYPES)
    w = torch.rand(n, dtype=torch.float64, generator=case.generator)
    shape = case.pick("uniform", "heavy", "equal", "range", "giant", "powers", "subnormal")
    if shape == "heavy":
        w = w.pow(-case.pick(0.5, 2.0, 8.0))
    elif shape == "equal":
        w = torch.full_like(w, case.random.uniform(0.1, 9))
    elif shape == "range":
        least, most = math.log2(torch.finfo(dtype).tiny), math.log2(torch.finfo(dtype).max)
        w = 2 ** (least + w * (most - least))
    elif shape == "giant":
        w[case.random.randrange(n)] = torch.finfo(dtype).max / 2
    elif shape == "powers":
        w = 2.0 ** (w * 40 - 20).round()
    elif shape == "subnormal":
        w = w * torch.finfo(dtype).tiny
    if case.chance(0.4):
        w[torch.rand(n, generator=case.generator) < case.pick(0.1, 0.5, 0.95)] = 0
    w = w.clamp(max=torch.finfo(dtype).max).to(dtype)
    layout = case.pick("plain", "plain", "plain", "strided", "offset", "expanded", "negated")
    if layout == "strided":
        return torch.stack([w, -w], 1)[:, 0]
    if layout == "offset":
        return torch.cat([w[:1], w])[1:]
    if layout == "expanded":
        return w[:1].expand(n)
    return torch._neg_view(-w) if layout == "negated" else w


def wrong_weights(case: Case, weights: Tensor) -> None:
    bad = weights.clone()
    bad[case.random.randrange(len(bad))] = case.pick(math.nan, math.inf, -math.inf, -1.0, -1e-3)
    resized = weights.clone()
    resized.untyped_storage().resize_(0)
    source = case.pick(
        bad, resized, weights[None], weights[:0], weights.long(), weights.bool(), weights * 0,
        weights.to("meta"), weights.tolist(), None, "weights", weights.to_sparse(),
        weights.to(torch.complex64),
    )  # fmt: skip
    case.must_raise(lambda: fastis.AliasTable(source))
    case.must_raise(lambda: fastis.sample(source, 2))
    case.must_raise(lambda: fastis.sample(source, 2, replacement=False))
    if bool((weights > 0).any()):
        count = case.pick(-1, 1.5, "2", True, 10**30, 10**5000)
        case.must_raise(lambda: fastis.sample(weights, count))
        cap = case.pick(math.nan, -1, "1", 10**400, True, 1e-9)
        case.must_raise(lambda: fastis.sample(weights, 3, max_duplicates=cap))
        case.must_raise(lambda: fastis.AliasTable(weights, max_prob=cap))


def floor_shifted(weight: Fraction, shift: int) -> int:
    scaled = weight * 2**shift if shift >= 0 else weight / 2**-shift
    return max(1, math.floor(scaled)) if weight > 0 else 0


def integer_weights(weights: Tensor) -> list[int]:
    """floor(w 2^shift), at least 1 where w > 0; the shift brings sum + N to 61 bits."""
    exact = [Fraction(w) for w in weights.tolist()]
    n = len(exact)
    first = SUM_BITS - (n - 1).bit_length() - math.frexp(float(max(exact)))[1]
    bits = (sum(floor_shifted(w, first) for w in exact) + n).bit_length()
    return [floor_shifted(w, first + SUM_BITS - bits) for w in exact]


def check_batch(batch: fastis.Batch, values: list[int], count: int) -> None:
    total, n = sum(values), len(values)
    assert batch.indices.shape == batch.weights.shape == (count,)
    for index, weight in zip(batch.indices.tolist(), batch.weights.tolist(), strict=True):
        assert 0 <= index < n, (index, n)
        assert values[index] > 0, index
        expected = total / (n * values[index])
        assert weight == torch.tensor(expected).float() or abs(weight / expected - 1) < 1e-7


def alias(case: Case, weights: Tensor, values: list[int]) -> None:
    case.count("alias")
    table = fastis.AliasTable(weights)
    total = sum(values)
    expected = torch.tensor([v / total for v in values], dtype=torch.float64)
    torch.testing.assert_close(table.probabilities, expected, rtol=1e-15, atol=0)
    if case.chance(0.2):
        case.count("copy")
        table = copy.deepcopy(table) if case.chance(0.5) else pickle.loads(pickle.dumps(table))
    for _ in range(case.random.randrange(1, 6)):
        count = case.pick(0, 1, 5, 16, 17, 100)
        case.count("draw")
        check_batch(table.sample(count, case.generator), values, count)


def categorical(case: Case, weights: Tensor, values: list[int]) -> None:
    for _ in range(case.random.randrange(1, 6)):
        count = case.pick(0, 1, 5, 63, 64, 65, 200)
        state = case.generator.get_state()
        case.count("weights")
        batch = fastis.sample(weights, count, generator=case.generator)
        check_batch(batch, values, count)
        if case.chance(0.3):
            case.count("weights")
            with fastis.backend("reference"):
                case.generator.set_state(state)
                again = fastis.sample(weights, count, generator=case.generator)
            assert torch.equal(batch.indices, again.indices)
            assert torch.equal(batch.weights, again.weights)


def race(case: Case, weights: Tensor, values: list[int]) -> None:
    possible = sum(v > 0 for v in values)
    count = case.random.randrange(possible + 1)
    case.count("race")
    batch = fastis.sample(weights, count, replacement=False, generator=case.generator)
    assert len(set(batch.indices.tolist())) == count
    assert bool((weights[batch.indices] > 0).all())
    assert bool((batch.weights > 0).all())
    case.must_raise(lambda: fastis.sample(weights, possible + 1, replacement=False))


def capped(case: Case, weights: Tensor, values: list[int]) -> None:
    """p = min(c w, cap), to the resolution of the integers, and the cap to the last digit."""
    positive, n = sum(v > 0 for v in values), len(values)
    cap = min(1.0, case.pick(1.0, 1 + 1e-9, 1.01, 1.5, 2, 10, 1e9) / positive)
    case.count("alias")
    p = fastis.AliasTable(weights, max_prob=cap).probabilities
    expected = flattened(weights, cap)
    torch.testing.assert_close(p, expected, rtol=1e-9, atol=2.0**-56 * n)
    assert abs(float(p.sum()) - 1) < 1e-12
    assert float(p.max()) <= max(cap, 1 / positive) * (1 + 1e-15)  # a quotient, rounded
    count = case.pick(1, 7, 64)
    case.count("weights")
    batch = fastis.sample(weights, count, max_duplicates=cap * count, generator=case.generator)
    assert bool((weights[batch.indices] > 0).all())
    wanted = (1 / (n * p[batch.indices])).float()
    torch.testing.assert_close(batch.weights, wanted, rtol=1e-6, atol=0)
    too_low = case.pick(0.5, 1 - 1e-6, 0.0) / positive
    case.must_raise(lambda: fastis.AliasTable(weights, max_prob=too_low))
    case.must_raise(lambda: fastis.sample(weights, count, max_duplicates=too_low * count))


def flattened(weights: Tensor, cap: float) -> Tensor:
    exact = [Fraction(w) for w in weights.tolist()]
    most = max(Fraction(cap), Fraction(1, sum(w > 0 for w in exact)))
    rest = sum(exact, Fraction(0))
    for above, largest in enumerate(sorted(exact, reverse=True)):
        scale = (1 - above * most) / rest
        if largest * scale <= most:
            break
        rest -= largest
    return torch.tensor([float(min(w * scale, most)) for w in exact], dtype=torch.float64)
