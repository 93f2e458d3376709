"""One large data set in shards: every process draws from samples of its own, all of them together
from one distribution.

:mod:`fastis.kernels.shards` has the arithmetic of the draws, :mod:`fastis.moments` the traces,
:mod:`fastis.sharded_state` what is saved.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from fastis import check
from fastis.batch import Scored, observe, with_coefficients
from fastis.categorical import seed_from
from fastis.kernels import kernels_for
from fastis.kernels.constants import FLATTEN, SCHEMES, Constants, cap_ratio
from fastis.kernels.flatten import tell_of_others
from fastis.kernels.layout import without_replacement
from fastis.kernels.shards import (
    NO_CAP,
    Gathered,
    Message,
    Shards,
    exponent_of_shard,
    floor_is_late,
    shard_probabilities,
    shard_sizes,
)
from fastis.kernels.table import Batch, Share
from fastis.methods import Method, from_name
from fastis.methods.base import FOREVER
from fastis.misuse import check_returned
from fastis.moments import WINDOW, SharedMoments
from fastis.ranks import Ranks, agreed_seed
from fastis.sampler import Sampler, _duplicates
from fastis.sharded_state import ResumableShards

STRATEGIES = ("global", "stratified")
_MASK = 2**64 - 1


class ShardedSampler(ResumableShards, Sampler):
    """A :class:`fastis.Sampler` whose table lies in shards, one in each process of a group.

    Rank k owns the samples ``sampler.shard``, a range of the indices that is fixed, draws from
    these alone, and keeps their states: sixteen bytes for each sample of its own. So the data can
    lie in shards too, and 1e10 samples need no more memory in one place than their share.

    - ``strategy="global"``: all ranks together draw a minibatch of R B samples with the
      probabilities of one table of all. In a step a rank sends 16 bytes, and draws those of the
      R B draws that fall into its shard: about B, more where importance is.
    - ``strategy="stratified"``: each rank draws B of its own, by the importance within its shard
      (p = w / (R W) of all ranks' draws, W the shard's total). Nothing is sent.

    Parameters
    ----------
    num_samples : int
        N, of all ranks. Rank k owns the k-th part of ``torch.arange(N).chunk(R)``: below 2^32.
    batch_size : int
        B, per process, as everywhere in PyTorch; at most the size of the smallest shard.
    group : ProcessGroup, optional
        of torch.distributed, of R ranks; None: the default group. Where minibatches are drawn in
        another thread than the one that trains, a group of its own (``dist.new_group()``).
    strategy : "global" or "stratified"
    method : str or fastis.methods.Method
        "emais", "loss", "scan", "uniform", or such an object with options.
    max_duplicates : float
        D, of the minibatch of all ranks: R B p <= D. With "global" the cap follows from the totals
        of the step before: where the capped total falls in a step, by a part a, an expected number
        of copies can be D / (1 - a) in that step. Coefficients are those of the very draw.
    flatten : "cap", or with "stratified" also "mix"
    scheme, correction, device
        as for :class:`fastis.Sampler`; slices are those of the minibatch of all ranks ("global").
    seed : int, optional
        the same on all ranks; None: the first rank's, from torch's default generator.

    Raises
    ------
    TypeError, ValueError
        naming the argument, what was expected and what came; also where ranks differ in them.

    All ranks call :meth:`sample` (and the constructor, and :meth:`probabilities`) in the same
    order, since they wait for one another there; :meth:`update` sends nothing.

    **Weights.** With "global" a minibatch has ``n = len(batch.indices)`` rows, which differ from
    rank to rank. Its weights are ``r n / B`` with r = 1/(N p), so that the mean over n rows, as
    every loss of fastis takes it, averaged over the ranks, as DistributedDataParallel does, is the
    mean over all R B draws. (A denominator of your own has n where it had B.) A rank that drew
    nothing gets one sample with weight 0, and takes part in all collectives.

    A sample without a score so far has the mean weight of its shard's; in a shard without any, of
    all shards'.

    Equivalent to, with the importance w of all ranks (capped, when there is a cap)::

        p = w / w.sum()
        drawn = torch.multinomial(p, R * B, replacement=True)
        mine = drawn[(drawn >= shard.start) & (drawn < shard.stop)]
        weights = 1 / (num_samples * p[mine]) * len(mine) / B

    Example
    -------
    >>> sampler = fastis.ShardedSampler(num_samples=10**8, batch_size=128)
    >>> batch = sampler.sample()
    >>> rows = batch.indices - sampler.shard.start  # where the data lie in shards too
    >>> out = fastis.cross_entropy(ddp_model(x[rows]), y[rows], batch.weights)
    >>> sampler.update(batch, out)
    """

    def __init__(
        self,
        num_samples: int,
        batch_size: int,
        *,
        group: Any = None,
        strategy: str = "global",
        method: str | Method = "emais",
        max_duplicates: float = 2.0,
        flatten: str = "cap",
        scheme: str = "multinomial",
        correction: float = 1.0,
        device: torch.device | str | None = None,
        seed: int | None = None,
    ) -> None:
        self._exchange = group if isinstance(group, Ranks) else Ranks.over(group)
        ranks = self._exchange.ranks
        n = check.integer("num_samples", num_samples, ranks)
        b = check.integer("batch_size", batch_size, 1, 2**31 - 1)
        self._is_global = check.choice("strategy", strategy, STRATEGIES) == "global"
        self._method = _in_shards(from_name(method))
        self._sizes = shard_sizes(n, b, ranks)
        if self._is_global and check.choice("flatten", flatten, ["cap", "mix"]) == "mix":
            raise ValueError("flatten must be 'cap' with strategy='global', got 'mix'")
        of, drawn = (n, ranks * b) if self._is_global else (int(self._sizes.min()), b)
        self._arguments: dict[str, Any] = {
            "num_samples": n,
            "batch_size": b,
            "strategy": strategy,
            "method": self._method,
            "max_duplicates": _duplicates(max_duplicates, of, drawn, self._method.has_states),
            "flatten": check.choice("flatten", flatten, ["cap", "mix"]),
            "scheme": check.choice("scheme", scheme, SCHEMES),
            "rank": self._exchange.rank,
            "ranks": ranks,
            "group": False,
            "seed": None if seed is None else check.integer("seed", seed, 0, 2**64 - 1),
        }
        self._correct(correction)
        shown = {**self._settings(), "correction": self.correction, "rank": None}
        own_seed = seed_from(None, torch.device("cpu")) if seed is None else seed
        self._arguments["seed"] = agreed_seed(self._exchange, own_seed, shown)
        warmup = self._method.warmup_draws(int(self._sizes.max()) // b)
        device = torch.get_default_device() if device is None else torch.device(device)
        with torch.inference_mode(False):
            place = torch.empty(0, device=device).device
            self._use(self._new_table(min(warmup, FOREVER), place))
            self._use_shards()

    def _constants(self, warmup_draws: int) -> Constants:
        a, n, b = self._arguments, int(self._sizes[self._exchange.rank]), self.batch_size
        draws = b * self._exchange.ranks if self._is_global else b  # under one cap
        return Constants(
            num_samples=n,
            batch_size=b,
            seed=self._own_seed(),
            warmup_draws=warmup_draws,
            batches_per_epoch=max(1, n // b),
            max_duplicates=min(a["max_duplicates"], draws),
            flatten=FLATTEN["none" if a["max_duplicates"] >= draws else a["flatten"]],
            scheme=SCHEMES[a["scheme"]],
            has_states=self._method.has_states,
            shard=self._is_global,
            keeps_moments=False,
            **{**self._method.constants(), "least_gain": 0.0},  # one rank's traces can't decide it
        )

    def _pause_or_not(self) -> None:
        """Shards do not pause."""

    def _use_shards(self) -> None:
        """What belongs to the table in use, and to the others beside it."""
        a, rank, ranks = self._arguments, self._exchange.rank, self._exchange.ranks
        n, draws = self.num_samples, self.batch_size * ranks
        no_cap = a["max_duplicates"] >= draws
        self._shards = Shards(
            rank=rank,
            sizes=self._sizes,
            batch_size=draws,
            scheme=SCHEMES[a["scheme"]],
            seed=a["seed"],
            cap=None if no_cap else cap_ratio(a["max_duplicates"], draws, n),
        )
        self._begin = int(self._sizes[:rank].sum())
        self._theta = NO_CAP
        # Of a rank's mean over draws that are uniform in its shard, or all from it.
        self._share_of_ranks = int(self._sizes[rank]) * ranks / n
        self._moments = SharedMoments(self._table, draws, a["seed"])
        self._drawn = Batch(
            torch.empty(draws, dtype=torch.int64, device=self.device),
            torch.empty(draws, dtype=torch.float32, device=self.device),
        )

    def _own_seed(self) -> int:
        """Of the rank: for whatever is drawn from the shard alone."""
        return int((self._arguments["seed"] + 0x9E3779B97F4A7C15 * self._exchange.rank) & _MASK)

    # The step ------------------------------------------------------------------------------------

    def sample(self) -> Batch:
        """This rank's part of the next minibatch: indices into the whole data set, new tensors.

        Collective with "global": 16 bytes a rank. About B rows, at least one.
        """
        watch = self._watch
        watch.draws += 1
        if watch.updates == 0:
            watch.drawn()
        with self._table.lock:
            batch = self._next_of_all() if self._is_global else self._next_of_shard()
        batch.indices.add_(self._begin)
        return batch

    def _next_of_shard(self) -> Batch:
        """B draws from this shard alone, each of which stands for as many as the shard has."""
        batch = self._new_batch()
        self._kernels().draw(self._table, batch)
        if self._share_of_ranks != 1:
            batch.weights.mul_(self._share_of_ranks)
        if self._correction != 1:
            batch.weights.pow_(self._correction)
        return batch

    def _next_of_all(self) -> Batch:
        draw = self._moments.draws
        gathered = self._gather(self._moments.to_send(draw))
        tell_of_others(self._table, *gathered.others)
        if without_replacement(self._table, draw):
            batch = self._next_of_shard()
        else:
            batch = self._own_draws(gathered.share)
        self._theta = gathered.theta
        self._moments.receive(draw, gathered.moment)
        if floor_is_late(self._table):
            self._kernels().rescale(self._table)
        return batch

    def _own_draws(self, share: Share) -> Batch:
        n = self._kernels().draw_share(self._table, share, self._drawn)
        if n == 0:  # something to take part in the collectives with
            indices = torch.zeros(1, dtype=torch.int64, device=self.device)
            return Batch(indices, torch.zeros(1, device=self.device))
        batch = Batch(self._drawn.indices[:n].clone(), self._drawn.weights[:n].clone())
        if self._correction != 1:
            batch.weights.pow_(self._correction)
        if n != self.batch_size:
            batch.weights.mul_(n / self.batch_size)
        return batch

    def _gather(self, moment: float) -> Gathered:
        """One exchange. A rank that has no others need not wait for the next step's theta."""
        words = self._exchange.gather(self._message(moment).packed())
        gathered = self._shards.gather(words, self._theta)
        while self._exchange.ranks == 1 and gathered.theta != self._theta:
            self._theta = gathered.theta
            words = self._message(moment).packed()[None]
            gathered = self._shards.gather(words, self._theta)
        return gathered

    def _message(self, moment: float) -> Message:
        exponent = exponent_of_shard(self._table)
        theta = self._theta.of_table(0 if exponent is None else exponent)
        return Message(self._kernels().shard_total(self._table, theta), exponent, moment)

    def _kernels(self) -> ModuleType:
        return kernels_for("table", self._device_type)

    def update(
        self,
        batch: Batch,
        out: Scored | Sequence[Scored] | Tensor,
        *,
        indices: Tensor | Sequence[int] | None = None,
    ) -> None:
        """Learns from this rank's part of a minibatch; see :meth:`fastis.Sampler.update`.

        Sends nothing. All ranks do as many updates.

        Raises
        ------
        TypeError, ValueError
            as there.
        IndexError
            for samples of other ranks (on a GPU such rows are left out).
        """
        observation = observe(self._table.device, self._observed_of, batch, out)
        if indices is not None:
            check_returned(batch, indices)
        n, b = observation.indices.numel(), self.batch_size
        if n == 0:
            raise ValueError("batch must have at least one sample, as every minibatch has, got 0")
        own = observation._replace(indices=observation.indices - self._begin)
        self._check_own(own.indices)
        if self._is_global and n != b:
            own = own._replace(weights=own.weights * (b / n))
        if self._correction != 1:
            own = with_coefficients(own, self._correction)
        with self._table.lock:
            self._kernels().update(self._table, own)
            total = None if own.mean_grad is None else own.mean_grad * float(b)
            self._moments.add(own, total, WINDOW if self._is_global else 0)
        self._watch.updated()
        if getattr(out, "weighted", None) is not True:
            self._watch.not_surely_weighted(batch, out)

    def _check_own(self, indices: Tensor) -> None:
        if self._device_type != "cpu":
            return
        least, most = (int(value) for value in torch.aminmax(indices))
        if least < 0 or most >= len(self.shard):
            raise IndexError(
                f"batch.indices must be in this rank's shard, [{self.shard.start}, "
                f"{self.shard.stop}), got values from {least + self._begin} to "
                f"{most + self._begin}"
            )

    def refresh(self, indices: Tensor, out: Scored | Sequence[Scored] | Tensor) -> None:
        """Not for shards.

        Raises
        ------
        TypeError
            always.
        """
        raise TypeError("a ShardedSampler learns by update(batch, out) alone, not by refresh()")

    def fold(self, indices: Tensor, scores: Tensor, iteration: int) -> None:
        """Not for shards.

        Raises
        ------
        TypeError
            always.
        """
        raise TypeError("a ShardedSampler learns by update(batch, out) alone, not by fold()")

    def reset(self, indices: Tensor | Sequence[int]) -> None:
        """Not for shards.

        Raises
        ------
        TypeError
            always.
        """
        raise TypeError("a ShardedSampler keeps the samples that it has: there is no reset()")

    def exclude(self, indices: Tensor | Sequence[int]) -> None:
        """Not for shards.

        Raises
        ------
        TypeError
            always.
        """
        raise TypeError("a ShardedSampler keeps the samples that it has: there is no exclude()")

    def update_and_sample(self, batch: Batch, out: Scored | Sequence[Scored] | Tensor) -> Batch:
        """:meth:`update`, then :meth:`sample`."""
        self.update(batch, out)
        return self.sample()

    def share_moments(self) -> None:
        """Brings the traces up to date with those of all ranks; collective, 40 bytes a rank.

        For "stratified", whose steps send nothing: until the first call ``lr_factor()`` is 1 and
        the traces are NaN; they stay as they are between calls, the same on all ranks. Call it as
        often as the learning rate should follow: every 100 steps, say. With "global" every step
        brings a part of them, and this does nothing.
        """
        if self._is_global:
            return
        own = self._moments.of_request()
        found = self._exchange.gather(own.view(torch.int64)).view(torch.float64)
        self._moments.answer(found.sum(0), self._exchange.ranks)

    # What can be read ----------------------------------------------------------------------------

    @property
    def num_samples(self) -> int:
        """N, of all ranks."""
        return int(self._arguments["num_samples"])

    @property
    def batch_size(self) -> int:
        """B, per process."""
        return int(self._arguments["batch_size"])

    @property
    def shard(self) -> range:
        """The indices of the samples that this rank owns."""
        return range(self._begin, self._begin + int(self._sizes[self._exchange.rank]))

    @property
    def strategy(self) -> str:
        """ "global" or "stratified"."""
        return str(self._arguments["strategy"])

    def probabilities(self) -> Tensor:
        """float64 [len(shard)]: with what probability a draw of the next minibatch of all ranks is
        each of this shard's samples, exactly. Collective with "global". O(len(shard))."""
        if self._is_global:
            gathered = self._gather(math.nan)
            if not without_replacement(self._table, self._moments.draws):
                return shard_probabilities(self._table, gathered.share)
        return super().probabilities() / self._exchange.ranks

    def __repr__(self) -> str:
        a = self._arguments
        return (
            f"ShardedSampler(num_samples={a['num_samples']}, batch_size={a['batch_size']}, "
            f"strategy={a['strategy']!r}, method={self._method!r}, "
            f"max_duplicates={a['max_duplicates']:g}, scheme={a['scheme']!r}, "
            f"device={str(self.device)!r}, seed={a['seed']}): rank {a['rank']} of {a['ranks']}, "
            f"samples {self.shard.start} to {self.shard.stop - 1}"
        )


def _in_shards(method: Method) -> Method:
    if method.name not in ("emais", "loss", "scan", "uniform") or not method.fused:
        raise ValueError(
            "method must be 'emais', 'loss', 'scan' or 'uniform' in shards, without a score_fn, "
            f"got {method!r}"
        )
    return method
