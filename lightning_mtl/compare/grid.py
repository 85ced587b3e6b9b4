"""The grid of runs, and the folder that remembers which of them are finished."""

from __future__ import annotations

import hashlib
import inspect
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning_mtl.compare import CompareError

SINGLE = "single-task"
FORMAT = 1


@dataclass(frozen=True)
class Run:
    """One training run.

    Attributes:
        kind: ``train`` (a result), ``curves`` (equal weighting again, with task gradients
            recorded) or ``timing`` (a few steps with nothing beside it).
        method: the name in the file of balancers, or ``single-task``.
        seed: seeds weights, data order and everything else.
        task: the one task of a single-task run.
    """

    kind: str
    method: str
    seed: int
    task: str | None = None

    @property
    def name(self) -> str:
        """Unique in a comparison, and usable as a file name."""
        parts = [
            self.method,
            self.task or "",
            f"seed{self.seed}",
            "" if self.kind == "train" else self.kind,
        ]
        return "-".join(file_name(part) for part in parts if part)

    @property
    def label(self) -> str:
        """How progress and errors name the run."""
        task = f" {self.task}" if self.task else ""
        what = f"seed {self.seed}" if self.kind == "train" else self.kind
        return f"{self.method}{task}, {what}"


def file_name(text: str) -> str:
    """``text`` with only characters that every file system takes."""
    return re.sub(r"[^A-Za-z0-9_.+-]+", "_", text)


def plan(tasks: Sequence[str], methods: Sequence[str], equal: str, seeds: int) -> list[Run]:
    """All runs in the order they start: baselines, balancers, one for curves, then timings.

    Args:
        tasks: the model's tasks.
        methods: names of the balancers.
        equal: which of them is equal weighting.
        seeds: how many seeds, from 0.
    """
    runs = [Run("train", SINGLE, seed, task) for seed in range(seeds) for task in tasks]
    runs += [Run("train", method, seed) for seed in range(seeds) for method in methods]
    runs += [Run("curves", equal, 0)] if equal in methods else []
    return runs + [Run("timing", method, 0) for method in methods]


class Results:
    """``results.jsonl``: a line a finished run, complete or not there at all.

    A line cut short by a kill is dropped, and so are failed runs: both are run again.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / "results.jsonl"
        self.records: dict[str, dict[str, Any]] = {}
        text = self.path.read_text(encoding="utf-8") if self.path.exists() else ""
        for line in text.splitlines(keepends=True):
            if line.endswith("\n"):
                record = json.loads(line)
                if record["status"] == "finished":
                    self.records[record["run"]] = record
        kept = "".join(_line(record) for record in self.records.values())
        if kept != text:
            write(self.path, kept)

    def append(self, record: dict[str, Any]) -> None:
        """Add a run: one write, on the disk when this returns. Curves get their own file."""
        if "curves" in record:
            points = record.pop("curves")
            write(self._curves(record["run"]), "".join(_line(point) for point in points))
        self.records[record["run"]] = record
        handle = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            os.write(handle, _line(record).encode())
            os.fsync(handle)
        finally:
            os.close(handle)

    def of(self, runs: Iterable[Run]) -> list[dict[str, Any]]:
        """The records of ``runs``, in their order."""
        return [self.records[run.name] for run in runs if run.name in self.records]

    def curves(self, runs: Iterable[Run]) -> dict[str, list[dict[str, Any]]]:
        """Recorded task gradients of finished ``runs``, by method."""
        found: dict[str, list[dict[str, Any]]] = {}
        for run in runs:
            path = self._curves(run.name)
            if run.name in self.records and path.exists():
                lines = path.read_text(encoding="utf-8").splitlines()
                found[run.method] = [json.loads(line) for line in lines]
        return {method: points for method, points in found.items() if points}

    def _curves(self, run: str) -> Path:
        return self.path.with_name("curves") / f"{run}.jsonl"


def _line(record: dict[str, Any]) -> str:
    return json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n"


def write(path: Path, content: str | bytes) -> None:
    """Replace a file in one step, so that a kill leaves the old one or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_bytes(content.encode() if isinstance(content, str) else content)
    temporary.replace(path)


def source_hash(cls: type) -> str:
    """Hash of the file that defines a class: results of older code must not mix with new ones."""
    try:
        return file_hash(inspect.getfile(cls))
    except TypeError:
        return "unknown"


def file_hash(path: str) -> str:
    """Hash of a file's content, ``"unknown"`` where it cannot be read."""
    try:
        return hashlib.sha256(Path(path).read_bytes()).hexdigest()[:16]
    except OSError:
        return "unknown"


def claim(folder: Path, comparison: dict[str, Any]) -> None:
    """Take a new folder for this comparison, or check that it already belongs to it.

    Args:
        folder: the output folder.
        comparison: what identifies it: all but the number of seeds, of workers, and ``--only``.

    Raises:
        CompareError: the folder holds another comparison, or files that are none.
    """
    path = folder / "comparison.json"
    comparison = json.loads(json.dumps({"format": FORMAT, **comparison}, default=str))
    cure = f"Give this comparison another folder with --out, or remove {folder} first."
    if not path.exists():
        if (folder / "results.jsonl").exists():
            raise CompareError(f"Expected {path} beside results.jsonl but found none. {cure}")
        write(path, json.dumps(comparison, indent=1, ensure_ascii=False) + "\n")
        return
    before = flatten(json.loads(path.read_text(encoding="utf-8")))
    now = flatten(comparison)
    differences = [
        f"  {key}: {_show(before, key)} in the folder, {_show(now, key)} now"
        for key in sorted({*before, *now})
        if before.get(key, ...) != now.get(key, ...)
    ]
    if differences:
        shown = differences[:10] + [f"  and {len(differences) - 10} more"] * (len(differences) > 10)
        raise CompareError(
            f"Expected {folder} to be empty or to hold this comparison, but it holds another one:\n"
            + "\n".join(shown)
            + f"\n{cure}"
        )


def flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    """Nested dicts and lists as ``{"a.b.0": leaf}``."""
    if isinstance(value, Mapping) and value:
        items: Iterable[tuple[Any, Any]] = value.items()
    elif isinstance(value, list) and value:
        items = enumerate(value)
    else:
        return {prefix: value}
    found: dict[str, Any] = {}
    for key, inner in items:
        found.update(flatten(inner, f"{prefix}.{key}" if prefix else str(key)))
    return found


def _show(flat: Mapping[str, Any], key: str) -> str:
    return repr(flat[key]) if key in flat else "nothing"
