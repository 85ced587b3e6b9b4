"""Many small fits in one launch of several real processes, a result file a case and rank.

Starting two processes costs seconds, a fit of twenty steps a fraction of one. So one launch runs
all cases in turn. A case that crashes or hangs is marked, and a new launch goes on from the next.

``python -m tests.common.ranks FOLDER RANK WORLD PORT FIRST`` is one of the processes; tests call
``run_cases``.
"""

from __future__ import annotations

import importlib
import json
import os
import socket
import subprocess
import sys
import time
import traceback
import warnings
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

from tests.common.places import ROOT

PATIENCE = 150.0  # seconds that a case may take before its processes are killed


def run_cases(folder: Path, cases: Sequence[str], runner: str, world: int = 2) -> None:
    """Run ``runner(case, rank, world)`` for every case in ``world`` processes.

    Args:
        folder: where results are written, ``<number>.<rank>.pt``.
        cases: what to run, in order.
        runner: ``module:function``; returns what ``torch.save`` can write.
        world: number of processes.
    """
    (folder / "cases.json").write_text(json.dumps({"cases": list(cases), "runner": runner}))
    first = 0
    while first < len(cases):
        processes = _launch(folder, world, first)
        failed = _watch(folder, processes, first, len(cases), world)
        if failed is None:
            return
        for rank in range(world):
            if not (path := folder / f"{failed}.{rank}.pt").exists():
                log = (folder / f"log.{rank}.txt").read_text(errors="replace")[-2000:]
                torch.save({"error": f"crashed or hung: {log}"}, path)
        first = failed + 1


def result(folder: Path, number: int, rank: int) -> Any:
    """What a case returned on a rank.

    Raises:
        AssertionError: it failed there.
    """
    found = torch.load(folder / f"{number}.{rank}.pt", weights_only=False)
    assert "error" not in found, found["error"]
    return found["value"]


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _launch(folder: Path, world: int, first: int) -> list[subprocess.Popen[bytes]]:
    port = free_port()
    processes = []
    for rank in range(world):
        env = {
            **{k: v for k, v in os.environ.items() if k != "PL_GLOBAL_SEED"},  # DDP seeds again
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "NODE_RANK": "0",
            "LOCAL_RANK": str(rank),
            "RANK": str(rank),
            "WORLD_SIZE": str(world),
            "OMP_NUM_THREADS": "1",
        }
        arguments = [str(folder), str(rank), str(world), str(first)]
        with (folder / f"log.{rank}.txt").open("wb") as log:
            processes.append(
                subprocess.Popen(
                    [sys.executable, "-m", "tests.common.ranks", *arguments],
                    cwd=ROOT,
                    env=env,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                )
            )
    return processes


def _watch(
    folder: Path, processes: list[subprocess.Popen[bytes]], first: int, size: int, world: int
) -> int | None:
    """Wait for the processes; the number of the case in which one crashed or hung."""
    done, since = first, time.monotonic()
    while True:
        while done < size and all((folder / f"{done}.{r}.pt").exists() for r in range(world)):
            done, since = done + 1, time.monotonic()
        codes = [p.poll() for p in processes]
        if all(code == 0 for code in codes):
            return None
        crashed = any(code not in (None, 0) for code in codes)
        if crashed or time.monotonic() - since > PATIENCE:
            for process in processes:
                process.kill()
                process.wait()
            return done if done < size else None
        time.sleep(0.05)


def main(folder: Path, rank: int, world: int, first: int) -> None:
    """One process: the cases in turn, together with the other ranks."""
    torch.set_num_threads(1)
    todo = json.loads((folder / "cases.json").read_text())
    module, _, name = todo["runner"].partition(":")
    runner = getattr(importlib.import_module(module), name)
    torch.distributed.init_process_group("gloo", timeout=timedelta(seconds=60))
    for number, case in enumerate(todo["cases"]):
        if number < first:
            continue
        try:
            found = {"value": runner(case, rank, world)}
        except Exception:  # told by the test that reads it; the next case is another matter
            found = {"error": traceback.format_exc()}
        path = folder / f"{number}.{rank}.pt"
        torch.save(found, path.with_suffix(".part"))
        path.with_suffix(".part").rename(path)
        errors: list[Any] = [None] * world
        torch.distributed.all_gather_object(errors, "error" in found)
        if any(errors) and not all(errors):
            sys.exit(1)  # the others wait in some collective: start afresh
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main(Path(sys.argv[1]), *(int(a) for a in sys.argv[2:5]))
