"""The report page: order, marks, decimals, names of any letters, and folders of any age."""

from __future__ import annotations

import csv
import json
import re
from html import escape, unescape
from pathlib import Path

import pytest

from lightning_mtl.cli import main
from lightning_mtl.compare.again import read
from lightning_mtl.compare.cells import columns, decimals
from lightning_mtl.compare.confirm import Plan
from lightning_mtl.compare.figures.drawing import panels
from lightning_mtl.compare.report import report_html
from lightning_mtl.compare.sheets import confirm_csv
from lightning_mtl.compare.table import Spread
from tests.compare import made

_ROW = re.compile(r'<tr class="(\w+ ?\w*)"><td data-v="([^"]*)">(.*?)</td>')


def rows(page: str) -> list[tuple[str, str, str]]:
    """Class, name and first cell of every row of the table."""
    return [(kind, unescape(name), cell) for kind, name, cell in _ROW.findall(page)]


def test_rows_stand_by_gain_with_the_best_and_its_ties_marked(tmp_path: Path) -> None:
    summary = made.summary(tmp_path, made.lines(17))
    page = report_html(summary, [], {}, [])
    shown = rows(page)
    gains = {row.method: row.delta_p.mean for row in summary.methods} | {"single-task": 0.0}
    names = [name for _, name, _ in shown]
    assert names == sorted(gains, key=lambda name: -gains[name])
    marked = {name for kind, name, _ in shown if kind.endswith(("best", "tie"))}
    assert marked == set(summary.judgement.ties)
    best = [(name, cell) for kind, name, cell in shown if kind.endswith("best")]
    assert [name for name, _ in best] == [
        max(summary.methods, key=lambda r: gains[r.method]).method
    ]
    assert "highest mean" in best[0][1]


def test_every_number_of_a_column_has_as_many_decimals(tmp_path: Path) -> None:
    summary = made.summary(tmp_path, made.lines(17, metrics=8))
    for column in columns(summary):
        if column.title in (("may be best",), ("Δp %",)):  # `0 (by definition)` is no measurement
            continue
        numbers = [cell.text for cell in column.cells if cell.text not in ("–", "1.00")]
        assert len({len(text.partition(".")[2]) for text in numbers}) <= 1, column


@pytest.mark.parametrize(
    ("values", "shown"),
    [
        ([(0.97612, 0.0031), (0.9, 0.0022)], "0.9761"),
        ([(0.5, None), (0.25, None)], "0.9761"),
        ([(1234.5, 22.0), (1200.0, 0.0)], "1"),
        ([(1e-9, 1e-10)], "9.76e-01"),
        ([], "0.976"),
    ],
)
def test_decimals(values: list, shown: str) -> None:
    write = decimals([Spread(mean, std, 3) for mean, std in values])
    assert write(0.97612) == shown


def test_names_are_text_and_right_to_left_ones_stand_apart(tmp_path: Path) -> None:
    names = ["<script>alert(1)</script>", "\u0634\u0628\u0643\u0629", "x" * 300, "\u202eturned"]
    summary = made.summary(tmp_path, made.lines(7, names=names))
    page = report_html(summary, [], {"\u0634\u0628\u0643\u0629.yaml": "<b>"}, [])
    assert "<script>alert" not in page
    assert escape(names[0]) in page
    assert "<bdi>\u0634\u0628\u0643\u0629</bdi>" in page
    assert "\u202e" not in page
    assert names[2] not in re.sub(r'data-v="[^"]*"', "", page)


def report(folder: Path, capsys: pytest.CaptureFixture) -> str:
    assert main(["report", str(folder)]) == 0, capsys.readouterr().err
    return capsys.readouterr().out


def test_a_folder_without_about_json(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """As comparisons left it before there was one; kinds follow from the callbacks."""
    head, *runs = made.lines(4)
    for record in runs:
        for field in ("step_turns_ms", "equal_turns_ms", "models", "steps"):
            record.pop(field, None)
    made.write(tmp_path, runs)
    balancers = {
        "equal": [],
        "x10": [{"class_path": "Scalarization", "init_args": {"weights": {"task 0": 10.0}}}],
        "Balancer0": [{"class_path": "lightning_mtl.MinNorm"}],
    }
    content = {"metrics": head["metrics"], "balancers": balancers, "config": {}, "split": "val"}
    (tmp_path / "comparison.json").write_text(json.dumps(content))
    printed = report(tmp_path, capsys)
    assert "equal weighting and the fixed weighting" in printed or "x10" in printed
    with (tmp_path / "summary.csv").open() as file:
        kinds = {row["method"]: row["kind"] for row in csv.DictReader(file)}
    expected = {"equal": "equal", "x10": "fixed", "Balancer0": "balancer"}
    assert kinds == {"single-task": "single", **expected}
    assert not (tmp_path / "models.csv").exists()
    page = (tmp_path / "report.html").read_text()
    assert "Gain against memory" in page
    assert "Gain against time" not in page  # no record says how many steps a run had


def test_the_table_of_a_confirmation(tmp_path: Path) -> None:
    found = made.lines(4)
    fresh = [
        {**record, "seed": 10_000 + record["seed"]}
        for record in found
        if record.get("method") not in (None, "single-task") and "metrics" in record
    ]
    rivals = ["equal", "x10"]
    plan = Plan("Balancer0", rivals, 3, 3, margin=1.0, alpha=0.05, rule="t", best="Balancer0")
    plan.save(tmp_path)
    about, records, _ = read(made.write(tmp_path, [*found, *fresh]))
    summary = about.summary(records, {}, plan)
    rows = list(csv.DictReader(confirm_csv(summary).splitlines()))
    assert [row["method"] for row in rows] == ["Balancer0", "equal", "x10"]
    assert {row["seeds"] for row in rows} == {"3"}
    means = [r["metrics"]["task 0"]["metric 0"] for r in fresh if r["method"] == "equal"]
    assert float(rows[1]["task 0/metric 0 mean"]) == pytest.approx(sum(means) / 3)
    assert "Confirmed on 3 fresh seeds" in report_html(summary, [], {}, [])


def test_a_picture_is_the_same_before_and_after_the_page() -> None:
    """The page's format has a resolution of its own, at which names would be cut."""
    drawing, (axis,) = panels(4.0, 2.0)
    axis.set_yticks([0.0], ["a name that takes room"])
    before = drawing.png()
    assert "<svg" in drawing.svg("x")
    assert drawing.png() == before
