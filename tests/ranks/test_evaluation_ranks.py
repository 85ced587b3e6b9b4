"""What two processes log of an evaluation is what one logs on the joined data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.common.ranks import result, run_cases
from tests.ranks import evaluation_cases
from tests.ranks.evaluation_cases import LAYOUTS, Measured, joined

pytestmark = pytest.mark.filterwarnings("ignore:Metric `Spearman.* will save all targets")

CASES = [
    *(f"validate|{layout}" for layout in LAYOUTS),
    "test|in some batches",
    "undeclared|each on one rank",
    "undeclared|in some batches",
    "undeclared|no batch on one rank",
    "baseline|on the first rank",
    "baseline|each on one rank",
    "hooks|uneven batches",
]
ADDED = ["added|running", "added|stateless", "added|by itself"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("evaluation")
    cases = [*CASES, "random|", f"fit|{path}", "failing|", *ADDED]
    run_cases(path, cases, "tests.ranks.evaluation_cases:run")
    return path


@pytest.mark.parametrize("case", CASES)
def test_two_ranks_log_what_one_logs(folder: Path, case: str) -> None:
    alone = evaluation_cases.run(case, 0, 1)
    first, second = (result(folder, CASES.index(case), rank) for rank in (0, 1))
    assert first == second
    assert list(first["numbers"]) == list(alone["numbers"])
    assert first["numbers"] == pytest.approx(alone["numbers"], rel=1e-5, abs=1e-6)
    assert first["seen"] == sorted(n for n in alone["numbers"] if "delta_p" not in n)
    assert (first["seen"], first["read"]) == (alone["seen"], alone["read"])
    assert first["read"] == (first["seen"] if case.startswith("hooks") else None)


def expected(layout: str, task: str, error: Any) -> float:
    """A mean over all labels of a task."""
    module = Measured().eval()
    found = []
    with torch.no_grad():
        for x, targets in joined(layout):
            if task in targets:
                found.append(error(module(x)[task] - targets[task]))
    return float(torch.cat(found).mean())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_figures_by_hand(folder: Path, layout: str) -> None:
    logged = result(folder, CASES.index(f"validate|{layout}"), 1)["numbers"]
    square = expected(layout, "a", torch.square)
    assert logged["val/loss/a"] == pytest.approx(square, rel=1e-5)
    assert logged["val/a/mse"] == pytest.approx(square, rel=1e-5)
    assert logged["val/a/twice"] == pytest.approx(2 * square, rel=1e-5)
    if layout == "no labels of one task":
        assert not [name for name in logged if "/b" in name]
        return
    error = expected(layout, "b", torch.abs)
    assert logged["val/loss/b"] == pytest.approx(error, rel=1e-5)
    assert logged["val/b/MeanAbsoluteError"] == pytest.approx(error, rel=1e-5)


def test_a_task_of_each_rank_keeps_its_figures(folder: Path) -> None:
    """They were both the mean of the two, under one another's name."""
    logged = result(folder, CASES.index("validate|each on one rank"), 0)["numbers"]
    assert abs(logged["val/b/MeanAbsoluteError"] - logged["val/a/mse"]) > 1
    assert set(logged) == {
        *("val/loss/a", "val/a/mse", "val/a/twice", "val/loss/b"),
        *(f"val/b/{n}" for n in ("MeanAbsoluteError", "PearsonCorrCoef", "SpearmanCorrCoef")),
    }


def test_values_of_a_dict_are_logged_by_name(folder: Path) -> None:
    logged = result(folder, CASES.index("validate|uneven batches"), 0)["numbers"]
    images = sum(size for rank in LAYOUTS["uneven batches"] for size, t in rank if "d" in t)
    assert logged["val/d/Images/images"] == images
    assert "val/d/Images/boxes" not in logged
    assert {f"val/c/each/multiclassaccuracy_{i}" for i in range(3)} < set(logged)
    assert {f"val/c/range/{n}" for n in ("raw", "min", "max")} < set(logged)
    assert "val/c/inner_MulticlassAccuracy" in logged


def test_delta_p_where_one_rank_has_no_labels(folder: Path) -> None:
    for case in ("baseline|on the first rank", "baseline|each on one rank"):
        logged = result(folder, CASES.index(case), 1)["numbers"]
        mse = expected(case.partition("|")[2], "a", torch.square)
        assert logged["val/delta_p/a"] == pytest.approx(100 * (3.0 - mse) / 3.0, rel=1e-4)
        assert logged["val/delta_p"] == logged["val/delta_p/a"]


def test_a_metric_that_draws_has_one_value(folder: Path) -> None:
    first, second = (result(folder, len(CASES), rank) for rank in (0, 1))
    assert first == second
    assert "val/a/drawn" in first


def test_schedules_checkpoints_and_stopping_agree(folder: Path) -> None:
    first, second = (result(folder, len(CASES) + 1, rank) for rank in (0, 1))
    assert first == second
    assert first["rate"] < 0.1
    assert first["best"]
    assert (folder / first["best"]).exists()
    assert first["score"] <= first["numbers"]["val/b/MeanAbsoluteError"]


def test_a_metric_that_fails_on_one_rank_ends_both(folder: Path) -> None:
    told = [result(folder, len(CASES) + 2, rank) for rank in (0, 1)]
    assert told[0] == "RuntimeError: Rank 1 cannot evaluate: there is no such mean"
    assert told[1] == "ArithmeticError: there is no such mean"


def test_a_window_over_batches_is_that_of_every_rank(folder: Path) -> None:
    """It was that of the first rank; here each rank has as many batches as fit in."""
    told = [result(folder, len(CASES) + 3, rank) for rank in (0, 1)]
    mse = expected("everything everywhere", "a", torch.square)
    assert told == pytest.approx([mse, mse], rel=1e-5)


def test_a_metric_without_states_is_refused_on_several_ranks(folder: Path) -> None:
    """Its value was that of the first rank, on every rank."""
    for rank in (0, 1):
        assert "metric Stateless to keep" in result(folder, len(CASES) + 4, rank)
        assert result(folder, len(CASES) + 5, rank) == 2.0  # it is said to do it by itself
    assert evaluation_cases.run("added|stateless", 0, 1) == 4.0
