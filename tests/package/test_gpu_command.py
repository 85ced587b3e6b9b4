"""`make gpu` without a GPU: with tiny networks, and without what a GPU machine may not have."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.common.places import ROOT

sys.path.append(str(ROOT / "benchmarks"))

from gpu_results import Results  # benchmarks are scripts: their folder is their path
from gpu_table import tables

ABSENT = ("jsonargparse", "hypothesis", "matplotlib", "torchvision", "torchjd", "xdist", "sklearn")
# Read by Python at its start, in every process: these modules, and every address but our own, are
# not to be had.
SITE = f"""
import socket
from importlib.machinery import PathFinder
from importlib.metadata import Distribution, PackageNotFoundError

find_spec, from_name = PathFinder.find_spec, Distribution.from_name

class AbsentModule:  # no function, which pytest would make a method of
    def __call__(self, name, path=None, target=None):
        return None if name.split(".")[0] in {ABSENT!r} else find_spec(name, path, target)

def absent_distribution(name):
    if name.replace("-", "_") in {ABSENT!r}:
        raise PackageNotFoundError(name)
    return from_name(name)

PathFinder.find_spec, Distribution.from_name = AbsentModule(), absent_distribution

def connect(self, address):
    if self.family != socket.AF_UNIX and address[0] not in ("127.0.0.1", "::1", "localhost"):
        raise OSError(f"no network, says the test: {{address}}")
    return inner(self, address)

inner, socket.socket.connect = socket.socket.connect, connect
"""


def gpu(folder: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    """Run `make gpu` with this Python, whose environment lacks what `SITE` says."""
    (folder / "sitecustomize.py").write_text(SITE)
    python = folder / "python"
    python.write_text(f'#!/bin/sh\nPYTHONPATH="$PYTHONPATH:{folder}" exec {sys.executable} "$@"\n')
    python.chmod(0o755)
    # Plugins of this environment import what is absent.
    environment = {**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    command = ["make", "gpu", f"PYTHON={python}", f"GPU_FLAGS={' '.join(flags)}"]
    return subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )


@pytest.mark.slow
def test_all_of_it_on_the_processor(tmp_path: Path) -> None:
    out = tmp_path / "results.json"
    run = gpu(tmp_path, "--device", "cpu", "--minutes", "40", "--out", str(out))
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
    found = json.loads(out.read_text())
    assert {part["state"] for part in found["parts"].values()} == {"done"}
    assert len(found["parts"]) == 5
    counts = found["tests"]["counts"]
    assert counts["failed"] == counts["error"] == 0
    assert counts["passed"] > 20
    for about in found["figures"].values():
        for way, of in about["ways"].items():
            assert "fails" not in of, (way, of)
            assert of["ms"]["least"] <= of["ms"]["median"] <= of["ms"]["most"]
            assert of["launches"] == 0  # there is no device
    text = tables(found)
    assert "ResNet-50" in text
    assert "Not complete" not in text


def test_what_is_absent_is_absent(tmp_path: Path) -> None:
    """The network and the modules, in a process that the test above starts."""
    (tmp_path / "sitecustomize.py").write_text(SITE)
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    for program, words in (
        ("import jsonargparse", "No module named 'jsonargparse'"),
        ("import matplotlib.pyplot", "No module named 'matplotlib'"),
        (
            "import socket; socket.create_connection(('203.0.113.1', 80), 1)",
            "no network, says the test",
        ),
    ):
        run = subprocess.run(
            [sys.executable, "-c", program],
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert run.returncode == 1
        assert words in run.stderr


@pytest.mark.slow
def test_what_there_is_no_time_for_is_said(tmp_path: Path) -> None:
    out = tmp_path / "results.json"
    run = gpu(tmp_path, "--device", "cpu", "--minutes", "0.1", "--out", str(out))
    assert run.returncode != 0
    found = json.loads(out.read_text())
    assert [part["state"] for part in found["parts"].values()] == ["left out"] * 5
    assert all("no time" in part["why"] for part in found["parts"].values())
    assert "Not complete: tests, left out: no time was left." in tables(found)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(tmp_path: Path) -> None:
    out = tmp_path / "results.json"
    run = gpu(tmp_path, "--out", str(out))
    assert run.returncode != 0
    assert "No CUDA device" in run.stdout
    assert "--device cpu" in run.stdout
    assert not out.exists()


def machine() -> dict[str, Any]:
    return {
        "gpu": "NVIDIA H100",
        "cuda": "13.0",
        "driver": "580",
        "torch": "2.11.0",
        "lightning": "2.6.6",
        "python": "3.12.3",
    }


def test_results_are_whole_after_each_figure(tmp_path: Path) -> None:
    results = Results(tmp_path / "folder" / "gpu.json")
    results.begin(machine(), 9.5)
    results.part("one", state="running")
    results.add("figures", "one", {"shared parameters": 10, "dtype": "float32", "batch": [2, 3]})
    results.add("figures", "one", "ways", "plain PyTorch", {"ms": _ms(2.0)})
    results.add("figures", "one", "ways", "ours", {"ms": _ms(5.0)})
    results.add("figures", "one", "ways", "ours", {"launches": 70.0, "peak MB": 1.5})
    results.add("figures", "one", "ways", "theirs", {"fails": "RuntimeError: no"})
    found = Results(tmp_path / "folder" / "gpu.json").read()  # as another process, or a later one
    assert found["figures"]["one"]["ways"]["ours"] == {
        "ms": _ms(5.0),
        "launches": 70.0,
        "peak MB": 1.5,
    }
    assert [path.name for path in (tmp_path / "folder").iterdir()] == ["gpu.json"]
    assert found["ended"] is None
    lines = tables(found).splitlines()
    assert lines[0].startswith("On NVIDIA H100, CUDA 13.0")
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if "|" in line]
    head = "way, ms a step, least to most, × plain PyTorch, launches, peak, MB"
    assert ", ".join(cells[0]) == head
    assert cells[2:] == [
        ["plain PyTorch", "2.00", "1.00 to 3.00", "1.00", "–", "–"],
        ["ours", "5.00", "4.00 to 6.00", "2.50", "70.00", "1.50"],
    ]
    assert "– theirs: RuntimeError: no" in lines
    assert "Not complete: one, running: it was cut off." in lines


def _ms(median: float) -> dict[str, float]:
    return {"median": median, "least": median - 1, "most": median + 1, "rounds": 3}
