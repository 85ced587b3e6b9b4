"""A checkpoint of an earlier version resumes, with the numbers that version resumed with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.trainer.old_checkpoints import ROWS, load, resumed

SAVED = load()


def test_there_is_one_of_every_balancer() -> None:
    assert SAVED.keys() == {method.name for method in ROWS}


@pytest.mark.parametrize("method", ROWS, ids=[method.name for method in ROWS])
def test_it_resumes(method: Any, tmp_path: Path) -> None:
    found = resumed(method, SAVED[method.name]["checkpoint"], tmp_path)
    torch.testing.assert_close(found, SAVED[method.name]["weights"], rtol=2e-4, atol=2e-6)
