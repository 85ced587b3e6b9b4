"""What each picture shows, in a sentence or two with its numbers."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

import numpy as np

from lightning_mtl.compare.figures.curves import overall
from lightning_mtl.compare.gradients import series
from lightning_mtl.compare.sheets import pareto, price
from lightning_mtl.compare.table import Row, Summary
from lightning_mtl.compare.texts import name

_SHOWN = 6  # names in a sentence


def delta_p(summary: Summary) -> str:
    """Who is best, who may be, and on which side of single-task training the rows are."""
    rows = [row for row in summary.ordered() if row.delta_p is not None]
    best = next((row for row in rows if summary.mark(row) == "best"), rows[0])
    ties = [row.method for row in rows if summary.mark(row) == "tie"]
    above = sum(_gain(row) > 0 for row in rows)
    found = summary.judgement
    if found is None or not found.ties:
        tied = "With so few seeds nothing can be said of chance."
    elif not ties:
        tied = "No other row may be the best."
    else:
        tied = f"{_list(ties)} may be the best as well."
    return (
        f"{name(best.method)} has the highest mean Δp, {_gain(best):+.1f} %. {tied} "
        f"{_part(above, len(rows))} above single-task training (0)."
    )


def by_task(summary: Summary) -> str:
    """Whether the best row is best at every task, and which task balancing is about."""
    rows = [row for row in summary.ordered() if row.delta_p is not None]
    best = next((row for row in rows if summary.mark(row) == "best"), rows[0])
    by = {task: spread.mean for task, spread in best.task_delta_p.items()}
    worst, top = min(by, key=lambda t: by[t]), max(by, key=lambda t: by[t])
    spans = {
        task: np.ptp([r.task_delta_p[task].mean for r in rows if task in r.task_delta_p])
        for task in by
    }
    widest = max(spans, key=lambda t: float(spans[t]))
    return (
        f"{name(best.method)} stands at {by[top]:+.1f} % on {name(top)} and at {by[worst]:+.1f} % "
        f"on {name(worst)}. Rows differ most on {name(widest)}, by {spans[widest]:.1f} points."
    )


def cost(summary: Summary, what: str) -> str:
    """The front, and what the best row costs beside equal weighting and a model per task."""
    unit = "s" if what == "device_seconds" else "MB"
    points = {row.method: p for row in summary.rows if (p := price(row, what))}
    best = pareto(summary, what)
    listed = [f"{name(m)} ({points[m][0]:.3g} {unit}, {points[m][1]:+.1f} %)" for m in best]
    text = (
        f"{listed[0]} is the cheapest and the best at once."
        if len(best) == 1
        else f"Of {len(points)} rows, no other one is both cheaper and better than {_list(listed)}."
    )
    equal = next((r for r in summary.methods if r.kind == "equal" and r.method in points), None)
    top = best[-1]
    if equal is not None and top != equal.method and points[equal.method][0] > 0:
        times = points[top][0] / points[equal.method][0]
        text += f" The best of them takes {times:.2f} times as much as equal weighting"
        single = points.get(summary.single.method)
        if single and top != summary.single.method and single[0] > 0:
            text += f", and {points[top][0] / single[0]:.2f} times as much as single-task training"
        text += "."
    return text


def runs(summary: Summary) -> str:
    """How many runs beat the single-task means at both tasks, at one, at none."""
    tasks = list(summary.directions)[:2]
    better = []
    for row in summary.methods:
        for run in row.runs.values():
            one = []
            for task in tasks:
                metric, higher = next(iter(summary.directions[task].items()))
                base = summary.single.metrics.get(task, {}).get(metric)
                if base is None:
                    return "There is no single-task run of both tasks to compare the runs with."
                one.append(
                    (run[task][metric] > base.mean) == higher and run[task][metric] != base.mean
                )
            better.append(one)
    both, none = sum(map(all, better)), sum(not any(one) for one in better)
    first, second = (sum(one[i] and not one[1 - i] for one in better) for i in (0, 1))
    return (
        f"Of {len(better)} runs, {both} are better than the mean of single-task training at both "
        f"tasks, {first} at {name(tasks[0])} only, {second} at {name(tasks[1])} only, {none} at "
        f"neither."
    )


def cosines(summary: Summary) -> str:
    """Whether and when the tasks conflict with equal weighting, and which pair most."""
    method, runs = _reference(summary)
    found = [series(points, "cosines") for points in runs]
    pairs = {
        pair: np.concatenate([one[pair][1] for one in found if pair in one])
        for pair in dict.fromkeys(key for one in found for key in one)
    }
    values = np.concatenate(list(pairs.values()))
    curve = overall(summary, "cosines")[method].mean
    lowest = min(pairs, key=lambda p: float(pairs[p].mean()))
    where = f" Most opposed: {name(lowest)}, {pairs[lowest].mean():+.2f}." if len(pairs) > 1 else ""
    return (
        f"With {name(method)}, the mean cosine is {values.mean():+.2f} ({curve[0]:+.2f} at first, "
        f"{curve[-1]:+.2f} at last), and {100 * (values < 0).mean():.0f} % of the recorded cosines "
        f"are below 0, where tasks conflict.{where}"
    )


def norms(summary: Summary) -> str:
    """How far the lengths of task gradients are apart with equal weighting."""
    method, runs = _reference(summary)
    found = [series(points, "norms") for points in runs]
    means = {
        task: statistics.median(float(v) for one in found if task in one for v in one[task][1])
        for task in dict.fromkeys(key for one in found for key in one)
    }
    curve = overall(summary, "norms").get(method)
    longest, shortest = max(means, key=lambda t: means[t]), min(means, key=lambda t: means[t])
    if curve is None or len(means) < 2:
        return "No two tasks had a gradient at once."
    return (
        f"With {name(method)}, the largest task gradient is {np.median(curve.mean):.3g} times the "
        f"smallest ({curve.mean[0]:.3g} at first, {curve.mean[-1]:.3g} at last): "
        f"{name(longest)} has the largest median, {name(shortest)} the smallest."
    )


def _reference(summary: Summary) -> tuple[str, Sequence[Sequence[dict[str, object]]]]:
    """Equal weighting, where it was recorded, or else the first method."""
    equal = [row.method for row in summary.methods if row.kind == "equal"]
    method = next((m for m in equal if m in summary.curves), next(iter(summary.curves)))
    return method, summary.curves[method]


def _gain(row: Row) -> float:
    assert row.delta_p is not None
    return row.delta_p.mean


def _part(count: int, of: int) -> str:
    if count in (0, of):
        return f"{'None' if count == 0 else 'All'} of {of} rows {'are' if of > 1 else 'is'}"
    return f"{count} of {of} rows {'is' if count == 1 else 'are'}"


def _list(names: Sequence[str]) -> str:
    shown = [name(n, 100) for n in names[:_SHOWN]]
    more = [f"{len(names) - _SHOWN} more"] if len(names) > _SHOWN else []
    *head, last = [*shown, *more]
    return f"{', '.join(head)} and {last}" if head else last
