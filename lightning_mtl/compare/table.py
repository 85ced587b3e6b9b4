"""From the records of runs to table, ``summary.csv`` and ``baseline.json``."""

from __future__ import annotations

import csv
import io
import json
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from lightning_mtl.compare.grid import FIRST_FRESH, SINGLE
from lightning_mtl.compare.texts import name, one_line
from lightning_mtl.metrics.delta_p import FORMAT, delta_p

if TYPE_CHECKING:
    from lightning_mtl.compare.confirm import Plan
    from lightning_mtl.compare.judge import Candidate, Finding, Judgement

Record = Mapping[str, Any]
Directions = Mapping[str, Mapping[str, bool]]


class Spread(NamedTuple):
    """Mean and sample standard deviation over seeds; no deviation of one value."""

    mean: float
    std: float | None
    n: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread | None:
        """The spread of ``values``, ``None`` when there are none."""
        if not values:
            return None
        return cls(
            statistics.fmean(values),
            statistics.stdev(values) if len(values) > 1 else None,
            len(values),
        )

    def text(self, mean: str, std: str) -> str:
        """Mean ± deviation, each in its format."""
        return format(self.mean, mean) + ("" if self.std is None else f" ± {self.std:{std}}")


@dataclass
class Row:
    """One line of the table.

    Attributes:
        method: its name.
        kind: ``single``, ``equal``, ``fixed`` or ``balancer``.
        metrics: of every task over seeds.
        delta_p: mean over tasks, over seeds; ``None`` when it is not defined.
        task_delta_p: by task, over seeds.
        step_ms: median time of an optimiser step.
        step_ratio: that time by the time of equal weighting in the same process.
        peak_mb: peak memory above what the process held before.
        errors: what went wrong, by run.
        runs: metrics of each finished run, by seed.
        scores: Δp of each finished run, by seed.
        baseline: what each seed of the single-task runs does to this Δp, see :func:`_baseline`.
    """

    method: str
    kind: str
    metrics: dict[str, dict[str, Spread]] = field(default_factory=dict)
    delta_p: Spread | None = None
    task_delta_p: dict[str, Spread] = field(default_factory=dict)
    step_ms: float | None = None
    step_ratio: float | None = None
    peak_mb: float | None = None
    errors: dict[str, str] = field(default_factory=dict)
    runs: dict[int, dict[str, dict[str, float]]] = field(default_factory=dict)
    scores: dict[int, float] = field(default_factory=dict)
    baseline: list[float] = field(default_factory=list)


@dataclass
class Summary:
    """The whole comparison in numbers.

    Attributes:
        directions: ``{task: {metric: higher is better}}``.
        rows: single-task first, then every method in its order.
        curves: recorded task gradients by method.
        no_delta_p: why there is no Δp, if there is none.
        unmeasured: tasks without a metric, which Δp says nothing about.
        judgement: what can be said of the methods; ``None`` without Δp.
        plan: what a confirmation was asked to decide.
        fresh: rows of the confirmation, over its seeds only.
        confirmed: what the confirmation says, ``None`` while runs of it are missing.
        confirmed_single: the same of joint training against a model per task.
        remarks: sentences about how settings were chosen, for the answer.
    """

    directions: Directions
    rows: list[Row]
    curves: dict[str, list[dict[str, Any]]]
    no_delta_p: str | None = None
    unmeasured: Sequence[str] = ()
    judgement: Judgement | None = None
    plan: Plan | None = None
    fresh: list[Row] = field(default_factory=list)
    confirmed: Judgement | None = None
    confirmed_single: Finding | None = None
    remarks: Sequence[str] = ()

    @property
    def single(self) -> Row:
        """The single-task baselines."""
        return self.rows[0]

    @property
    def methods(self) -> list[Row]:
        """Every multi-task method."""
        return self.rows[1:]

    def scope(self) -> str | None:
        """Which tasks Δp is about, where it is not about all."""
        if not self.unmeasured:
            return None
        measured = ", ".join(map(name, self.directions))
        others = ", ".join(map(name, self.unmeasured))
        have = "have none: they are" if len(self.unmeasured) > 1 else "has none: it is"
        return f"Δp is over the tasks with a metric: {measured}; {others} {have} trained only."


def summarise(
    records: Iterable[Record],
    directions: Directions,
    kinds: Mapping[str, str],
    curves: Mapping[str, list[dict[str, Any]]],
    unmeasured: Sequence[str] = (),
    margin: float | None = None,
    plan: Plan | None = None,
) -> Summary:
    """Average over seeds, Δp of every run against the mean of the single-task runs, and judge.

    Args:
        records: what the runs gave, failed ones too.
        directions: ``{task: {metric: higher is better}}``.
        kinds: ``{method: equal, fixed or balancer}``, in the order of the table.
        curves: recorded task gradients by method.
        unmeasured: tasks without a metric.
        margin: the smallest difference that matters, in points of Δp.
        plan: of the confirmation, whose runs are among the records.
    """
    fresh = {} if plan is None else {m: Row(m, kinds[m]) for m in (plan.balancer, *plan.rivals)}
    rows = {SINGLE: Row(SINGLE, "single")} | {
        method: Row(method, kind) for method, kind in kinds.items()
    }
    for record in records:
        among = rows if record["seed"] < FIRST_FRESH else fresh
        row = among[record["method"]]
        if record["status"] == "failed":
            row.errors[record["run"]] = record["error"]
        elif record["kind"] == "timing":
            row.step_ms, row.peak_mb = record["step_ms"], record["peak_mb"]
            row.step_ratio = 1.0 if row.kind == "equal" else record["step_ratio"]
        elif record["kind"] == "train":
            row.runs.setdefault(record["seed"], {}).update(record["metrics"])
    for row in (*rows.values(), *fresh.values()):
        row.metrics = _metrics(row, directions)
    drawn = {method: curves[method] for method in rows if method in curves}
    summary = Summary(directions, list(rows.values()), drawn, unmeasured=unmeasured)
    summary.plan, summary.fresh = plan, list(fresh.values())
    _add_delta_p(summary)
    if not summary.no_delta_p:
        _judge(summary, margin)
    return summary


def _judge(summary: Summary, margin: float | None) -> None:
    # Imported here since scipy comes with an extra, and runs do not need it.
    from lightning_mtl.compare.judge import MARGIN, confirm, confirm_single, judge

    margin = MARGIN if margin is None else margin
    summary.judgement = judge(_candidates(summary.methods), margin)
    plan = summary.plan
    if plan is not None:
        fresh = _candidates(summary.fresh)
        if not all(len(c.scores) == plan.seeds for c in fresh):
            return  # runs of it are missing
        summary.confirmed = confirm(fresh, plan.balancer, plan.rivals, plan.margin)
        best = next(c for c in fresh if c.method == plan.best)
        summary.confirmed_single = confirm_single(best, sorted(best.scores), plan.margin)


def _candidates(rows: Iterable[Row]) -> list[Candidate]:
    from lightning_mtl.compare.judge import Candidate

    return [Candidate(row.method, row.kind, row.scores, row.baseline) for row in rows if row.scores]


def _metrics(row: Row, directions: Directions) -> dict[str, dict[str, Spread]]:
    found: dict[str, dict[str, Spread]] = {}
    for task, metrics in directions.items():
        for metric in metrics:
            spread = Spread.of([run[task][metric] for run in row.runs.values() if task in run])
            if spread is not None:
                found.setdefault(task, {})[metric] = spread
    return found


def _add_delta_p(summary: Summary) -> None:
    missing = [task for task in summary.directions if task not in summary.single.metrics]
    if missing:
        summary.no_delta_p = f"there is no finished single-task run of {', '.join(missing)}"
        return
    base = {
        task: {m: s.mean for m, s in metrics.items()}
        for task, metrics in summary.single.metrics.items()
    }
    for row in (*summary.methods, *summary.fresh):
        try:
            found = [delta_p(run, base, summary.directions) for run in row.runs.values()]
        except ValueError as error:  # a baseline of zero
            summary.no_delta_p = str(error)
            return
        means = [statistics.fmean(run.values()) for run in found]
        row.scores = dict(zip(row.runs, means, strict=True))
        row.baseline = _baseline(summary, row)
        row.delta_p = Spread.of(means)
        for task in summary.directions:
            spread = Spread.of([run[task] for run in found])
            if spread is not None:
                row.task_delta_p[task] = spread


def _baseline(summary: Summary, row: Row) -> list[float]:
    r"""By how much each single-task seed moves the Δp of a method, were it the whole baseline.

    To first order: :math:`\frac{100}{T}\sum_t s_t \frac{\bar M_t}{\bar B_t}
    \frac{B_{ti} - \bar B_t}{|\bar B_t|}`, with the method's mean metric :math:`\bar M_t`. Over the
    seeds that every task has.
    """
    if not row.runs:
        return []
    runs = [run for run in summary.single.runs.values() if run.keys() >= summary.directions.keys()]
    moved = []
    for run in runs:
        by_task = []
        for task, metrics in summary.directions.items():
            parts = []
            for metric, higher in metrics.items():
                base = summary.single.metrics[task][metric].mean
                ratio = row.metrics[task][metric].mean / base
                parts.append((1 if higher else -1) * ratio * (run[task][metric] - base) / abs(base))
            by_task.append(statistics.fmean(parts))
        moved.append(100 * statistics.fmean(by_task))
    middle = statistics.fmean(moved) if moved else 0.0  # not 0 where a task has a seed more
    return [value - middle for value in moved]


def baseline_json(summary: Summary) -> str:
    """The single-task averages, as ``MultiTaskModule(baseline=...)`` takes them."""
    tasks = {
        task: {
            metric: {
                "value": spread.mean,
                "higher_is_better": summary.directions[task][metric],
            }
            for metric, spread in metrics.items()
        }
        for task, metrics in summary.single.metrics.items()
    }
    return json.dumps({"format": FORMAT, "tasks": tasks}, indent=1, ensure_ascii=False) + "\n"


def summary_csv(summary: Summary) -> str:
    """A line a method, with means and standard deviations in columns of their own."""
    lines = []
    for row in summary.rows:
        # pairs: names may be such that two columns are called the same
        line: list[tuple[str, Any]] = [
            ("method", row.method),
            ("kind", row.kind),
            ("seeds", len(row.runs)),
        ]
        for task, metrics in summary.directions.items():
            for metric in metrics:
                _add(
                    line,
                    f"{task}/{metric}",
                    row.metrics.get(task, {}).get(metric),
                )
        _add(line, "delta_p", row.delta_p)
        for task in summary.directions:
            _add(line, f"delta_p/{task}", row.task_delta_p.get(task))
        for column, (low, high) in _intervals(summary, row).items():
            line += [(f"{column} low", low), (f"{column} high", high)]
        line.append(("may be best", _tie(summary, row)))
        line += [("step_ms", row.step_ms), ("step_ratio", row.step_ratio), ("peak_mb", row.peak_mb)]
        line.append(("failed", "; ".join(row.errors)))
        lines.append(line)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([column for column, _ in lines[0]])
    writer.writerows([value for _, value in line] for line in lines)
    return text.getvalue()


def _add(line: list[tuple[str, Any]], column: str, spread: Spread | None) -> None:
    line.append((f"{column} mean", None if spread is None else spread.mean))
    line.append((f"{column} std", None if spread is None else spread.std))


def _intervals(summary: Summary, row: Row) -> dict[str, tuple[float | None, float | None]]:
    """Of Δp and of the difference to equal weighting, 95 % for all rows together."""
    found = summary.judgement
    none = (None, None)
    return {
        "delta_p": none if found is None else found.delta_p.get(row.method, none),
        "beside_equal": none if found is None else found.beside_equal.get(row.method, none),
    }


def _tie(summary: Summary, row: Row) -> str:
    found = summary.judgement
    if found is None or not found.ties or row.method not in found.judged or row.kind == "single":
        return ""
    return "yes" if row.method in found.ties else "no"


def _between(interval: tuple[float | None, float | None]) -> str:
    low, high = interval
    if low is None or high is None or not math.isfinite(high - low):
        return "–"
    return f"{low:+.1f} to {high:+.1f}"


def cells(summary: Summary) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the table, as text."""
    columns = [(task, metric) for task, metrics in summary.directions.items() for metric in metrics]
    header = ["method"]
    header += [
        f"{name(f'{task} {metric}')} {'↑' if summary.directions[task][metric] else '↓'}"
        for task, metric in columns
    ]
    header += [
        "Δp %",
        "Δp, 95 %",
        "beside equal, 95 %",
        "may be best",
        "step ms",
        "× equal",
        "peak MB",
    ]
    body = []
    for row in summary.rows:
        spreads = [row.metrics.get(task, {}).get(metric) for task, metric in columns]
        line = [name(row.method)] + ["–" if s is None else s.text(".4g", ".2g") for s in spreads]
        line.append("0 (by definition)" if row.kind == "single" else "–")
        if row.delta_p is not None:
            line[-1] = row.delta_p.text("+.2f", ".2f")
        line += map(_between, _intervals(summary, row).values())
        line.append(_tie(summary, row) or "–")
        line.append("–" if row.step_ms is None else f"{row.step_ms:.2f}")
        line.append("–" if row.step_ratio is None else f"{row.step_ratio:.2f}")
        line.append("–" if row.peak_mb is None else f"{row.peak_mb:.1f}")
        if row.errors:
            line[0] += f" ({len(row.errors)} FAILED)"
        body.append(line)
    return header, body


def console_table(summary: Summary) -> str:
    """The table for a terminal, with failures below it."""
    header, body = cells(summary)
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
