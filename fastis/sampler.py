"""The sampler: which samples come next, with which coefficients, and what was learnt of them.

It sits at both ends of a training step: ``sample()`` before the forward pass, ``update()`` with the
scored loss after it. Between the two it knows neither the model nor the data.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NoReturn

import torch
from torch import Tensor

from fastis import check
from fastis.batch import Scored, observe, with_coefficients
from fastis.categorical import seed_from
from fastis.kernels import kernels_for
from fastis.kernels.constants import FLATTEN, SCHEMES, Constants, is_uniform
from fastis.kernels.layout import Table
from fastis.kernels.table import Batch
from fastis.methods import Method, from_name
from fastis.methods.base import FOREVER
from fastis.misuse import Watch, check_group, check_returned, is_group
from fastis.steer import Steerable
from fastis.variance import Variance

_empty_like, _cpu = torch.empty_like, torch.device("cpu")


class Sampler(Steerable):
    """Draws minibatches by importance sampling, and learns each sample's importance on the way.

    A training step calls :meth:`sample` before the forward pass and :meth:`update` after the loss.
    The first epochs (two, for the default method) are drawn without replacement, to score every
    sample once; from then on sample i is drawn with probability p_i and has the coefficient
    ``1/(N p_i)``, which keeps the gradient unbiased. Sixteen bytes of state a sample.

    Parameters
    ----------
    num_samples : int
        N, the size of the training set; below 2^32.
    batch_size : int
        B, indices per minibatch; at most N for methods that start or stay without replacement. In a
        ``group`` of W processes each one's: the global minibatch, of which all else speaks, has
        W B.
    method : str or fastis.methods.Method
        "emais" (Kutsuna 2025), "scan" (uniform without replacement), "uniform" (with), any other
        name of :data:`fastis.methods.BY_NAME`, or an object that carries options, e.g.
        ``fastis.methods.EMAIS(tau=1000, warmup_epochs=1)``.
    max_duplicates : float
        D, the most expected copies of any sample in a minibatch: B max p <= D. At least B/N, which
        is uniform; B or more means no cap.
    flatten : "cap" or "mix"
        how the cap is met: p = min(c w, D/B), which has the least variance, or p = (1 - a) p + a/N,
        which keeps some probability for every sample.
    scheme : "multinomial", "stratified" or "systematic"
        independent draws; one draw from each of B equal slices of the cumulative distribution; or
        one random offset for all slices. The same expectation, with less and less variance.
    correction : float in [0, 1]
        weights are (1/(N p))^correction: see :attr:`correction`.
    group : torch.distributed.ProcessGroup or False, optional
        to be given where torch.distributed has several processes, since each would draw the same
        samples. A process group (``torch.distributed.group.WORLD``, say): one distribution and one
        global minibatch; what its processes draw, in the order of ranks, is what one draws with
        W B. All of them make the sampler together, and call :meth:`sample` and :meth:`update` in
        the same order. False: a process on its own, with a seed of its own.
    device : torch.device or str, optional
        where the state and the minibatches live; None: torch's default device. The data may live
        anywhere.
    seed : int, optional
        of all randomness, in [0, 2^64). Draw b of iteration t depends on (seed, t, b) and the
        scores alone, on every backend and after any resume. None: a number from torch's default
        generator, so that ``torch.manual_seed`` decides; in a group that of the first rank.

    Raises
    ------
    TypeError, ValueError
        naming the argument, what was expected and what came; in a group also, in all processes, for
        arguments that are not the same in all.

    See Also
    --------
    fastis.methods : the methods and their options.
    fastis.EffectiveBatchLR : the learning rate that goes with the reduced variance.

    Equivalent to, for ``method="scan"``, the indices of ``DataLoader(shuffle=True,
    drop_last=True)``; for the default, with the present importance w::

        p = w / w.sum()  # then capped: B * p <= max_duplicates
        indices = torch.multinomial(p, batch_size, replacement=True)
        weights = 1 / (num_samples * p[indices])

    Example
    -------
    >>> sampler = Sampler(num_samples=60000, batch_size=128)
    >>> batch = sampler.sample()
    >>> out = fastis.cross_entropy(model(x[batch.indices]), y[batch.indices], batch.weights)
    >>> sampler.update(batch, out)
    """

    # The class of samplers with a group: fastis.replicated, above this module, sets it.
    _replicated: ClassVar[type[Sampler]]
    _processes = 1

    def __new__(cls, *_: Any, group: Any = None, **__: Any) -> Sampler:
        return super().__new__(cls._replicated if is_group(group) and cls is Sampler else cls)

    def __init__(
        self,
        num_samples: int,
        batch_size: int,
        *,
        method: str | Method = "emais",
        max_duplicates: float = 2.0,
        flatten: str = "cap",
        scheme: str = "multinomial",
        correction: float = 1.0,
        group: Any = None,
        device: torch.device | str | None = None,
        seed: int | None = None,
    ) -> None:
        check_group(group)
        arguments = {
            "num_samples": num_samples,
            "batch_size": batch_size,
            "method": method.described() if isinstance(method, Method) else method,
            "max_duplicates": max_duplicates,
            "flatten": flatten,
            "scheme": scheme,
            "correction": correction,
            "seed": seed,
        }
        seed = self._join(group, arguments, seed_from(None, _cpu) if seed is None else seed)
        if hasattr(num_samples, "__getitem__"):
            kind = type(num_samples).__name__
            raise TypeError(f"num_samples must be an int, got {kind}: pass its length, len(...)")
        n = check.integer("num_samples", num_samples, 1, 2**32 - 1)
        each = check.integer("batch_size", batch_size, 1, (2**31 - 1) // self._processes)
        b = each * self._processes
        self._method = from_name(method)
        warmup_draws = min(self._method.warmup_draws(n // b), FOREVER)
        if b > n and (warmup_draws > 0 or getattr(self._method, "warmup_epochs", 0) > 0):
            raise ValueError(
                f"batch_size must be at most num_samples={n}, since method "
                f"{self._method.name!r} draws without replacement, got {b}"
                f"{f' in {self._processes} processes' if self._processes > 1 else ''}"
            )
        self._arguments: dict[str, Any] = {
            "num_samples": n,
            "batch_size": each,
            "method": self._method,
            "max_duplicates": _duplicates(max_duplicates, n, b, self._method.has_states),
            "flatten": check.choice("flatten", flatten, ["cap", "mix"]),
            "scheme": check.choice("scheme", scheme, SCHEMES),
            "group": group,
            "seed": check.integer("seed", seed, 0, 2**64 - 1),
        }
        self._correct(correction)
        device = torch.get_default_device() if device is None else torch.device(device)
        with torch.inference_mode(False):  # else no update outside of it could write its tensors
            self._use(self._new_table(warmup_draws, torch.empty(0, device=device).device))
            self._pause_or_not()

    def _join(self, group: Any, arguments: Mapping[str, Any], seed: int) -> int:
        """The seed: its own, for a process that is not in a group."""
        if is_group(group):
            kind = type(self).__name__
            raise TypeError(f"group must be False for {kind}: derive it from {self._replicated}")
        return seed

    def _constants(self, warmup_draws: int) -> Constants:
        a = self._arguments
        n, duplicates = a["num_samples"], a["max_duplicates"]
        b = a["batch_size"] * self._processes
        flatten = a["flatten"]
        if duplicates >= b:
            flatten = "none"
        elif is_uniform(duplicates, b, n):
            flatten = "cap"  # which is then exactly uniform; "mix" would need an infinite constant
        return Constants(
            num_samples=n,
            batch_size=b,
            seed=a["seed"],
            warmup_draws=warmup_draws,
            batches_per_epoch=max(1, n // b),
            max_duplicates=min(duplicates, b),
            flatten=FLATTEN[flatten],
            scheme=SCHEMES[a["scheme"]],
            has_states=self._method.has_states,
            **self._method.constants(),
        )

    def _new_table(self, warmup_draws: int, device: torch.device) -> Table:
        table = Table(self._constants(warmup_draws), device)
        table.memory = self._method.memory(table)
        return table

    def _use(self, table: Table) -> None:
        self._table, self._variance = table, Variance(table)
        self._watch = Watch(table, self._arguments["group"])
        self._device_type = table.device.type
        observes_score = type(self._method).observed is Method.observed
        self._observed_of = None if observes_score else self._method.observed
        size = table.constants.batch_size
        self._like = Batch(  # what a minibatch looks like; copying is faster than describing
            torch.empty(size, dtype=torch.int64, device=table.device),
            torch.empty(size, dtype=torch.float32, device=table.device),
        )

    # The step ------------------------------------------------------------------------------------

    def sample(self) -> Batch:
        """The next minibatch: new tensors on the sampler's device, ready to index with.

        May run ahead of :meth:`update` (prefetching): coefficients stay those of the draw.

        Raises
        ------
        ValueError
            where all samples are excluded (:meth:`fastis.Sampler.exclude`); on a GPU see there.
        """
        watch = self._watch
        watch.draws += 1
        if watch.updates == 0:
            watch.drawn()
        batch = self._new_batch()
        kernels = kernels_for("table", self._device_type)
        if self._method.fused and kernels.IS_ATOMIC:
            kernels.draw(self._table, batch)
        else:
            with self._table.lock:
                self._method.next_batch(self._table, batch)
        if self._correction != 1.0:
            batch.weights.pow_(self._correction)
        return batch

    def update(
        self,
        batch: Batch,
        out: Scored | Sequence[Scored] | Tensor,
        *,
        indices: Tensor | Sequence[int] | None = None,
    ) -> None:
        """Learns from one minibatch, once its scores are known: one iteration of ``.step``.

        Parameters
        ----------
        batch : Batch
            as drawn, or of any other length n; for an evaluation pass there is
            :meth:`fastis.Sampler.refresh`.
        out : ScoredLoss, a sequence of them, or a float tensor [B]
            of the whole minibatch, or its parts in order (gradient accumulation); or the scores
            themselves: a residual, a TD error. Without ``mean_grad`` the variance traces take
            ``|G|^2 = 0``.
        indices : int tensor [B] or sequence, optional
            as the data set returned them with its data: an error where they are not those of the
            batch. Waits for a CUDA device.

        Tensors on another device than the sampler's are moved, about 4 B + C numbers. To a sampler
        on a GPU that waits for nothing; a sampler on the host waits until the GPU has computed the
        scores: call ``update`` before ``backward``, so that it need not wait for that too.

        Raises
        ------
        TypeError, ValueError, IndexError
            before anything has changed.

        Warns
        -----
        UserWarning
            once, for a loss to be differentiated that was computed without the coefficients of a
            minibatch that has some; once, for an epoch more updates than draws.

        Non-finite scores, and those from 2^60 on, leave their samples' states unchanged and are
        counted in ``.skipped``; scores below 2^-100 all weigh the same. A sample drawn twice is
        observed once: its first position wins.
        """
        observation = observe(self._table.device, self._observed_of, batch, out)
        if indices is not None:
            check_returned(batch, indices)
        if self._correction != 1.0:
            observation = with_coefficients(observation, self._correction)
        kernels = kernels_for("table", self._device_type)
        if self._method.fused and kernels.IS_ATOMIC:
            kernels.update(self._table, observation)
        else:
            with self._table.lock:
                self._method.update(self._table, observation)
        watch = self._watch
        watch.updates += 1
        if watch.updates > watch.draws + watch.patience:
            watch.updated_too_often()
        if getattr(out, "weighted", None) is not True:
            watch.not_surely_weighted(batch, out)

    def update_and_sample(self, batch: Batch, out: Scored | Sequence[Scored] | Tensor) -> Batch:
        """:meth:`update`, then :meth:`sample`: exactly these two, in one launch on a CUDA device.

        For loops that draw the next minibatch as soon as the last one's scores are known::

            batch = sampler.sample()
            for step in range(total_steps):
                out = fastis.cross_entropy(model(x[batch.indices]), y[batch.indices], batch.weights)
                next_batch = sampler.update_and_sample(batch, out)
                ...
                batch = next_batch

        Raises
        ------
        TypeError, ValueError, IndexError
            as :meth:`update`, before anything has changed: nothing was drawn then. ValueError as
            :meth:`sample`, after the update.
        """
        observation = observe(self._table.device, self._observed_of, batch, out)
        if self._correction != 1.0:
            observation = with_coefficients(observation, self._correction)
        next_batch = self._new_batch()
        with self._table.lock:
            self._method.update_and_draw(self._table, observation, next_batch)
        if self._correction != 1.0:
            next_batch.weights.pow_(self._correction)
        self._watch.updates += 1
        self._watch.draws += 1
        if getattr(out, "weighted", None) is not True:
            self._watch.not_surely_weighted(batch, out)
        return next_batch

    def _part_of(self, global_batch: Batch) -> Batch:
        """What this process trains on of a minibatch that was drawn: all of it, but in a group."""
        return global_batch

    def __iter__(self) -> NoReturn:
        raise TypeError(
            "a fastis.Sampler can't be iterated, nor be the sampler of a torch DataLoader, which "
            "would lose the coefficients: use fastis.DataLoader(dataset, sampler), or "
            "sampler.sample()"
        )

    def __len__(self) -> NoReturn:
        raise TypeError(
            "a fastis.Sampler has no length: minibatches come without end; the data set's is "
            "sampler.num_samples, an epoch's that of fastis.DataLoader(dataset, sampler)"
        )

    def __bool__(self) -> bool:
        return True

    def _new_batch(self) -> Batch:
        return Batch(_empty_like(self._like.indices), _empty_like(self._like.weights))


def _duplicates(max_duplicates: float, num_samples: int, batch_size: int, used: bool) -> float:
    value = check.number("max_duplicates", max_duplicates, 0.0)
    if not used:
        return max(value, batch_size / num_samples)  # uniform draws can't go below, and needn't
    if value * num_samples < batch_size * (1 - 1e-12):  # D = B/N may have been rounded down
        raise ValueError(
            "max_duplicates must be at least batch_size / num_samples = "
            f"{batch_size / num_samples:.6g} (which is uniform), got {max_duplicates!r}"
        )
    return value
