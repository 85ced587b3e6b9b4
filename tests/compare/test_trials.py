"""Trials are a function of the records: killed anywhere, with any workers, they are the same."""

from __future__ import annotations

import random

import pytest

from lightning_mtl.compare.grid import FIRST_FRESH, SINGLE, TUNING_SEED, Run
from lightning_mtl.compare.tuning.choose import Tuning
from lightning_mtl.compare.tuning.fairness import fairness
from lightning_mtl.compare.tuning.space import grid, read_space

DIRECTIONS = {"a": {"acc": True}, "b": {"mse": False}}
SEARCH = {"search": {"model.lr": {"low": 1e-4, "high": 1, "log": True}, "n": ["x", "y"]}}


def spaces(trials: int = 10) -> dict:
    space = read_space("m", {**SEARCH, "trials": trials})
    assert space is not None
    return {SINGLE: grid([{"model.lr": 0.1}, {"model.lr": 0.2}]), "mine": space, "other": space}


def tuning(records: dict[Run, dict]) -> Tuning:
    return Tuning(spaces(), ["equal", "mine", "other"], DIRECTIONS, records)


def train(run: Run) -> dict:
    """A record whose metrics depend on the settings alone; small rates diverge."""
    assert run.settings is not None
    lr = run.settings["model.lr"]
    if lr < 1e-3:
        return {**run.record(), "status": "failed", "error": "diverged"}
    bonus = 0.1 if run.settings.get("n") == "y" else 0.0
    metrics = {"a": {"acc": 0.5 + lr / 4 + bonus}, "b": {"mse": 2.0 - lr}}
    kept = {t: m for t, m in metrics.items() if run.task in (None, t)}
    return {**run.record(), "status": "finished", "metrics": kept}


def settings(records: dict[Run, dict]) -> dict[str, dict]:
    return {record["run"]: record["settings"] for record in records.values()}


def whole(kills: random.Random | None = None) -> dict[Run, dict]:
    """All trials; with ``kills`` in any order, stopped again and again between two of them."""
    records: dict[Run, dict] = {}
    while todo := tuning(records).todo():
        if kills is not None:
            kills.shuffle(todo)
            todo = todo[: kills.randrange(1, len(todo) + 1)]
        for run in todo:
            records[run] = train(run)
        if kills is not None:  # a new start has the finished ones only, in the order of the file
            finished = {r: x for r, x in records.items() if x["status"] == "finished"}
            failed = {r: x for r, x in records.items() if x["status"] == "failed"}
            records = {Run.of(x): x for x in finished.values()} | failed
    return records


def test_a_search_that_is_stopped_goes_on_with_the_same_trials():
    records = whole()
    assert len(records) == 2 * 2 + 10 + 10
    expected = tuning(records).choice(("mine", None))
    for seed in range(5):
        again = whole(random.Random(seed))
        assert settings(again) == settings(records)
        assert tuning(again).choice(("mine", None)) == expected
    assert {run.seed for run in records} == {TUNING_SEED}
    assert TUNING_SEED > FIRST_FRESH
    assert {record["stage"] for record in records.values()} == {"tune"}


def test_a_failed_trial_that_is_done_again_has_the_same_settings():
    records = whole()
    failed = [run for run, record in records.items() if record["status"] == "failed"]
    assert failed
    for run in failed:
        del records[run]
    todo = tuning(records).todo()
    while todo:
        for run in todo:
            assert run.settings == dict(next(r.settings for r in failed if r == run) or {})
            records[run] = train(run)
        todo = tuning(records).todo()


def test_entries_with_the_same_ranges_have_the_same_trials_while_they_are_alike():
    records = settings(whole())
    mine = [records[f"mine-trial{i}"] for i in range(10)]
    assert mine == [records[f"other-trial{i}"] for i in range(10)]
    assert len({s["model.lr"] for s in mine}) == 10  # rounds are not repeated


def test_the_best_trial_is_chosen_and_a_failed_one_is_counted():
    records = whole()
    found = tuning(records)
    choice = found.choice(("mine", None))
    assert choice.settings is not None
    finished = [r["settings"] for r in records.values() if r["method"] == "mine"]
    finished = [s for s in finished if s["model.lr"] >= 1e-3]
    base = {"a": 0.5 + 0.2 / 4, "b": 2.0 - 0.2}

    def score(s: dict) -> float:
        acc = 0.5 + s["model.lr"] / 4 + (0.1 if s["n"] == "y" else 0.0)
        return 50 * ((acc - base["a"]) / base["a"] + s["model.lr"] / base["b"] - 0.2 / base["b"])

    assert choice.settings == max(finished, key=score)
    assert choice.score == pytest.approx(score(dict(choice.settings)))
    assert choice.failed == 10 - len(finished) > 0
    assert found.choice((SINGLE, "b")).settings == {"model.lr": 0.2}
    assert found.reference() == {"a": {"acc": 0.55}, "b": {"mse": 1.8}}
    assert "(the best of 10 trials, " in str(choice)


def test_what_a_row_was_run_with_stays_chosen():
    records = whole()
    run = Run("train", "mine", 0, name="mine-seed0").set({"model.lr": 0.5, "n": "x"})
    records[run] = {**run.record(), "status": "finished", "metrics": {}}
    for failed in [r for r, x in records.items() if x["status"] == "failed" and r.method == "mine"]:
        del records[failed]
    found = tuning(records)
    assert found.choice(("mine", None)).settings == {"model.lr": 0.5, "n": "x"}
    assert not [run for run in found.todo() if run.method == "mine"]


def test_without_a_single_task_trial_rows_are_judged_by_their_own_median():
    records = whole()
    for run in [run for run in records if run.task == "b"]:
        records[run] = {**records[run], "status": "failed"}
    found = tuning(records)
    assert list(found.reference()) == ["a"]
    assert found.choice(("mine", None)).settings is not None


def test_nothing_is_chosen_where_nothing_finished():
    records = whole()
    for run in [run for run in records if run.method == "mine"]:
        records[run] = {**records[run], "status": "failed"}
    choice = tuning(records).choice(("mine", None))
    assert choice.settings is None
    assert str(choice) == "none: all 10 trials failed"
    said = remarks(choices={"mine": choice})
    assert "mine has no row: all of its 10 trials failed." in said


def remarks(**changes: object) -> list[str]:
    choice = tuning(whole()).choice(("mine", None))
    given: dict = {
        "kinds": {"equal": "equal", "mine": "balancer", "other": "balancer"},
        "choices": {"mine": choice, f"{SINGLE} a": choice},
        "missing": [],
        "unjudged": [],
        "split": "test",
        "same_data": False,
        "select": "last",
    }
    return fairness(**{**given, **changes})


def test_what_is_unfair_is_said():
    first, *others = remarks()
    assert first.startswith("Budgets differ, so a balancer may be ahead for having been tuned more")
    assert "10 for mine; 1 for equal and other." in first
    assert all("of 10 trials of" in said for said in others)
    assert any("use --split test" in said for said in remarks(split="val"))
    assert any("begin with the same batch" in said for said in remarks(same_data=True))
    assert any("No single-task trial of b finished" in said for said in remarks(unjudged=["b"]))
    assert "Rivals: x left out." in remarks(missing=["x left out"])
    choice = tuning(whole()).choice(("mine", None))
    alone = remarks(choices={"mine": choice})
    assert any("The single-task runs were not tuned" in said for said in alone)
    rows = dict.fromkeys(("equal", "mine", "other"), choice)
    assert not [said for said in remarks(choices=rows) if said.startswith("Budgets")]
    rivals = remarks(choices={"equal": choice})
    assert "a yes is the stronger for it" in rivals[0]
    assert remarks(choices={}) == []
