"""What others use in place of a sampler, with what a run asks of a :class:`fastis.Sampler`.

Each is one class, whose keyword arguments are its options. The coefficients go with the minibatch,
so that the loss is sum(r_i loss_i) / B, as in the authors' code.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

import fastis
from bench.experiments.config import RunConfig
from bench.experiments.k_means import k_means
from fastis import check


class Peer(Protocol):
    """What a run asks of it."""

    def sample(self) -> fastis.Batch: ...

    def update(self, batch: fastis.Batch, out: fastis.ScoredLoss) -> None: ...

    def lr_factor(self, optimizer: str = "sgd", rule: str = "linear") -> Tensor: ...

    def reading(self) -> dict[str, float]: ...


class Plain:
    """A peer without coefficients or a factor of the learning rate."""

    def update(self, batch: fastis.Batch, out: fastis.ScoredLoss) -> None:
        pass

    def lr_factor(self, optimizer: str = "sgd", rule: str = "linear") -> Tensor:
        return torch.ones((), dtype=torch.float64)

    def reading(self) -> dict[str, float]:
        return {"effective_batch_size": float("nan"), "efficiency": float("nan")}


class ClassBalanced(Plain):
    """torch's WeightedRandomSampler with weights 1 / n_c: every class is drawn equally often, each
    loss counts alike."""

    def __init__(self, config: RunConfig, labels: Tensor) -> None:
        weights = 1.0 / labels.bincount()[labels].double()
        self.batch_size, self.device = config.batch_size, labels.device
        self.generator = torch.Generator().manual_seed(config.seed)
        self.weights = weights
        self._drawn = iter(())

    def sample(self) -> fastis.Batch:
        batch = next(self._drawn, None)
        if batch is None:  # an epoch's indices at once, as its DataLoader would
            number = len(self.weights) // self.batch_size * self.batch_size
            sampler = torch.utils.data.WeightedRandomSampler(
                self.weights, number, generator=self.generator
            )
            indices = torch.tensor(list(sampler), device=self.device)
            self._drawn = iter(indices.split(self.batch_size))
            batch = next(self._drawn)
        return fastis.Batch(batch, torch.ones(len(batch), device=self.device))


class PrunedEpochs(Plain):
    """Epochs of some of the samples, chosen by their last losses: what InfoBatch and SeTa share.

    What differs from the authors' code, for both of them:

    - A run has a fixed number of steps: pruning makes it more epochs, not a shorter run. Its
      schedule of the learning rate goes over the steps, where theirs goes over the epochs.
    - Epoch e of E is pruned there if e <= delta E. Here it is if it ends within the first
      ``delta`` of the run's steps: all later minibatches are of epochs that are not pruned.
    - All minibatches are full. Where an epoch's last one is smaller in their CIFAR scripts (and is
      dropped in SeTa's for ImageNet), its samples begin the first one of the next epoch here: a
      sample that was chosen is always used. That epoch is chosen before they are visited.
    - A loss that is not finite is not remembered.

    Raises
    ------
    TypeError, ValueError
        for an option of another type or range, and for a run that ends by time: its last part
        can't be told by steps.
    """

    def __init__(self, config: RunConfig, labels: Tensor, prune_ratio: float, delta: float) -> None:
        # Their code keeps at least a tenth, whatever it is told.
        self.keep_ratio = 1.0 - check.number("prune_ratio", prune_ratio, 0.0, 0.9)
        delta = check.number("delta", delta, 0.0, 1.0)
        if config.seconds:
            raise ValueError(
                f"seconds must be 0 for method {config.method!r}, which stops pruning after a "
                f"share of the run's iterations, got {config.seconds:g}"
            )
        self.batch_size, self.device = config.batch_size, labels.device
        self.generator = torch.Generator().manual_seed(config.seed)
        # Theirs are 3 before the first visit: none is below the mean in the first epoch.
        self.last_losses = torch.full((len(labels),), 3.0, device=self.device)
        self.pruned_until = delta * config.iterations * config.batch_size  # in samples
        self.num_chosen = 0
        nothing = torch.empty(0, dtype=torch.int64, device=self.device)
        self._left = fastis.Batch(nothing, nothing.float())

    def pruned_epoch(self, losses: Tensor) -> tuple[Tensor, Tensor]:
        """Indices and coefficients ``[n]`` from the last losses, float64 ``[N]`` on the CPU."""
        raise NotImplementedError

    def late_epoch(self) -> tuple[Tensor, Tensor]:
        """The same for an epoch of the last part."""
        raise NotImplementedError

    def choose(self, candidates: Tensor, ratio: float) -> Tensor:
        """That share of the candidates, rounded down, at random, in random order."""
        order = torch.randperm(len(candidates), generator=self.generator)
        return candidates[order[: int(ratio * len(candidates))]]

    def sample(self) -> fastis.Batch:
        while len(self._left.indices) < self.batch_size:
            self._next_epoch()
        (indices, weights), size = self._left, self.batch_size
        self._left = fastis.Batch(indices[size:], weights[size:])
        return fastis.Batch(indices[:size], weights[:size])

    def _next_epoch(self) -> None:
        """Chooses an epoch's samples, behind those that are left of the last one."""
        indices, weights = self.pruned_epoch(self.last_losses.double().cpu())
        if self.num_chosen + len(indices) > self.pruned_until:
            indices, weights = self.late_epoch()
        self.num_chosen += len(indices)
        order = torch.randperm(len(indices), generator=self.generator)
        chosen = (indices[order].to(self.device), weights[order].to(self.device))
        self._left = fastis.Batch(*map(torch.cat, zip(self._left, chosen, strict=True)))

    def update(self, batch: fastis.Batch, out: fastis.ScoredLoss) -> None:
        remember(self.last_losses, batch.indices, out.losses)


class InfoBatch(PrunedEpochs):
    """InfoBatch (Qin et al. 2024, ICLR, arXiv 2303.04947): unbiased dynamic pruning.

    Of the samples whose last loss is below the mean of all last losses, each epoch leaves out a
    share ``prune_ratio``; the coefficient of those that stay is 1 / (1 - prune_ratio), all others'
    is 1, and the loss is the mean of the weighted losses over the minibatch. In the last
    1 - ``delta`` of the run nothing is pruned. After infobatch/infobatch.py and
    examples/cifar_example.py of NUS-HPC-AI-Lab/InfoBatch, whose defaults are 0.5 and 0.875.

    A sample's expected coefficient is 1 an epoch, not a draw: an epoch of n of the N samples takes
    steps whose expected gradient is N / n times that of the mean loss, as if the learning rate were
    larger by that factor. ``lr_factor`` is 1 all the same.

    Their code, which is followed, leaves out exactly that share of those samples (in whole
    samples); in the paper each of them is left out with that probability (from memory: its text
    was not at hand). See :class:`PrunedEpochs` for what differs from the code.
    """

    def __init__(
        self, config: RunConfig, labels: Tensor, *, prune_ratio: float = 0.5, delta: float = 0.875
    ) -> None:
        super().__init__(config, labels, prune_ratio, delta)

    def pruned_epoch(self, losses: Tensor) -> tuple[Tensor, Tensor]:
        is_easy = losses < losses.mean()
        kept = self.choose(is_easy.nonzero().flatten(), self.keep_ratio)
        indices = torch.cat([is_easy.logical_not().nonzero().flatten(), kept])
        weights = torch.ones(len(indices))
        weights[len(indices) - len(kept) :] = 1.0 / self.keep_ratio
        return indices, weights

    def late_epoch(self) -> tuple[Tensor, Tensor]:
        return torch.arange(len(self.last_losses)), torch.ones(len(self.last_losses))


class SeTa(PrunedEpochs):
    """SeTa (Zhou, Gao & Wang 2025, CVPR, arXiv 2503.13385): a window slides from easy to hard.

    An epoch is made of a random share 1 - ``prune_ratio`` of all samples, grouped by their last
    losses (k-means, ``num_group`` groups), and of those groups, in the order of their means, the
    window of round(num_group window_scale) that begins with group e mod (num_group - window + 1) in
    the e-th epoch, from 0; the first epoch has all groups. In the last 1 - ``delta`` of the run an
    epoch is a random share 1 - prune_ratio of all samples ("partial annealing"). All coefficients
    are 1: this is a curriculum, not an unbiased estimate. After seta.py of mrazhou/SeTa; defaults
    of its scripts/cifar.sh, "lossless pruning" on CIFAR (there are others: 0, 5 and 0.6 in its
    scripts/imagenet.sh, 0, 10 and 0.5 in the class). The paper's text was not at hand.

    Beside what :class:`PrunedEpochs` says: k-means is :func:`k_means`, not scikit-learn's, and
    starts from the run's seed, not from 0.
    """

    def __init__(
        self,
        config: RunConfig,
        labels: Tensor,
        *,
        prune_ratio: float = 0.1,
        num_group: int = 5,
        window_scale: float = 0.9,
        delta: float = 0.875,
    ) -> None:
        super().__init__(config, labels, prune_ratio, delta)
        most = int(self.keep_ratio * len(labels))
        self.num_group = check.integer("num_group", num_group, 1, most)
        scale = check.number("window_scale", window_scale, 0.0, 1.0)
        self.window = round(num_group * scale)
        if self.window == 0:
            raise ValueError(
                f"window_scale must leave one of {num_group} groups, got {window_scale:g}"
            )
        self.epoch = 0

    def pruned_epoch(self, losses: Tensor) -> tuple[Tensor, Tensor]:
        indices, weights = self.late_epoch()
        first = self.epoch % (self.num_group - self.window + 1)
        # The first epoch's losses are equal: all are in group 0, and so in its window.
        group = k_means(losses[indices], self.num_group, self.generator)
        indices = indices[(group >= first) & (group < first + self.window)]
        self.epoch += 1
        return indices, weights[: len(indices)]

    def late_epoch(self) -> tuple[Tensor, Tensor]:
        indices = self.choose(torch.arange(len(self.last_losses)), self.keep_ratio)
        return indices, torch.ones(len(indices))


class OnlineImportance(Plain):
    """Online importance sampling (Salaün et al. 2023, arXiv 2311.14468).

    The memory q holds each sample's importance, the norm of the loss's gradient at the network's
    output. The first epoch is an ordinary one, without replacement, and fills it. From then on a
    minibatch is drawn with replacement from p = q / sum(q), with coefficients 1 / (N p), and
    q <- alpha q + (1 - alpha) |g| for its samples; after each of these epochs epsilon is added to
    all q, so that every sample is visited again. The learning rate is not adjusted.

    The authors' code was not found, nor that paper's full text: this is the algorithm as they
    print it in their paper on multiple importance sampling (arXiv 2407.15525, Algorithms 1 and 4,
    Appendix E). Their alpha is one of 0, 0.1, 0.2 and 0.3, which is not said for each task: 0.2 is
    ours. So is epsilon, there "a small value": with 0.001 a sample of importance 0 is drawn again
    within about 14 epochs where the mean importance is 0.1. Their Algorithm 6 prints the importance
    as sum_j (s_j - y_j), which is 0; the norm of s - y that their text speaks of is taken.

    What differs: q starts at 1, which shows only where a score is not finite (it is not
    remembered); the first epoch's last minibatch is filled up with samples of its first; the draws
    are those of :func:`fastis.sample`, the same as torch.multinomial's in distribution.
    """

    def __init__(
        self, config: RunConfig, labels: Tensor, *, alpha: float = 0.2, epsilon: float = 1e-3
    ) -> None:
        self.alpha = check.number("alpha", alpha, 0.0, 1.0, "[)")
        self.epsilon = check.number("epsilon", epsilon, 0.0, interval="[)")
        self.batch_size, self.device = config.batch_size, labels.device
        self.generator = torch.Generator().manual_seed(config.seed)
        self.importance = torch.ones(len(labels), dtype=torch.float64, device=self.device)
        self.batches_per_epoch = math.ceil(len(labels) / self.batch_size)
        self.num_updates = 0
        order = torch.randperm(len(labels), generator=self.generator)
        missing = self.batches_per_epoch * self.batch_size - len(labels)
        first_epoch = torch.cat([order, order[:missing]]).to(self.device)
        self._first_epoch = iter(first_epoch.split(self.batch_size))

    def sample(self) -> fastis.Batch:
        indices = next(self._first_epoch, None)
        if indices is None:
            return fastis.sample(self.importance, self.batch_size, generator=self.generator)
        return fastis.Batch(indices, torch.ones(len(indices), device=self.device))

    def update(self, batch: fastis.Batch, out: fastis.ScoredLoss) -> None:
        is_first = self.num_updates < self.batches_per_epoch
        old, new = self.importance[batch.indices], out.score.double()
        share = 1.0 if is_first else 1.0 - self.alpha
        remember(self.importance, batch.indices, old.lerp(new, share))
        self.num_updates += 1
        if not is_first and self.num_updates % self.batches_per_epoch == 0:
            self.importance += self.epsilon


def remember(memory: Tensor, indices: Tensor, values: Tensor) -> None:
    """``memory[indices] = values`` where these are finite, as a :class:`fastis.Sampler` does."""
    memory[indices] = torch.where(values.isfinite(), values.to(memory.dtype), memory[indices])


SAMPLERS: dict[str, Callable[..., Peer]] = {
    "class_balanced": ClassBalanced,
    "infobatch": InfoBatch,
    "seta": SeTa,
    "online_importance": OnlineImportance,
}


def build_peer(config: RunConfig, labels: Tensor) -> Peer:
    """The peer of a configuration, for the training set's labels ``[N]``.

    Raises
    ------
    TypeError, ValueError
        for an unknown option or a bad value, and for a minibatch larger than the training set.
    """
    kind = SAMPLERS[config.method]
    parameters = inspect.signature(kind).parameters.values()
    config.check_options(p.name for p in parameters if p.kind is p.KEYWORD_ONLY)
    check.integer("batch_size", config.batch_size, 1, len(labels))
    return kind(config, labels, **config.options)
