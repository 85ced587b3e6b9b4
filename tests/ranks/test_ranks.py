"""Two processes against one on the joined batch: for every method, in every way to train."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_mtl import SAMO
from tests.common.method_rows.row import Method
from tests.common.methods import METHODS
from tests.common.ranks import result, run_cases
from tests.ranks import rank_cases


def claims(method: Method, variant: str) -> bool:
    """Whether a method works in a variant; where it does not, the flow refuses it by name."""
    made = method.make()
    if isinstance(made, SAMO):
        return variant in ("plain", "missing")
    if getattr(made, "gradients", "parameters") != "parameters":
        return variant in ("plain", "missing", "sharded")
    if getattr(made, "batches", 1) > 1:  # accumulates by itself, and needs every task
        return variant not in ("accumulate", "missing")
    return True


def cases(methods: Sequence[Method]) -> list[str]:
    """Every variant that every method claims."""
    return [f"{v}|{m.name}" for m in methods for v in rank_cases.VARIANTS if claims(m, v)]


def sees_columns(method: Method) -> bool:
    """Whether it is more than weights from small tensors, which do not tell how J is divided."""
    made = method.make()
    wraps = bool(made.nested())
    return wraps or made._columns or not getattr(made, "gramian_weighted", True)


FIRST = list({m.cls: m for m in reversed(METHODS)}.values())  # a row a class
BLOCKS = [f"blocks|{name}" for name in ("MinNorm", "NashMTL", "DualProj", "TaskTensioner(MinNorm)")]
# Ranks with other tasks have other graphs, and must agree on the blocks.
BLOCKS += ["missing blocks|MinNorm"]
HALF = [f"{v}|{name}" for v in ("bf16", "sharded bf16") for name in ("MinNorm", "DualBalance()")]
LEVELS = ("last_layer", "representation", "representation+1", "representation+2")
BY = [f"{variant}|by {level}" for variant in ("plain", "missing", "sharded") for level in LEVELS]
PADDED = "padded|by representation+1"
# What is summed over ranks does not depend on a method that gets small tensors: of these, all
# variants of two, and of the others the hardest, labels that are missing on a rank, come first.
SMALL = {m.name for m in FIRST if not sees_columns(m) and claims(m, "missing")}
SMALL -= {"MinNorm", "EqualWeighting"}
LATER = [c for c in cases(FIRST) if c.split("|")[0] != "missing" and c.split("|")[1] in SMALL]
CASES = [*(c for c in cases(FIRST) if c not in LATER), *BLOCKS, *HALF, *BY]
OTHERS = [*LATER, *cases([m for m in METHODS if m not in FIRST])]


def launched(cases: Sequence[str], path: Path) -> Path:
    """Results of all cases, of one launch."""
    run_cases(path, cases, "tests.ranks.rank_cases:run")
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A row a class."""
    return launched([*CASES, PADDED], tmp_path_factory.mktemp("ranks"))


@pytest.fixture(scope="module")
def other_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All other rows."""
    return launched(OTHERS, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("case", CASES)
def test_two_ranks_train_as_one(folder: Path, case: str) -> None:
    check(folder, CASES.index(case), case)


def test_a_representation_of_another_length_on_each_rank(folder: Path) -> None:
    first, second = (result(folder, len(CASES), rank) for rank in (0, 1))
    assert torch.equal(first["weights"], second["weights"])
    assert first["weights"].isfinite().all()
    assert (first["weights"] - rank_cases.start()).abs().max() > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("case", OTHERS)
def test_every_other_row_too(other_folder: Path, case: str) -> None:
    check(other_folder, OTHERS.index(case), case)


@functools.cache
def alone(case: str) -> dict[str, Any]:
    """One process on the joined batch."""
    return rank_cases.run(case, 0, 1)


def check(folder: Path, number: int, case: str) -> None:
    """Both ranks alike, bit for bit, and like one process."""
    first, second = (result(folder, number, rank) for rank in (0, 1))
    assert torch.equal(first["weights"], second["weights"])
    assert len(first["state"]) == len(second["state"])
    for mine, other in zip(first["state"], second["state"], strict=True):
        assert torch.equal(mine, other)
    variant, _, name = case.partition("|")
    alike = {"sharded": "plain", "fsdp2": "plain", "blocks": "plain", "missing blocks": "missing"}
    one = alone(f"{alike.get(variant, variant)}|{name}")
    assert first["steps"] == one["steps"] > 0
    close = 1e-2 if "bf16" in variant else 1e-5  # sums over ranks are rounded too
    torch.testing.assert_close(first["weights"], one["weights"], rtol=close, atol=close)
    moved = (one["weights"] - rank_cases.start()).abs().max()
    assert moved > 1e-3  # it trained
