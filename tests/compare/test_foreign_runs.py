"""Runs that another tool wrote, with whatever it puts where: read, or refused by the line."""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lightning_mtl.compare import CompareError
from lightning_mtl.compare.again import _shown, read
from lightning_mtl.compare.answer import answer
from lightning_mtl.compare.cells import console_table
from lightning_mtl.compare.report import report_html
from lightning_mtl.compare.request import _listed
from lightning_mtl.compare.sheets import summary_csv
from tests.compare.made import lines, write

ODD = [None, True, -1, float("nan"), 10**400, "x", [1], {"a": {"b": None}}]
FAILED = {"method": "Balancer0", "seed": 7, "status": "failed", "error": "x"}
LINES = [*lines(4, seeds=2), FAILED]
OPTIONAL = ["error", "status", "seconds", "steps", "unmeasured", "texts", "facts", "remarks"]
OPTIONAL += ["seeds", "margin", "kind", "task", "trial"]


def shown(folder: Path) -> str:
    """All that a report says in words."""
    about, records, notes = read(folder)
    records, curves = _shown(folder, about, records, None, notes)
    summary = about.summary(records, curves, None)
    said = [console_table(summary), *answer(summary), summary_csv(summary)]
    return "\n".join([*said, report_html(summary, [], about.texts, about.facts, [])])


def places(value: Any, way: tuple = ()) -> Iterator[tuple]:
    yield way
    inner = value.items() if isinstance(value, dict) else ()
    for key, one in enumerate(value[:1]) if isinstance(value, list) else inner:
        yield from places(one, (*way, key))


@pytest.mark.parametrize("number", [0, 4, len(LINES) - 2, len(LINES) - 1])
def test_anything_anywhere_is_read_or_refused(tmp_path: Path, number: int) -> None:
    ways = [way for way in places(LINES[number]) if way] + [(key,) for key in OPTIONAL]
    refused = []
    for way in ways:
        for odd in ODD:
            changed = json.loads(json.dumps(LINES))
            place = changed[number]
            for key in way[:-1]:
                place = place[key]
            place[way[-1]] = odd
            try:
                shown(write(tmp_path, changed))
            except CompareError as error:
                refused.append(str(error))
    assert len(refused) > len(ways)
    if number:  # what the first line lacks is missed elsewhere
        assert all(f"line {number + 1}: " in message for message in refused)


def test_a_seed_of_fresh_runs_is_not_left_out_in_silence(tmp_path: Path) -> None:
    changed = [*LINES, {**LINES[-1], "seed": 12345}]
    with pytest.raises(CompareError, match=f"line {len(changed)}: the seed 12345: .*below 10000"):
        read(write(tmp_path, changed))


def test_a_confirmation_whose_plan_is_gone_is_told(tmp_path: Path) -> None:
    """In a folder of ours, where what it is about stands in a file of its own."""
    (tmp_path / "about.json").write_text(json.dumps(LINES[0]))
    write(tmp_path, [*LINES[1:], {**LINES[-1], "seed": 10_000}])
    about, records, notes = read(tmp_path)
    kept, _ = _shown(tmp_path, about, records, None, notes)
    assert len(kept) == len(records) - 1
    assert "no confirm.json in" in notes[0]


@pytest.mark.parametrize("seconds", [0, 0.0, 3, 1e-3])
def test_what_other_tools_write_for_nothing(tmp_path: Path, seconds: float) -> None:
    changed = [*LINES[:-1], {**FAILED, "error": None}]
    changed[1] = {**changed[1], "seconds": seconds, "steps": None, "error": None}
    assert "no reason given" in shown(write(tmp_path, changed))


def test_a_byte_order_mark_and_ends_of_lines_of_windows(tmp_path: Path) -> None:
    path = write(tmp_path, LINES) / "results.jsonl"
    plain = shown(tmp_path)
    path.write_bytes(codecs.BOM_UTF8 + path.read_bytes().replace(b"\n", b"\r\n"))
    assert shown(tmp_path) == plain


def test_another_encoding_is_named(tmp_path: Path) -> None:
    path = write(tmp_path, LINES) / "results.jsonl"
    path.write_bytes(path.read_text().encode("utf-16"))
    with pytest.raises(CompareError, match=r"found neither \(line 1 is no JSON in UTF-8: "):
        read(tmp_path)


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("a, b", ["a", "b"]),
        ("a,b", ["a,b"]),
        ("a,b,a", ["a,b", "a"]),
        ("b,a,b, c ,c", ["b", "a,b", " c ", "c"]),
        (" a ,nope", ["a", "nope"]),
        ("", [""]),
    ],
)
def test_a_list_of_names_that_may_have_commas(text: str, names: list[str]) -> None:
    assert _listed(text, {"a": 0, "b": 0, "a,b": 0, " c ": 0, "c": 0}) == names
