"""Screen, then confirm; and the report again, from a folder or from another tool's runs."""

from __future__ import annotations

import json
import os
import re
import signal
from pathlib import Path

import pytest

from lightning_mtl.cli import main
from lightning_mtl.compare.confirm import Plan
from lightning_mtl.compare.grid import FIRST_FRESH
from tests.compare.compare_runs import files, finished, printed, records, start, until

BALANCERS = {
    "equal": [],
    "minnorm": [{"class_path": "MinNorm"}],
    "fixed-x3": [{"class_path": "Scalarization", "init_args": {"weights": {"regress": 3.0}}}],
}
MADE = ("summary.csv", "baseline.json", "report.html", "runs.png")


@pytest.mark.slow
def test_killed_while_it_confirms_it_ends_with_the_same_answer(tmp_path: Path, monkeypatch, capsys):
    options = [*files(tmp_path, BALANCERS), "--seeds", "2", "--confirm", "3"]
    plan = tmp_path / "out" / "confirm.json"
    process = start(tmp_path, options)
    until(lambda: plan.exists() and "10001" in printed(tmp_path), "a fresh run")
    os.killpg(process.pid, signal.SIGKILL)
    process.join()
    fixed = plan.read_bytes()
    before = [r["run"] for r in records(tmp_path)]

    assert finished(start(tmp_path, options)) == 0
    text = printed(tmp_path)
    assert plan.read_bytes() == fixed
    assert [r["run"] for r in records(tmp_path)][: len(before)] == before
    assert "on 3 fresh seeds" in text
    fresh = [r for r in records(tmp_path) if r["stage"] == "confirm"]
    assert {r["seed"] for r in fresh} == {10_000, 10_001, 10_002}
    assert {r["method"] for r in fresh} == set(BALANCERS)
    assert len(fresh) == 9
    assert {r["stage"] for r in records(tmp_path) if r["seed"] < FIRST_FRESH} == {"screen"}
    assert "minnorm was picked on seeds 0 to 1" in text
    assert "3 fresh seeds (10000 to 10002) of 3 methods, 9 runs" in text

    # the report again, into another folder, is the same; what was fixed stays
    monkeypatch.chdir(tmp_path)
    assert main(["report", "out", "--out", "again"]) == 0
    answer = capsys.readouterr().out.split("\n\n")[1].rsplit("\nReport", 1)[0]
    assert answer.strip() in text
    for name in MADE:
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "out" / name).read_bytes()
    for change in (["--confirm", "4"], ["--margin", "2"], ["--seeds", "3"]):
        assert main(["compare", *options, *change]) == 2
        assert "has no error rate" in capsys.readouterr().err
    assert main(["report", "out", "--margin", "3"]) == 2
    assert "has no error rate" in capsys.readouterr().err


def test_the_plan_is_read_back_or_refused(tmp_path: Path):
    assert Plan.load(tmp_path) is None
    plan = Plan("mine", ["equal"], 3, 5, 1.0, 0.05, "rule", "mine")
    plan.save(tmp_path)
    assert Plan.load(tmp_path) == plan
    runs = plan.runs(["a"], ["equal", "mine"])
    assert [(r.method, r.seed) for r in runs[:2]] == [("mine", 10_000), ("equal", 10_000)]
    assert len(runs) == 10
    for content in ("", "3", '{"format": 1}', json.dumps({"format": 2})):
        (tmp_path / "confirm.json").write_text(content)
        with pytest.raises(Exception, match=r"confirm.json to be the plan of a confirmation"):
            Plan.load(tmp_path)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (["--confirm", "2"], "--confirm to be at least 3 but found 2"),
        (["--margin", "0"], "--margin to be a number above 0 but found 0.0"),
        (["--margin", "nan"], "--margin to be a number above 0 but found nan"),
        (["--confirm", "3", "--seeds", "10001"], "at most 10000 --seeds beside --confirm"),
    ],
)
def test_numbers_that_cannot_be(tmp_path: Path, monkeypatch, capsys, option, message):
    monkeypatch.chdir(tmp_path)
    assert main(["compare", *files(tmp_path, BALANCERS), *option]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


# ------------------------------------------------------------------------ another tool's runs

ABOUT = {
    "kind": "about",
    "metrics": {"depth": {"rmse": False}, "class": {"acc": True}},
    "methods": {"equal": "equal", "x10": "fixed", "mine": "balancer"},
}


def foreign(folder: Path, *more: object, about: object = ABOUT, **means: float) -> Path:
    """A ``results.jsonl`` with just what the format asks for."""
    lines: list[object] = [about]
    means = {"equal": 1.2, "x10": 1.1, "mine": 0.6, **means}
    for seed, noise in enumerate((0.01, -0.02, 0.015)):
        lines += [
            {"method": "single-task", "task": t, "seed": seed, "metrics": {t: {m: 1 + noise}}}
            for t, m in (("depth", "rmse"), ("class", "acc"))
        ]
        for turn, (method, mean) in enumerate(means.items()):
            value = {"depth": {"rmse": mean + noise * (turn - 1)}, "class": {"acc": 1 - noise}}
            lines.append({"method": method, "seed": seed, "metrics": value})
    folder.mkdir(exist_ok=True)
    text = "".join(x if isinstance(x, str) else json.dumps(x) + "\n" for x in [*lines, *more])
    (folder / "results.jsonl").write_text(text)
    return folder


def test_runs_of_another_tool(tmp_path: Path, capsys):
    folder = foreign(tmp_path / "runs")
    assert main(["report", str(folder)]) == 0
    captured = capsys.readouterr()
    assert not captured.err
    assert "Yes: balancing helps here. mine (Δp +" in captured.out
    assert {p.name for p in folder.iterdir()} >= {*MADE, "results.jsonl"}
    assert main(["report", str(folder), "--margin", "80"]) == 0
    assert "does as well as" in capsys.readouterr().out


def test_a_metric_that_is_nan_makes_a_failed_run(tmp_path: Path, capsys):
    bad = {"method": "mine", "seed": 2, "metrics": {"depth": {"rmse": float("nan")}}}
    assert main(["report", str(foreign(tmp_path, bad))]) == 0
    captured = capsys.readouterr()
    assert "FAILED mine-seed2: depth.rmse nan is no finite number" in captured.out
    assert "No answer: no balancer has a run on every seed" in captured.out
    assert "mine lacks 1 seed" in captured.out
    assert "is about mine, seed 2 once more" in captured.err


@pytest.mark.parametrize(
    ("about", "more", "message"),
    [
        ({"method": "mine"}, [], "Expected .*about.json, or a first line of .*kind `about`"),
        ({**ABOUT, "metrics": {}}, [], "results.jsonl at line 1 .*no `metrics`"),
        ({**ABOUT, "metrics": {"depth": {"rmse": "low"}}}, [], "`metrics` of task 'depth'"),
        ({**ABOUT, "methods": {"mine": "best"}}, [], "no `methods` that map each name to one of"),
        (ABOUT, ["x\n"], r"at line 17: Expecting value.*Correct or remove"),
        (ABOUT, [{"method": "other", "seed": 0, "metrics": {}}], "line 17: the metrics"),
        (ABOUT, [{"method": "mine", "metrics": {}}], "line 17: no usable seed"),
        (
            ABOUT,
            [{"method": "y", "seed": 0, "metrics": {"depth": {"rmse": 1}, "class": {"acc": 1}}}],
            "line 17: the method 'y', which is not among",
        ),
        (
            ABOUT,
            [{"method": "mine", "task": "depth", "seed": 0, "metrics": {"depth": {"rmse": 1}}}],
            "line 17: `task` in a run of 'mine'",
        ),
    ],
)
def test_files_that_are_none_are_named(tmp_path: Path, capsys, about, more, message):
    folder = foreign(tmp_path / "runs", *more, about=about)
    before = [p.name for p in folder.iterdir()]
    assert main(["report", str(folder)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("lightning-mtl report: error: Expected ")
    assert re.search(message, error), error
    assert [p.name for p in folder.iterdir()] == before


def test_folders_that_are_none(tmp_path: Path, capsys):
    assert main(["report", str(tmp_path / "nothing")]) == 2
    assert "Give the folder of a comparison" in capsys.readouterr().err
    (tmp_path / "results.jsonl").write_text("\n")
    assert main(["report", str(tmp_path)]) == 2
    assert "Expected runs in" in capsys.readouterr().err


def test_a_baseline_of_zero_is_said(tmp_path: Path, capsys):
    folder = foreign(tmp_path)
    text = (folder / "results.jsonl").read_text()
    lines = [json.loads(line) for line in text.splitlines()]
    for line in lines[1:]:
        if line["method"] == "single-task" and line["task"] == "depth":
            line["metrics"] = {"depth": {"rmse": 0.0}}
    (folder / "results.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert main(["report", str(folder)]) == 0
    assert "No answer: Δp is not defined, because" in capsys.readouterr().out
