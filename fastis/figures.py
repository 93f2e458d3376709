"""Pictures of what a sampler has learnt, by matplotlib: ``pip install 'fastis[plot]'``.

They read the table and what you have logged of it; a training step knows nothing of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from fastis import check
from fastis.kernels.constants import FLATTEN
from fastis.kernels.flatten import distribution
from fastis.kernels.layout import LAST_EXCLUDED, LAST_UNSEEN, LATEST
from fastis.methods.base import PHASES
from fastis.sampler import Sampler

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Stats = Mapping[str, float]
_BLUE, _RED = "#0072B2", "#D55E00"
_BINS = 60
# What the curves show of a sampler's stats(): above, sizes relative to B; below, shares.
_CURVES = (
    {"N_ems / B": "effective_batch_size", "gain": "gain"},
    {"S": "efficiency", "share unseen": "share_unseen"},
)


def plot(sampler: Sampler, history: Sequence[Stats] = ()) -> Figure:
    """Where a sampler stands, on one page: ``fastis.plot(sampler).savefig("sampler.png")``.

    - The samples' importance over its mean, on logarithmic axes: how many times as often as under
      uniform sampling each of them comes, but for the cap, which is marked. Unseen samples are
      shown apart, where they are drawn: at the mean.
    - How long ago samples were last observed, in iterations.
    - N_ems / B and the gain, which the learning rate follows; S (1: no better than uniform, 0: the
      least variance there can be) and the share of unseen samples: as curves over the steps of
      ``history``, or as they stand.

    Parameters
    ----------
    sampler : Sampler
        of any method: those that keep no state of the samples have the second half only.
    history : sequence of dict
        what :meth:`fastis.Sampler.stats` gave in the course of the run, or :func:`fastis.log`; the
        present is added.

    Returns
    -------
    matplotlib.figure.Figure
        of its own, unknown to pyplot: nothing is to be closed.

    Raises
    ------
    ImportError
        without matplotlib.
    TypeError, ValueError
        for another sampler, or a history that is none.

    O(N), and waits for a device.
    """
    check_sampler(sampler)
    course = [*_checked(history), sampler.stats()]
    figure = _figure(9.0, 6.0)
    (above, right), below = figure.subplots(2, 2)
    _draw_importance(above, sampler)
    _draw_staleness(right, sampler)
    for axes, curves in zip(below, _CURVES, strict=True):
        _draw_curves(axes, curves, course, sampler.batch_size)
    now = course[-1]
    title = f"step {now['step']:,.0f}, {PHASES[int(now['phase'])]}, method {sampler.method.name!r}"
    figure.suptitle(title, fontsize="medium")
    return figure


def check_sampler(sampler: Any) -> None:
    if not isinstance(sampler, Sampler):
        raise TypeError(f"sampler must be a fastis.Sampler, got {type(sampler).__name__}")


def _figure(width: float, height: float) -> Figure:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("matplotlib is missing: pip install 'fastis[plot]'") from error
    return Figure(figsize=(width, height), layout="constrained")


def _checked(history: Any) -> list[Stats]:
    if not isinstance(history, Sequence) or isinstance(history, str):
        raise TypeError(f"history must be a list of sampler.stats(), got {type(history).__name__}")
    for i, stats in enumerate(history):
        if not isinstance(stats, Mapping) or "step" not in stats:
            raise ValueError(f"history[{i}] must be a sampler.stats(), got {check.describe(stats)}")
    return list(history)


# ---- the distributions


def _draw_importance(axes: Axes, sampler: Sampler) -> None:
    axes.set_title("importance of the samples")
    if not sampler.method.has_states:
        return _say(axes, f"method {sampler.method.name!r} keeps no state of the samples")
    seen = sampler.last_seen >= 0
    if not bool(seen.any()):
        return _say(axes, "no sample has been seen yet")
    importance = sampler.importance.double()
    mean, x = float(importance[seen].mean()), importance[seen & (importance > 0)].cpu().numpy()
    cap = _cap(sampler, importance, seen)
    marked = [x.min(), x.max(), mean, *([cap] if cap else [])]
    edges = np.geomspace(0.9 * min(marked), 1.1 * max(marked), _BINS + 1) / mean
    axes.hist(x / mean, edges.tolist(), color=_BLUE, label=f"seen: {int(seen.sum()):,}")
    unseen = int((sampler.last_seen == LAST_UNSEEN).sum())
    if unseen:
        left, right = edges[np.searchsorted(edges, 1.0) - 1 :][:2]
        label = f"unseen: {unseen:,} ({unseen / (unseen + int(seen.sum())):.1%})"
        axes.bar(left, unseen, right - left, align="edge", color=_RED, alpha=0.7, label=label)
    if cap:
        label = f"cap: {sampler._arguments['max_duplicates']:g} expected copies"
        axes.axvline(cap / mean, color="black", linestyle="--", label=label)
    axes.set(xscale="log", yscale="log", xlabel="importance / mean", ylabel="samples")
    _plain_ticks(axes, edges[-1] / edges[0])
    axes.set_ylim(0.5, 20 * axes.get_ylim()[1])  # room for the legend
    _legend(axes)
    return None


def _cap(sampler: Sampler, importance: Tensor, seen: Tensor) -> float | None:
    """The importance from which on samples are drawn alike; None where there is no such one."""
    table = sampler._table
    constants = table.constants
    if constants.flatten != FLATTEN["cap"]:
        return None
    drawn = distribution(table)
    if drawn.total == drawn.active:  # all alike
        return None
    free = seen & (importance > 0)
    free[drawn.capped] = False
    if not bool(free.any()):
        return None
    # Below the cap probabilities are proportional to the importance. Of integer weights, which are
    # rounded, the largest is the most exact.
    at = int(torch.where(free, importance, -1.0).argmax())
    probability = float(drawn.weights[at]) / drawn.total
    largest = constants.max_duplicates / constants.batch_size
    return float(importance[at]) * largest / probability


def _draw_staleness(axes: Axes, sampler: Sampler) -> None:
    axes.set_title("staleness of the samples")
    if not sampler.method.has_states:
        return _say(axes, f"method {sampler.method.name!r} keeps no state of the samples")
    last = sampler.last_seen
    passed = ((sampler.step - last[last >= 0]) & LATEST).cpu().numpy()
    if not len(passed):
        return _say(axes, "no sample has been seen yet")
    most = int(passed.max()) + 1
    width = -(-most // _BINS)  # whole iterations
    axes.hist(passed, list(range(0, most + width, width)), color=_BLUE)
    mean = float(passed.mean())
    axes.axvline(mean, color="black", linestyle="--", label=f"mean: {mean:,.1f}")
    axes.set(xlabel="iterations since the last observation", ylabel="samples")
    axes.margins(y=0.2)
    _legend(axes)
    return None


def _plain_ticks(axes: Axes, span: float) -> None:
    """Powers of ten, with 2 and 5 of each where few would be seen; written as 0.1, 1, 10."""
    from matplotlib.ticker import FuncFormatter, LogLocator

    axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if span < 100 else (1.0,)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.minorticks_off()


def _legend(axes: Axes) -> None:
    axes.legend(fontsize="small", framealpha=0.85, edgecolor="none")


def _say(axes: Axes, text: str) -> None:
    axes.text(0.5, 0.5, text, ha="center", va="center", transform=axes.transAxes, color="0.3")
    axes.set(xticks=[], yticks=[])


# ---- the numbers


def _draw_curves(axes: Axes, curves: dict[str, str], course: list[Stats], batch_size: int) -> None:
    """Over the steps; where there is one, its numbers."""
    axes.set_title(", ".join(curves))
    values = {
        label: np.array([stats.get(key, np.nan) for stats in course], dtype=float)
        / (batch_size if key == "effective_batch_size" else 1)
        for label, key in curves.items()
    }
    if len(course) == 1:
        return _draw_bars(axes, {label: float(only[0]) for label, only in values.items()})
    steps = [stats["step"] for stats in course]
    marker = "." if len(course) < 30 else ""
    for (label, y), colour, line in zip(values.items(), (_BLUE, _RED), ("-", "--"), strict=True):
        label = f"{label}: {_number(y[-1])}"
        axes.plot(steps, y, marker + line, color=colour, linewidth=1.4, label=label)
    axes.set_xlabel("step")
    axes.set_ylim(bottom=min(0.0, axes.get_ylim()[0]))
    _legend(axes)
    return None


def _draw_bars(axes: Axes, values: dict[str, float]) -> None:
    lengths = [value if np.isfinite(value) else 0.0 for value in values.values()]
    bars = axes.barh(list(values), lengths, height=0.5, color=(_BLUE, _RED))
    axes.bar_label(bars, [_number(value) for value in values.values()], padding=4)
    axes.set_xlim(min(0.0, *lengths), 1.25 * max(1.0, *lengths))
    axes.set_ylim(-0.6, 1.6)


def _number(value: float) -> str:
    return f"{value:.3g}" if np.isfinite(value) else "not known"


# ---- the samples themselves


def contact_sheet(
    sampler: Sampler, dataset: Any, labels: Any = None, *, count: int = 24, columns: int = 12
) -> Figure:
    """The most and the least important samples as images, each with index, label and importance.

    The most important ones are what training finds hardest: among them are mislabelled and broken
    samples, if there are any.

    Parameters
    ----------
    sampler : Sampler
        that has seen samples; of a method that keeps a state of them.
    dataset : Tensor, array or Dataset
        ``[N, H, W]``, ``[N, C, H, W]`` or ``[N, H, W, C]`` with one or three channels C; or
        map-style, ``dataset[i]`` being such an image (of PIL too), or a tuple that begins with the
        image and its label. Integers are taken for 0 to 255; floats are stretched, each image from
        its least to its largest value.
    labels : sequence or Tensor, optional
        ``[N]``, in place of the data set's.
    count : int
        images of each kind, if so many have been seen.
    columns : int
        images in a row.

    Returns
    -------
    matplotlib.figure.Figure

    Raises
    ------
    ImportError
        without matplotlib.
    TypeError, ValueError
        for a sampler that knows nothing of the samples, a data set of another length, or what is
        no image.
    """
    check_sampler(sampler)
    count, columns = check.integer("count", count, 1), check.integer("columns", columns, 1)
    for name, value in (("dataset", dataset), ("labels", labels)):
        if value is not None and len(value) != sampler.num_samples:
            raise ValueError(
                f"{name} must have the sampler's num_samples={sampler.num_samples} entries, got "
                f"{len(value)}"
            )
    most, least = _extremes(sampler, count)
    importance = sampler.importance
    importance = importance / importance[sampler.last_seen != LAST_EXCLUDED].double().mean()
    rows = [-(-len(kind) // columns) for kind in (most, least)]
    columns = min(columns, len(most))
    figure = _figure(0.9 * columns + 0.4, 1.2 * sum(rows) + 0.7)
    parts = figure.subfigures(2, 1, height_ratios=[n + 0.3 for n in rows], squeeze=False).flat
    for part, kind, n, title in zip(parts, (most, least), rows, ("most", "least"), strict=True):
        part.suptitle(f"{title} important (index: label, importance / mean)", fontsize="small")
        grid = part.subplots(n, columns, squeeze=False).flatten()
        for axes in grid:
            axes.set_axis_off()
        for axes, i in zip(grid, kind, strict=False):
            image, label = _sample(dataset, labels, i)
            axes.imshow(_displayable(image, i), cmap="gray")
            text = f"{i}" if label is None else f"{i}: {label}"
            axes.set_title(f"{text}\n{float(importance[i]):.2g}", fontsize=6, pad=2)
    return figure


def _extremes(sampler: Sampler, count: int) -> tuple[list[int], list[int]]:
    """Indices of the most and of the least important ones that have been seen, each in order."""
    if not sampler.method.has_states:
        raise ValueError(
            "sampler must have a method that keeps a state of the samples, got "
            f"{sampler.method.name!r}"
        )
    seen = (sampler.last_seen >= 0).nonzero().flatten()
    if len(seen) == 0:
        raise ValueError("sampler must have seen samples, got one without any update")
    # Many have the least importance there can be: of those the ones with the least mean.
    seen = seen[sampler.mean[seen].argsort(stable=True)]
    seen = seen[sampler.importance[seen].argsort(stable=True)]
    most = seen.flip(0)[: min(count, -(-len(seen) // 2))]
    return most.tolist(), seen[: min(count, max(1, len(seen) // 2))].tolist()


def _sample(dataset: Any, labels: Any, i: int) -> tuple[Any, Any]:
    """Image and label of a sample."""
    item, label = dataset[i], None
    if isinstance(item, (tuple, list)):
        item, label = item[0], item[1] if len(item) > 1 else None
    if labels is not None:
        label = labels[i]
    if isinstance(label, Tensor) and label.numel() == 1:
        label = label.item()
    return item, label


def _displayable(image: Any, i: int) -> np.ndarray:
    """``[H, W]`` or ``[H, W, 3]``, float in [0, 1]."""
    pixels = image.detach().cpu() if isinstance(image, Tensor) else image
    pixels = pixels.float() if isinstance(pixels, Tensor) and pixels.is_floating_point() else pixels
    array = np.asarray(pixels)
    if array.ndim == 3 and array.shape[0] in (1, 3):
        array = np.moveaxis(array, 0, 2)
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] != 3):
        raise ValueError(
            f"dataset[{i}] must be an image of shape [H, W], [C, H, W] or [H, W, C] with 1 or 3 "
            f"channels, alone or first in a tuple, got {check.describe(image)}"
        )
    if array.dtype.kind in "ui":
        return array / 255.0
    low, high = float(array.min()), float(array.max())
    return (array.astype(float) - low) / max(high - low, 1e-12)
