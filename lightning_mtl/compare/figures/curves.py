"""Task gradients over the training."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from lightning_mtl.compare.figures.drawing import (
    CYCLE,
    INK,
    KINDS,
    MUTED,
    WIDE,
    Drawing,
    label,
    logarithmic,
    name_points,
    panels,
)
from lightning_mtl.compare.figures.scatter import important
from lightning_mtl.compare.gradients import Band, band, over_all, series
from lightning_mtl.compare.table import Summary

_MOST = 6  # lines of a panel
TITLES = {"cosines": "mean cosine of two task gradients", "norms": "largest norm / smallest norm"}


def overall(summary: Summary, what: str) -> dict[str, Band]:
    """One curve a method: the mean cosine over all pairs, or the ratio of extreme norms."""
    found = {}
    for method, runs in summary.curves.items():
        shown = band([over_all(points, what) for points in runs], what == "norms")
        if shown is not None:
            found[method] = shown
    return found


def draw_overall(summary: Summary, width: float, what: str) -> Drawing | None:
    """All methods in one panel; those that matter are named, the others are grey."""
    bands = overall(summary, what)
    if not bands:
        return None
    kinds = {row.method: row.kind for row in summary.rows}
    named = important(summary) & bands.keys() or set(list(bands)[:_MOST])
    drawing, (axis,) = panels(width, 3.2)
    if what == "norms":
        logarithmic(axis, "y", [value for curve in bands.values() for value in curve.mean])
    else:
        axis.axhline(0, color=INK, linewidth=0.8)
    ends = []
    for method, curve in bands.items():
        strong = method in named
        colour = KINDS[kinds[method]] if strong else MUTED
        if strong and curve.seeds > 1:
            axis.fill_between(
                curve.steps, curve.low, curve.high, color=colour, alpha=0.2, linewidth=0
            )
        (line,) = axis.plot(
            curve.steps, curve.mean, color=colour, linewidth=1.8 if strong else 0.8,
            alpha=1 if strong else 0.55, zorder=3 if strong else 2,
        )  # fmt: skip
        drawing.tip(line, f"{method}: {curve.mean[0]:.3g} at first, {curve.mean[-1]:.3g} at last")
        if strong:
            ends.append((curve.steps[-1], curve.mean[-1], label(method, width)))
    first = min(curve.steps[0] for curve in bands.values())
    last = max(curve.steps[-1] for curve in bands.values())
    axis.set_xlim(first, last + (0.18 if width >= WIDE else 0.3) * (last - first or 1))  # for names
    axis.set_xlabel("optimiser step")
    axis.set_ylabel(TITLES[what])
    name_points(drawing, axis, ends)
    return drawing


def draw_methods(summary: Summary, width: float, what: str) -> Drawing | None:
    """A panel a method: its pairs or tasks, or above six of them their mean and range."""
    if not overall(summary, what):
        return None
    columns = min(len(summary.curves), 3 if width >= WIDE else 1)
    lines = math.ceil(len(summary.curves) / columns)
    drawing, axes = panels(width, 0.7 + 1.75 * lines, lines, columns, sharex=True, sharey=True)
    handles: dict[str, Any] = {}
    for axis, (method, runs) in zip(axes, summary.curves.items(), strict=False):
        found = [series(points, what) for points in runs]
        subjects = list(dict.fromkeys(key for one in found for key in one))
        curves = {
            key: curve
            for key in subjects
            if (curve := band([one[key] for one in found if key in one], what == "norms"))
        }
        if len(subjects) > _MOST:
            curves = _range(curves)
        for i, (key, curve) in enumerate(curves.items()):
            colour = CYCLE[i]
            if curve.seeds > 1 or key == _RANGE:
                axis.fill_between(
                    curve.steps, curve.low, curve.high, color=colour, alpha=0.2, linewidth=0
                )
            (handles[key],) = axis.plot(curve.steps, curve.mean, color=colour, linewidth=1.3)
        axis.set_title(label(method, width))
        if what == "cosines":
            axis.axhline(0, color=INK, linewidth=0.8)
    if what == "norms":
        drawn = [curve for axis in axes for line in axis.lines for curve in line.get_ydata()]
        logarithmic(axes[0], "y", drawn)
    for axis in axes[len(summary.curves) :]:
        axis.remove()
    for axis in axes[: len(summary.curves)][-columns:]:
        axis.set_xlabel("optimiser step")
        axis.tick_params(labelbottom=True)
    names = [label(key, width) for key in handles]
    drawing.figure.legend(
        list(handles.values()), names, loc="outside lower center", ncols=3 if width >= WIDE else 1
    )
    return drawing


_RANGE = "mean of all, and their range"


def _range(curves: dict[str, Band]) -> dict[str, Band]:
    """Their mean, lowest and highest, on the steps that all have."""
    shortest = min(len(curve.steps) for curve in curves.values())
    means = np.array([curve.mean[:shortest] for curve in curves.values()])
    first = next(iter(curves.values()))
    mean, low, high = means.mean(0), means.min(0), means.max(0)
    return {_RANGE: Band(first.steps[:shortest], mean, low, high, first.seeds)}
