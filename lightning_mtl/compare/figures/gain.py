"""Δp of every row, over all tasks and by task."""

from __future__ import annotations

import math
from typing import Any

from lightning_mtl.compare.figures.drawing import (
    INK,
    KINDS,
    MUTED,
    WIDE,
    Drawing,
    label,
    legend,
    panels,
    point,
    visible_range,
)
from lightning_mtl.compare.table import Row, Spread, Summary


def draw_delta_p(summary: Summary, width: float) -> Drawing | None:
    """Δp of every row, the best at the top, with its interval.

    Points and no bars, since the axis need not begin at 0: it shows the region of the best.
    """
    rows = _rows(summary)
    if not rows:
        return None
    drawing, (axis,) = panels(width, 0.9 + 0.19 * len(rows))
    found = [(row, row.delta_p, _interval(summary, row)) for row in rows]
    _column(drawing, axis, summary, found, width, "Δp (%), higher is better")
    numbers = [spread.text("+.1f", ".1f") if spread else "" for _, spread, _ in found]
    if width < WIDE:
        numbers = [text.partition(" ")[0] for text in numbers]
    side = axis.secondary_yaxis("right")
    side.set_yticks(range(len(rows)), numbers)
    side.tick_params(length=0)
    side.spines["right"].set_visible(False)
    legend(drawing.figure, [row.kind for row in rows])
    return drawing


def draw_by_task(summary: Summary, width: float) -> Drawing | None:
    """Δp of every row by task, mean and standard deviation; rows in the order of the mean."""
    rows = _rows(summary)
    tasks = list(summary.directions)
    if not rows or len(tasks) < 2:
        return None
    columns = min(len(tasks), 3 if width >= WIDE else 1)
    lines = math.ceil(len(tasks) / columns)
    drawing, axes = panels(width, lines * (0.7 + 0.17 * len(rows)), lines, columns)
    for axis, task in zip(axes, tasks, strict=False):
        found = [(row, row.task_delta_p.get(task)) for row in rows]
        whole = [(row, spread, _deviation(spread)) for row, spread in found]
        _column(drawing, axis, summary, whole, width, "Δp (%)")
        axis.set_title(label(task, width))
        if axes.index(axis) % columns:  # names stand at the left
            axis.set_yticklabels([])
    for axis in axes[len(tasks) :]:
        axis.remove()
    return drawing


def _rows(summary: Summary) -> list[Row]:
    return [row for row in summary.ordered() if row.delta_p is not None]


def _interval(summary: Summary, row: Row) -> tuple[float, float] | None:
    """What the table has; of one seed nothing, and of single-task runs of one seed a deviation."""
    found = None if summary.judgement is None else summary.judgement.delta_p.get(row.method)
    if found is not None and math.isfinite(found[1] - found[0]):
        return found
    return _deviation(row.delta_p)


def _deviation(spread: Spread | None) -> tuple[float, float] | None:
    if spread is None or spread.std is None:
        return None
    return spread.mean - spread.std, spread.mean + spread.std


def _column(
    drawing: Drawing,
    ax: Any,
    summary: Summary,
    found: list[tuple[Row, Spread | None, tuple[float, float] | None]],
    width: float,
    title: str,
) -> None:
    """One line a row, from the top down."""
    low, high = visible_range([(spread.mean, ends) for _, spread, ends in found if spread])
    length = high - low
    if high < 0 < high + 0.4 * length:  # single-task training, if it is near
        high = 0.03 * length
    elif low - 0.4 * length < 0 < low:
        low = -0.03 * length
    for height, (row, spread, ends) in enumerate(found):
        if spread is None:
            continue
        strong = bool(summary.mark(row))
        outside = spread.mean < low
        if ends:
            ax.plot(
                [max(ends[0], low), min(ends[1], high)],
                [height, height],
                color=KINDS[row.kind],
                linewidth=1.2,
                alpha=0.9 if strong else 0.45,
                zorder=2,
            )
        if outside:
            mark = ax.scatter(
                [low], [height], marker="<", color=KINDS[row.kind], s=22, zorder=4, clip_on=False
            )
        else:
            mark = point(ax, row, spread.mean, height, strong)
        drawing.tip(mark, f"{row.method}: {spread.text('+.2f', '.2f')} %")
    if low <= 0 <= high:
        ax.axvline(0, color=INK, linewidth=1)
    ax.set_xlim(low, high)
    ax.set_ylim(len(found) - 0.4, -0.6)
    ax.set_yticks(range(len(found)), [label(row.method, width) for row, *_ in found])
    for text, (row, *_) in zip(ax.get_yticklabels(), found, strict=True):
        text.set_color(INK if summary.mark(row) else MUTED)
        text.set_fontweight("bold" if summary.mark(row) == "best" else "normal")
    ax.tick_params(axis="y", length=0)
    ax.grid(axis="y", visible=False)
    ax.set_xlabel(title)
