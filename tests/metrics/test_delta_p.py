"""Δp and the baseline files it is relative to: values, directions and messages."""

from __future__ import annotations

import json
import math

import pytest
import torch

from lightning_mtl.metrics import (
    DeltaP,
    delta_p,
    load_baseline,
)
from tests.common.places import PUBLISHED
from tests.metrics.test_metrics import BASE, RUN, UP

TABLE = json.loads(PUBLISHED.read_text(encoding="utf-8"))["tables"]["table 1"]


def nested(row):
    table: dict[str, dict] = {}
    for (task, metric, _), value in zip(TABLE["columns"], row, strict=True):
        table.setdefault(task, {})[metric] = value
    return table


DIRECTIONS = nested([up for *_, up in TABLE["columns"]])


def test_delta_p_by_task():
    row, base = ([float(v) for v in TABLE["rows"][m][:-1]] for m in ("DB-MTL", "STL"))
    result = delta_p(nested(row), nested(base), DIRECTIONS)
    assert list(result) == ["segmentation", "depth", "normal"]
    assert list(result.values()) == pytest.approx([0.53, 3.51, -0.61], abs=5e-3)
    metric = DeltaP(nested(base), DIRECTIONS)
    metric.update(nested(row))
    logged = {name: value.item() for name, value in metric.compute().items()}
    assert logged.pop("delta_p") == pytest.approx(1.144, abs=5e-4)
    assert logged == pytest.approx({f"delta_p/{t}": v for t, v in result.items()}, abs=1e-5)


def test_delta_p_is_a_mean_over_tasks_and_not_over_metrics():
    assert delta_p(RUN, BASE, UP) == pytest.approx({"classify": 5.0, "depth": (10 - 5) / 2})
    metric = DeltaP(BASE, UP)
    metric.update(RUN)
    assert metric.compute()["delta_p"].item() == pytest.approx((5 + 2.5) / 2, abs=1e-5)


def test_an_improvement_over_a_negative_baseline_is_positive():
    up = {"fit": {"r2": True}}
    assert delta_p({"fit": {"r2": 0.1}}, {"fit": {"r2": -0.2}}, up)["fit"] == pytest.approx(150)


def test_several_updates_are_averaged_and_reset_forgets():
    metric = DeltaP(BASE, UP)
    other = {"classify": {"accuracy": 0.72}, "depth": {"error": 0.5, "relative": 0.2}}
    first = metric(RUN)
    second = metric(other)
    assert first["delta_p"].item() == pytest.approx(3.75, abs=1e-5)
    assert second["delta_p"].item() == pytest.approx(-5, abs=1e-5)
    assert metric.compute()["delta_p"].item() == pytest.approx((3.75 - 5) / 2, abs=1e-5)
    metric.reset()
    metric.update(other)
    assert metric.compute()["delta_p/classify"].item() == pytest.approx(-10, abs=1e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_delta_p_takes_scalar_tensors(dtype):
    base = {"classify": {"accuracy": 0.5}}
    up = {"classify": {"accuracy": True}}
    value = {"classify": {"accuracy": torch.tensor([0.75], dtype=dtype)}}
    assert delta_p(value, base, up) == {"classify": 50.0}


def test_delta_p_refuses_other_tasks_and_metrics():
    with pytest.raises(
        ValueError, match=r"\['classify'\].*\['classify', 'depth'\].*Use a baseline"
    ):
        delta_p({"classify": {"accuracy": 1.0}}, BASE, UP)
    extra = {**RUN, "normal": {"angle": 1.0}}
    with pytest.raises(ValueError, match=r"missing in the baseline \['normal'\].*Use a baseline"):
        delta_p(extra, BASE, UP)
    renamed = {**RUN, "classify": {"f1": 1.0}}
    message = r"metric of task 'classify'.*\['f1'\].*\['accuracy'\].*leave out"
    with pytest.raises(ValueError, match=message):
        delta_p(renamed, BASE, UP)


@pytest.mark.parametrize("value", [0.0, math.nan, math.inf])
def test_delta_p_refuses_a_baseline_that_cannot_be_a_denominator(value):
    base = {**BASE, "depth": {"error": 0.5, "relative": value}}
    message = rf"metric `relative` of task 'depth' but found {value}.*leave the metric out"
    with pytest.raises(ValueError, match=message):
        DeltaP(base, UP)


@pytest.mark.parametrize("found", [None, "max"])
def test_delta_p_needs_a_direction(found):
    message = rf"direction for metric `error` of task 'depth' but found {found}.*higher_is_better="
    with pytest.raises(ValueError, match=message):
        DeltaP(BASE, {**UP, "depth": {"error": found, "relative": False}})


def test_delta_p_refuses_an_empty_baseline_and_values_that_are_no_number():
    with pytest.raises(ValueError, match="at least one task but found none"):
        DeltaP({}, {})
    value = {**RUN, "classify": {"accuracy": torch.ones(10)}}
    with pytest.raises(ValueError, match=r"`accuracy` of task 'classify'.*\(10,\).*macro"):
        delta_p(value, BASE, UP)


# ------------------------------------------------------------------------------ baseline files


def as_file(values, directions):
    tasks = {
        task: {m: {"value": v, "higher_is_better": directions[task][m]} for m, v in metrics.items()}
        for task, metrics in values.items()
    }
    return {"format": 1, "tasks": tasks}


def test_a_baseline_file_brings_its_directions(tmp_path):
    path = tmp_path / "baseline.json"
    path.write_text(json.dumps(as_file(BASE, UP)), encoding="utf-8")
    assert load_baseline(path) == load_baseline(str(path)) == (BASE, UP)
    assert load_baseline(as_file(BASE, UP)) == (BASE, UP)
    metric = DeltaP(path)
    metric.update(RUN)
    assert metric.compute()["delta_p"].item() == pytest.approx(3.75, abs=1e-5)
    turned = DeltaP(path, {"classify": {"accuracy": False}})
    turned.update(RUN)
    assert turned.compute()["delta_p/classify"].item() == pytest.approx(-5, abs=1e-5)


def test_a_baseline_by_hand_has_no_directions():
    assert load_baseline(BASE) == (BASE, {"classify": {}, "depth": {}})
    assert load_baseline({"format": {"psnr": 30.0}}) == ({"format": {"psnr": 30.0}}, {"format": {}})


def test_a_missing_baseline_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nothing there.*lightning-mtl compare.*a dict"):
        load_baseline(tmp_path / "baseline.json")
    with pytest.raises(FileNotFoundError, match=r"a folder there.*baseline\.json in its output"):
        load_baseline(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"format": 1, "tasks": ', r"to be JSON.*line 1 column 2.*Write it again"),
        ("{}", r'"format": 1` but found None.*of this version'),
        ('{"format": 2, "tasks": {}}', r'"format": 1` but found 2.*of this version'),
        ("[1, 2]", r'"format": 1` but found .\[1, 2\].*of this version'),
        ('{"format": 1, "tasks": {"depth": 0.5}}', r"found \{'depth': 0\.5\}.*at least one metric"),
        ('{"format": 1, "tasks": {"depth": {}}}', r"found \{'depth': \{\}\}.*at least one metric"),
        ('{"format": 1}', r"every task its metrics.*found None"),
        ('{"format": 1, "tasks": {"depth": {"error": "low"}}}', r"`error` of task 'depth'.*'low'"),
    ],
)
def test_a_baseline_file_of_something_else(tmp_path, text, message):
    path = tmp_path / "baseline.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        load_baseline(path)
