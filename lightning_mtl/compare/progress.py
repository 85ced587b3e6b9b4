"""Progress over the whole grid: one line a finished run, so that it reads the same in a log."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lightning_mtl.compare.grid import Run
from lightning_mtl.compare.texts import name, one_line


class Progress:
    """Counts runs and estimates the time left.

    Args:
        total: runs of the grid.
        kinds: how many runs of each kind are to do now.
        before: records of the runs that an earlier command finished.
        workers: runs side by side.
        clock: seconds of a monotonic clock.
    """

    def __init__(
        self,
        total: int,
        kinds: Mapping[str, int],
        before: Sequence[Mapping[str, Any]],
        workers: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.total, self.done, self.workers = total, len(before), workers
        self.left = dict(kinds)
        self.took: dict[str, list[float]] = {}
        for record in before:
            self.took.setdefault(record["kind"], []).append(record["seconds"])
        self.clock = clock
        self.started = clock()

    def headline(self) -> str:
        """What there is to do."""
        before = f", {self.done} of them finished before" if self.done else ""
        return f"{self.total} runs{before}; {self.workers} side by side"

    def elapsed(self) -> float:
        """Seconds since the start of this command."""
        return self.clock() - self.started

    def line(self, run: Run, record: Mapping[str, Any]) -> str:
        """Count a run that ended and describe it."""
        self.done += 1
        self.left[run.kind] -= 1
        self.took.setdefault(run.kind, []).append(record.get("seconds", 0.0))
        width = len(str(self.total))
        text = f"[{self.done:{width}}/{self.total}] {name(run.label, 100)}: {outcome(record)}"
        remaining = self.time_left()
        if remaining is None:
            return text
        return f"{text} | {duration(self.elapsed())} so far, about {duration(remaining)} left"

    def time_left(self) -> float | None:
        """Seconds until the last run ends; ``None`` when there is nothing left to do."""
        if not any(self.left.values()):
            return None
        seconds = 0.0
        for kind, count in self.left.items():
            known = self.took.get(kind) or [
                sum(map(sum, self.took.values())) / max(sum(map(len, self.took.values())), 1)
            ]
            side_by_side = 1 if kind == "timing" else min(self.workers, max(count, 1))
            seconds += count * sum(known) / len(known) / side_by_side
        return seconds


def outcome(record: Mapping[str, Any]) -> str:
    """What a run gave, in a few words."""
    if record["status"] == "failed":
        return f"FAILED, {one_line(record['error'])}"
    if record["kind"] == "timing":
        memory = "" if record["peak_mb"] is None else f", {record['peak_mb']:.1f} MB"
        return f"{record['step_ms']:.2f} ms a step{memory}"
    metrics = [
        f"{name(f'{task} {metric}')} {value:.4g}"
        for task, found in record.get("metrics", {}).items()
        for metric, value in found.items()
    ]
    return f"{', '.join(metrics[:4]) or 'recorded'} ({duration(record['seconds'])})"


def duration(seconds: float) -> str:
    """Seconds as a person says them."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"
