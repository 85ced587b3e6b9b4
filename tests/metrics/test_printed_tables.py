"""Δp of the printed tables, as far as the rounding of what is printed allows."""

from __future__ import annotations

import json

import pytest

from lightning_mtl.metrics import DeltaP
from tests.common.places import PUBLISHED

TABLES = json.loads(PUBLISHED.read_text(encoding="utf-8"))["tables"]

# Their printed Δp does not belong to their printed metrics: by .001 more than rounding; that of
# IMTL-G on Office-Home is the one printed for IMTL-L; and .12 beyond rounding.
DEVIATING = {
    ("table 4, Office-31", "GLS"): -1.647,
    ("table 4, Office-Home", "IMTL-G"): -1.512,
    ("table 4, Office-Home", "CAGrad"): -1.635,
}
ROWS = [(table, method) for table, found in TABLES.items() for method in found["rows"]]


def half_unit(printed: str) -> float:
    """How far a number may be from what is printed of it."""
    return 0.5 * 10.0 ** -len(printed.partition(".")[2])


def nested(table: str, row: list[str]) -> dict[str, dict[str, float]]:
    found: dict[str, dict[str, float]] = {}
    for (task, metric, _), value in zip(TABLES[table]["columns"], row, strict=True):
        found.setdefault(task, {})[metric] = float(value)
    return found


def rounding(table: str, row: list[str], base: list[str]) -> float:
    """How far Δp may be off for the digits that are not printed, to first order."""
    tasks = [task for task, _, _ in TABLES[table]["columns"]]
    total = 0.0
    for task, value, reference in zip(tasks, row, base, strict=True):
        weight = 100.0 / len(set(tasks)) / tasks.count(task)
        v, r = float(value), float(reference)
        total += weight * (half_unit(value) / r + v * half_unit(reference) / r**2)
    return total


@pytest.mark.parametrize(("table", "method"), ROWS)
def test_delta_p_is_the_printed_one(table: str, method: str) -> None:
    directions: dict[str, dict[str, bool]] = {}
    for task, metric, up in TABLES[table]["columns"]:
        directions.setdefault(task, {})[metric] = up
    *base, _ = TABLES[table]["rows"]["STL"]
    *row, printed = TABLES[table]["rows"][method]
    metric = DeltaP(nested(table, base), directions)
    metric.update(nested(table, row))
    found = metric.compute()["delta_p"].item()
    allowed = half_unit(printed) + rounding(table, row, base) + 1e-6 * abs(found)
    deviating = DEVIATING.get((table, method))
    if deviating is None:
        assert found == pytest.approx(float(printed), abs=allowed)
    else:
        assert found == pytest.approx(deviating, abs=1e-3)
        assert abs(found - float(printed)) > half_unit(printed) + rounding(table, row, base)


def test_the_tables_are_whole() -> None:
    assert {name: len(found["rows"]) for name, found in TABLES.items()} == {
        "table 1": 22,
        "table 2": 22,
        "table 3": 22,
        "table 4, Office-31": 21,
        "table 4, Office-Home": 21,
        "table 6": 22,
    }
