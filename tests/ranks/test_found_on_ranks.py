"""Two processes: parameters outside the module, found late, complex or sparse, as in one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.common.ranks import result, run_cases
from tests.ranks.found_cases import BALANCERS, fit

CASES = [
    *((name, False, "raise") for name in BALANCERS),
    ("MinNorm", True, "raise"),
    ("DualBalance", True, "raise"),
    ("MinNorm", False, "ignore"),
    ("DualBalance", False, "ignore"),
]
UNUSUAL = [("none", False), ("MinNorm", False), ("MinNorm", True), ("last layer", False)]
COMPLEX = [(*case, "raise", "complex") for case in [*UNUSUAL, ("DualBalance", False)]]
SPARSE = [(*case, "raise", "sparse") for case in UNUSUAL]
ALL = [*CASES, *COMPLEX, *SPARSE]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("found")
    run_cases(found, [json.dumps(case) for case in ALL], "tests.ranks.found_cases:run")
    return found


@pytest.mark.parametrize("number", range(len(CASES)), ids=[" ".join(map(str, c)) for c in CASES])
def test_two_ranks_train_as_one(folder: Path, number: int) -> None:
    name, _, rule = CASES[number]
    first, second = (result(folder, number, rank) for rank in (0, 1))
    assert torch.equal(first["weights"], second["weights"])
    alone: dict[str, Any] = fit(0, 1, name, False, rule)
    assert first["steps"] == alone["steps"] == 6
    assert first["shared"] == alone["shared"]
    if name != "none":
        assert first["shared"][-2:] == ["late.weight", "late.bias"]
    torch.testing.assert_close(first["weights"], alone["weights"], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(first["state"], alone["state"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("case", COMPLEX, ids=lambda case: f"{case[0]} {case[1]}")
def test_complex_parameters(folder: Path, case: Any) -> None:
    first, second = (result(folder, ALL.index(case), rank) for rank in (0, 1))
    alone = fit(0, 1, *case)
    assert torch.equal(first["weights"], second["weights"])
    torch.testing.assert_close(first["weights"], alone["weights"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("case", SPARSE, ids=lambda case: f"{case[0]} {case[1]}")
def test_sparse_gradients_are_refused_on_both(folder: Path, case: Any) -> None:
    for rank in (0, 1):
        with pytest.raises(
            AssertionError, match=r"found sparse ones of \['table.weight'\]. Use nn"
        ):
            result(folder, ALL.index(case), rank)
