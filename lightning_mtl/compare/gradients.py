"""Recorded task gradients of several seeds as smooth curves with a band."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
_POINTS = 40  # of a curve
_WINDOW = 1 / 8  # of the training, over which a point is the mean


class Band(NamedTuple):
    """A quantity over a training.

    Attributes:
        steps: optimiser steps, shape ``(N,)``.
        mean: over the seeds, of moving means, shape ``(N,)``.
        low: the lowest seed, shape ``(N,)``.
        high: the highest seed, shape ``(N,)``.
        seeds: how many.
    """

    steps: Array
    mean: Array
    low: Array
    high: Array
    seeds: int


def series(points: Sequence[Mapping[str, Any]], what: str) -> dict[str, tuple[Array, Array]]:
    """Steps and values of one run, by task (``norms``) or by pair of tasks (``cosines``)."""
    names = dict.fromkeys(key for point in points for key in point[what])
    found = {}
    for key in names:
        seen = [(p["step"], p[what][key]) for p in points if key in p[what]]
        steps, values = np.array(seen, dtype=np.float64).T
        found[key] = (steps, values)
    return found


def over_all(points: Sequence[Mapping[str, Any]], what: str) -> tuple[Array, Array]:
    """Steps of one run and one number a step: the mean cosine, or the ratio of extreme norms."""
    seen = []
    for point in points:
        values = [v for v in point[what].values() if what == "cosines" or v > 0]
        if values:
            one = sum(values) / len(values) if what == "cosines" else max(values) / min(values)
            seen.append((point["step"], one))
    steps, values = np.array(seen, dtype=np.float64).reshape(-1, 2).T
    return steps, values


def band(runs: Sequence[tuple[Array, Array]], log: bool = False) -> Band | None:
    """Moving means of every run on the same steps, and their mean and range.

    Args:
        runs: steps and values of each seed.
        log: take means of logarithms, for quantities whose ratios matter.
    """
    runs = [(steps, values) for steps, values in runs if len(steps)]
    if log:
        runs = [(s[v > 0], v[v > 0]) for s, v in runs]
    if not runs or not all(len(steps) for steps, _ in runs):
        return None
    # no further than the shortest run, beyond which a mean would be over other seeds
    last = min(steps[-1] for steps, _ in runs)
    first = max(steps[0] for steps, _ in runs)
    most = min(_POINTS, max(len(steps) for steps, _ in runs))
    at = np.linspace(first, last, most) if last > first else np.array([last])
    half = _WINDOW * (last - first) / 2
    smooth = np.array([_moving_mean(s, np.log(v) if log else v, at, half) for s, v in runs])
    mean, low, high = smooth.mean(0), smooth.min(0), smooth.max(0)
    if log:
        mean, low, high = np.exp(mean), np.exp(low), np.exp(high)
    return Band(at, mean, low, high, len(runs))


def _moving_mean(steps: Array, values: Array, at: Array, half: float) -> Array:
    """Mean of the values within ``half`` of each step, or the nearest one."""
    found = []
    for step in at:
        near = values[np.abs(steps - step) <= half]
        found.append(near.mean() if len(near) else values[np.argmin(np.abs(steps - step))])
    return np.array(found)
