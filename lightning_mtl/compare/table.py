"""From the records of runs to a row a method: means over seeds, Δp, cost, judgement."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from lightning_mtl.compare.cost import Models, Ratio, device_seconds, equal_ms, step_ratio
from lightning_mtl.compare.grid import FIRST_FRESH, SINGLE
from lightning_mtl.compare.texts import name
from lightning_mtl.metrics.delta_p import delta_p

if TYPE_CHECKING:
    from lightning_mtl.compare.confirm import Plan
    from lightning_mtl.compare.judge import Candidate, Finding, Judgement

Record = Mapping[str, Any]
Directions = Mapping[str, Mapping[str, bool]]
Curves = list[list[dict[str, Any]]]


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
        step_ms: time of an optimiser step: that of equal weighting, one for all rows, by the ratio.
        step_ratio: time of a step by that of equal weighting, taken in turns with it.
        peak_mb: peak memory above what the process held before.
        device_seconds: of a training, over seeds: its optimiser steps by the time of a step; of
            the single-task models together. Without evaluation.
        errors: what went wrong, by run.
        runs: metrics of each finished run, by seed.
        lengths: optimiser steps of each finished run, by seed, with its task if it has one only.
        scores: Δp of each finished run, by seed.
        baseline: what each seed of the single-task runs does to this Δp, see :func:`_baseline`.
    """

    method: str
    kind: str
    metrics: dict[str, dict[str, Spread]] = field(default_factory=dict)
    delta_p: Spread | None = None
    task_delta_p: dict[str, Spread] = field(default_factory=dict)
    step_ms: float | None = None
    step_ratio: Ratio | None = None
    peak_mb: float | None = None
    device_seconds: Spread | None = None
    errors: dict[str, str] = field(default_factory=dict)
    runs: dict[int, dict[str, dict[str, float]]] = field(default_factory=dict)
    lengths: dict[int, list[tuple[str | None, int]]] = field(default_factory=dict)
    scores: dict[int, float] = field(default_factory=dict)
    baseline: list[float] = field(default_factory=list)


@dataclass
class Summary:
    """The whole comparison in numbers.

    Attributes:
        directions: ``{task: {metric: higher is better}}``.
        rows: single-task first, then every method in its order.
        curves: recorded task gradients by method, a list of points for each seed.
        models: one multi-task model beside a model per task, if that was measured.
        no_models: why it was not, if it was tried.
        noise: equal weighting beside itself: how far from 1 a ratio is by chance.
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
    curves: Mapping[str, Curves]
    models: Models | None = None
    no_models: str | None = None
    noise: Ratio | None = None
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

    def ordered(self) -> list[Row]:
        """All rows from the highest Δp down, single-task at its 0; those without Δp last."""

        def place(row: Row) -> float:
            if row.kind == "single" and not self.no_delta_p:
                return 0.0
            return float("inf") if row.delta_p is None else -row.delta_p.mean

        return sorted(self.rows, key=place)

    def mark(self, row: Row) -> str:
        """``best`` for the highest mean Δp of the methods, ``tie`` for one that may be the best."""
        judged = None if self.judgement is None else self.judgement.judged
        scored = [r for r in self.methods if r.delta_p and (not judged or r.method in judged)]
        if scored and row is max(scored, key=lambda r: r.delta_p.mean if r.delta_p else 0.0):
            return "best"
        ties = () if self.judgement is None else self.judgement.ties
        return "tie" if row.kind != "single" and row.method in ties else ""

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
    curves: Mapping[str, Curves],
    unmeasured: Sequence[str] = (),
    margin: float | None = None,
    plan: Plan | None = None,
) -> Summary:
    """Average over seeds, Δp of every run against the mean of the single-task runs, and judge.

    Args:
        records: what the runs gave, failed ones too.
        directions: ``{task: {metric: higher is better}}``.
        kinds: ``{method: equal, fixed or balancer}``, in the order of the table.
        curves: recorded task gradients by method, a list of points for each seed.
        unmeasured: tasks without a metric.
        margin: the smallest difference that matters, in points of Δp.
        plan: of the confirmation, whose runs are among the records.
    """
    fresh = {} if plan is None else {m: Row(m, kinds[m]) for m in (plan.balancer, *plan.rivals)}
    rows = {SINGLE: Row(SINGLE, "single")} | {
        method: Row(method, kind) for method, kind in kinds.items()
    }
    timings = {}
    for record in records:
        among = rows if record["seed"] < FIRST_FRESH else fresh
        row = among[record["method"]]
        if record["status"] == "failed":
            row.errors[record["run"]] = record["error"]
        elif record["kind"] == "timing":
            timings[row.method] = record
        elif record["kind"] == "train":
            row.runs.setdefault(record["seed"], {}).update(record["metrics"])
            if isinstance(record.get("steps"), int):  # another tool may give none
                length = (record.get("task"), record["steps"])
                row.lengths.setdefault(record["seed"], []).append(length)
    for row in (*rows.values(), *fresh.values()):
        row.metrics = _metrics(row, directions)
    drawn = {method: curves[method] for method in rows if method in curves}
    summary = Summary(directions, list(rows.values()), drawn, unmeasured=unmeasured)
    summary.plan, summary.fresh = plan, list(fresh.values())
    _add_cost(summary, timings)
    _add_delta_p(summary)
    if not summary.no_delta_p:
        _judge(summary, margin)
    return summary


def _add_cost(summary: Summary, timings: Mapping[str, Record]) -> None:
    """Milliseconds are those of equal weighting by each ratio, so that both order rows alike."""
    equal = next((row.method for row in summary.methods if row.kind == "equal"), "")
    milliseconds = equal_ms(timings, equal)
    if milliseconds is None:
        return
    for row in summary.methods:
        if row.method in timings:
            record = timings[row.method]
            row.peak_mb = record["peak_mb"]
            row.step_ratio = Ratio(1.0) if row.method == equal else step_ratio(record)
            row.step_ms = milliseconds * row.step_ratio.value
            row.device_seconds = Spread.of(device_seconds(row.lengths, {None: row.step_ms}))
    if equal not in timings:
        return
    if timings[equal].get("equal_turns_ms"):
        summary.noise = step_ratio(timings[equal])
    summary.no_models = timings[equal].get("models_error")
    if timings[equal].get("models"):
        models = summary.models = Models.of(timings[equal]["models"])
        steps: dict[str | None, float] = {
            task: one.step.value * milliseconds for task, one in models.single.items() if one.step
        }
        if steps.keys() >= summary.directions.keys():
            single = summary.single
            single.device_seconds = Spread.of(device_seconds(single.lengths, steps))


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
