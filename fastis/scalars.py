"""What a sampler tells about itself, into the logger that a run has already."""

from __future__ import annotations

from math import isfinite
from typing import Any

from fastis import check
from fastis.sampler import Sampler


def log(
    sampler: Sampler, writer: Any, step: int, *, prefix: str = "fastis/", full: bool = False
) -> dict[str, float]:
    """Writes :meth:`fastis.Sampler.stats` as scalars. One wait for a CUDA device.

    Equal, for TensorBoard's ``SummaryWriter`` and for a run of W&B::

        for name, value in sampler.stats().items(): writer.add_scalar(prefix + name, value, step)
        run.log({prefix + name: value for name, value in sampler.stats().items()}, step=step)

    Values that are not known yet (NaN) are left out.

    Parameters
    ----------
    sampler : Sampler
        of which.
    writer
        anything with ``add_scalar(name, value, step)`` (TensorBoard), else ``log_metrics(dict,
        step=)`` (the loggers of Lightning, MLflow), else ``log(dict, step=)`` (W&B, Accelerate).
    step : int
        of the writer's axis.
    prefix : str
        of every name.
    full : bool
        as in :meth:`fastis.Sampler.stats`: also what costs O(N).

    Returns
    -------
    dict of str to float
        the stats, without the prefix: a list of them is the history of :func:`fastis.plot`.

    Raises
    ------
    TypeError
        for another sampler or writer, or a step that is no int.
    """
    if not isinstance(sampler, Sampler):
        raise TypeError(f"sampler must be a fastis.Sampler, got {type(sampler).__name__}")
    step = check.integer("step", step, 0)
    takes = ("add_scalar", "log_metrics", "log")
    method = next((name for name in takes if callable(getattr(writer, name, None))), None)
    if method is None:
        raise TypeError(
            "writer must have add_scalar (TensorBoard's SummaryWriter), log_metrics or log (a run "
            f"of W&B), got {type(writer).__name__}"
        )
    stats = sampler.stats(full=full)
    known = {prefix + name: value for name, value in stats.items() if isfinite(value)}
    if method == "add_scalar":
        for name, value in known.items():
            writer.add_scalar(name, value, step)
    else:
        getattr(writer, method)(known, step=step)
    return stats
