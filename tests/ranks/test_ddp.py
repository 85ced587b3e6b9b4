"""DDP in its variants trains as one process on the joined batches; three and four ranks too."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.common.ranks import ROOT, result, run_cases
from tests.ranks import rank_cases
from tests.ranks.variant_cases import BALANCERS, STEPS, VARIANTS, fit

CASES = [f"{v}|{m}" for v in VARIANTS if v != "launched" for m in BALANCERS]
NORMS = ["batch norm|ours", "batch norm|plain", "sync_batchnorm"]
MANY = [f"plain|{m}" for m in ("EqualWeighting", "LogLoss", "MinNorm", "DualBalance()")]
MANY += [f"sharded|{m}" for m in ("MinNorm", "DualBalance()")]  # 94 columns: padded to 96
LAUNCHED = [("ddp_spawn", "MinNorm"), ("ddp_spawn", "DualBalance")]  # imports everything anew
LAUNCHED += [("ddp_fork", m) for m in BALANCERS] if hasattr(os, "fork") else []


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("ddp")
    run_cases(path, CASES + NORMS, "tests.ranks.variant_cases:run")
    return path


@pytest.mark.parametrize("case", CASES)
def test_trains_as_one_process(folder: Path, case: str) -> None:
    first, second = (result(folder, CASES.index(case), rank) for rank in (0, 1))
    variant, _, method = case.partition("|")
    alone = fit(method, variant, 1)
    assert first["steps"] == second["steps"] == alone["steps"] == STEPS + (variant == "uneven")
    assert torch.equal(first["weights"], second["weights"])
    torch.testing.assert_close(first["weights"], alone["weights"], rtol=0, atol=1e-5)
    torch.testing.assert_close(first["state"], second["state"], rtol=0, atol=0)
    torch.testing.assert_close(first["state"], alone["state"], rtol=1e-4, atol=1e-5)
    assert (alone["weights"] - rank_cases.start()).abs().max() > 1e-3  # it trained


def test_buffers_are_kept_in_step(folder: Path) -> None:
    """As under Lightning's own DDP: each forward pass starts from those of rank 0."""
    ours, plain = (
        [result(folder, len(CASES) + number, rank) for rank in (0, 1)] for number in (0, 1)
    )
    for mine, other in zip(ours, plain, strict=True):
        torch.testing.assert_close(mine["weights"], other["weights"], rtol=0, atol=1e-5)
        torch.testing.assert_close(mine["buffers"], other["buffers"], rtol=0, atol=1e-5)


def test_sync_batchnorm_asks_for_a_gpu(folder: Path) -> None:
    """PyTorch's own refusal, on both ranks; nothing of it can be tried on the CPU."""
    for rank in (0, 1):
        assert "GPU" in result(folder, len(CASES) + 2, rank)["error"]


@pytest.fixture(scope="module", params=[3, pytest.param(4, marks=pytest.mark.slow)])
def many(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    path = tmp_path_factory.mktemp("many")
    run_cases(path, MANY, "tests.ranks.rank_cases:run", world=request.param)
    return path, request.param


@pytest.mark.slow
@pytest.mark.parametrize("case", MANY)
def test_three_and_four_ranks(many: Any, case: str) -> None:
    path, world = many
    found = [result(path, MANY.index(case), rank) for rank in range(world)]
    alone = rank_cases.run(case, 0, 1)
    for other in found:
        assert torch.equal(other["weights"], found[0]["weights"])
        torch.testing.assert_close(other["state"], found[0]["state"], rtol=0, atol=0)
    torch.testing.assert_close(found[0]["weights"], alone["weights"], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found[0]["state"], alone["state"], rtol=1e-4, atol=1e-5)


@pytest.fixture(scope="module")
def launched(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs whose Trainer starts the other process by itself, from a process without threads."""
    path = tmp_path_factory.mktemp("launched")
    wanted = [f"{launcher}|{method}" for launcher, method in LAUNCHED]
    command = [sys.executable, "-m", "tests.ranks.variant_cases", str(path), *wanted]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return path


@pytest.mark.slow
@pytest.mark.parametrize(("launcher", "method"), LAUNCHED)
def test_processes_that_the_trainer_starts(launched: Path, launcher: str, method: str) -> None:
    """The trained parameters come back to the process that called ``fit``.

    The state of callbacks, so of balancers, does not: Lightning leaves it in the processes that it
    ended. A checkpoint written by them has it.
    """
    found = torch.load(launched / f"{launcher}|{method}.pt", weights_only=True)
    alone = fit(method, "launched", 1)
    torch.testing.assert_close(found["weights"], alone["weights"], rtol=0, atol=1e-5)
    assert len(alone["state"]) == (2 if method == "DualBalance" else 0)
    assert not any(state.any() for state in found["state"])
