"""The numbers of a comparison as data files."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Sequence
from typing import Any

from lightning_mtl.compare.cost import Ratio, front
from lightning_mtl.compare.gradients import band, series
from lightning_mtl.compare.table import Row, Spread, Summary
from lightning_mtl.metrics.delta_p import FORMAT

# A line as pairs of column and value: names may be such that two columns are called the same.
Line = list[tuple[str, Any]]


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
    fronts = {f"on_front/{cost}": pareto(summary, cost) for cost in ("device_seconds", "peak_mb")}
    lines = []
    for row in summary.rows:
        line = _means(summary, row)
        found = summary.judgement
        for column, intervals in (
            ("delta_p", {} if found is None else found.delta_p),
            ("beside_equal", {} if found is None else found.beside_equal),
        ):
            low, high = intervals.get(row.method, (None, None))
            line += [(f"{column} low", low), (f"{column} high", high)]
        judged = found is not None and found.ties and row.method in found.judged
        tie = ("yes" if row.method in found.ties else "no") if judged and found else ""
        line.append(("may be best", tie if row.kind != "single" else ""))
        line.append(("step_ms", row.step_ms))
        line += _ratio("step_ratio", row.step_ratio)
        _add(line, "device_seconds", row.device_seconds)
        line.append(("peak_mb", row.peak_mb))
        line += [(name, "yes" if row.method in on else "no") for name, on in fronts.items()]
        line.append(("failed", "; ".join(row.errors)))
        lines.append(line)
    return _csv(lines)


def confirm_csv(summary: Summary) -> str:
    """A line a method of the confirmation, over its fresh seeds only."""
    return _csv([*_means(summary, row), ("failed", "; ".join(row.errors))] for row in summary.fresh)


def models_csv(summary: Summary) -> str:
    """The multi-task model, then a line a single-task model."""
    models = summary.models
    assert models is not None
    lines: list[Line] = [
        [
            *(("model", "multi-task"), ("task", ""), ("parameters", models.parameters)),
            *_ratio("step_ratio", Ratio(1.0)),
            ("forward_ms", models.forward_ms),
            *_ratio("forward_ratio", Ratio(1.0) if models.forward_ms else None),
        ]
    ]
    lines += [
        [
            *(("model", "single-task"), ("task", task), ("parameters", one.parameters)),
            *_ratio("step_ratio", one.step),
            ("forward_ms", one.forward_ms),
            *_ratio("forward_ratio", one.forward),
        ]
        for task, one in models.single.items()
    ]
    return _csv(lines)


def gradients_csv(summary: Summary) -> str:
    """Moving means of norms and cosines: mean, lowest and highest seed."""
    lines: list[Line] = []
    for method, runs in summary.curves.items():
        for what, column in (("norms", "norm"), ("cosines", "cosine")):
            found = [series(points, what) for points in runs]
            for subject in dict.fromkeys(key for one in found for key in one):
                shown = band([one[subject] for one in found if subject in one], what == "norms")
                if shown is None:
                    continue
                for step, mean, low, high in zip(*shown[:4], strict=True):
                    line = [("method", method), ("what", column), ("of", subject), ("step", step)]
                    line += [("mean", mean), ("low", low), ("high", high), ("seeds", shown.seeds)]
                    lines.append(line)
    return _csv(lines)


def pareto(summary: Summary, cost: str) -> list[str]:
    """Methods on the front of Δp against a cost, from the cheapest to the best, by means.

    Args:
        summary: the comparison.
        cost: ``device_seconds`` or ``peak_mb``.
    """
    return front({row.method: point for row in summary.rows if (point := price(row, cost))})


def price(row: Row, cost: str) -> tuple[float, float] | None:
    """Cost and Δp of a row by means, where both are known."""
    paid = row.device_seconds.mean if cost == "device_seconds" and row.device_seconds else None
    paid = row.peak_mb if cost == "peak_mb" else paid
    gain = 0.0 if row.kind == "single" else row.delta_p.mean if row.delta_p else None
    return None if paid is None or gain is None else (paid, gain)


def _means(summary: Summary, row: Row) -> Line:
    line: Line = [("method", row.method), ("kind", row.kind), ("seeds", len(row.runs))]
    for task, metrics in summary.directions.items():
        for metric in metrics:
            _add(line, f"{task}/{metric}", row.metrics.get(task, {}).get(metric))
    _add(line, "delta_p", row.delta_p)
    for task in summary.directions:
        _add(line, f"delta_p/{task}", row.task_delta_p.get(task))
    return line


def _add(line: Line, column: str, spread: Spread | None) -> None:
    line.append((f"{column} mean", None if spread is None else spread.mean))
    line.append((f"{column} std", None if spread is None else spread.std))


def _ratio(column: str, ratio: Ratio | None) -> Line:
    value, low, high = (None, None, None) if ratio is None else ratio
    return [(column, value), (f"{column} low", low), (f"{column} high", high)]


def _csv(lines: Iterable[Sequence[tuple[str, Any]]]) -> str:
    lines = list(lines)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([column for column, _ in lines[0]] if lines else [])
    writer.writerows([value for _, value in line] for line in lines)
    return text.getvalue()
