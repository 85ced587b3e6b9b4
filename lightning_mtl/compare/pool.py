"""Runs side by side, a process each."""

from __future__ import annotations

import multiprocessing
import signal
import sys
from collections import deque
from collections.abc import Callable, Sequence
from multiprocessing.connection import wait
from typing import Any

import torch

from lightning_mtl.compare.grid import Run
from lightning_mtl.compare.stopping import undisturbed
from lightning_mtl.compare.worker import Job, work

_PATIENCE = 30  # seconds for a worker to end once it has sent its record


def start_method() -> str:
    """``fork`` where it is safe, since it spares every run the imports."""
    return "fork" if sys.platform == "linux" and not torch.cuda.is_initialized() else "spawn"


def execute(
    runs: Sequence[Run], job: Job, workers: int, finished: Callable[[Run, dict[str, Any]], None]
) -> None:
    """Do all ``runs``, at most ``workers`` at a time.

    Args:
        runs: what to do, in this order.
        job: what they share.
        workers: number of processes.
        finished: called with each run and its record as it ends, also when its process died.
    """
    context: Any = multiprocessing.get_context(start_method())
    waiting = deque(runs)
    active: dict[Any, tuple[Run, Any]] = {}
    try:
        while waiting or active:
            while waiting and len(active) < workers:
                run = waiting.popleft()
                receiver, sender = context.Pipe(duplex=False)
                process = context.Process(target=work, args=(run, job, sender))
                with undisturbed():  # no process that nobody knows of
                    process.start()
                    active[receiver] = (run, process)
                sender.close()
            ready: Any = wait(list(active))
            for receiver in ready:
                run, process = active[receiver]
                try:
                    record = receiver.recv()
                except (EOFError, OSError):  # nothing, or the half of a record
                    process.join()
                    record = _died(run, process.exitcode)
                finished(run, record)
                _end(process, _PATIENCE)  # a thread of the user's may keep it from ending
                del active[receiver]
                receiver.close()
    finally:
        with undisturbed():
            for _, process in active.values():
                _end(process, 0)


def _end(process: Any, patience: float) -> None:
    if patience:
        process.join(patience)
    if process.is_alive():
        process.kill()
    process.join()


def _died(run: Run, exitcode: int) -> dict[str, Any]:
    if exitcode < 0:
        how = f"signal {-exitcode} ({signal.Signals(-exitcode).name})"
        how += (
            ", often a lack of memory: use fewer --workers"
            if -exitcode == getattr(signal, "SIGKILL", 9)
            else ""
        )
    else:
        how = f"exit status {exitcode}"
    return {**run.record(), "status": "failed", "error": f"its process ended with {how}"}
