"""Timesteps of diffusion models by importance, in the place of improved-diffusion's samplers.

A training step of a diffusion model draws a timestep for every image. Some timesteps have far
larger gradients than others, above all under the variational bound, and drawn uniformly these are
most of the gradient's noise (Nichol & Dhariwal 2021, section 3.3). The T timesteps are the
"samples" here; images come from the data loader, as ever.

Names and signatures are those of openai/improved-diffusion (improved_diffusion/resample.py), which
guided-diffusion and DiT copied. Nothing here needs any of these to be installed.
"""

from __future__ import annotations

import sys
import weakref
from abc import ABCMeta
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed
from numpy.typing import NDArray
from torch import Tensor, nn

from fastis import check
from fastis.categorical import seed_from
from fastis.kernels.layout import DRAWS
from fastis.kernels.table import Batch
from fastis.methods import EMAIS
from fastis.ranks import Ranks, agreed_seed
from fastis.sampler import Sampler

_CPU = torch.device("cpu")
_FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_INTEGERS = (torch.int64, torch.int32)
_VERSION = 1
_OF_RANKS = 0x9E3779B97F4A7C15  # from one rank's key to the next one's: 2^64 over the golden ratio
# Timesteps are few and visited often: what is known of them can be trusted further than of samples.
FLOOR = 0.01


class TimestepSampler:
    """Draws timesteps in proportion to the root mean square of their gradient norms, or losses.

    In the place of ``create_named_schedule_sampler(name, diffusion)``, of improved-diffusion's
    ``LossSecondMomentResampler`` in particular: ``TrainLoop(schedule_sampler=...)`` takes it as it
    is. Weights are 1/(T p), so that the objective stays what it is under uniform timesteps.

    Parameters
    ----------
    diffusion : object with ``num_timesteps``, or int
        T. Loops of its package that ask for a ``LossAwareSampler`` are told that this is one.
    model : torch.nn.Module, optional
        the network as the loss calls it (wrapped, if it is): timesteps are then drawn by the norm
        of the loss's gradient at its output, a tensor ``[B, ...]``, which a hook takes from the
        backward pass. That is nearer to what is optimal than the loss. None: by the losses that
        ``update_with_local_losses`` is given, as theirs does.
    method : fastis.methods.EMAIS, optional
        with its options. None: ``EMAIS(floor=0.01)``, no weight above 101.
    scheme : "systematic", "stratified" or "multinomial"
        how a minibatch is drawn, see :class:`fastis.Sampler`; the timesteps are then shuffled. One
        timestep may come any number of times: it meets another image and other noise each time.
    group : torch.distributed.ProcessGroup or False, optional
        whose processes learn from one another: all have the same probabilities, and each draws its
        own timesteps. None: all processes, where torch.distributed is initialised at the first
        draw. False: this one alone.
    seed : int, optional
        as in :class:`fastis.Sampler`; in a group that of the first rank, from which the others'
        follow.

    Attributes
    ----------
    num_timesteps : int
        T.
    sampler : fastis.Sampler or None
        the table over timesteps, from the first draw on: ``.stats()``, ``.mean``, ``.importance``.

    Raises
    ------
    TypeError, ValueError
        naming the argument, what was expected and what came.

    Equivalent to, after two epochs of timesteps without replacement, with moving averages for
    E::

        p = E[score**2].sqrt()  # [T]; score: the gradient's norm at the output, or the loss
        p = p.clamp(min=0.01 * p.mean())
        p = p / p.sum()
        t = torch.multinomial(p, batch_size, replacement=True)
        weights = 1 / (T * p[t])

    The table is on the host, as theirs: an update waits for a GPU's scores, once. Mixed precision:
    by the gradients it goes as they come to the output, whose scale does not matter unless it
    changes; not finite ones are left out.

    Example
    -------
    >>> schedule_sampler = TimestepSampler(diffusion, model=model)
    >>> t, weights = schedule_sampler.sample(batch_size, device)
    >>> losses = diffusion.training_losses(model, x, t)["loss"]
    >>> (losses * weights).mean().backward()
    """

    def __init__(
        self,
        diffusion: Any,
        *,
        model: nn.Module | None = None,
        method: EMAIS | None = None,
        scheme: str = "systematic",
        group: Any = None,
        seed: int | None = None,
    ) -> None:
        steps = getattr(diffusion, "num_timesteps", diffusion)
        self.num_timesteps = check.integer("diffusion.num_timesteps", steps, 1, 2**24)
        method = EMAIS(floor=FLOOR) if method is None else method
        if not isinstance(method, EMAIS) or method.score_fn is not None:
            raise TypeError(
                "method must be a fastis.methods.EMAIS without score_fn, or None, got "
                f"{check.describe(method)}"
            )
        if model is not None and not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module or None, got {check.describe(model)}")
        self._method, self._group = method, group
        self._scheme = check.choice("scheme", scheme, ["systematic", "stratified", "multinomial"])
        self._seed = None if seed is None else check.integer("seed", seed, 0, 2**64 - 1)
        self._ranks: Ranks | None = None
        self.sampler: Sampler | None = None
        self._drawn: tuple[Tensor, Tensor] | None = None  # by the last draw, until it is scored
        self._watches = model is not None
        if model is not None:
            model.register_forward_hook(_Hook(self))
        _tell(type(diffusion))

    # Drawing -------------------------------------------------------------------------------------

    def weights(self) -> NDArray[np.float64]:
        """``[T]``: what timesteps are drawn in proportion to at the moment, of mean 1."""
        if self.sampler is None:
            return np.ones(self.num_timesteps)
        return self.sampler.probabilities().numpy() * self.num_timesteps

    def sample(
        self, batch_size: int, device: torch.device | str | int = _CPU
    ) -> tuple[Tensor, Tensor]:
        """Timesteps int64 ``[batch_size]`` and their weights float32 ``[batch_size]``.

        Parameters
        ----------
        batch_size : int
            at least 1. It may change; systematic draws are made for the first one.
        device : torch.device or str
            where they are wanted.

        Raises
        ------
        TypeError, ValueError
            for an impossible ``batch_size``; in a group at the first draw, which all ranks make
            together, for arguments that are not the same on all.
        """
        count = check.integer("batch_size", batch_size, 1, 2**31 - 1)
        if self.sampler is None:
            self.sampler = self._new_sampler(count)
        batches, have = [], 0
        while have < count:
            batches.append(self._shuffled_batch(self.sampler))
            have += len(batches[-1].indices)
        t = torch.cat([batch.indices for batch in batches])[:count]
        weights = torch.cat([batch.weights for batch in batches])[:count]
        self._drawn = t, weights
        return t.to(device), weights.to(device)

    def _shuffled_batch(self, sampler: Sampler) -> Batch:
        """Neighbours of a systematic draw are neighbours in time: any part of a shuffled one is a
        fair draw, and data that are in some order meet all timesteps."""
        number = int(sampler._table.scalars[DRAWS])
        batch = sampler.sample()
        key = (int(sampler._arguments["seed"]) + number * _OF_RANKS) % 2**63
        generator = torch.Generator().manual_seed(key)
        order = torch.randperm(len(batch.indices), generator=generator)
        return Batch(batch.indices[order], batch.weights[order])

    def _new_sampler(self, batch_size: int) -> Sampler:
        """A table that knows nothing, with this rank's seed."""
        if self._ranks is None:
            self._ranks = self._meet()
        method = self._method
        if batch_size > self.num_timesteps:  # there is no drawing that many without replacement
            method = type(method)(**{**method.options(), "warmup_epochs": 0})
        return Sampler(
            self.num_timesteps,
            batch_size,
            method=method,
            max_duplicates=batch_size,
            scheme=self._scheme,
            group=False,
            device=_CPU,
            seed=self._own_seed(),
        )

    def _meet(self) -> Ranks:
        """The ranks, once they have agreed on a seed."""
        seed = seed_from(None, _CPU) if self._seed is None else self._seed
        initialized = torch.distributed.is_available() and torch.distributed.is_initialized()
        if self._group is False or (self._group is None and not initialized):
            ranks = Ranks(0, 1, lambda message: message[None])
        else:
            ranks = Ranks.over(self._group)
        shown = {
            "num_timesteps": self.num_timesteps,
            "method": self._method.described(),
            "scheme": self._scheme,
            "model": self._watches,
        }
        self._seed = agreed_seed(ranks, seed, shown)
        return ranks

    def _own_seed(self) -> int:
        assert self._seed is not None
        assert self._ranks is not None
        return (self._seed + self._ranks.rank * _OF_RANKS) % 2**64

    # Learning ------------------------------------------------------------------------------------

    def update_with_local_losses(self, local_ts: Tensor, local_losses: Tensor) -> None:
        """Learns from the losses of this process's minibatch, and of all others' in a group.

        Nothing with a ``model``, whose gradients say more. To be called by all ranks of a group,
        whose minibatches may differ in size.

        Parameters
        ----------
        local_ts : Tensor
            int64 ``[n]``, timesteps.
        local_losses : Tensor
            floating ``[n]``, their losses without the weights.

        Raises
        ------
        TypeError, ValueError
            naming the argument, before anything has changed.
        """
        t, losses = self._checked("local_ts", local_ts, "local_losses", local_losses)
        if self._watches:
            return
        drawn, self._drawn = self._drawn, None
        if drawn is not None and torch.equal(drawn[0], t):
            coefficients = drawn[1]
        else:
            coefficients = self._coefficients(t)
        self._learn(t, losses, coefficients)

    def update_with_all_losses(
        self, ts: Sequence[int] | Tensor, losses: Sequence[float] | Tensor
    ) -> None:
        """Learns from losses, or gradient norms, of any timesteps: one iteration.

        Says nothing to other processes: in a group all ranks must call it with the same ``ts`` and
        ``losses``. For loops that gather them themselves. Of timesteps that were not drawn here all
        is learnt but whether it pays: give ``method=EMAIS(..., least_gain=0.0)`` then, or draws may
        go uniform for an apparent lack of gain.

        Parameters
        ----------
        ts : sequence of int, or int64 tensor [n]
        losses : sequence of float, or floating tensor [n]

        Raises
        ------
        TypeError, ValueError
            naming the argument, before anything has changed.
        """
        if not isinstance(ts, Tensor):
            ts = torch.tensor([check.integer("ts", t, 0) for t in ts], dtype=torch.int64)
        if not isinstance(losses, Tensor):
            losses = torch.tensor([float(x) for x in losses], dtype=torch.float64)
        t, x = self._checked("ts", ts, "losses", losses)
        self._update(t, x, self._coefficients(t))

    def _checked(self, ts_name: str, ts: Any, name: str, scores: Any) -> tuple[Tensor, Tensor]:
        """Timesteps int64 ``[n]`` and scores float64 ``[n]``, on the host."""
        t = check.tensor(ts_name, ts).detach().to(_CPU)
        x = check.tensor(name, scores).detach().to(_CPU)
        t = check.vector(ts_name, t, None, _INTEGERS, _CPU).long()
        x = check.vector(name, x, len(t), _FLOATS, _CPU).double()
        if len(t) and not 0 <= int(t.min()) <= int(t.max()) < self.num_timesteps:
            raise ValueError(
                f"{ts_name} must be in [0, {self.num_timesteps - 1}], got {int(t.min())} to "
                f"{int(t.max())}"
            )
        return t, x

    def _coefficients(self, t: Tensor) -> Tensor:
        """float32 ``[n]``: those of the present probabilities."""
        return torch.from_numpy(1 / self.weights()[t.numpy()]).float()

    def _learn(self, t: Tensor, scores: Tensor, coefficients: Tensor) -> None:
        """From all ranks' scores."""
        if self._ranks is None:
            self._ranks = self._meet()
        if self._ranks.ranks > 1:
            t, scores, coefficients = _gathered(self._ranks, t, scores, coefficients)
        self._update(t, scores, coefficients)

    def _update(self, t: Tensor, scores: Tensor, coefficients: Tensor) -> None:
        if len(t) == 0:
            return
        if self.sampler is None:
            self.sampler = self._new_sampler(len(t))
        # The table takes one score a timestep: the root mean square of those of the minibatch,
        # whose moving second moment is that of the scores themselves.
        observed = _root_mean_squares(t, scores, self.num_timesteps)
        self.sampler.update(Batch(t, coefficients), observed.float())

    def _await_gradient(self, output: Any) -> None:
        """Of the forward pass that the last draw is for; others are none of our business."""
        if self._drawn is None or not torch.is_grad_enabled():
            return
        if not isinstance(output, Tensor) or not output.is_floating_point():
            raise TypeError(f"model must return a tensor of floats, got {check.describe(output)}")
        if not output.requires_grad or len(output) != len(self._drawn[0]):
            return
        (t, weights), self._drawn = self._drawn, None

        def take(gradient: Tensor) -> None:
            handle.remove()  # a second backward pass brings nothing new
            norms = gradient.detach().flatten(1).float().norm(dim=1).to(_CPU).double()
            self._learn(t, norms * (len(t) / weights), weights)

        handle = output.register_hook(take)

    # State ---------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """All that a resumed run needs to go on bit for bit: fit for ``torch.save`` and
        ``weights_only=True``. Alike on all ranks: that of one is enough."""
        sampler = None if self.sampler is None else self.sampler.state_dict()
        if sampler is not None:
            sampler["settings"]["seed"] = self._seed
        return {"version": _VERSION, "num_timesteps": self.num_timesteps, "sampler": sampler}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes over :meth:`state_dict` of one with the same arguments; all ranks of a group
        together, whose number may have changed.

        Raises
        ------
        TypeError, ValueError
            for a state of another kind, T or options, or damaged, before anything has changed.
        """
        if not isinstance(state, Mapping):
            raise TypeError(f"state must be a dict, got {check.describe(state)}")
        for name, ours in (("version", _VERSION), ("num_timesteps", self.num_timesteps)):
            if state.get(name) != ours:
                raise ValueError(f"state must have {name}={ours}, got {state.get(name)!r}")
        inner = state.get("sampler")
        if inner is None:
            self.sampler = self._drawn = None
            return
        settings = inner.get("settings") if isinstance(inner, Mapping) else None
        if not isinstance(settings, Mapping):
            raise ValueError("state must have the sampler's settings, got none")
        size = check.integer("state's batch_size", settings.get("batch_size"), 1, 2**31 - 1)
        seed = check.integer("state's seed", settings.get("seed"), 0, 2**64 - 1)
        loaded, before = self._new_sampler(size), self._seed
        self._seed = seed
        try:
            own = {**settings, "seed": self._own_seed()}
            loaded.load_state_dict({**inner, "settings": own})
        except BaseException:
            self._seed = before
            raise
        self.sampler, self._drawn = loaded, None

    def __repr__(self) -> str:
        by = "gradients" if self._watches else "losses"
        return f"TimestepSampler(num_timesteps={self.num_timesteps}, by {by}, {self.sampler!r})"


class _Hook:
    """Of a network, whose copies and pickles forget it: they are not what is trained."""

    def __init__(self, sampler: TimestepSampler | None = None) -> None:
        self._sampler = (lambda: None) if sampler is None else weakref.ref(sampler)

    def __call__(self, module: nn.Module, inputs: Any, output: Any) -> None:
        sampler = self._sampler()
        if sampler is not None:
            sampler._await_gradient(output)

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return _Hook, ()


def _root_mean_squares(t: Tensor, scores: Tensor, num_timesteps: int) -> Tensor:
    """float64 ``[n]``: of the finite scores of the same timestep; others stay as they are."""
    finite = scores.isfinite()
    squares = torch.where(finite, scores, 0.0).square()
    sums = scores.new_zeros(num_timesteps).index_add_(0, t, squares)
    counts = scores.new_zeros(num_timesteps).index_add_(0, t, finite.double())
    return torch.where(finite, (sums[t] / counts[t]).sqrt(), torch.nan)


def _gathered(ranks: Ranks, t: Tensor, *columns: Tensor) -> tuple[Tensor, ...]:
    """Those of all ranks, in order; every rank may bring another number."""
    sizes = ranks.gather(torch.tensor([len(t)]))[:, 0].tolist()
    message = torch.zeros(1 + len(columns), max(sizes), dtype=torch.float64)
    for row, values in zip(message, (t, *columns), strict=True):
        row[: len(t)] = values
    found = ranks.gather(message.view(torch.int64).flatten()).view(torch.float64)
    parts = found.view(len(sizes), len(message), -1)
    everyone = torch.cat([part[:, :n] for part, n in zip(parts, sizes, strict=True)], 1)
    return everyone[0].long(), everyone[1], everyone[2].float()


def _tell(kind: type) -> None:
    """Makes a TimestepSampler a ``LossAwareSampler`` to the package that a diffusion is from.

    Its training loop calls ``update_with_local_losses`` for such alone, and without a word for no
    other: ``isinstance(schedule_sampler, LossAwareSampler)``.
    """
    packages = {base.__module__.partition(".")[0] for base in kind.__mro__} - {"builtins"}
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] in packages:
            base = getattr(module, "LossAwareSampler", None)
            if isinstance(base, ABCMeta):
                base.register(TimestepSampler)
