"""Callbacks that watch the runs of a comparison."""

from __future__ import annotations

import gc
import time
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

_MB = 1024.0**2


class CurveRecorder(Callback):
    """Norms and cosines of the task gradients at 50 to 100 steps spread evenly over the training.

    Args:
        most: at this many points, every second one is dropped and the distance doubled.
    """

    def __init__(self, most: int = 100) -> None:
        self.most = most
        self.every = 1
        self.points: list[dict[str, Any]] = []
        self._seen: Any = None

    def wants_jacobian(self, trainer: Trainer, module: LightningModule) -> bool:
        """Whether the coming step is recorded and has to collect task gradients."""
        return trainer.global_step % self.every == 0

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """Add a point when an optimiser step is due."""
        record: Any = pl_module.last_step
        if record is None or record is self._seen:
            return
        self._seen = record
        step = trainer.global_step - 1
        if step % self.every or record.gramian is None:
            return
        gramian = record.gramian.double().cpu()
        norms = gramian.diagonal().clamp_min(0).sqrt()
        cosines = gramian / (norms.outer(norms)).clamp_min(torch.finfo(torch.float64).tiny)
        tasks = record.tasks
        self.points.append(
            {
                "step": step,
                "norms": {task: norms[i].item() for i, task in enumerate(tasks)},
                "cosines": {
                    f"{tasks[i]} / {tasks[j]}": cosines[i, j].item()
                    for i, j in combinations(range(len(tasks)), 2)
                },
            }
        )
        if len(self.points) > self.most:
            self.every *= 2
            self.points = [point for point in self.points if point["step"] % self.every == 0]


class StepTimer(Callback):
    """Wall time of optimiser steps, loading of data included; ends the training.

    Args:
        warm_up: steps before the first that counts.
        least: steps that count at least.
        seconds: how long to measure at least, so that a moment of other load is outvoted.
    """

    most = 2000

    def __init__(self, warm_up: int = 10, least: int = 30, seconds: float = 0.2) -> None:
        self.warm_up = warm_up
        self.least = least
        self.seconds = seconds
        self._ends: list[tuple[int, float]] = []  # epoch and time

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """Note the end of an optimiser step."""
        if trainer.global_step <= len(self._ends):
            return
        if pl_module.device.type == "cuda":
            torch.cuda.synchronize()
        self._ends.append((trainer.current_epoch, time.perf_counter()))
        measured = self._ends[self.warm_up :]
        if len(measured) > self.least and measured[-1][1] - measured[0][1] >= self.seconds:
            trainer.should_stop = True

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """End a training that makes no step, and would go on for ever."""
        if not self._ends:
            trainer.should_stop = True

    def durations(self) -> list[float]:
        """Seconds of every step that counts; evaluation between two epochs does not.

        Raises:
            RuntimeError: the training ended before there were two steps.
        """
        ends = self._ends[self.warm_up :] if len(self._ends) > self.warm_up + 1 else self._ends
        pairs = [(a[0] == b[0], b[1] - a[1]) for a, b in pairwise(ends)]
        steps = [took for same_epoch, took in pairs if same_epoch] or [took for _, took in pairs]
        if not steps:
            raise RuntimeError(
                f"Expected at least 2 optimiser steps to time but found {len(ends)}."
            )
        return steps


class PeakMemory(Callback):
    """Peak memory of a training above what the process held before it.

    On a GPU this is memory allocated by torch, elsewhere the resident memory of the process
    (Linux only).
    """

    def __init__(self) -> None:
        self.peak_mb: float | None = None
        self._before: float | None = None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note where the training starts from."""
        gc.collect()
        if pl_module.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            self._before = torch.cuda.memory_allocated() / _MB
        else:
            _reset_peak()
            self._before = _status("VmRSS")

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note the peak."""
        peak = (
            torch.cuda.max_memory_allocated() / _MB
            if torch.cuda.is_initialized()
            else _status("VmHWM")
        )
        if peak is not None and self._before is not None:
            self.peak_mb = round(max(peak - self._before, 0.0), 2)


def _status(field: str) -> float | None:
    """A size of this process in MB, where /proc tells it."""
    path = Path("/proc/self/status")
    for line in path.read_text().splitlines() if path.exists() else ():
        if line.startswith(field):
            return int(line.split()[1]) / 1024
    return None


def _reset_peak() -> None:
    path = Path("/proc/self/clear_refs")
    if path.exists():
        try:
            path.write_text("5")
        except (
            OSError
        ):  # not permitted in some containers: the peak since the start of the process stays
            return
