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

PATIENCE = 30  # seconds for a worker to end once it has sent its record


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
                end(process, PATIENCE)  # a thread of the user's may keep it from ending
                del active[receiver]
                receiver.close()
    finally:
        with undisturbed():
            for _, process in active.values():
                end(process, 0)


def end(process: Any, patience: float) -> None:
    """Wait ``patience`` seconds for a process to end, then end it."""
    if patience:
        process.join(patience)
    if process.is_alive():
        process.kill()
    process.join()


def _died(run: Run, exitcode: int) -> dict[str, Any]:
    return {**run.record(), "status": "failed", "error": f"its process {ended_with(exitcode)}"}


def ended_with(exitcode: int) -> str:
    """How a process ended that sent nothing."""
    if exitcode >= 0:
        return f"ended with exit status {exitcode}"
    how = f"ended with signal {-exitcode} ({signal.Signals(-exitcode).name})"
    lack = -exitcode == getattr(signal, "SIGKILL", 9)
    return how + ", often a lack of memory: use fewer --workers" * lack
