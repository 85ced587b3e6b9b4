"""Many small fits in one launch of several real processes, a result file a case and rank.

Starting two processes costs seconds, a fit of twenty steps a fraction of one. So one launch runs
all cases in turn, in processes that come from one which has imported everything already. A case
that crashes or hangs is marked, and a new launch goes on from the next.
"""

from __future__ import annotations

import importlib
import json
import multiprocessing
import os
import socket
import sys
import time
import traceback
import warnings
from collections.abc import Sequence
from datetime import timedelta
from multiprocessing.process import BaseProcess
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


def _launch(folder: Path, world: int, first: int) -> list[BaseProcess]:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, "lightning_mtl"])
    port = str(free_port())
    processes: list[BaseProcess] = []
    for rank in range(world):
        process = context.Process(target=_start, args=(folder, rank, world, first, port))
        process.start()
        processes.append(process)
    return processes


def _start(folder: Path, rank: int, world: int, first: int, port: str) -> None:
    """As if this process had been started by hand, with its output in a file."""
    with (folder / f"log.{rank}.txt").open("wb") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    os.chdir(ROOT)
    os.environ.pop("PL_GLOBAL_SEED", None)  # DDP seeds again
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "NODE_RANK": "0"}
    os.environ |= {"LOCAL_RANK": str(rank), "RANK": str(rank), "WORLD_SIZE": str(world)}
    os.environ["OMP_NUM_THREADS"] = "1"
    warnings.simplefilter("ignore")
    main(folder, rank, world, first)


def _watch(
    folder: Path, processes: list[BaseProcess], first: int, size: int, world: int
) -> int | None:
    """Wait for the processes; the number of the case in which one crashed or hung."""
    done, since = first, time.monotonic()
    while True:
        while done < size and all((folder / f"{done}.{r}.pt").exists() for r in range(world)):
            done, since = done + 1, time.monotonic()
        codes = [p.exitcode for p in processes]
        if all(code == 0 for code in codes):
            return None
        crashed = any(code not in (None, 0) for code in codes)
        if crashed or time.monotonic() - since > PATIENCE:
            for process in processes:
                process.kill()
                process.join()
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
