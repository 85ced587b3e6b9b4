"""The table as text: for a terminal, and cell by cell for the page."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from typing import NamedTuple

from lightning_mtl.compare.cost import Models, Ratio
from lightning_mtl.compare.table import Row, Spread, Summary
from lightning_mtl.compare.texts import name, one_line

_NONE = "–"


class Cell(NamedTuple):
    """One number as text.

    Attributes:
        text: the number.
        beside: its spread or interval.
        value: what rows are sorted by.
    """

    text: str
    beside: str = ""
    value: float | None = None

    def line(self) -> str:
        """Both texts."""
        return f"{self.text} {self.beside}".rstrip()


class Column(NamedTuple):
    """A column, with as many decimals in every row.

    Attributes:
        title: its lines.
        cells: a cell for each row of :meth:`Summary.ordered`.
        meaning: what the numbers are.
    """

    title: tuple[str, ...]
    cells: list[Cell]
    meaning: str


def decimals(spreads: Sequence[Spread | None]) -> Callable[[float], str]:
    """How every number of a column is written.

    Two digits of the median standard deviation, or four of the largest mean where no deviation is
    known; never more than six of the largest mean. Powers of ten where that would be too long.
    """
    known = [s for s in spreads if s is not None]
    largest = max((abs(s.mean) for s in known), default=0.0)
    deviations = [s.std for s in known if s.std]
    magnitude = _magnitude(largest)
    places = 3 - magnitude
    if deviations:
        places = min(1 - _magnitude(statistics.median(deviations)), 5 - magnitude)
    places = max(places, 0)
    if places > 6 or magnitude > 6:
        return lambda value: f"{value:.2e}"
    return lambda value: f"{value:.{places}f}"


def _magnitude(value: float) -> int:
    return math.floor(math.log10(value)) if value > 0 and math.isfinite(value) else 0


def columns(summary: Summary) -> list[Column]:
    """Every column but the names."""
    rows = summary.ordered()
    return [*_gain(summary, rows), *_metrics(summary, rows), *_cost(rows)]


def _metrics(summary: Summary, rows: Sequence[Row]) -> list[Column]:
    found = []
    for task, metrics in summary.directions.items():
        for metric, higher in metrics.items():
            spreads = [row.metrics.get(task, {}).get(metric) for row in rows]
            write = decimals(spreads)
            cells = [_spread(s, write, write) for s in spreads]
            way = "higher" if higher else "lower"
            title = (name(task), f"{name(metric)} {'↑' if higher else '↓'}")
            found.append(Column(title, cells, f"{way} is better; mean ± standard deviation"))
    return found


def _gain(summary: Summary, rows: Sequence[Row]) -> list[Column]:
    judged = summary.judgement
    gains = [_spread(row.delta_p, "{:+.2f}".format, "{:.2f}".format) for row in rows]
    for i, row in enumerate(rows):
        if row.kind == "single" and not summary.no_delta_p:
            gains[i] = Cell("0", "(by definition)", 0.0)
    delta_p = {} if judged is None else judged.delta_p
    beside = {} if judged is None else judged.beside_equal
    may = {row.method: _tie(summary, row) for row in rows}
    both = "95 % for all rows together"
    return [
        Column(("Δp %",), gains, "mean ± standard deviation over the seeds"),
        Column(("Δp, 95 %",), [_between(delta_p.get(r.method)) for r in rows], both),
        Column(("beside equal, 95 %",), [_between(beside.get(r.method)) for r in rows], both),
        Column(
            ("may be best",),
            [Cell(may[r.method] or _NONE, "", _YES.get(may[r.method])) for r in rows],
            "not shown to be worse than another row",
        ),
    ]


_YES = {"yes": 1.0, "no": 0.0}


def _cost(rows: Sequence[Row]) -> list[Column]:
    seconds = [s and s._replace(std=s.std or None) for s in (r.device_seconds for r in rows)]
    write = decimals(seconds)
    ratios = [_ratio(row.step_ratio) for row in rows]
    peaks = [row.peak_mb for row in rows]
    return [
        Column(("step ms",), _plain([r.step_ms for r in rows]), "equal weighting's by × equal"),
        Column(("× equal",), ratios, "time of a step beside equal weighting, in turns, 97 %"),
        Column(
            ("device s",),
            [_spread(s, write, write) for s in seconds],
            "steps of a training by the time of a step",
        ),
        Column(("peak MB",), [_number(p, "{:.1f}".format) for p in peaks], "above the process's"),
    ]


def _plain(values: Sequence[float | None]) -> list[Cell]:
    write = decimals([None if v is None else Spread(v, None, 1) for v in values])
    return [_number(value, write) for value in values]


def _number(value: float | None, write: Callable[[float], str]) -> Cell:
    return Cell(_NONE) if value is None else Cell(write(value), "", value)


def _spread(
    spread: Spread | None, mean: Callable[[float], str], std: Callable[[float], str]
) -> Cell:
    if spread is None:
        return Cell(_NONE)
    beside = "" if spread.std is None else f"± {std(spread.std)}"
    return Cell(mean(spread.mean), beside, spread.mean)


def _ratio(ratio: Ratio | None) -> Cell:
    if ratio is None:
        return Cell(_NONE)
    value, _, interval = ratio.text().partition(" ")
    return Cell(value, interval, ratio.value)


def _between(interval: tuple[float, float] | None) -> Cell:
    if interval is None or not math.isfinite(interval[1] - interval[0]):
        return Cell(_NONE)
    low, high = (round(end, 1) + 0.0 for end in interval)  # no "-0.0"
    return Cell(f"{low:+.1f}", f"to {high:+.1f}", interval[0])


def _tie(summary: Summary, row: Row) -> str:
    found = summary.judgement
    if found is None or not found.ties or row.method not in found.judged or row.kind == "single":
        return ""
    return "yes" if row.method in found.ties else "no"


def fresh_columns(summary: Summary) -> list[Column]:
    """Of the runs that confirm, in the order of :attr:`Summary.fresh`."""
    gains = [_spread(row.delta_p, "{:+.2f}".format, "{:.2f}".format) for row in summary.fresh]
    runs = [_number(float(len(row.scores)), "{:.0f}".format) for row in summary.fresh]
    return [
        *_metrics(summary, summary.fresh),
        Column(("Δp %",), gains, "mean ± standard deviation over the fresh seeds"),
        Column(("runs",), runs, "finished"),
    ]


def models_columns(models: Models) -> tuple[list[str], list[Column], str]:
    """The multi-task model, the single-task models, all of these together; and it in words."""
    tasks = models.single
    together = f"{len(tasks)} single-task models"
    heads = ["multi-task model", *tasks, together]
    total = models.single_parameters
    counts = [models.parameters, *(one.parameters for one in tasks.values()), total]
    times = [models.forward_ms, *(one.forward_ms for one in tasks.values())]
    known = [t for t in times[1:] if t is not None]
    times.append(sum(known) if len(known) == len(tasks) else None)
    same = Ratio(1.0) if models.forward_ms is not None else None
    ratios = [same, *(one.forward for one in tasks.values()), models.together]
    columns = [
        Column(
            ("parameters",),
            [_number(None if c is None else float(c), "{:,.0f}".format) for c in counts],
            "reached by the gradient of a task's loss",
        ),
        Column(("forward ms",), _plain(times), "in evaluation mode"),
        Column(("× multi-task",), [_ratio(ratio) for ratio in ratios], "taken in turns"),
    ]
    parts = []
    if models.parameters and total:
        parts.append(f"has {models.parameters / total:.2f} times the parameters of the {together}")
    if models.together is not None and models.together.value > 0:
        value, low, high = models.together
        share = Ratio(1 / value, high and 1 / high, low and 1 / low)
        parts.append(f"answers for every task in {share.text()} times the time that they take")
    says = f"One model {' and '.join(parts)}." if parts else "Nothing could be measured of them."
    return heads, columns, says


def label(row: Row) -> str:
    """The name of a row, with how many of its runs failed."""
    failed = f" ({len(row.errors)} FAILED)" if row.errors else ""
    return name(row.method) + failed


def console_table(summary: Summary) -> str:
    """The table for a terminal, with failures below it."""
    found = columns(summary)
    header = ["method", *(" ".join(column.title) for column in found)]
    body = [
        [label(row), *(column.cells[i].line() for column in found)]
        for i, row in enumerate(summary.ordered())
    ]
    widths = [max(len(line[i]) for line in [header, *body]) for i in range(len(header))]
    lines = [_aligned(header, widths), "  ".join("-" * width for width in widths)]
    lines += [_aligned(line, widths) for line in body]
    lines += [
        f"FAILED {run}: {one_line(error)}"
        for row in (*summary.rows, *summary.fresh)
        for run, error in row.errors.items()
    ]
    lines += [f"No Δp: {summary.no_delta_p}."] if summary.no_delta_p else []
    lines += [scope] if (scope := summary.scope()) else []
    return "\n".join(lines)


def _aligned(line: Sequence[str], widths: Sequence[int]) -> str:
    first, *others = (
        text.ljust(w) if i == 0 else text.rjust(w)
        for i, (text, w) in enumerate(zip(line, widths, strict=True))
    )
    return "  ".join([first, *others]).rstrip()
