"""Cost against gain: times that agree, device-seconds, the front, one model beside one per task."""

from __future__ import annotations

import csv
from pathlib import Path
from statistics import median

import pytest
import yaml

from lightning_mtl.compare import CompareError, recorders
from lightning_mtl.compare.answer import answer
from lightning_mtl.compare.build import RunCLI
from lightning_mtl.compare.cost import Ratio, front
from lightning_mtl.compare.recorders import StepTimer
from lightning_mtl.compare.sheets import models_csv, pareto
from lightning_mtl.compare.timing import TURNS, time_method
from tests.compare import made
from tests.compare.test_compare import CONFIG


def test_milliseconds_and_ratios_order_rows_alike(tmp_path: Path) -> None:
    """Each process found the machine at another speed, up to three times slower."""
    found = made.lines(17)
    own = {r["method"]: r["step_ms"] for r in found if r.get("kind") == "timing"}
    rows = made.summary(tmp_path, found).methods
    by_ratio = sorted(rows, key=lambda row: row.step_ratio.value)
    by_own = sorted(rows, key=lambda row: own[row.method])
    assert by_own != by_ratio
    assert sorted(rows, key=lambda row: row.step_ms) == by_ratio
    equal = median(ms for r in found if r.get("kind") == "timing" for ms in r["equal_turns_ms"])
    for row in rows:
        assert row.step_ms == pytest.approx(equal * row.step_ratio.value)
        if row.kind != "equal":
            assert row.step_ratio.low <= row.step_ratio.value <= row.step_ratio.high
    assert rows[0].step_ratio == Ratio(1.0)


def test_an_interval_needs_six_turns() -> None:
    assert Ratio.of([2.0, 4.0, 9.0, 2.2, 1.8, 2.1], [1.0, 2.0, 3.0, 1.0, 1.0, 1.0]) == (
        pytest.approx(2.05),
        pytest.approx(1.8),
        pytest.approx(3.0),
    )
    assert Ratio.of([2.0] * 5, [1.0] * 5) == Ratio(2.0)
    assert Ratio.of([], []) is None


def test_device_seconds_are_steps_by_time(tmp_path: Path) -> None:
    found = made.lines(4)
    cut = next(r for r in found if r.get("method") == "x10" and "steps" in r)
    cut["steps"] = 400  # a run that stopped early
    summary = made.summary(tmp_path, found)
    row = next(row for row in summary.methods if row.method == "x10")
    assert row.device_seconds.mean == pytest.approx(row.step_ms * (1000 + 1000 + 400) / 3 / 1000)
    assert row.device_seconds.std > 0
    # half of a step of equal weighting for each of two tasks
    equal = summary.methods[0]
    assert summary.single.device_seconds.mean == pytest.approx(equal.device_seconds.mean)


def test_the_front_is_what_no_other_one_beats() -> None:
    points = {"a": (1, 0), "b": (2, 5), "c": (2, 4), "d": (3, 5), "e": (4, 6), "f": (1, 0)}
    assert front(points) == ["a", "f", "b", "e"]
    for name, (cost, gain) in points.items():
        beaten = any(c <= cost and g >= gain and (c, g) != (cost, gain) for c, g in points.values())
        assert (name in front(points)) != beaten
    assert front({}) == []


def test_a_model_per_task_is_on_the_front_of_time(tmp_path: Path) -> None:
    summary = made.summary(tmp_path, made.lines(6))
    assert "single-task" in pareto(summary, "device_seconds")  # no row is as good
    assert "single-task" not in pareto(summary, "peak_mb")  # unknown
    said = " ".join(answer(summary))
    assert "One model has 0.62 times the parameters of the 2 single-task models" in said
    assert "answers for every task in 0.67 (0.67 to 0.67) times the time" in said
    assert "10 with equal weighting" not in said or "single-task models" in said
    (joint, first, second) = csv.DictReader(models_csv(summary).splitlines())
    assert (joint["parameters"], first["parameters"], second["task"]) == ("100", "80", "task 1")
    assert float(first["forward_ratio"]) == 0.75


def test_records_of_before_are_still_read(tmp_path: Path) -> None:
    """No turns, no models, no steps."""
    found = made.lines(5)
    for record in found:
        for field in ("step_turns_ms", "equal_turns_ms", "models", "steps"):
            record.pop(field, None)
    summary = made.summary(tmp_path, found)
    equal = next(r for r in found if r.get("kind") == "timing" and r["method"] == "equal")
    for row in summary.methods:
        assert row.step_ms == pytest.approx(equal["step_ms"] * row.step_ratio.value)
        assert row.device_seconds is None
        assert row.step_ratio.low is None
    assert summary.models is None
    assert summary.noise is None


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("step_turns_ms", [1.0, "2"]),
        ("equal_turns_ms", [0.0]),
        ("step_ms", -1.0),
        ("peak_mb", "much"),
        ("models", {"joint": {}}),
        ("models", {"joint": {"parameters": 1.5}, "single": {}}),
        ("models", []),
        ("models_error", 3),
    ],
)
def test_a_timing_that_is_none_is_refused_with_its_line(tmp_path: Path, field, value) -> None:
    found = made.lines(3)
    found[-1][field] = value
    with pytest.raises(CompareError, match=rf"line {len(found)}.*`{field}`"):
        made.summary(tmp_path, found)


# ------------------------------------------------------------------------------ measured


@pytest.mark.filterwarnings("ignore")  # advice of Lightning's, which a run prints into its log
def test_parameters_are_those_that_a_loss_reaches(tmp_path: Path) -> None:
    config = {**CONFIG, "model": {"class_path": "tests.compare.made.Frozen"}}
    path = tmp_path / "C.yaml"
    path.write_text(yaml.safe_dump(config))
    found = time_method(str(path), 0, "equal", [], ["a", "b"])
    assert "models_error" not in found
    trunk = (6 * 5 + 5) + (5 * 4 + 4)
    joint, single = found["models"]["joint"], found["models"]["single"]
    assert joint["parameters"] == trunk + 15 + 5
    assert [single[task]["parameters"] for task in "ab"] == [trunk + 15, trunk + 5]
    assert found["models"]["timed"] == "forward"
    for times in (joint, *single.values()):
        assert len(times["step_turns_ms"]) == len(times["forward_turns_ms"]) == TURNS
    assert len(found["step_turns_ms"]) == len(found["equal_turns_ms"]) == TURNS


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("took", "warm", "counted"),
    [
        (0.001, 10, 100),  # until a tenth of a second is measured
        (0.01, 10, 30),
        (0.25, 4, 8),
        (1.0, 3, 3),
        (600.0, 3, 3),
    ],
)
def test_long_steps_are_timed_by_fewer(tmp_path: Path, monkeypatch, took, warm, counted) -> None:
    """A clock set by hand: every step takes as long."""
    path = tmp_path / "C.yaml"
    path.write_text(yaml.safe_dump(CONFIG))
    timer = StepTimer()
    clock = iter(took * step for step in range(2000))
    monkeypatch.setattr(recorders, "_now", lambda module: next(clock))
    short = {"max_steps": timer.most, "max_epochs": -1, "limit_val_batches": 1}
    cli = RunCLI(str(path), 0, [timer], short, may_stop_early=False)
    cli.trainer.fit(cli.model, datamodule=cli.datamodule)
    steps = 1 + warm + counted
    assert cli.trainer.global_step in (steps, steps + 1)  # rounding of sums of the clock
    assert timer.durations() == pytest.approx([took] * len(timer.durations()), rel=1e-9)
