"""What balancing costs: times beside equal weighting, device-seconds, the Pareto front."""

from __future__ import annotations

import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

_FEWEST = 6  # turns of an interval: the range of six holds their median with 1 - 2^-5 = 97 %


class Ratio(NamedTuple):
    """The median of ratios that were measured in turns; their range, where there are six or more.

    The range of n independent values holds the median of their distribution with
    :math:`1 - 2^{1-n}`, whatever that distribution is.
    """

    value: float
    low: float | None = None
    high: float | None = None

    @classmethod
    def of(cls, above: Sequence[float], below: Sequence[float]) -> Ratio | None:
        """From pairs of measurements, ``None`` where there are none."""
        found = [a / b for a, b in zip(above, below, strict=False) if b > 0]
        if not found:
            return None
        interval = (min(found), max(found)) if len(found) >= _FEWEST else (None, None)
        return cls(statistics.median(found), *interval)

    def text(self) -> str:
        """The ratio, with its interval."""
        if self.low is None or self.high is None:
            return f"{self.value:.2f}"
        return f"{self.value:.2f} ({self.low:.2f} to {self.high:.2f})"


@dataclass(frozen=True)
class Model:
    """A single-task model beside the multi-task model.

    Attributes:
        parameters: how many its task's loss reaches.
        step: time of a training step, by that of the multi-task model with equal weighting.
        forward: time of a forward pass in evaluation mode, by that of the multi-task model.
        forward_ms: that time.
    """

    parameters: int | None
    step: Ratio | None
    forward: Ratio | None
    forward_ms: float | None


@dataclass(frozen=True)
class Models:
    """One multi-task model beside a model per task.

    Attributes:
        parameters: of the multi-task model, those that the loss of a task reaches.
        forward_ms: its forward pass in evaluation mode.
        single: the others, by task.
        together: time of a forward pass of each of them, one after the other, by that of the
            multi-task model.
        timed: ``forward``, or ``losses`` where losses had to be timed with it.
    """

    parameters: int | None
    forward_ms: float | None
    single: Mapping[str, Model] = field(default_factory=dict)
    together: Ratio | None = None
    timed: str | None = None

    @property
    def single_parameters(self) -> int | None:
        """Of all single-task models together."""
        found = [model.parameters for model in self.single.values()]
        return None if not found or None in found else sum(n or 0 for n in found)

    @classmethod
    def of(cls, content: Mapping[str, Any]) -> Models:
        """From the field ``models`` of a record of equal weighting."""
        joint, single = content["joint"], content["single"]
        forward = joint["forward_turns_ms"]
        found = {
            task: Model(
                one["parameters"],
                Ratio.of(one["step_turns_ms"], joint["step_turns_ms"]),
                Ratio.of(one["forward_turns_ms"], forward),
                _median(one["forward_turns_ms"]),
            )
            for task, one in single.items()
        }
        by_turn = zip(*(one["forward_turns_ms"] for one in single.values()), strict=False)
        together = Ratio.of([sum(turn) for turn in by_turn], forward)
        return cls(joint["parameters"], _median(forward), found, together, content.get("timed"))


def _median(values: Sequence[float]) -> float | None:
    return statistics.median(values) if values else None


def equal_ms(timings: Mapping[str, Mapping[str, Any]], equal: str) -> float | None:
    """A step of equal weighting: one number for the whole comparison.

    The median over all its turns, those beside every row; of records from before there were turns,
    its own time.

    Args:
        timings: finished records of the kind ``timing``, by method.
        equal: the name of equal weighting.
    """
    turns: list[float] = []
    for record in timings.values():
        turns += record.get("equal_turns_ms", ())
    if turns:
        return statistics.median(turns)
    if equal in timings:
        return float(timings[equal]["step_ms"])
    found = [r["step_ms"] / r["step_ratio"] for r in timings.values() if r["step_ratio"] > 0]
    return _median(found)


def step_ratio(record: Mapping[str, Any]) -> Ratio:
    """Time of a step by that of equal weighting beside it."""
    found = Ratio.of(record.get("step_turns_ms", ()), record.get("equal_turns_ms", ()))
    return found or Ratio(float(record["step_ratio"]))


def device_seconds(
    lengths: Mapping[int, Sequence[tuple[str | None, int]]], step_ms: Mapping[str | None, float]
) -> list[float]:
    """Steps by the time of a step, for every seed that has all of its runs.

    Args:
        lengths: by seed, the task of each run (``None`` for all of them) and its optimiser steps.
        step_ms: time of a step, by task.
    """
    whole = [runs for runs in lengths.values() if {task for task, _ in runs} == step_ms.keys()]
    return [sum(steps * step_ms[task] for task, steps in runs) / 1000 for runs in whole]


def front(points: Mapping[str, tuple[float, float]]) -> list[str]:
    """The points that no other one beats, from the cheapest to the best.

    A point is beaten by one that costs no more and gains no less, and differs in one of both.

    Args:
        points: cost (less is better) and gain (more is better), by name.
    """
    ordered = sorted(points.items(), key=lambda item: (item[1][0], -item[1][1]))
    found: list[str] = []
    best: tuple[float, float] | None = None
    for name, (cost, gain) in ordered:
        if best is None or gain > best[1] or (cost, gain) == best:
            found.append(name)
            best = (cost, gain)
    return found


def timing_fault(record: Mapping[str, Any]) -> str | None:
    """What keeps the numbers of a finished ``timing`` from being used."""
    for name in ("step_ms", "step_ratio"):
        if not _numbers([record[name]]):
            return f"`{name}` {record[name]!r} instead of a number above 0"
    peak = record.get("peak_mb")
    if not (peak is None or peak == 0 or _numbers([peak])):
        return f"`peak_mb` {peak!r} instead of a number or null"
    for name in ("step_turns_ms", "equal_turns_ms"):
        if not _numbers(record.get(name, [])):
            return f"`{name}` that is no list of numbers above 0"
    models = record.get("models")
    if not isinstance(record.get("models_error", ""), str):
        return "`models_error` that is no text"
    if models is None:
        return None
    try:
        parts = [models["joint"], *models["single"].values()]
        if not parts[1:]:
            return "`models` without a single-task model"
        for part in parts:
            count = part["parameters"]
            whole = count is None or count == 0 or positive(count, int)
            turns = (part["step_turns_ms"], part["forward_turns_ms"])
            if not whole or not all(map(_numbers, turns)):
                return "`models` with something else than numbers"
    except (TypeError, KeyError, AttributeError):
        return "`models` that are not those of a comparison"
    return None


def _numbers(values: Any) -> bool:
    return isinstance(values, list) and all(map(positive, values))


def positive(value: Any, kind: type[int] | type[float] = float) -> bool:
    """Whether a value from a file is a number above 0 that a float can hold; ``int``: a whole one.

    Booleans are none, and neither are integers beyond the range of floats, which JSON may have.
    """
    kinds = int if kind is int else (int, float)
    return (
        isinstance(value, kinds) and not isinstance(value, bool) and 0 < value <= sys.float_info.max
    )
