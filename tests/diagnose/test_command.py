"""`lightning-mtl diagnose`: its predictions where the truth is known, its files, its refusals."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from lightning_mtl.cli import main

MODELS = "tests.diagnose.models."
TRAINER = {"max_epochs": 1, "accelerator": "cpu"}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def config(model: str = "Bottleneck", data: str = "Samples", **changes: Any) -> dict[str, Any]:
    trainer = {**TRAINER, **changes.pop("trainer", {})}
    of_data = {key: changes.pop(key) for key in ("batches", "ragged") if key in changes}
    return {
        "model": {"class_path": MODELS + model, "init_args": changes},
        "data": {"class_path": MODELS + data, "init_args": of_data},
        "trainer": trainer,
    }


def run(here: Path, given: dict[str, Any], *options: str) -> int:
    (here / "C.yaml").write_text(yaml.safe_dump(given, sort_keys=False))
    return main(["diagnose", "--config", "C.yaml", *options]) or 0


def diagnosed(here: Path, given: dict[str, Any], *options: str) -> dict[str, Any]:
    assert run(here, given, *options) == 0
    return json.loads((here / "diagnosis" / "diagnose.json").read_text())


def verdicts(found: dict[str, Any], verdict: str) -> set[str]:
    return {m for s in found["reading"] if s["verdict"] == verdict for m in s["methods"]}


def test_losses_a_thousand_apart_through_a_bottleneck(here: Path, capsys: pytest.CaptureFixture):
    found = diagnosed(here, config(scale=1000.0), "--steps", "100", "--measure", "20")
    assert found["loss"]["spread"] > 50
    could = verdicts(found, "could help")
    assert {"LogLoss", "DualBalance", "CentralDirection", "NashMTL", "Scalarization"} <= could
    assert found["alone"]["near"]["starves"] is True
    assert found["alone"]["far"]["starves"] is False
    weights = found["fixed_weights"]
    assert weights[0] / weights[1] > 100
    printed = capsys.readouterr().out
    assert "could help" in printed
    assert "near is where it would be alone after" in printed
    page = (here / "diagnosis" / "diagnose.html").read_text()
    assert "<svg" in page
    assert not re.search(r"(src|href)=", page)  # nothing outside it


def test_tasks_that_are_alike_leave_nothing_to_balance(here: Path, capsys: pytest.CaptureFixture):
    given = config(width=8, apart=False)
    found = diagnosed(here, given, "--steps", "60", "--measure", "15", "--out", "diagnosis")
    assert verdicts(found, "could help") == verdicts(found, "cannot tell") == set()
    assert "UPGrad" in verdicts(found, "no reason seen")
    assert found["pairs"][0]["verdict"] == "agree"
    assert not any(row["starves"] for row in found["alone"].values())
    assert "no reason seen" in capsys.readouterr().out


def test_batches_that_cannot_be_divided_are_said(here: Path, capsys: pytest.CaptureFixture):
    found = diagnosed(here, config(ragged=True), "--steps", "12", "--measure", "6", "--no-alone")
    assert found["halves"]["unit"] == "batches"
    assert "first dimensions of [3, 32]" in capsys.readouterr().out
    assert all(floor is not None for floor in found["noise"]["floor"])
    assert found["alone"] == {}


def test_tasks_that_the_first_batch_names(here: Path):
    found = diagnosed(here, config("Unnamed"), "--steps", "10", "--measure", "4")
    assert found["tasks"] == ["p", "q"]
    assert found["measured"][0] == 1


@pytest.fixture
def refused(here: Path, capsys: pytest.CaptureFixture) -> Callable[..., str]:
    """The message of a request that is refused, and that no file was written."""

    def told(given: dict[str, Any], *options: str) -> str:
        assert run(here, given, "--steps", "8", "--measure", "4", *options) == 2
        assert [p.name for p in here.iterdir()] == ["C.yaml"]
        captured = capsys.readouterr()
        assert "lightning-mtl diagnose: error: Expected " in captured.err
        assert "Traceback" not in captured.err
        return captured.err

    return told


BALANCED = {"trainer": {"callbacks": [{"class_path": "MinNorm"}]}}


@pytest.mark.parametrize(
    ("given", "options", "message"),
    [
        (config(tasks=1), [], "at least 2 tasks but found ['near']"),
        (config(data="NoLoader"), [], "Expected a batch to measure"),
        (config(batches=0), [], "Expected a batch to measure but the training made no"),
        (config(**BALANCED), [], "found MinNorm. A diagnosis is of equal weighting: remove it"),
        (config(broken=0), [], "all tasks but it failed. BadLossError: Expected finite"),
        (config(broken=2), [], "short training of all tasks but it failed. BadLossError"),
        (config("Separate"), [], "share but found none"),
        (config(trainer={"devices": 2}), [], "one device"),
        (config(nothing=3), [], "to be a config that"),
        (config(), ["--out", ""], 'to name a folder but found ""'),
        (config(), ["--steps", "1"], "--steps to be at least 4"),
        (config(), ["--measure", "0"], "--measure to be at least 2"),
        (config(), ["--config", "no.yaml"], "YAML file at no.yaml"),
    ],
)
def test_what_cannot_be_diagnosed_says_the_cure(
    given: dict[str, Any], options: list[str], message: str, refused: Callable[..., str]
):
    assert message in refused(given, *options)
