"""Two processes: parameters outside the module, and layers that are found late, as in one."""

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


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("found")
    run_cases(found, [json.dumps(case) for case in CASES], "tests.ranks.found_cases:run")
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
