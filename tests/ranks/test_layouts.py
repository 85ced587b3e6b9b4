"""Checkpoints across layouts: saved by one process, two, divided columns, FSDP2; resumed by any."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.common.ranks import result, run_cases
from tests.ranks.layout_cases import BALANCERS, STEPS, fit

FEW = ("MinNorm", "DualBalance", "PCGrad")  # without state, with T x P state, with random numbers
AGAIN = [(m, layout) for m in BALANCERS for layout in ("plain", "sharded")]
AGAIN += [(m, layout) for m in FEW for layout in ("fsdp2", "parts")]
CROSSED = [
    ("plain", "sharded"),
    ("sharded", "plain"),
    ("plain", "fsdp2"),
    ("sharded", "parts"),
    ("one", "fsdp2"),
    ("one", "parts"),
    ("fsdp2", "plain"),
    ("fsdp2", "sharded"),
    ("fsdp2", "parts"),
    ("parts", "fsdp2"),
]
FOLDER = (
    r"Expected a checkpoint in one file with (DDP|SingleDevice)Strategy but found a folder.* Load "
    r"it with ModelParallelStrategy; .*`save_distributed_checkpoint=False`.*from-parts-DualBalance"
)


class Launch:
    """Two processes that have done every case; and one process on the joined batches."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.cases: dict[str, dict[str, Any]] = {}
        self.alone = {}
        for m in BALANCERS:
            self.alone[m] = fit(0, 1, method=m, layout="plain", save=self.file("one", m))
        for m in BALANCERS:
            for layout in ("plain", "sharded"):
                self.add(f"{layout} {m}", m, layout, save=self.file(layout, m))
                self.add(f"one to {layout} {m}", m, layout, resume=self.file("one", m))
        for layout in ("fsdp2", "parts"):
            file = self.file(layout, "DualBalance")
            self.add(f"{layout} DualBalance", "DualBalance", layout, save=file)
        for saved, resumed in CROSSED:
            file = self.file(saved, "DualBalance")
            self.add(f"{saved} to {resumed}", "DualBalance", resumed, resume=file)
        for m, layout in AGAIN:
            file = folder / f"again-{layout}-{m}.ckpt"
            self.add(f"whole {layout} {m}", m, layout, save=file, dropout=0.3)
            self.add(f"again {layout} {m}", m, layout, resume=file, dropout=0.3)
        file = self.file("parts", "DualBalance")
        self.add("refused", "DualBalance", "plain", resume=file)
        run_cases(
            folder, [json.dumps(c) for c in self.cases.values()], "tests.ranks.layout_cases:run"
        )

    def file(self, layout: str, method: str) -> Path:
        return self.folder / f"from-{layout}-{method}.ckpt"

    def add(self, name: str, method: str, layout: str, **options: Any) -> None:
        paths = {k: str(v) if isinstance(v, Path) else v for k, v in options.items()}
        self.cases[name] = {"method": method, "layout": layout, **paths}

    def of(self, name: str, rank: int = 0) -> Any:
        return result(self.folder, list(self.cases).index(name), rank)


@pytest.fixture(scope="module")
def launch(tmp_path_factory: pytest.TempPathFactory) -> Launch:
    return Launch(tmp_path_factory.mktemp("layouts"))


def close(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert found["steps"] == expected["steps"] == STEPS
    torch.testing.assert_close(found["weights"], expected["weights"], rtol=0, atol=1e-5)
    torch.testing.assert_close(found["state"], expected["state"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize(("method", "layout"), AGAIN)
def test_two_ranks_resume_bit_for_bit(launch: Launch, method: str, layout: str, rank: int) -> None:
    whole = launch.of(f"whole {layout} {method}", rank)
    again = launch.of(f"again {layout} {method}", rank)
    assert whole["steps"] == again["steps"] == STEPS
    assert torch.equal(again["weights"], whole["weights"])
    torch.testing.assert_close(again["state"], whole["state"], rtol=0, atol=0)
    assert again["drawn"] == whole["drawn"]  # dropout and shuffling of this very rank
    assert again["told"] == []
    other = launch.of(f"whole {layout} {method}", 1 - rank)
    assert whole["drawn"] != other["drawn"]


@pytest.mark.parametrize("layout", ["plain", "sharded"])
@pytest.mark.parametrize("method", BALANCERS)
def test_one_process_goes_on_from_two(launch: Launch, method: str, layout: str) -> None:
    stayed = launch.of(f"{layout} {method}")
    close(stayed, launch.alone[method])
    found = fit(0, 1, method=method, layout="plain", resume=launch.file(layout, method))
    close(found, stayed)
    assert len(found["told"]) == 1
    assert "was written by 2 processes and is resumed by 1" in found["told"][0]


@pytest.mark.parametrize("layout", ["plain", "sharded"])
@pytest.mark.parametrize("method", BALANCERS)
def test_two_ranks_go_on_from_one_process(launch: Launch, method: str, layout: str) -> None:
    for rank in (0, 1):
        found = launch.of(f"one to {layout} {method}", rank)
        close(found, launch.alone[method])
        assert len(found["told"]) == (rank == 0)  # said once
        if rank == 0:
            assert "was written by 1 processes and is resumed by 2" in found["told"][0]


@pytest.mark.parametrize("layout", ["plain", "sharded", "fsdp2"])
def test_divided_state_is_whole_in_the_file(launch: Launch, layout: str) -> None:
    files = [launch.file(name, "DualBalance") for name in (layout, "one")]
    saved, alone = (torch.load(f, weights_only=True)["callbacks"]["DualBalance"] for f in files)
    assert saved["state"]["average"].shape == (3, 94)
    torch.testing.assert_close(saved["state"]["average"], alone["state"]["average"])


@pytest.mark.parametrize(("saved", "resumed"), CROSSED)
def test_a_run_goes_on_under_another_strategy(launch: Launch, saved: str, resumed: str) -> None:
    for rank in (0, 1):
        close(launch.of(f"{saved} to {resumed}", rank), launch.alone["DualBalance"])


def test_a_folder_of_parts_is_refused_elsewhere(launch: Launch) -> None:
    """By DDP on both ranks, and by one process; the way that it names is tested above."""
    for rank in (0, 1):
        with pytest.raises(AssertionError, match=FOLDER):
            launch.of("refused", rank)
    with pytest.raises(IsADirectoryError, match=FOLDER):
        fit(0, 1, method="DualBalance", layout="plain", resume=launch.file("parts", "DualBalance"))
