"""Curves of runs that differ in their seed only, at common points."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from bench.report import Row


def curve(rows: Sequence[Row], name: str, x: str = "step") -> tuple[np.ndarray, np.ndarray]:
    """Points ``[P]`` and values ``[seeds, P]``, NaN where there is none.

    Runs that were read at other points (by time, or by effective iterations) are interpolated over
    the part that all of them have.
    """
    pairs = [(_floats(row["curves"][x]), _floats(row["curves"][name])) for row in rows]
    if all(np.array_equal(points, pairs[0][0]) for points, _ in pairs):
        return pairs[0][0], np.stack([values for _, values in pairs])
    start, end = max(points[0] for points, _ in pairs), min(points[-1] for points, _ in pairs)
    points = np.linspace(start, end, min(len(points) for points, _ in pairs))
    return points, np.stack([np.interp(points, *pair) for pair in pairs])


def _floats(values: list[float | None]) -> np.ndarray:
    return np.array([np.nan if value is None else value for value in values], dtype=float)
