"""Names and errors of any length and letters: every run is kept, and every file can be read."""

from __future__ import annotations

import csv
import html
import json
from pathlib import Path

import pytest

from lightning_mtl.compare.plots import plots
from lightning_mtl.compare.report import report_html
from lightning_mtl.compare.table import console_table, summarise, summary_csv
from lightning_mtl.compare.texts import error_text, name, one_line, shortened, visible
from lightning_mtl.metrics import load_baseline
from tests.compare.compare_runs import CONFIG, MODEL, files, finished, printed, start
from tests.compare.test_compare_folder import NAMES

HIDDEN = {"\x1b", "\u202e", "\ud800", "\0", "\u2028"}


def test_what_cannot_be_seen_becomes_an_escape():
    assert visible("plain größe 日本\n") == "plain größe 日本\n"
    assert visible("a\x1b[2J\u202eb\ud800\0") == r"a\x1b[2J\u202eb\ud800\x00"
    assert name("a\nb") == r"a\nb"
    assert name("x" * 300) == "x" * 39 + "…" + "x" * 20
    assert one_line("  a\n\n b\t") == "a b"


def test_long_texts_keep_head_and_tail():
    text = shortened("head" + "x" * 1_000_000 + "tail", 4000)
    assert len(text) < 4100
    assert text.startswith("headx")
    assert text.endswith("xtail")
    assert "[996008 characters left out]" in text

    class UnspeakableError(Exception):
        def __str__(self) -> str:
            raise RuntimeError

    assert error_text(UnspeakableError()) == (
        "UnspeakableError: (its message could not be read: RuntimeError)"
    )


def test_every_name_in_every_file():
    names = [*NAMES, "_hidden", "$", "\\$x", "<b>&", "|", "{x}", "%s", "^_^", "\u0627\u0644"]
    tasks = ["$\\beta_$", "_hidden", "x" * 300, "\ud800", "\u202eabc"]
    directions = {task: {task: True} for task in tasks}
    points = [
        {"step": s, "norms": dict.fromkeys(tasks, 1.0), "cosines": {f"{tasks[0]} / $": 0.5}}
        for s in range(2)
    ]
    runs = [
        {"method": "single-task", "task": task, "metrics": {task: {task: 1.0}}} for task in tasks
    ]
    runs += [{"method": n, "metrics": {t: {t: 2.0} for t in tasks}} for n in names[::-1]]
    runs = [
        {"run": str(i), "kind": "train", "status": "finished", "seed": 0, **r}
        for i, r in enumerate(runs)
    ]
    runs.append({**runs[-1], "status": "failed", "error": "".join(names)})
    summary = summarise(
        runs, directions, dict.fromkeys(names, "balancer"), {names[0]: points, "$": points}
    )

    pictures, faults = plots(summary)
    assert not faults
    assert len(pictures) == 4
    page = report_html(summary, pictures, {"\ud800": "\u202e"}, [("command", "\ud800")])
    page.encode()
    table = console_table(summary)
    table.encode()
    assert not HIDDEN & set(page)
    assert not HIDDEN & set(table)
    assert html.escape("<b>&") in page
    assert max(map(len, (line.split("  ")[0] for line in table.splitlines()[:-1]))) < 100
    rows = list(csv.reader(summary_csv(summary).splitlines(keepends=True)))
    assert {len(row) for row in rows} == {len(rows[0])}


def test_a_picture_that_cannot_be_drawn_costs_only_itself(monkeypatch: pytest.MonkeyPatch):
    curves = {"a": [{"step": 0, "norms": {"x": 1.0}, "cosines": {"x": "no number"}}] * 2}
    runs = [
        {"method": "single-task", "task": t, "seed": 0, "metrics": {t: {"acc": 1.0}}} for t in "xy"
    ]
    runs += [{"method": "a", "seed": 0, "metrics": {t: {"acc": 1.1} for t in "xy"}}]
    runs = [{"run": str(i), "kind": "train", "status": "finished", **r} for i, r in enumerate(runs)]
    summary = summarise(runs, {t: {"acc": True} for t in "xy"}, {"a": "balancer"}, curves)
    summary.curves["a"][0]["norms"] = {"x": object()}
    pictures, faults = plots(summary)
    assert set(pictures) == {"delta_p.png", "runs.png"} | (set(pictures) & {"gradient_cosines.png"})
    assert any(fault.startswith("gradient_norms.png could not be drawn. ") for fault in faults)
    page = report_html(summary, pictures, {}, [], faults)
    assert "gradient_norms.png could not be drawn" in page


WEIRD = ["$\\beta_$", "größe", "grüße", "../up" + "x" * 300]


def test_a_comparison_of_such_names_with_a_task_without_metric(tmp_path: Path):
    """The file is deleted while it runs; what is shown is what ran."""
    wordy = {"class_path": MODEL + "Wordy"}
    balancers = {"equal": [], **{n: [wordy] for n in WEIRD}}
    config = {
        **CONFIG,
        "model": {"class_path": MODEL + "TwoTasks", "init_args": {"measured": "classify"}},
    }
    options = files(tmp_path, balancers, config)
    source = (tmp_path / "B.yaml").read_text()
    process = start(tmp_path, options)
    log = tmp_path / "out" / "logs"
    while not log.exists() or not list(log.iterdir()):
        assert process.is_alive(), printed(tmp_path)
    (tmp_path / "B.yaml").unlink()
    assert finished(process) == 1
    out = tmp_path / "out"
    records = [json.loads(line) for line in (out / "results.jsonl").read_bytes().split(b"\n")[:-1]]
    assert len(records) == 1 + 5 + 1 + 5  # one single-task run: the other task has no metric
    assert len({r["run"].casefold() for r in records}) == len(records)
    assert len(list((out / "logs").iterdir())) == len(records)
    failed = [r for r in records if r["status"] == "failed"]
    assert {r["method"] for r in failed} == set(WEIRD)
    for record in failed:
        assert len(record["error"]) < 5000
        assert record["error"].startswith("ArithmeticError: head \ud800 \u2028")
        assert record["error"].endswith("tail")
    text = printed(tmp_path)
    assert len(text) < 30_000
    assert not HIDDEN & set(text)
    assert "Traceback" not in text
    scope = "Δp is over the tasks with a metric: classify; regress has none: it is trained only."
    assert scope in text
    page = (out / "report.html").read_text()
    assert html.escape(scope) in page
    assert html.escape(source) in page
    values, _ = load_baseline(out / "baseline.json")
    assert list(values) == ["classify"]
    assert {p.name for p in tmp_path.iterdir()} == {"C.yaml", "out", "printed.txt"}
