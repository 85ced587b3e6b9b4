"""The files of a comparison: whole or not there, read back exactly, refused where broken."""

from __future__ import annotations

import codecs
import errno
import json
import os
import resource
import shutil
import signal
from pathlib import Path

import pytest

from lightning_mtl.compare import CompareError
from lightning_mtl.compare.folder import append, claimed, owned, write
from lightning_mtl.compare.grid import Run, file_names, plan
from lightning_mtl.compare.results import Results

DIRECTIONS = {"größe": {"acc": True}, "grüße": {"acc": True}}
RUNS = plan(list(DIRECTIONS), ["equal", "mine"], "equal", 2)


def record(run: Run, value: float = 0.5) -> dict:
    tasks = DIRECTIONS if run.task is None else [run.task]
    found = {"seconds": 1.0, "status": "finished"}
    if run.kind == "train":
        found["metrics"] = {task: {"acc": value} for task in tasks}
    if run.kind == "timing":
        found |= {"step_ms": 1.0, "step_ratio": 1.0, "peak_mb": None}
    return {**run.record(), **found}


@pytest.fixture
def full(tmp_path: Path) -> Path:
    """A folder with all runs finished."""
    results = Results(tmp_path, DIRECTIONS)
    for run in RUNS:
        results.append(run, record(run))
    return tmp_path


def test_what_is_appended_is_read_back(full: Path):
    results = Results(full, DIRECTIONS)
    assert list(results.records) == RUNS
    assert results.of(RUNS) == [record(run) for run in RUNS]
    assert not results.notes


def test_letters_that_end_a_line_elsewhere_end_none_here(tmp_path: Path):
    run = Run("train", "a\u2028b\x85c\x0bd\ud800", 0, None, "name-seed0")
    Results(tmp_path, DIRECTIONS).append(run, record(run))
    assert Results(tmp_path, DIRECTIONS).records == {run: record(run)}


def limited(largest: int):
    """No file may grow beyond so many bytes: the write before that is short, the next one fails."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (largest, before[1]))
    return before


@pytest.mark.parametrize("room", [0, 1, 40])
def test_an_append_without_room_leaves_the_file_as_it_was(full: Path, room: int):
    path = full / "results.jsonl"
    whole = path.read_bytes()
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    before = limited(len(whole) + room)
    try:
        with pytest.raises(OSError, match=r"File too large: '.*results.jsonl'"):
            append(path, "x" * 100 + "\n")
        with pytest.raises(OSError, match="File too large"):
            write(path, "y" * (len(whole) + 100))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert path.read_bytes() == whole
    assert [p.name for p in full.iterdir()] == ["results.jsonl"]


@pytest.mark.parametrize("broken", [("write",), ("fsync",), ("write", "ftruncate")])
def test_a_disk_that_breaks(full: Path, broken: tuple[str, ...], monkeypatch: pytest.MonkeyPatch):
    """There is no broken disk here: calls of the system that fail as on one stand for it."""
    path, write_ = full / "results.jsonl", os.write
    whole = path.read_bytes()

    def fails(handle: int, *arguments):
        if arguments and isinstance(arguments[0], bytes):  # a part of it arrives
            write_(handle, arguments[0][:7])
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patch:
        for name in broken:
            patch.setattr(os, name, fails)
        with pytest.raises(OSError, match=r"Input/output error: '.*results.jsonl'"):
            append(path, "x" * 100 + "\n")
        with pytest.raises(OSError, match="Input/output error"):
            write(path, "y" * 100)
    results = Results(full, DIRECTIONS)
    assert list(results.records) == RUNS
    assert len(results.notes) == ("ftruncate" in broken)
    assert path.read_bytes() == whole
    assert [p.name for p in full.iterdir()] == ["results.jsonl"]


@pytest.mark.parametrize(
    "rest", [b'{"run": "equal-seed0", "ki', b"\0" * 300, b"\xff\xfe", b"x", b'{"run": 1}']
)
def test_a_last_line_cut_short_is_dropped_and_told(full: Path, rest: bytes):
    path = full / "results.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole + rest)
    results = Results(full, DIRECTIONS)
    assert list(results.records) == RUNS
    assert path.read_bytes() == whole
    assert results.notes == [
        f"line {len(RUNS) + 1} of {path} was cut short and is dropped; its run is done again"
    ]


def test_only_the_end_of_the_last_line_is_missing(full: Path):
    path = full / "results.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    assert list(Results(full, DIRECTIONS).records) == RUNS
    assert path.read_bytes() == whole


def test_a_byte_order_mark_costs_nothing(full: Path):
    path = full / "results.jsonl"
    whole = path.read_bytes()
    path.write_bytes(codecs.BOM_UTF8 + whole)
    results = Results(full, DIRECTIONS)
    assert list(results.records) == RUNS
    assert not results.notes
    assert path.read_bytes() == whole


def test_blank_lines_and_repeated_records_cost_nothing(full: Path):
    path = full / "results.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"\n" + lines[0] + b"".join(lines).replace(b"\n", b"\r\n"))
    results = Results(full, DIRECTIONS)
    assert results.of(RUNS) == [record(run) for run in RUNS]
    assert len(results.notes) == 1
    assert "single-task größe, seed 0 once more" in results.notes[0]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"{", "Expecting property name"),
        (b"\0\0\0", "Expecting value"),
        (b'{"run": "\xff"}', "codec can't decode"),
        (b"[1]", "a list instead of a record"),
        (b"[" * 100_000, "recursion"),
        (json.dumps({**record(RUNS[0]), "status": "done"}).encode(), "the status 'done'"),
        (json.dumps({**record(RUNS[0]), "run": "../../x"}).encode(), "the run '../../x'"),
        (json.dumps({**record(RUNS[0]), "metrics": {}}).encode(), "the metrics"),
        (json.dumps(record(RUNS[0], float("nan"))).encode(), "größe.acc nan instead of a finite"),
        (json.dumps(record(RUNS[0], 10**400)).encode(), "instead of a finite number"),
        (b'{"status": "finished", "kind": "train"}', "no usable run or method or seed"),
        (json.dumps({**record(RUNS[0]), "seed": True}).encode(), "the seed True"),
        (json.dumps({**record(RUNS[0]), "seed": -1}).encode(), "the seed -1"),
        (json.dumps({**record(RUNS[0]), "steps": 0}).encode(), "`steps` 0"),
        (json.dumps({**record(RUNS[0]), "steps": True}).encode(), "`steps` True"),
        (json.dumps({**record(RUNS[0]), "steps": 10**400}).encode(), "`steps` 1000"),
        (json.dumps({**record(RUNS[0]), "seconds": float("nan")}).encode(), "`seconds` nan"),
        (json.dumps(record(RUNS[0], True)).encode(), "größe.acc True instead of a finite"),
        (
            json.dumps({**record(RUNS[0]), "status": "failed", "error": ["x"]}).encode(),
            "an `error` that is no text",
        ),
    ],
)
def test_a_broken_line_is_refused_by_its_number(full: Path, line: bytes, message: str):
    path = full / "results.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    lines[2:2] = [line + b"\n"]
    path.write_bytes(b"".join(lines))
    with pytest.raises(CompareError, match=f"(?s)results.jsonl .*at line 3: .*{message}"):
        Results(full, DIRECTIONS)
    assert path.read_bytes() == b"".join(lines)


def test_curves_that_cannot_be_read_cost_a_picture_only(tmp_path: Path):
    point = {"step": 0, "norms": {"a": 1.0}, "cosines": {}}
    results = Results(tmp_path, DIRECTIONS)
    runs = [run for run in RUNS if run.kind == "train" and run.seed == 0 and run.task is None]
    for run in runs:
        results.append(run, {**record(run), "curves": [point]})
    (tmp_path / "curves" / "mine-seed0.jsonl").write_bytes(b"\0\n")
    results = Results(tmp_path, DIRECTIONS)
    assert results.curves(runs) == {"equal": [[point]]}
    assert "mine-seed0.jsonl cannot be read" in results.notes[0]


# ------------------------------------------------------------------------------------------ names


def test_names_are_the_old_ones_where_they_tell_runs_apart():
    subjects = [("single-task", "a b"), ("single-task", "c"), ("MinNorm + tension",), ("x1",)]
    assert list(file_names(subjects).values()) == [
        "single-task-a_b",
        "single-task-c",
        "MinNorm_+_tension",
        "x1",
    ]


NAMES = ["größe", "grüße", "a", "A", "a/b", "a b", "..", "/", "CON", "con", "nul.x", "x" * 300]
NAMES += [
    "x" * 299 + "y",
    "$\\beta_$",
    " ",
    "-",
    "a_b",
    "日本",
    "\u202eabc",
    "a\nb",
    "\ud800",
    "\u00e9",
    "e\u0301",
]


def test_names_are_safe_and_unique_where_case_makes_no_difference(tmp_path: Path):
    tasks = [*NAMES, "", "seed0"]
    runs = plan(tasks, [*NAMES, "a-seed0", "a-seed0-timing", "Single-task-a"], "a", 2)
    names = [run.name for run in runs]
    assert len({name.casefold() for name in names}) == len(runs) == len(set(runs))
    for name in names:
        assert len(name) < 120
        assert name.isascii()
        assert not set(name) & set('/\\:*?"<>| \n')
        assert name.split(".")[0].casefold() not in {"con", "nul", ""}
        (tmp_path / f"{name}.log").touch()
    assert len(list(tmp_path.iterdir())) == len(runs)


def test_a_name_that_somebody_else_would_be_given():
    (_, taken) = file_names([("a",), ("A",)]).values()
    names = file_names([("a",), ("A",), (taken,), (taken.upper(),)]).values()
    assert len({name.casefold() for name in names}) == 4


def test_folders_with_names_of_before_go_on(tmp_path: Path):
    """Runs are found by what they did: the names of 15 were the same for two tasks."""
    lines = [{**record(run), "run": "single-task-gr_e-seed0"} for run in RUNS if run.task]
    (tmp_path / "results.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    results = Results(tmp_path, DIRECTIONS)
    assert len(results.of(RUNS)) == 4
    assert not results.notes


# ----------------------------------------------------------------------------------- the claim


def test_the_lock_goes_with_the_block(tmp_path: Path):
    folder = tmp_path / "new" / "out"
    with claimed(folder, {"a": float("nan")}):
        again = claimed(folder, {"a": float("nan")})
        with pytest.raises(CompareError, match=rf"free but another .*process {os.getpid()}\)"):
            again.__enter__()
    with claimed(folder, {"a": float("nan")}):
        assert sorted(p.name for p in folder.iterdir()) == [
            ".lock",
            "comparison.json",
            "curves",
            "logs",
        ]


@pytest.mark.parametrize("gone", [".lock", "."])
def test_nothing_is_written_once_the_lock_is_gone(tmp_path: Path, gone: str):
    """Whoever removed it, or the folder with it, may have started another comparison there."""
    folder = tmp_path / "out"
    with claimed(folder, {"a": 1}):
        results = Results(folder, DIRECTIONS)
        results.append(RUNS[0], record(RUNS[0]))
        if gone == ".":
            shutil.rmtree(folder)
        else:
            (folder / gone).unlink()
        with pytest.raises(OSError, match=r"lock was removed .* writes nothing more"):
            results.append(RUNS[1], record(RUNS[1]))
        with owned(folder), pytest.raises(OSError, match=r"lock was removed .* nothing more"):
            results.append(RUNS[1], record(RUNS[1]))
        assert list(Results(folder, DIRECTIONS).records) == ([] if gone == "." else RUNS[:1])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "at line 1: Expecting value"),
        (b"\0\xff", "at line 1: .*utf-8"),
        (b'{\n"format": 1,\n', "at line 3: "),
        (b"[" * 100_000, "recursion"),
        (b"3", "holds another one"),
    ],
)
def test_a_broken_comparison_is_refused(tmp_path: Path, content: bytes, message: str):
    path = tmp_path / "comparison.json"
    path.write_bytes(content)
    claim = claimed(tmp_path, {"a": 1})
    with pytest.raises(CompareError, match=f"(?s)({path}|{tmp_path}) .*{message}.*--out"):
        claim.__enter__()
    assert [p.name for p in tmp_path.iterdir()] == ["comparison.json"]
    assert path.read_bytes() == content
