"""``results.jsonl``: what every run gave, a line each."""

from __future__ import annotations

import codecs
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning_mtl.compare import CompareError
from lightning_mtl.compare.cost import positive, timing_fault
from lightning_mtl.compare.folder import append, as_bytes, check_lock, flatten, write
from lightning_mtl.compare.grid import Run
from lightning_mtl.compare.texts import shortened


class Results:
    """The records of a comparison, by run; each is on the disk as a whole, or not at all.

    Failed runs are dropped, since they are run again, and so is a last line that was cut short.

    Args:
        folder: of the comparison; only its owner may read or write it.
        directions: ``{task: {metric: higher is better}}`` of the comparison.

    Attributes:
        records: of finished runs; failed ones too, once they failed in this process.
        notes: what was dropped, in words.

    Raises:
        CompareError: a line that is not a record, by its number.
    """

    def __init__(self, folder: Path, directions: Mapping[str, Mapping[str, bool]]) -> None:
        self.path = folder / "results.jsonl"
        self._directions = directions
        self.records: dict[Run, dict[str, Any]] = {}
        self.notes: list[str] = []
        before = self.path.read_bytes() if self.path.exists() else b""
        # An editor may have put a byte order mark before it; str.splitlines would also split at
        # letters in texts.
        *lines, rest = before.removeprefix(codecs.BOM_UTF8).split(b"\n")
        for number, line in enumerate(lines, 1):
            if line.strip():
                self._keep(self._record(line, number), number)
        if rest.strip():
            try:
                self._keep(self._record(rest, len(lines) + 1), len(lines) + 1)
            except CompareError:
                self.notes.append(
                    f"line {len(lines) + 1} of {self.path} was cut short and is dropped; its run "
                    f"is done again"
                )
        kept = "".join(_line(record) for record in self.records.values())
        if as_bytes(kept) != before:
            write(self.path, kept)

    def _keep(self, record: dict[str, Any], number: int) -> None:
        run = Run.of(record)
        if record["status"] != "finished":
            return
        if run in self.records:
            self.notes.append(
                f"line {number} of {self.path} is about {run.label} once more; the earlier line is "
                f"dropped"
            )
        self.records[run] = record

    def _record(self, line: bytes, number: int) -> dict[str, Any]:
        """The record of a line, or a refusal that names it."""
        record: Any = None
        try:
            record = json.loads(line.decode("utf-8"))
            fault = record_fault(record, self._directions)
        except (ValueError, RecursionError) as error:  # not UTF-8, not JSON
            fault = str(error)
        if fault:
            raise CompareError(
                f"Expected every line of {self.path} to be the record of a run, but found at line "
                f"{number}: {shortened(fault, 300)}. Remove that line, and its run is done again; "
                f"or give this comparison another folder with --out."
            )
        return dict(record)

    def append(self, run: Run, record: dict[str, Any]) -> None:
        """Add a run, on the disk when this returns. Curves get their own file.

        Raises:
            OSError: it could not be written; everything before is as it was. Or the folder may
                belong to another comparison by now.
        """
        check_lock(self.path.parent)
        if "curves" in record:
            points = record.pop("curves")
            write(self._curves(record), "".join(_line(point) for point in points))
        append(self.path, _line(record))
        self.records[run] = record

    def of(self, runs: Iterable[Run]) -> list[dict[str, Any]]:
        """The records of ``runs``, in their order."""
        return [self.records[run] for run in runs if run in self.records]

    def curves(self, runs: Iterable[Run]) -> dict[str, list[list[dict[str, Any]]]]:
        """Recorded task gradients of finished ``runs``, by method, a list of points for each run.

        They are only drawn: a file that cannot be read costs a picture, and a note says so.
        """
        found: dict[str, list[list[dict[str, Any]]]] = {}
        for run in runs:
            path = self._curves(self.records.get(run, {"run": ""}))
            if run in self.records and path.exists():
                try:
                    points = read_points(path)
                except (OSError, ValueError) as error:
                    self.notes.append(f"{path} cannot be read and is not drawn: {error}")
                    continue
                if points:
                    found.setdefault(run.method, []).append(points)
        return found

    def _curves(self, record: dict[str, Any]) -> Path:
        return self.path.with_name("curves") / f"{record['run']}.jsonl"


def _line(record: dict[str, Any]) -> str:
    return json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n"


def record_fault(record: Any, directions: Mapping[str, Mapping[str, bool]]) -> str | None:
    """What keeps ``record`` from being one of this comparison, ``None`` for nothing."""
    if not isinstance(record, dict):
        return f"a {type(record).__name__} instead of a record"
    kind, status = record.get("kind"), record.get("status")
    if kind not in ("train", "curves", "timing") or status not in ("finished", "failed"):
        return f"the kind {kind!r} with the status {status!r}"
    needed: dict[str, Any] = {"run": str, "method": str, "seed": int}
    if status == "finished":
        needed["seconds"] = (int, float)
        needed |= {"step_ms": (int, float), "step_ratio": (int, float)} if kind == "timing" else {}
    wrong = [name for name, types in needed.items() if not isinstance(record.get(name), types)]
    if wrong or not isinstance(record.get("task", ""), str):
        return f"no usable {' or '.join(wrong or ['task'])}"
    seed, steps, seconds = record["seed"], record.get("steps"), record.get("seconds")
    if isinstance(seed, bool) or seed < 0:
        return f"the seed {seed!r} instead of a whole number, 0 or above"
    if steps is not None and not positive(steps, int):
        return f"`steps` {steps!r} instead of a whole number above 0"
    if status == "finished" and seconds != 0 and not positive(seconds):
        return f"`seconds` {seconds!r} instead of a number, 0 or above"
    if not isinstance(record.get("error", ""), str):
        return "an `error` that is no text"
    tried = "trial" in record
    if tried and (not isinstance(record["trial"], int) or "settings" not in record):
        return "a `trial` that is no number, or has no `settings`"
    if not isinstance(record.get("settings", {}), dict):
        return "`settings` that are no mapping"
    if not re.fullmatch(r"[A-Za-z0-9_.+-]+", record["run"]):  # it becomes the name of a file
        return f"the run {record['run']!r}, which this command does not write"
    if status == "finished" and kind == "train":
        tasks = [record["task"]] if "task" in record else list(directions)
        found = flatten(record.get("metrics"))
        expected = [f"{t}.{m}" for t in tasks for m in directions.get(t, {})]
        if sorted(found) != sorted(expected):
            return f"the metrics {sorted(found)} instead of {sorted(expected)}"
        bad = [f"{name} {value!r}" for name, value in found.items() if not _finite(value)]
        return f"{', '.join(bad)} instead of a finite number" if bad else None
    return timing_fault(record) if status == "finished" and kind == "timing" else None


def _finite(value: Any) -> bool:
    try:
        numbers = isinstance(value, (int, float)) and not isinstance(value, bool)
        return numbers and math.isfinite(value)
    except OverflowError:  # an integer too long for a float
        return False


def read_points(path: Path) -> list[dict[str, Any]]:
    """The points of a file of curves.

    Raises:
        ValueError: it holds something else.
    """
    lines: Sequence[str] = path.read_bytes().decode("utf-8").split("\n")
    points = [json.loads(line) for line in lines if line.strip()]
    for point in points:
        if not isinstance(point, dict) or not {"step", "norms", "cosines"} <= point.keys():
            raise ValueError(f"{str(point)[:80]!r} is not a point of a curve")
    return points
