"""Gain against cost, and every run by two metrics."""

from __future__ import annotations

from lightning_mtl.compare.figures.drawing import (
    INK,
    KINDS,
    MUTED,
    WIDE,
    Drawing,
    label,
    legend,
    logarithmic,
    name_points,
    panels,
    point,
    visible_range,
)
from lightning_mtl.compare.sheets import pareto, price
from lightning_mtl.compare.table import Row, Summary

COSTS = {
    "device_seconds": "device-seconds of a training (of all single-task trainings)",
    "peak_mb": "peak memory of a training (MB)",
}


def draw_pareto(summary: Summary, width: float, cost: str) -> Drawing | None:
    """Δp against a cost; the line joins the rows that no other one beats in both."""
    prices = {row.method: found for row in summary.rows if (found := price(row, cost))}
    rows = [row for row in summary.rows if row.method in prices]
    if summary.no_delta_p or sum(row.kind != "single" for row in rows) < 2:
        return None
    drawing, (axis,) = panels(width, 3.9 if width >= WIDE else 3.6)
    low, high = visible_range([(gain, None) for _, gain in prices.values()])
    costs = [paid for paid, _ in prices.values()]
    logarithmic(axis, "x", costs)
    best = pareto(summary, cost)
    named = important(summary) | set(best)
    for row in rows:
        paid, gain = prices[row.method]
        if gain < low:
            mark = axis.scatter(
                [paid], [low], marker="v", color=KINDS[row.kind], s=22, clip_on=False
            )
        else:
            mark = point(axis, row, paid, gain, row.method in best or bool(summary.mark(row)))
        drawing.tip(mark, f"{row.method}: Δp {gain:+.2f} %, {paid:.4g} {_unit(cost)}")
    axis.step(*zip(*(prices[n] for n in best), strict=True), where="post", color=MUTED, zorder=1)
    axis.axhline(0, color=INK, linewidth=0.8, linestyle="--")
    axis.set_ylim(low, high)
    axis.margins(x=0.12)
    axis.set_xlabel(COSTS[cost])
    axis.set_ylabel("Δp (%)")
    legend(drawing.figure, [row.kind for row in rows])
    shown = sorted(
        (row for row in rows if row.method in named), key=lambda row: -prices[row.method][1]
    )
    name_points(
        drawing,
        axis,
        [(p, max(g, low), label(r.method, width)) for r in shown for p, g in [prices[r.method]]],
    )
    return drawing


def _unit(cost: str) -> str:
    return "s" if cost == "device_seconds" else "MB"


def important(summary: Summary) -> set[str]:
    """Rows to name wherever there is no room for all: references, and the best of each kind."""
    found = {row.method for row in summary.rows if row.kind in ("single", "equal")}
    for kind in ("fixed", "balancer"):
        scored = [row for row in summary.methods if row.kind == kind and row.delta_p]
        if scored:
            found.add(max(scored, key=_mean).method)
    return found


def _mean(row: Row) -> float:
    assert row.delta_p is not None
    return row.delta_p.mean


def draw_runs(summary: Summary, width: float) -> Drawing | None:
    """Every run by the first metric of the first two tasks; single-task means as lines."""
    tasks = list(summary.directions)[:2]
    if len(tasks) < 2 or not any(row.runs for row in summary.methods):
        return None
    metrics = [next(iter(summary.directions[task])) for task in tasks]
    drawing, (axis,) = panels(width, 4.1 if width >= WIDE else 3.7)
    middles = []
    for row in summary.methods:
        named = row.method in important(summary)
        xy = [(run[tasks[0]][metrics[0]], run[tasks[1]][metrics[1]]) for run in row.runs.values()]
        for seed, (x, y) in zip(row.runs, xy, strict=True):
            mark = point(axis, row, x, y, named, 26)
            drawing.tip(mark, f"{row.method}, seed {seed}: {x:.4g}, {y:.4g}")
        if named and xy:
            middles.append((*xy[0], label(row.method, width)))
    for i, (task, metric) in enumerate(zip(tasks, metrics, strict=True)):
        higher = summary.directions[task][metric]
        values = [run[task][metric] for row in summary.methods for run in row.runs.values()]
        spread = summary.single.metrics.get(task, {}).get(metric)
        low, high = visible_range([(v if higher else -v, None) for v in values])
        if not higher:
            low, high = -high, -low
        if spread is not None:  # the lines are what the runs are compared with
            (axis.axvline, axis.axhline)[i](
                spread.mean, color=KINDS["single"], linewidth=1, linestyle="--"
            )
            pad = 0.04 * (high - low)
            low, high = min(low, spread.mean - pad), max(high, spread.mean + pad)
        (axis.set_xlim, axis.set_ylim)[i](low, high)
        better = f"{label(task, width)}: {label(metric, width)}"
        arrow = (
            ("better →" if higher else "← better")
            if i == 0
            else ("better ↑" if higher else "better ↓")
        )
        (axis.set_xlabel, axis.set_ylabel)[i](f"{better}   ({arrow})")
    legend(drawing.figure, [row.kind for row in summary.methods if row.runs])
    name_points(drawing, axis, middles)
    return drawing
