"""``lightning-mtl report``: the files of a comparison again, from its runs, without training."""

from __future__ import annotations

import argparse
import codecs
import json
import math
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning_mtl.compare import CompareError
from lightning_mtl.compare.about import FILE, About
from lightning_mtl.compare.command import check_extras
from lightning_mtl.compare.confirm import FILE as CONFIRMED
from lightning_mtl.compare.confirm import Plan
from lightning_mtl.compare.folder import flatten, owned
from lightning_mtl.compare.grid import FIRST_FRESH, SINGLE, Run, file_names
from lightning_mtl.compare.output import show
from lightning_mtl.compare.results import read_points, record_fault
from lightning_mtl.compare.texts import complain, one_line, say, shortened, visible
from lightning_mtl.compare.tuning.rivals import NAMES

Record = dict[str, Any]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="lightning-mtl report",
        description="Answer, table, plots and report from the runs of a comparison.",
    )
    parser.add_argument("folder", help="holds results.jsonl, of `compare` or of another tool")
    parser.add_argument("--out", help="where to write (default: the folder)")
    parser.add_argument("--margin", type=float, help="points of Δp that matter")
    return parser


def main(args: Sequence[str]) -> int:
    """Write the files of a comparison again.

    Args:
        args: the command line after ``report``.

    Returns:
        The exit status: 0; 1 when a file could not be written; 2 when the folder cannot be used.
    """
    options = _parser().parse_args(args)
    try:
        check_extras()
        _report(Path(options.folder), Path(options.out or options.folder), options.margin)
    except CompareError as error:
        complain(f"error: {visible(str(error))}", "report")
        return 2
    except OSError as error:
        complain(f"error: {one_line(str(error))}", "report")
        return 1
    return 0


def _report(folder: Path, out: Path, margin: float | None) -> None:
    if margin is not None and not 0 < margin < math.inf:
        raise CompareError(
            f"Expected --margin to be a number above 0 but found {margin}. Give the smallest "
            f"difference that matters, in points of Δp."
        )
    about, records, notes = read(folder)
    plan = Plan.load(folder)
    if margin is not None:
        if plan is not None:
            plan.agree(folder, None, plan.screening, margin)
        about.margin = margin
    if plan is not None and not {plan.balancer, plan.best, *plan.rivals} <= about.methods.keys():
        raise CompareError(
            f"Expected confirm.json in {folder} to name methods of this comparison but found "
            f"others. Put it back as it was."
        )
    records, curves = _shown(folder, about, records, plan, notes)
    summary = about.summary(records, curves, plan)
    with owned(out):
        notes += show(summary, out, about.texts, about.facts)
    for note in notes:
        complain(f"note: {one_line(note)}", "report")
    say(f"\nReport: {out / 'report.html'}")


def _shown(
    folder: Path, about: About, records: list[Record], plan: Plan | None, notes: list[str]
) -> tuple[list[Record], dict[str, list[list[Record]]]]:
    """The runs that are asked for, and the curves that are there."""
    seeds = math.inf if about.seeds is None else about.seeds
    records = [record for record in records if not _left_out(record, about.methods)]
    shown = [record for record in records if record["seed"] < min(seeds, FIRST_FRESH)]
    if plan is not None:
        chosen = {plan.balancer, *plan.rivals}
        last = FIRST_FRESH + plan.seeds
        shown += [r for r in records if FIRST_FRESH <= r["seed"] < last and r["method"] in chosen]
    elif any(record["seed"] >= FIRST_FRESH for record in records):
        notes.append(
            f"runs of a confirmation are left out: there is no confirm.json in {folder} that says "
            f"what they are to decide"
        )
    curves: dict[str, list[list[Record]]] = {}
    for record in shown:
        path = folder / "curves" / f"{record['run']}.jsonl"
        if record["status"] == "finished" and path.exists():
            try:
                points = read_points(path)
            except (OSError, ValueError) as error:
                notes.append(f"{path} cannot be read and is not drawn: {error}")
                continue
            if points:
                curves.setdefault(record["method"], []).append(points)
    return shown, curves


def read(folder: Path) -> tuple[About, list[Record], list[str]]:
    """What a folder holds: what it is about, its records (the last of each run), and notes.

    Raises:
        CompareError: a file that is missing or no such file, by its name and line.
    """
    path = folder / "results.jsonl"
    lines = _lines(path)
    about, first = _about(folder, path, lines)
    records: dict[Run, Record] = {}
    notes: list[str] = []
    # Runs of another tool, without a word on what fresh seeds are to decide.
    alone = first > 0 and not (folder / CONFIRMED).exists()
    for number, line in lines[first:]:
        try:
            record = _record(_json(line), about)
            if alone and record["seed"] >= FIRST_FRESH:
                raise ValueError(f"the seed {record['seed']}: seeds are below {FIRST_FRESH}")
        except ValueError as error:
            if number == lines[-1][0] and first < number - 1 and not _ends(path):
                notes.append(f"line {number} of {path} was cut short and is left out")
                continue
            raise CompareError(
                f"Expected every line of {path} to be the record of a run, but found at line "
                f"{number}: {shortened(str(error), 300)}. Correct or remove that line."
            ) from error
        run = Run.of(record)
        if run in records:
            notes.append(f"line {number} of {path} is about {run.label} once more and replaces it")
        records[run] = record
    return about, list(records.values()), notes


def _lines(path: Path) -> list[tuple[int, bytes]]:
    try:
        content = path.read_bytes()
    except (OSError, ValueError) as error:
        raise CompareError(
            f"Expected a comparison with a file {shortened(str(path), 200)} but could not read it: "
            f"{shortened(str(error), 300)}. Give the folder of a comparison."
        ) from error
    content = content.removeprefix(codecs.BOM_UTF8)  # some editors and shells begin files with it
    lines = [(n, line) for n, line in enumerate(content.split(b"\n"), 1) if line.strip()]
    if not lines:
        raise CompareError(f"Expected runs in {path} but found none. Run the comparison first.")
    return lines


def _ends(path: Path) -> bool:
    return path.read_bytes().endswith(b"\n")


def _json(line: bytes) -> Any:
    try:
        return json.loads(line.decode("utf-8"))
    except RecursionError as error:
        raise ValueError(str(error)) from error


def _about(folder: Path, path: Path, lines: list[tuple[int, bytes]]) -> tuple[About, int]:
    """From the first line, ``about.json`` or ``comparison.json``; how many lines it takes."""
    where = f"{path} at line {lines[0][0]}"
    fault = ""
    try:
        try:
            head = _json(lines[0][1])
        except ValueError as error:
            head = None  # with another file that says it, it is named with the other lines
            fault = f" (line {lines[0][0]} is no JSON in UTF-8: {shortened(str(error), 200)})"
        if isinstance(head, dict) and head.get("kind") == "about":
            return About.read(head), 1
        for name, build in ((FILE, About.read), ("comparison.json", _of_before)):
            file = folder / name
            if file.exists():
                where = str(file)
                return build(_json(file.read_bytes())), 0
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise CompareError(
            f"Expected {where} to say what the runs are about, but found "
            f"{shortened(str(error), 300)}. See the format in docs/compare.md."
        ) from error
    raise CompareError(
        f"Expected {folder / FILE}, or a first line of {path} of the kind `about`, which say "
        f"which way metrics are better and what the methods are, but found neither{fault}. See the "
        f"format in docs/compare.md."
    )


def _of_before(content: Mapping[str, Any]) -> About:
    """Of a folder from before there was ``about.json``."""
    methods = {}
    for name, specs in content["balancers"].items():
        classes = {str(spec["class_path"]).rpartition(".")[2] for spec in specs}
        fixed = classes <= {"Scalarization", "EqualWeighting"}
        equal = classes <= {"EqualWeighting"}
        methods[name] = "equal" if equal else "fixed" if fixed else "balancer"
    return About.read({"metrics": content["metrics"], "methods": methods})


def _record(record: Any, about: About) -> Record:
    """A record with everything that ours have; a metric that is not finite makes a failed run.

    Raises:
        ValueError: what is wrong with it.
    """
    if isinstance(record, dict):
        record = {"kind": "train", "status": "finished", "seconds": 0.0, **record}
        if "run" not in record:
            subject = [str(record.get(k)) for k in ("method", "task") if k in record]
            (stem,) = file_names([tuple(subject)]).values()
            record["run"] = f"{stem}-seed{record.get('seed')}"
        if record.get("error", "") is None:
            del record["error"]
        bad = _not_finite(record)
        if bad:
            record = {k: v for k, v in record.items() if k != "metrics"}
            record |= {"status": "failed", "error": f"{bad} is no finite number"}
    fault = record_fault(record, about.metrics)
    if fault:
        raise ValueError(fault)
    if record["status"] == "failed":
        record = {**record, "error": record.get("error") or "no reason given"}
    if record["kind"] == "timing":
        record = {"peak_mb": None, **record}
    known = {SINGLE, *about.methods}
    if record["method"] not in known and not _left_out(record):
        raise ValueError(f"the method {record['method']!r}, which is not among {sorted(known)}")
    if (record["method"] == SINGLE) != ("task" in record) and record["kind"] == "train":
        raise ValueError(f"`task` in a run of {record['method']!r}: it belongs to {SINGLE} only")
    return dict(record)


def _left_out(record: Record, methods: Collection[str] = ()) -> bool:
    """Whether it is a trial, or of a rival that the last command did not ask for."""
    return "trial" in record or record["method"] in set(NAMES.values()) - set(methods)


def _not_finite(record: Mapping[str, Any]) -> str | None:
    if record.get("kind") != "train" or not isinstance(record.get("metrics"), dict):
        return None
    for name, value in flatten(record["metrics"]).items():
        if isinstance(value, float) and not math.isfinite(value):
            return f"{name} {value}"
    return None
