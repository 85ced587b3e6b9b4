"""The answer of `compare`, in numbers and words, from runs that are made up."""

from __future__ import annotations

import pytest

from lightning_mtl.compare.answer import answer
from lightning_mtl.compare.cells import console_table
from lightning_mtl.compare.grid import Run
from lightning_mtl.compare.progress import Progress
from lightning_mtl.compare.table import summarise

KINDS = {"equal": "equal", "fixed": "fixed", "mine": "balancer"}


def summary_of(
    equal: list[float],
    fixed: list[float],
    mine: list[float],
    single: float = 1.0,
    alone: list[float] | None = None,
):
    """A comparison with given accuracies of task `a`; task `b` is always as good as alone."""
    runs = [
        {"method": "single-task", "task": task, "seed": seed, "metrics": {task: {"acc": value}}}
        for task in ("a", "b")
        for seed, value in enumerate(alone or [single])
    ]
    for method, values in {"equal": equal, "fixed": fixed, "mine": mine}.items():
        runs += [
            {"method": method, "seed": seed, "metrics": {"a": {"acc": v}, "b": {"acc": single}}}
            for seed, v in enumerate(values)
        ]
    runs = [{"run": str(i), "kind": "train", "status": "finished", **r} for i, r in enumerate(runs)]
    return summarise(runs, {"a": {"acc": True}, "b": {"acc": True}}, KINDS, {})


NOISE = [0.001, -0.001, 0.0005, 0.0, -0.0005]


def around(mean: float, turn: int) -> list[float]:
    """Five values of that mean; each ``turn`` pairs them with other seeds."""
    return [mean + x for x in NOISE[turn:] + NOISE[:turn]]


@pytest.mark.parametrize(
    ("accuracies", "verdict", "single"),
    [
        ((0.9, 0.9, 1.1), "Yes: balancing helps", "is above single-task"),
        ((0.9, 0.9, 0.95), "Yes: balancing helps", "a model per task remains better"),
        ((0.8, 1.0, 0.999), "No: fixed", "a model per task does as well"),
        ((0.9, 0.8, 0.85), "No: equal", "a model per task remains better"),
    ],
)
def test_answer(accuracies, verdict, single):
    means = [around(mean, turn) for turn, mean in enumerate(accuracies)]
    sentences = answer(summary_of(*means, alone=around(1.0, 3)))
    assert sentences[0].startswith(verdict)
    assert any(single in sentence for sentence in sentences), sentences
    assert any("5 seeds (0 to 4) of 3 methods, 15 runs" in sentence for sentence in sentences)


def test_answer_of_runs_that_spread():
    wide = [0.9, 0.8, 1.0]
    sentences = answer(summary_of(wide, wide[::-1], [0.8, 1.1, 0.95], alone=[1.0, 1.1, 0.9]))
    assert sentences[0].startswith("Cannot tell: with 3 seeds only an advantage above")
    assert sentences[1].startswith("Cheapest way on: --confirm")


def test_answer_admits_what_it_does_not_know():
    sentences = answer(summary_of([0.9], [0.9], [1.0]))
    assert sentences[0].startswith("Cannot tell: on the one seed that was run, mine (Δp +0.00 %)")
    sentences = answer(summary_of([0.9, 0.91], [0.9, 0.9], [1.0, 1.01]))
    assert sentences[0].startswith("Cannot tell: two seeds are for screening only")
    assert answer(summary_of([0.9], [0.9], []))[0] == "No answer: no balancer has a finished run."
    zero = summary_of([0.9], [0.9], [1.0], single=0.0)
    assert answer(zero)[0].startswith("No answer: Δp is not defined")
    assert "No Δp: " in console_table(zero)
    nothing = summarise([], {"a": {"acc": True}}, KINDS, {})
    assert "no finished single-task run of a" in answer(nothing)[0]


def test_time_left_counts_each_kind_by_itself():
    now = iter([0.0, 10.0, 20.0])
    earlier = [{"kind": "train", "seconds": 6.0}]
    progress = Progress(6, {"train": 3, "timing": 2}, earlier, 2, clock=lambda: next(now))
    assert progress.headline() == "6 runs, 1 of them finished before; 2 side by side"
    record = {"status": "finished", "kind": "train", "seconds": 10.0, "metrics": {"a": {"acc": 1}}}
    line = progress.line(Run("train", "mine", 1), record)
    # two more of (6 + 10) / 2 seconds side by side, two timings of as long one after the other
    assert line == "[2/6] mine, seed 1: a acc 1 (10 s) | 10 s so far, about 24 s left"
    record = {"status": "finished", "kind": "timing", "seconds": 2.0, "step_ms": 1, "peak_mb": None}
    line = progress.line(Run("timing", "mine", 0), record)
    assert line == "[3/6] mine, timing: 1.00 ms a step | 20 s so far, about 10 s left"
