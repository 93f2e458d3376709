"""Cases of ``Sampler``: any options, any scores, any order of calls, on backends that take turns.

The oracle recomputes the distribution from the states in Python's integers; draws of small tables
are compared with the reference backend's.
"""

from __future__ import annotations

import copy
import math
import pickle
from fractions import Fraction
from typing import Any, NamedTuple

import torch
from fuzz import Case
from torch import Tensor

import fastis
from fastis import methods
from fastis.kernels.code import exponent_of, mantissa_of
from fastis.kernels.layout import EXCLUDED, EXPONENT, LAST, LAST_EXCLUDED, SEEN, TOTAL

# Whose coefficients are 1 / (N p) of Sampler.probabilities().
EXACT = ("emais", "loss", "scan", "uniform", "rais")
SMALL = 1500  # samples: the reference backend takes its turns, every integer is looked at


class Scored(NamedTuple):
    losses: Any
    score: Any
    mean_grad: Any = None


def run(case: Case) -> None:
    with case.may_raise():
        case.count("init")
        sampler = any_sampler(case)
        Session(case, sampler).run(case.size(60))


def some_scores(indices: Tensor) -> Tensor:
    return 0.1 + 5 * torch.frac(indices * 0.6180339887).square().float()


def any_method(case: Case) -> Any:
    if case.chance(0.6):
        kind = case.pick(methods.EMAIS, methods.EMAIS, methods.Loss)
        refreshed = case.chance(0.1)
        return kind(
            tau=case.pick("linear", "linear", 0.3, 5.0, 1e6),
            tau_scale=case.pick(1.0, 0.1, 7.0),
            importance=case.pick("rms", "sum"),
            warmup_epochs=case.pick(0, 0, 0, 1, 2),
            floor=case.pick(1e-3, 1e-3, 1e-6, 0.1, 1.0),
            refresh_every=case.size(9) if refreshed else 0,
            score_fn=some_scores if refreshed else None,
            estimator=case.pick("unbiased", "plugin"),
            smoothing=case.pick(0.99, 0.0),
        )
    name = case.pick(*methods.BY_NAME)
    return methods.Presampling(some_scores) if name == "presampling" else methods.BY_NAME[name]()


def any_sampler(case: Case) -> fastis.Sampler:
    draw = case.random.random()
    most = 64 if draw < 0.4 else SMALL if draw < 0.8 else 2**17
    n = case.size(most)
    if draw > 0.9985:
        n = 2**24 if draw > 0.9999 else 2**20
    b = case.size(min(n, 512)) if case.chance(0.95) else case.size(600)
    least = b / n
    factors = [1.0, 1 + 1e-9, 1 + 1e-6, 1.001, 1.01, 1.1, 2, 9]
    duplicates = case.pick(2.0, 2.0, 1.0, 3, 0.7, b, math.inf, least * case.pick(*factors))
    if n > 4000:
        duplicates = max(duplicates, 0.5)
    return fastis.Sampler(
        n,
        b,
        method=any_method(case),
        max_duplicates=duplicates,
        flatten=case.pick("cap", "cap", "mix"),
        scheme=case.pick("multinomial", "stratified", "systematic"),
        seed=case.random.getrandbits(64),
    )


class Session:
    """One sampler and what is done with it."""

    def __init__(self, case: Case, sampler: fastis.Sampler) -> None:
        self.case, self.sampler = case, sampler
        self.n, self.size = sampler.num_samples, sampler.batch_size
        self.small = self.n <= SMALL
        self.turns = self.small and case.chance(0.5)
        self.scale = 10.0 ** case.random.uniform(-8, 3)
        self.trend = case.pick(0.0, 0.0, 0.3, 3.0, -3.0)
        self.pending: list[fastis.Batch] = []
        self.last: fastis.Batch | None = None

    def run(self, length: int) -> None:
        steps = (
            [self.step] * 10 + [self.ahead, self.fused, self.fused, self.sweep, self.partial]
            + [self.wrong, self.wrong, self.save, self.copied, self.read, self.change, self.renew]
        )  # fmt: skip
        for _ in range(length):
            with fastis.backend("reference" if self.turns and self.case.chance(0.3) else "cpu"):
                self.case.pick(*steps)()
                if self.case.chance(1.0 if self.n < 100 else 0.2 if self.small else 0.02):
                    self.check_table()

    # Calls -------------------------------------------------------------------------------------

    def draw(self) -> fastis.Batch:
        """The next minibatch, checked."""
        case, sampler = self.case, self.sampler
        p = twin = None
        if case.chance(0.5 if self.small else 0.02):
            p = sampler.probabilities()
            check_probabilities(sampler, p)
        if self.small and case.chance(0.3):
            twin = copy.deepcopy(sampler)
        case.count("draw")
        batch = sampler.sample()
        self.check_batch(batch, p)
        if twin is not None:
            with fastis.backend("reference"):
                expected = twin.sample()
            assert torch.equal(batch.indices, expected.indices), "unlike the reference"
            assert torch.equal(batch.weights, expected.weights), "unlike the reference"
        return batch

    def check_batch(self, batch: fastis.Batch, p: Tensor | None) -> None:
        assert batch.indices.shape == batch.weights.shape == (self.size,)
        assert batch.indices.dtype == torch.int64
        assert 0 <= int(batch.indices.min()) <= int(batch.indices.max()) < self.n, "out of range"
        assert bool(batch.weights.isfinite().all()), "a weight is not finite"
        least = 1e-38 if self.sampler.method.name in EXACT else 0.0  # 0: left out by self_paced
        assert float(batch.weights.min()) >= least, "a weight is not positive"
        assert bool(self.sampler._table.is_active()[batch.indices].all()), "an excluded sample"
        if p is not None and self.sampler.method.name in EXACT:
            items = int(self.sampler._table.is_active().sum())
            wanted = (1 / (items * p[batch.indices])).pow(self.sampler.correction).float()
            torch.testing.assert_close(batch.weights, wanted, rtol=3e-7, atol=0)
        if p is not None and self.sampler.method.name != "presampling":
            assert bool((p[batch.indices] > 0).all())

    def step(self) -> None:
        batch = self.pending.pop(0) if self.pending else self.draw()
        self.update(batch)

    def ahead(self) -> None:
        self.pending.append(self.draw())

    def update(self, batch: fastis.Batch) -> None:
        out = self.scored(batch.indices)
        before = self.sampler.step
        self.case.count("update")
        self.sampler.update(batch, out)
        assert self.sampler.step == before + (len(batch.indices) > 0)
        self.last = batch

    def fused(self) -> None:
        batch = self.last if self.last is not None else self.draw()
        self.case.count("update_and_sample")
        self.last = self.sampler.update_and_sample(batch, self.scored(batch.indices))
        self.check_batch(self.last, None)

    def sweep(self) -> None:
        """An evaluation of many samples, or a few, in any order, perhaps some of them twice."""
        case = self.case
        if self.n > SMALL and case.chance(0.7):
            return self.partial()
        count = self.n if case.chance(0.3) else case.random.randrange(self.n + 1)
        order = torch.randperm(self.n, generator=case.generator)[:count]
        case.count("sweep")
        self.update(fastis.Batch(order, torch.ones(count)))

    def partial(self) -> None:
        count = self.case.pick(0, 1, 3, 200)
        some = torch.randint(self.n, (count,), generator=self.case.generator)
        self.update(fastis.Batch(some, torch.ones(count)))

    def scored(self, indices: Tensor) -> Any:
        """Any scores for these samples; in parts at times."""
        case, n = self.case, len(indices)
        self.scale = min(max(self.scale * 10**self.trend, 1e-38), 1e17)
        if case.chance(0.1):
            self.scale = 10.0 ** case.random.uniform(-38, 17)
        score = torch.empty(n).log_normal_(0, case.pick(0.1, 1, 3), generator=case.generator)
        score *= self.scale
        if case.chance(0.3):
            hostile = case.pick(math.nan, math.inf, -math.inf, 0.0, 1e-38, 1e30, 1e18, -1.0, -0.0)
            score[torch.rand(n, generator=case.generator) < case.pick(0.1, 1.0)] = hostile
        elif case.chance(0.1):
            score.fill_(self.scale)
        # Some methods take no losses below 0, and all may see another loss than score.
        losses = score if case.chance(0.5) else score.abs() * 2
        mean_grad = None
        if case.chance(0.5):
            mean_grad = torch.randn(case.size(20), generator=case.generator) * self.scale
        if case.chance(0.1) and n > 1:
            cut = case.random.randrange(1, n)
            parts = zip(losses.split([cut, n - cut]), score.split([cut, n - cut]), strict=True)
            return [Scored(*part) for part in parts]
        if case.chance(0.05):
            score, losses = score.double(), losses.double()
        return Scored(losses, score, mean_grad)

    def wrong(self) -> None:
        """Raises, and nothing has changed."""
        case, n = self.case, self.n
        count = case.size(5)
        i, r = torch.randint(n, (count,), generator=case.generator), torch.ones(count)
        x = torch.rand(count, generator=case.generator) + 0.1
        batch, out = fastis.Batch(i, r), Scored(x, x)
        outside = i.clone()
        outside[-1] = case.pick(n, -1, 2**40, -(2**63), 2**63 - 1, 2**32)
        batch, out = case.pick(
            (fastis.Batch(outside, r), out),
            (fastis.Batch(i.int(), r), out),
            (fastis.Batch(i, r.double()), out),
            (fastis.Batch(i, torch.ones(count + 1)), out),
            (fastis.Batch(i[:, None], r), out),
            (batch, Scored(x, torch.cat([x, x]))),
            (batch, Scored(x[None], x[None])),
            (batch, []),
            (batch, [3]),
            (batch, Scored(x, x, torch.ones(2, 2))),
            (batch, Scored(x, x, torch.ones(2).long())),
            (fastis.Batch(i.to("meta"), r), out),
            (batch, Scored(x, x.to("meta"))),
        )
        before = self.sampler.state_dict()
        case.must_raise(lambda: self.sampler.update(batch, out))
        case.must_raise(lambda: self.sampler.update_and_sample(batch, out))
        assert same(before, self.sampler.state_dict()), "changed by a call that raised"

    def change(self) -> None:
        """What the user may change during a run."""
        case, sampler = self.case, self.sampler
        case.count("change")
        if self.size <= self.n:
            sampler.uniform = case.chance(0.4)
        if sampler.method.has_coefficients:
            sampler.correction = case.pick(1.0, 1.0, 0.5, 0.0)

    def renew(self) -> None:
        """Samples come and go; one is left at least."""
        case, sampler = self.case, self.sampler
        count = case.pick(1, 1, 5, case.size(self.n))
        indices = torch.randint(self.n, (count,), generator=case.generator)
        if case.chance(0.1):  # all but a few
            indices = torch.randperm(self.n, generator=case.generator)[case.size(9) :]
        if not sampler.method.renews:
            return case.must_raise(lambda: sampler.reset(indices))
        case.count("renew")
        if case.chance(0.5):
            sampler.reset(indices)
            return None
        sampler.exclude(indices)
        assert bool((sampler.last_seen[indices] == LAST_EXCLUDED).all())
        if not bool(sampler._table.is_active().any()):
            sampler.reset(indices[:1])
        return None

    def save(self) -> None:
        """Goes on with another sampler that took over the state: it draws the same."""
        case = self.case
        case.count("save")
        state = self.sampler.state_dict()
        arguments = {**self.sampler._arguments, "seed": case.random.getrandbits(64)}
        other = fastis.Sampler(**arguments)
        if case.chance(0.3):
            other.update(other.sample(), self.scored(torch.empty(self.size)))
        other.load_state_dict(state)
        assert same(state, other.state_dict()), "saved another state than was loaded"
        self.follow(other)

    def copied(self) -> None:
        self.case.count("copy")
        if self.case.chance(0.5):
            self.follow(copy.deepcopy(self.sampler))
        else:
            self.follow(pickle.loads(pickle.dumps(self.sampler)))

    def follow(self, other: fastis.Sampler) -> None:
        """Goes on with the other one, or with this one."""
        if self.case.chance(0.5):
            batch, again = self.draw(), other.sample()
            assert torch.equal(batch.indices, again.indices), "the copy draws differently"
            assert torch.equal(batch.weights, again.weights), "the copy draws differently"
        self.sampler = other if self.case.chance(0.5) else self.sampler

    def read(self) -> None:
        self.case.count("read")
        s = self.sampler
        factor = float(s.lr_factor(self.case.pick("sgd", "adam")))
        assert factor > 0, factor
        assert math.isfinite(factor), factor
        assert s.skipped >= 0
        assert math.isfinite(float(s.effective_iterations))
        assert s.importance.shape == (self.n,)
        is_active = s._table.is_active()
        assert torch.equal(s.importance > 0, is_active), "an importance is not positive"
        assert repr(s)
        check_probabilities(s, s.probabilities())

    # Oracles -----------------------------------------------------------------------------------

    def check_table(self) -> None:
        table = self.sampler._table
        if table.states is None:
            return
        scalars, codes = table.scalars.tolist(), table.codes().long()
        seen = table.column(LAST) >= 0
        assert scalars[SEEN] == int(seen.sum()), "the number of seen samples is wrong"
        assert bool((codes[~seen] == 0).all())
        excluded = table.column(LAST) == LAST_EXCLUDED
        assert scalars[EXCLUDED] == int(excluded.sum()), "the number of excluded samples is wrong"
        if scalars[SEEN] == 0:
            return
        # By exponents: a sum of mantissas fits 64 bits, the sum itself is Python's.
        e0, exponents = scalars[EXPONENT], exponent_of(codes[seen])
        assert int(exponents.min()) >= e0, "a weight is below the table's exponent"
        sums = torch.zeros(512, dtype=torch.int64)
        sums.index_add_(0, exponents - e0, mantissa_of(codes[seen]))
        total = sum(s << shift for shift, s in enumerate(sums.tolist()) if s)
        assert scalars[TOTAL] == total, "the total is not the sum of the integers"
        plain = type(self.sampler.method).probabilities is methods.Method.probabilities
        if plain and self.small and self.sampler.phase == "importance":
            p = self.sampler.probabilities()
            shifts = (exponent_of(codes) - e0).tolist()
            pairs = zip(mantissa_of(codes).tolist(), shifts, seen.tolist(), strict=True)
            unseen = total // scalars[SEEN]
            weights = [m << s if known else unseen for m, s, known in pairs]
            assert not p[excluded].any(), "a probability of an excluded sample"
            active = [w for w, out in zip(weights, excluded.tolist(), strict=True) if not out]
            check_flattened(table, active, p[~excluded])


def check_flattened(table: Any, weights: list[int], p: Tensor) -> None:
    """The distribution, in Python's integers: water filling, or a mixture with the uniform one; all
    alike where so many are excluded that it can't meet the cap."""
    constants, n = table.constants, len(weights)
    assert sum(weights) < 2**62, "the total leaves its 62 bits"
    most = Fraction(constants.cap_numerator, constants.cap_denominator) / constants.batch_size
    if constants.flatten != 0 and n < constants.num_samples and n * most <= 1:
        weights, most = [1] * n, Fraction(1, n)
    elif constants.flatten == 1:
        rest, theta = sum(weights), 0
        for above, largest in enumerate(sorted(weights, reverse=True)):
            theta = math.floor(most * rest / (1 - above * most))
            if largest <= theta:
                break
            rest -= largest
        weights = [min(w, theta) for w in weights]
    elif constants.flatten == 2:
        over = (max(weights) - most * sum(weights)) / (n * most - 1)
        offset = max(0, math.ceil(over))
        fits = sum(weights) + n * offset < 2**62
        weights = [w + offset for w in weights] if fits else [1] * n
    total = sum(weights)
    expected = torch.tensor([w / total for w in weights], dtype=torch.float64)
    torch.testing.assert_close(p, expected, rtol=1e-14, atol=0)
    if constants.flatten != 0:
        assert max(weights) <= most * total, "the cap does not hold"


def check_probabilities(sampler: fastis.Sampler, p: Tensor) -> None:
    constants = sampler._table.constants
    assert p.shape == (sampler.num_samples,)
    assert abs(float(p.sum()) - 1) < 1e-9, f"probabilities add up to {float(p.sum())}"
    is_active = sampler._table.is_active()
    assert torch.equal(p > 0, is_active), "a probability is not positive"
    if constants.flatten != 0 and sampler.method.name != "presampling":
        bound = constants.max_duplicates / constants.batch_size
        bound = max(bound, 1 / int(is_active.sum()))
        assert float(p.max()) <= bound * (1 + 1e-9), "the cap does not hold"


def same(a: dict[str, Any], b: dict[str, Any]) -> bool:
    return a.keys() == b.keys() and all(
        torch.equal(x.view(torch.uint8), b[k].view(torch.uint8)) if x.dim() else x.equal(b[k])
        for k, x in a.items()
        if isinstance(x, Tensor)
    )
