"""What is learnt: a task is a data set, its loss with score, and how a network is judged.

Training and evaluation loops take a task and branch on no names. A new task is one entry of TASKS.
Every metric is a number of the whole set; ``loss`` and ``error`` (lower is better, in percent)
exist for every task.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

import fastis
from bench.experiments import datasets, metrics
from bench.experiments.datasets import Dataset

EVALUATION_BATCH = 500


def sample_cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    """[B] in plain torch: what evaluation sums."""
    return F.cross_entropy(logits, target, reduction="none")


def sample_binary_cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    """[B]: the mean over a sample's labels."""
    return F.binary_cross_entropy_with_logits(logits, target, reduction="none").mean(-1)


def class_metrics(logits: Tensor, target: Tensor) -> dict[str, float]:
    """The error of the most likely class, in percent."""
    wrong = (logits.argmax(1) != target).sum().item()
    return {"error": 100 * wrong / len(target)}


def label_metrics(logits: Tensor, target: Tensor) -> dict[str, float]:
    """Mean average precision and macro AUC in percent; the error is what the former lacks."""
    precision = 100 * metrics.average_precision(logits, target).mean().item()
    auc = 100 * metrics.area_under_roc(logits, target).mean().item()
    return {"error": 100 - precision, "map": precision, "auc": auc}


@dataclass(frozen=True)
class Task:
    """A data set with its loss and metrics.

    Attributes
    ----------
    source : str
        the file that the data come from: a key of ``datasets.LOADERS``.
    model : str
        the network it is usually learnt with: a key of ``models.MODELS``.
    loss : callable
        (logits, target, weights) -> ScoredLoss, the loss that is trained.
    sample_losses : callable
        (logits, target) -> ``[B]``, the same loss in plain torch.
    metrics : callable
        (logits ``[N, C]``, target) -> numbers; the mean loss is added to them.
    error : str
        what ``error`` is, in words.
    prepare : callable, optional
        Dataset -> Dataset, applied to what the file holds.
    one_class : bool
        whether a target is one class index; methods that need it are left out where it is not.
    """

    source: str
    model: str
    loss: Callable[..., fastis.ScoredLoss] = fastis.cross_entropy
    sample_losses: Callable[[Tensor, Tensor], Tensor] = sample_cross_entropy
    metrics: Callable[[Tensor, Tensor], dict[str, float]] = class_metrics
    error: str = "classification error, %"
    prepare: Callable[[Dataset], Dataset] | None = None
    one_class: bool = True

    @torch.no_grad()
    def evaluate(self, model: torch.nn.Module, x: Tensor, y: Tensor) -> dict[str, float]:
        """Mean loss and metrics over ``x [N, ...]``, in eval mode."""
        model.eval()
        loss = torch.zeros((), dtype=torch.float64, device=x.device)
        outputs = []
        for x_part, y_part in zip(
            x.split(EVALUATION_BATCH), y.split(EVALUATION_BATCH), strict=True
        ):
            outputs.append(model(x_part))
            loss += self.sample_losses(outputs[-1], y_part).sum()
        model.train()
        return {"loss": loss.item() / len(y), **self.metrics(torch.cat(outputs), y)}


def sort_by_class(data: Dataset) -> Dataset:
    """The training set in the order of its labels, for the schemes that draw by slices."""
    order = data.y_train.argsort(stable=True)
    return replace(data, x_train=data.x_train[order], y_train=data.y_train[order])


def permuted_sequences(data: Dataset, width: int) -> Dataset:
    """Images as sequences of ``width`` pixels a step, all pixels in one fixed random order
    (Le et al. 2015): ``[N, T, width]``."""
    pixels = data.x_train[0].numel()
    order = torch.randperm(pixels, generator=torch.Generator().manual_seed(0))
    x_train, x_test = (
        x.flatten(1)[:, order].view(len(x), -1, width) for x in (data.x_train, data.x_test)
    )
    return replace(data, x_train=x_train, x_test=x_test)


def permuted_pixels(data: Dataset) -> Dataset:
    return permuted_sequences(data, 1)


def permuted_rows(data: Dataset) -> Dataset:
    """As many pixels a step as an image is wide: short enough for a CPU."""
    return permuted_sequences(data, data.x_train.shape[-1])


def tile_images(x: Tensor, y: Tensor, num_classes: int, seed: int) -> tuple[Tensor, Tensor]:
    """Four different images each in one of twice the height and width, with their set of classes.

    Every image is used in two tiled ones, so that there are half as many. Fixed by the seed.

    Parameters
    ----------
    x : Tensor ``[N, C, H, W]``
    y : Tensor ``[N]``, class indices

    Returns
    -------
    Tensor ``[N // 4 * 2, C, 2H, 2W]``, and float32 ``[N // 4 * 2, num_classes]`` of zeros and ones
    """
    generator = torch.Generator().manual_seed(seed)
    passes = [torch.randperm(len(x), generator=generator)[: len(x) // 4 * 4] for _ in range(2)]
    members = torch.cat(passes).view(-1, 4)
    top, bottom = (
        torch.cat([x[members[:, left]], x[members[:, left + 1]]], dim=3) for left in (0, 2)
    )
    labels = torch.zeros(len(members), num_classes).scatter_(1, y[members], 1.0)
    return torch.cat([top, bottom], dim=2), labels


def tiled(data: Dataset) -> Dataset:
    """Multi-label images: training tiles of training images only, test tiles of test images."""
    x_train, y_train = tile_images(data.x_train, data.y_train, data.num_classes, seed=0)
    x_test, y_test = tile_images(data.x_test, data.y_test, data.num_classes, seed=1)
    return replace(data, x_train=x_train, y_train=y_train, x_test=x_test, y_test=y_test)


def long_tailed(data: Dataset, factor: float = 100.0) -> Dataset:
    """Class c of C keeps the first factor^(-c / (C - 1)) of its training images (Cui et al. 2019).
    The test set stays balanced: its error is the balanced error."""
    kept = []
    for c in range(data.num_classes):
        of_class = (data.y_train == c).nonzero().flatten()
        kept.append(of_class[: round(len(of_class) * factor ** (-c / (data.num_classes - 1)))])
    order = torch.cat(kept).sort().values
    return replace(data, x_train=data.x_train[order], y_train=data.y_train[order])


def mislabelled(data: Dataset, share: float) -> Dataset:
    """Exactly that share of the training labels is replaced by another class, each alike; the test
    set is clean. Fixed, the same for all runs."""
    generator = torch.Generator().manual_seed(0)
    n = len(data.y_train)
    wrong = torch.randperm(n, generator=generator)[: round(n * share)]
    shift = torch.randint(1, data.num_classes, (len(wrong),), generator=generator)
    labels = data.y_train.clone()
    labels[wrong] = (labels[wrong] + shift) % data.num_classes
    return replace(data, y_train=labels)


def not_augmented(data: Dataset) -> Dataset:
    return replace(data, augment=None)


TASKS = {
    "fashion_mnist": Task("fashion_mnist", "lenet5"),
    "fashion_by_class": Task("fashion_mnist", "lenet5", prepare=sort_by_class),
    "fashion_tiles": Task(
        "fashion_mnist",
        "cnn",
        loss=fastis.binary_cross_entropy_with_logits,
        sample_losses=sample_binary_cross_entropy,
        metrics=label_metrics,
        error="100 % minus the mean average precision",
        prepare=tiled,
        one_class=False,
    ),
    "permuted_rows": Task("fashion_mnist", "lstm", prepare=permuted_rows),
    "permuted_pixels": Task("fashion_mnist", "lstm", prepare=permuted_pixels),
    "fashion_long_tail": Task("fashion_mnist", "lenet5", prepare=long_tailed),
    "fashion_noise20": Task("fashion_mnist", "lenet5", prepare=partial(mislabelled, share=0.2)),
    "fashion_noise40": Task("fashion_mnist", "lenet5", prepare=partial(mislabelled, share=0.4)),
    "cifar10": Task("cifar10", "resnet18"),
    "cifar10_plain": Task("cifar10", "cnn", prepare=not_augmented),
}


def load_task_data(name: str, data: str | Path | None = None) -> Dataset:
    """The data of a task, from ``data`` or where :func:`datasets.load_dataset` looks.

    Raises
    ------
    ValueError, FileNotFoundError
        for an unknown task or a file that does not hold its data.
    """
    if name not in TASKS:
        raise ValueError(f"--dataset must be one of {', '.join(TASKS)}, got {name!r}")
    task = TASKS[name]
    loaded = datasets.load_dataset(task.source, data)
    return replace(task.prepare(loaded) if task.prepare else loaded, name=name)
