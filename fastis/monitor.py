"""What a sampler tells about itself: where it stands, what it has learnt, and whether it pays.

Everything here only reads the table. Tensors stay on the device and nothing waits for it; what is a
number, a word or a line of text does, once.
"""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor

from fastis import check
from fastis.categorical import MinibatchSource
from fastis.kernels.layout import (
    EFFECTIVE_BATCH_SIZE,
    EFFICIENCY,
    EXCLUDED,
    LAST,
    LAST_UNSEEN,
    LATEST,
    MEAN,
    MEAN_SQUARED,
    SEEN,
    SKIPPED,
    UPDATES,
    VAR,
    Table,
)
from fastis.kernels.table import Batch
from fastis.methods import Method
from fastis.methods.base import DEFAULT_RULE, OPTIMIZERS, PHASES, RULES
from fastis.variance import Variance

# Updates after the warm-up until the gain is known: three times the moving averages' memory.
UPDATES_TO_KNOW = 300
# Between these nothing is to be gained or lost that a run could show.
_NO_GAIN = (0.9, 1.1)


class Monitored(MinibatchSource):
    """What can be read of a :class:`fastis.Sampler`."""

    _arguments: dict[str, Any]
    _method: Method
    _table: Table
    _variance: Variance
    _like: Batch
    _place = ""  # in a group, for the repr
    correction: float

    @property
    def num_samples(self) -> int:
        """N."""
        return int(self._arguments["num_samples"])

    @property
    def batch_size(self) -> int:
        """B; in a group each process's."""
        return int(self._arguments["batch_size"])

    @property
    def global_batch_size(self) -> int:
        """W B, of all W processes of the group; B of a process on its own."""
        return len(self._like.indices)

    @property
    def method(self) -> Method:
        """The method with its options, for good; uniform draws can be had at any time
        (:attr:`fastis.Sampler.uniform`)."""
        return self._method

    @method.setter
    def method(self, wanted: object) -> NoReturn:
        raise AttributeError(
            f"method is that of the sampler for good, {self._method.name!r}, and can't be set to "
            f"{wanted!r}: for uniform draws from now on set sampler.uniform = True"
        )

    @property
    def device(self) -> torch.device:
        """Where the state and the batches live."""
        return self._like.indices.device

    # Where it stands -----------------------------------------------------------------------------

    @property
    def step(self) -> int:
        """Updates applied: the time of the moving averages. Synchronises with a CUDA device."""
        return int(self._table.scalars[UPDATES])

    @property
    def skipped(self) -> int:
        """Non-finite scores left out so far. Synchronises with a CUDA device."""
        return int(self._table.scalars[SKIPPED])

    @property
    def phase(self) -> str:
        """How the next minibatch is drawn: "warm-up", "importance" or "uniform".

        "warm-up" is the first epochs without replacement, which score every sample once; "uniform"
        whatever draws all samples alike and is not that: methods that never do otherwise, or do not
        at the moment. Synchronises with a CUDA device.
        """
        return PHASES[int(self._method.phase(self._table))]

    def stats(self, *, full: bool = False) -> dict[str, float]:
        """Where the sampler stands, as plain numbers for any logger. One wait for a CUDA device.

        ::

            wandb.log({f"fastis/{name}": value for name, value in sampler.stats().items()})

        Parameters
        ----------
        full : bool
            also what costs O(N): milliseconds at a million samples.

        Returns
        -------
        dict of str to float
            - ``step``: updates applied. ``skipped``: non-finite scores left out so far.
            - ``phase``: of the next draw, 0 warm-up, 1 importance, 2 uniform.
            - ``effective_batch_size``: N_ems. ``efficiency``: S. Smoothed; NaN where not defined
              (yet).
            - ``lr_factor``: :meth:`lr_factor` of SGD. ``gain``: the same by the rule of that name;
              it is also the predicted speed-up (:meth:`prediction`).
            - ``share_unseen``: part of the samples, but for excluded ones, without a score so far
              (methods that keep a state of the samples). ``share_excluded``: part of all samples
              that is excluded, if any is.

            With ``full``, for methods that keep one:

            - ``staleness``: iterations since a sample's last score, mean over the seen ones.
            - ``largest_weight``: the largest weight that the next draw can give (methods with
              coefficients).
        """
        table, method = self._table, self._method
        found = {
            "step": table.scalars[UPDATES],
            "phase": method.phase(table),
            "effective_batch_size": table.variance[EFFECTIVE_BATCH_SIZE],
            "efficiency": table.variance[EFFICIENCY],
            "lr_factor": self.lr_factor(),
            "gain": self.lr_factor(rule="gain"),
            "skipped": table.scalars[SKIPPED],
        }
        if table.states is not None:
            n, excluded = table.constants.num_samples, table.scalars[EXCLUDED]
            items = n - excluded
            found["share_unseen"] = 1 - table.scalars[SEEN] / items
            found["share_excluded"] = excluded.double() / n
            if full:
                found["staleness"] = _staleness(table)
                if method.has_coefficients:
                    p = self.probabilities()
                    least = torch.where(p > 0, p, torch.inf).min()
                    found["largest_weight"] = (1 / (items * least)) ** self.correction
        values = torch.stack([value.double() for value in found.values()])
        stats = dict(zip(found, values.tolist(), strict=True))
        if stats.get("share_excluded") == 0:
            del stats["share_excluded"]
        return stats

    def prediction(self) -> str:
        """One line on what importance sampling is worth here: the gain, once it is known.

        The gain is the speed-up to expect of a run whose learning rate is tuned: the size of the
        uniform minibatch that makes as much progress an iteration, over B
        (:meth:`lr_factor` with ``rule="gain"``). It is known some hundred updates after the
        warm-up. Where no ``mean_grad`` has been told (scores alone, several outputs) the mean
        gradient counts as 0, and the gain is N_ems/B: the most that it can be. Synchronises with a
        CUDA device.
        """
        stats, warmup = self.stats(), self._table.constants.warmup_draws
        phase, step = PHASES[int(stats["phase"])], int(stats["step"])
        if not (self._method.adjusts_lr and self._method.has_coefficients):
            return f"gain not known: method {self._method.name!r} does not estimate it"
        if self.correction != 1.0:
            return "gain not known while the correction is below 1"
        least = self._table.constants.least_gain
        if phase == "uniform" and not self._table.uniform and least > 0:
            return f"gain below {least:g}: draws are uniform while no more is predicted"
        if phase == "uniform":
            return "gain not known while draws are uniform"
        if step < warmup + UPDATES_TO_KNOW:
            of_warmup = f", of which {warmup} are warm-up" if warmup else ""
            return f"gain not yet known: {step} of {warmup + UPDATES_TO_KNOW} updates{of_warmup}"
        gain = stats["gain"]
        if gain < _NO_GAIN[1]:
            verdict = "as good" if gain >= _NO_GAIN[0] else "better"
            return f"gain {gain:.2f}: uniform sampling is {verdict}"
        if float(self._table.variance[MEAN_SQUARED]) == 0.0:
            return f"gain at most {gain:.2f}: no loss has told its mean gradient (mean_grad)"
        return f"gain {gain:.2f}: a minibatch is worth {gain:.2f} uniform ones"

    # Variance and learning rate ------------------------------------------------------------------

    @property
    def variance(self) -> Variance:
        """Smoothed variance traces, effective minibatch size and efficiency."""
        return self._variance

    def lr_factor(self, optimizer: str = "sgd", rule: str = DEFAULT_RULE) -> Tensor:
        """What to multiply the learning rate with, a 0-d float64 tensor on the device.

        Parameters
        ----------
        optimizer : "sgd" or "adam"
            the factor of the rule, or its square root for Adam and its family, whose own
            normalisation by the gradient's size makes the other half of it.
        rule : "linear" or "gain"
            N_ems / B (Kutsuna 2025, eq. 8), which is right where noise dominates the minibatch's
            gradient; or the gain of a larger minibatch (AdaScale, Johnson et al. 2020)
            ``(mu2 + tr V_uni / B) / (mu2 + tr V_is / B)``, with mu2 the squared norm of the mean
            gradient: between 1 and N_ems / B, and nearer to 1 the less noise there is.

        1 while draws are uniform, with a ``correction`` below 1, and for methods that define no
        adjustment. RAIS has a gain of its own, by either rule. A loss without ``mean_grad`` counts
        as mu2 = 0, which makes the rules one.

        Raises
        ------
        ValueError
            for another optimizer or rule.
        """
        if rule not in RULES:
            check.choice("rule", rule, RULES)
        factor = self._method.lr_factor(self._table, rule)
        if self.correction != 1.0:
            factor = torch.ones_like(factor)
        if optimizer == "sgd":
            return factor
        check.choice("optimizer", optimizer, OPTIMIZERS)
        return factor.sqrt()

    @property
    def effective_iterations(self) -> Tensor:
        """0-d float64: iterations of uniform sampling that the run so far is worth.

        RAIS: the sum of its gains (Johnson & Guestrin 2018); any other method: ``.step``.
        """
        return self._method.effective_iterations(self._table)

    def probabilities(self) -> Tensor:
        """float64 [N]: the probabilities of each draw of the next minibatch, exactly. O(N).

        0 for excluded samples.
        """
        return self._method.probabilities(self._table)

    # What it has learnt --------------------------------------------------------------------------

    @property
    def mean(self) -> Tensor:
        """float32 [N]: moving mean of each sample's score; 0 if unseen or excluded. A copy.

        Methods with weights of their own (all but emais, loss and auto) keep the last weight here.
        """
        return self._column(MEAN)

    @property
    def var(self) -> Tensor:
        """float32 [N]: moving variance of each sample's score; 0 if unseen or excluded. A copy."""
        return self._column(VAR)

    @property
    def last_seen(self) -> Tensor:
        """int64 [N]: iteration of each sample's last observation; -1 if unseen, -2 if excluded. A
        copy.

        Intervals are kept modulo 2^31: an observation longer ago appears as a later one.

        Methods that give unseen samples a weight of their own (online_batch, prioritized) count
        that as seen.
        """
        self._column(LAST)  # or an error
        return self._table.last_seen()

    @property
    def importance(self) -> Tensor:
        """float32 [N]: each sample's weight, floored and rounded to 16 bits, before flattening.

        Unseen samples have the mean of the seen ones; all are 1 while nothing has been seen.
        Excluded ones have 0.
        """
        table = self._table
        if table.states is None or int(table.scalars[SEEN]) == 0:
            return table.is_active().float()
        weights, last = table.codes().view(torch.float32), table.column(LAST)
        mean = weights[last >= 0].double().mean().float()
        return torch.where(last == LAST_UNSEEN, mean, weights)

    def _column(self, position: int) -> Tensor:
        if self._table.states is None:
            raise AttributeError(f"method {self._method.name!r} keeps no state of the samples")
        return self._table.column(position).clone()

    def __repr__(self) -> str:
        a = self._arguments
        correction = "" if self.correction == 1.0 else f", correction={self.correction:g}"
        text = (
            f"Sampler(num_samples={a['num_samples']}, batch_size={a['batch_size']}, "
            f"method={self._method!r}, max_duplicates={a['max_duplicates']:g}, "
            f"flatten={a['flatten']!r}, scheme={a['scheme']!r}, device={str(self.device)!r}, "
            f"seed={a['seed']}{correction}{self._place})"
        )
        if self.device.type == "meta":
            return text
        stats = self.stats()
        return (
            f"{text} at step {stats['step']:.0f}, {PHASES[int(stats['phase'])]}, "
            f"effective_batch_size={stats['effective_batch_size']:.4g}, "
            f"efficiency={stats['efficiency']:.3g}"
        )


def _staleness(table: Table) -> Tensor:
    """0-d float64: iterations since the last observation, mean over the seen samples."""
    last = table.column(LAST)
    passed = (table.scalars[UPDATES] - last) & LATEST
    return torch.where(last < 0, 0, passed).sum(dtype=torch.float64) / table.scalars[SEEN]
