"""The pictures of a comparison."""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Callable
from typing import Any

import matplotlib
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from lightning_mtl.compare.table import Spread, Summary
from lightning_mtl.compare.texts import error_text, name

_STYLE: Any = {
    "text.usetex": False,  # whatever the user's own settings are: names are no formulas
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "font.size": 10,
    "axes.titlesize": 11,
}


def plots(summary: Summary) -> tuple[dict[str, bytes], list[str]]:
    """Every picture that the results allow, as ``{file name: PNG}``; what could not be drawn."""
    made: dict[str, bytes] = {}
    faults: list[str] = []
    drawings: dict[str, Callable[[Summary], Figure | None]] = {
        "delta_p.png": draw_delta_p,
        "runs.png": draw_runs,
        "gradient_cosines.png": lambda s: _draw_curves(
            s, "cosines", "cosine between task gradients"
        ),
        "gradient_norms.png": lambda s: _draw_curves(s, "norms", "norm of task gradients"),
    }
    with matplotlib.rc_context(_STYLE), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # letters that the font does not have
        for file, draw in drawings.items():
            try:
                figure = draw(summary)
                if figure is not None:
                    buffer = io.BytesIO()
                    figure.savefig(buffer, format="png", dpi=110)
                    made[file] = buffer.getvalue()
            except Exception as error:  # a picture must not cost the report of a week's runs
                faults.append(f"{file} could not be drawn. {error_text(error)}")
    return made, faults


def _label(text: str) -> str:
    """A name as matplotlib shows it: no formula between `$`, no hidden entry of a legend."""
    label = name(text, 40).replace("$", r"\$")
    return f" {label}" if label.startswith("_") else label


def _figure(
    width: float, height: float, rows: int = 1, columns: int = 1, **kwargs: Any
) -> tuple[Figure, list[Any]]:
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns, squeeze=False, **kwargs)
    return figure, [axis for line in axes for axis in line]


def _colours(summary: Summary) -> dict[str, Any]:
    colour_map: Any = matplotlib.colormaps["tab10" if len(summary.methods) <= 10 else "tab20"]
    palette = colour_map.colors
    return {row.method: palette[i % len(palette)] for i, row in enumerate(summary.methods)}


def draw_delta_p(summary: Summary) -> Figure | None:
    """Δp of every method, mean and by task; bars are means over seeds, whiskers ± 1 std."""
    rows = [row for row in summary.methods if row.delta_p is not None]
    if not rows:
        return None
    panels = [("mean over tasks", [row.delta_p for row in rows])]
    panels += [(task, [row.task_delta_p.get(task) for row in rows]) for task in summary.directions]
    columns = min(len(panels), 4)
    lines = math.ceil(len(panels) / columns)
    figure, axes = _figure(
        2.2 + 3.2 * columns, lines * (1.4 + 0.32 * len(rows)), lines, columns, sharey=True
    )
    colours = _colours(summary)
    for axis, (title, spreads) in zip(axes, panels, strict=False):
        for height, (row, spread) in enumerate(zip(rows, spreads, strict=True)):
            if spread is not None:
                axis.barh(
                    height,
                    spread.mean,
                    xerr=spread.std,
                    color=colours[row.method],
                    height=0.7,
                    capsize=2,
                )
                _value_label(axis, height, spread)
        axis.axvline(0, color="black", linewidth=1)
        axis.set_title(_label(title))
        axis.set_xlabel("Δp (%), higher is better")
        axis.margins(x=0.22)
        axis.grid(axis="y", visible=False)
    axes[0].set_yticks(range(len(rows)), [_label(row.method) for row in rows])
    axes[0].invert_yaxis()
    for axis in axes[len(panels) :]:
        axis.remove()
    figure.suptitle("Δp against single-task training (0)")
    return figure


def _value_label(axis: Any, height: float, spread: Spread) -> None:
    std = spread.std or 0.0
    end, side = (spread.mean + std, 1) if spread.mean >= 0 else (spread.mean - std, -1)
    axis.annotate(
        f"{spread.mean:+.1f}",
        (end, height),
        xytext=(4 * side, 0),
        textcoords="offset points",
        ha="left" if side > 0 else "right",
        va="center",
        fontsize=8,
    )


def draw_runs(summary: Summary) -> Figure | None:
    """Every run by the first metric of the first two tasks; single-task averages as axes."""
    tasks = list(summary.directions)[:2]
    if len(tasks) < 2:
        return None
    metrics = [next(iter(summary.directions[task])) for task in tasks]
    figure, (axis,) = _figure(7.2, 4.8)
    colours = _colours(summary)
    drawn = 0
    for i, row in enumerate(summary.methods):
        points = [
            [run[t][m] for t, m in zip(tasks, metrics, strict=True)] for run in row.runs.values()
        ]
        if points:
            marker = "osD^vP*Xph"[i % 10]
            axis.scatter(
                *zip(*points, strict=True),
                color=colours[row.method],
                label=_label(row.method),
                marker=marker,
                s=36,
            )
            drawn += 1
    for task, metric, line in zip(tasks, metrics, (axis.axvline, axis.axhline), strict=True):
        spread = summary.single.metrics.get(task, {}).get(metric)
        if spread is not None:
            line(spread.mean, color="black", linewidth=1, linestyle="--")
    arrows = [
        "better →" if summary.directions[t][m] else "← better"
        for t, m in zip(tasks, metrics, strict=True)
    ]
    axis.set_xlabel(f"{_label(f'{tasks[0]}: {metrics[0]}')}   ({arrows[0]})")
    axis.set_ylabel(f"{_label(f'{tasks[1]}: {metrics[1]}')}   ({arrows[1]})")
    axis.set_title("Every run; dashed: single-task averages")
    if drawn:
        axis.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)
    return figure if drawn else None


def _draw_curves(summary: Summary, what: str, label: str) -> Figure | None:
    """A panel a method, over the steps of seed 0; above six lines, their mean and range."""
    if not summary.curves:
        return None
    columns = min(len(summary.curves), 3)
    lines = math.ceil(len(summary.curves) / columns)
    figure, axes = _figure(
        1 + 3.4 * columns, 0.9 + 2.4 * lines, lines, columns, sharex=True, sharey=True
    )
    for axis, (method, points) in zip(axes, summary.curves.items(), strict=False):
        tasks = list(dict.fromkeys(task for point in points for task in point[what]))
        if len(tasks) <= 6:
            for task in tasks:
                seen = [(p["step"], p[what][task]) for p in points if task in p[what]]
                axis.plot(*zip(*seen, strict=True), label=_label(task), linewidth=1.2)
        else:
            some = [point for point in points if point[what]]
            steps = [point["step"] for point in some]
            values = [list(point[what].values()) for point in some]
            axis.fill_between(
                steps, [min(v) for v in values], [max(v) for v in values], alpha=0.25, label="range"
            )
            axis.plot(steps, [sum(v) / len(v) for v in values], label="mean")
        axis.set_title(_label(method))
        if what == "cosines":
            axis.axhline(0, color="black", linewidth=1)
            axis.set_ylim(-1.05, 1.05)
        else:
            axis.set_yscale("log")
    for axis in axes[len(summary.curves) :]:
        axis.remove()
    shown = axes[: len(summary.curves)]
    for axis in shown[-columns:]:
        axis.set_xlabel("optimiser step")
        axis.tick_params(labelbottom=True)
    handles, labels = shown[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False)
    figure.suptitle(f"{label[0].upper()}{label[1:]}, seed 0")
    return figure
