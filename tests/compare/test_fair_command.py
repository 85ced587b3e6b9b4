"""The command with settings to try and with rivals: its runs, its answer, its refusals, its end."""

from __future__ import annotations

import csv
import json
import os
import random
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from lightning_mtl.cli import main
from lightning_mtl.compare.request import Request
from tests.compare.compare_runs import CONFIG, MODEL, files, finished, printed, start, until

GRID = {"model.lr": [0.01, 0.3]}
SEARCH = {"search": {"model.lr": {"low": 0.001, "high": 1, "log": True}}, "trials": 6}
TUNED = {
    "equal": [],
    "single-task": {"grid": GRID},
    "mine": {"callbacks": [{"class_path": "MinNorm"}], "grid": GRID},
}


def records(folder: Path) -> list[dict]:
    text = (folder / "out" / "results.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


@pytest.mark.slow
def test_settings_are_chosen_on_validation_and_reported_on_test(tmp_path: Path):
    options = [*files(tmp_path, TUNED), "--rivals", "all", "--split", "test", "--workers", "2"]
    assert finished(start(tmp_path, options)) == 0, printed(tmp_path)
    text = printed(tmp_path)
    found = records(tmp_path)
    trials = [r for r in found if r["stage"] == "tune"]
    counts = {m: sum(r["method"] == m for r in trials) for m in {r["method"] for r in trials}}
    sweep, decay, longer = "fixed weights (tuned)", "equal (weight decay)", "equal (same time)"
    assert counts == {"single-task": 4, "mine": 2, sweep: 8, decay: 5}
    rest = [r for r in found if r["stage"] != "tune" and r["kind"] == "train"]
    for method, task in (("mine", None), ("single-task", "classify"), (sweep, None)):
        tried = [r for r in trials if (r["method"], r.get("task")) == (method, task)]
        (final,) = (r for r in rest if (r["method"], r.get("task")) == (method, task))
        assert final["settings"] in [r["settings"] for r in tried]
        assert final["metrics"] not in [r["metrics"] for r in tried]  # other data, another seed
        if task == "classify":
            best = max(tried, key=lambda r: r["metrics"]["classify"]["MulticlassAccuracy"])
            assert final["settings"] == best["settings"]
    (again,) = (r for r in rest if r["method"] == longer)
    (ratio,) = (r["step_ratio"] for r in found if r["kind"] == "timing" and r["method"] == "mine")
    factor = again["settings"]["callbacks.0.factor"]
    assert factor == pytest.approx(ratio, abs=0.006)
    (equal,) = (r for r in rest if r["method"] == "equal")
    assert again["steps"] == 2 * equal["steps"]  # a whole epoch more, since there was one
    assert "settings" not in equal

    for said in (
        f"{longer}: {factor:.2f} times the steps",
        "mine: model.lr ",
        "Budgets differ, so rivals were tuned more",
        "8 for fixed weights (tuned); 5 for equal (weight decay); 2 for mine; 1 for equal and",
    ):
        assert said in text, said
    report = (tmp_path / "out" / "report.html").read_text()
    assert "<td>settings of single-task regress</td>" in report
    before = (tmp_path / "out" / "results.jsonl").read_bytes()
    assert finished(start(tmp_path, options)) == 0
    assert (tmp_path / "out" / "results.jsonl").read_bytes() == before
    answer = [line for line in text.splitlines() if line.startswith("Budgets differ")]
    assert answer[0] in printed(tmp_path)
    assert main(["report", str(tmp_path / "out")]) == 0
    assert answer[0].replace("(", "(") in (tmp_path / "out" / "report.html").read_text()


@pytest.mark.slow
def test_a_search_whose_trials_all_fail_has_no_row_and_the_others_have(tmp_path: Path):
    balancers = {
        "equal": [],
        "broken": {"callbacks": [{"class_path": MODEL + "Broken"}], "grid": {"model.lr": [0.1]}},
    }
    options = [*files(tmp_path, balancers), "--select", "best_val", "--split", "test"]
    config = tmp_path / "C.yaml"
    config.write_text(config.read_text().replace("Points", "SameData"))
    assert finished(start(tmp_path, options)) == 1
    text = printed(tmp_path)
    assert "broken: none: all 1 trials failed" in text
    assert "No answer: no balancer has a finished run." in text
    assert "broken has no row: all of its 1 trials failed." in text
    assert "Test data begin with the same batch as validation data" in text
    assert {r["method"] for r in records(tmp_path) if r["kind"] == "timing"} == {"equal"}


@pytest.fixture
def refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> Callable[..., str]:
    monkeypatch.chdir(tmp_path)

    def run(*options: str, balancers: dict = TUNED, config: dict = CONFIG) -> str:
        assert main(["compare", *files(tmp_path, balancers, config), *options]) == 2
        assert not (tmp_path / "out").exists()
        captured = capsys.readouterr()
        assert not captured.out
        return captured.err

    return run


def one(space: dict, class_path: str = "CAGrad") -> dict:
    return {"mine": {"callbacks": [{"class_path": class_path}], "grid": space}}


@pytest.mark.parametrize(
    ("space", "message"),
    [
        ({"callbacks.0.cc": [0.5]}, "found `callbacks.0.cc: 0.5`"),
        ({"callbacks.0.c": [0.5, "much"]}, "found `callbacks.0.c: 'much'`"),
        ({"callbacks.1.c": [0.5]}, "found no callback of that number"),
        ({"model.lrr": [0.5]}, "has no argument `lrr`. Did you mean `lr`?"),
        ({"model.lr": [0.5, "fast"]}, "found `model.lr: 'fast'`"),
        ({"optimiser.lr": [0.5]}, "found `optimiser.lr: 0.5`"),
        ({"trainer.devices": [2]}, "has to be the same for all rows"),
    ],
)
def test_grids_over_what_does_not_exist(refused: Callable[..., str], space: dict, message: str):
    found = refused(balancers=one(space))
    assert "Expected `mine`" in found
    assert message in found


def test_weights_of_a_task_that_does_not_exist(refused: Callable[..., str]):
    space = {"callbacks.0.weights": [{"regress": 2.0}, {"nope": 2.0}]}
    found = refused(balancers=one(space, "Scalarization"))
    assert "found `callbacks.0.weights: {'nope': 2.0}`" in found


def test_options_that_cannot_be(refused: Callable[..., str]):
    assert "all, none or some of weights, decay, time but found ['x']" in refused("--rivals", "x")
    assert "--last-k to be at least 1 but found 0" in refused("--last-k", "0")
    balancers = {"fixed weights (tuned)": []}
    assert "names of balancers that no rival has" in refused("--rivals", "all", balancers=balancers)


def test_settings_need_validation_data(refused: Callable[..., str]):
    config = {**CONFIG, "data": {"class_path": MODEL + "NoValidation"}}
    found = refused("--split", "test", config=config)
    assert "so no settings or weights could be chosen" in found


def test_rivals_that_cannot_be_had_are_left_out_and_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    config = {**CONFIG, "data": {"class_path": MODEL + "NoValidation"}}
    options = [*files(tmp_path, {"equal": []}, config), "--rivals", "all", "--split", "test"]
    from lightning_mtl.compare.command import _parser

    request = Request(_parser().parse_args(options))
    assert list(request.rivals.methods) == ["equal (same time)"]
    because = "left out, because there is no validation data to choose on"
    assert request.rivals.missing == [
        f"fixed weights (tuned) {because}",
        f"equal (weight decay) {because}",
    ]


def enough(path: Path, lines: int) -> bool:
    return path.exists() and path.read_bytes().count(b"\n") >= lines


@pytest.mark.slow
def test_a_search_that_is_killed_goes_on_with_the_same_trials_and_the_same_answer(tmp_path: Path):
    balancers = {
        "equal": [],
        "single-task": SEARCH,
        "mine": {"callbacks": [{"class_path": "MinNorm"}], **SEARCH},
    }
    more = ["--rivals", "weights,decay", "--split", "test", "--seeds", "3"]
    folders = [tmp_path / name for name in ("whole", "killed")]
    for folder in folders:
        folder.mkdir()
    whole, killed = folders
    options = [*files(whole, balancers), *more]
    assert finished(start(whole, [*options, "--workers", "2"])) == 0

    files(killed, balancers)
    path = killed / "out" / "results.jsonl"
    numbers = random.Random()  # the test has to hold wherever it is killed
    for _ in range(6):
        before = path.read_bytes().count(b"\n") if path.exists() else 0
        process = start(killed, [*options, "--workers", numbers.choice(["1", "2"])])
        until(partial(enough, path, before + numbers.randrange(1, 6)), "a few runs")
        os.killpg(process.pid or 0, signal.SIGKILL)
        process.join()
    assert finished(start(killed, [*options, "--workers", "1"])) == 0

    def trained(folder: Path) -> dict:
        keys = ("settings", "metrics", "steps", "status")
        return {r["run"]: [r.get(k) for k in keys] for r in records(folder) if r["kind"] == "train"}

    assert trained(killed) == trained(whole)

    def table(folder: Path) -> list[dict]:
        rows = list(csv.DictReader((folder / "out" / "summary.csv").read_text().splitlines()))
        measured = ("step_", "peak_", "device_", "on_front/")
        return [{k: v for k, v in row.items() if not k.startswith(measured)} for row in rows]

    assert table(killed) == table(whole)
    answers = [
        [
            line
            for line in printed(f).splitlines()
            if not line.startswith(("Cost", "[", "Done", "One model"))
        ]
        for f in folders
    ]
    assert answers[0][-6:] == answers[1][-6:]
