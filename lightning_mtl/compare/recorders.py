"""Callbacks that watch the runs of a comparison."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Sequence
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

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

    Long steps are measured by fewer of them: what disturbs a step for a moment disturbs a long one
    by less.

    Args:
        warm_up: steps before the first that counts; three of them do once they took a second.
        least: steps that count at least; three of them do once they took two seconds.
        seconds: how long to measure at least, so that a moment of other load is outvoted.

    Attributes:
        most: steps of a training that ends it in any case.
    """

    most = 2000
    few, long_warm_up, long = 3, 1.0, 2.0

    def __init__(self, warm_up: int = 10, least: int = 30, seconds: float = 0.1) -> None:
        self.warm_up = warm_up
        self.least = least
        self.seconds = seconds
        self._ends: list[tuple[int, float]] = []  # epoch and time
        self._first: int | None = None  # the end that the first step that counts begins at

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """Note the end of an optimiser step."""
        if trainer.global_step <= len(self._ends):
            return
        self._ends.append((trainer.current_epoch, _now(pl_module)))
        last = len(self._ends) - 1
        if self._first is None:
            warm = self._enough(last, last, self.warm_up, 0.0, self.long_warm_up)
            self._first = last if warm else None
        elif self._enough(last - self._first, last, self.least, self.seconds, self.long):
            trainer.should_stop = True

    def _enough(self, steps: int, last: int, least: int, seconds: float, long: float) -> bool:
        took = self._ends[last][1] - self._ends[last - steps][1]
        return (steps >= least and took >= seconds) or (steps >= self.few and took >= long)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """End a training that makes no step, and would go on for ever."""
        if not self._ends:
            trainer.should_stop = True

    def durations(self) -> list[float]:
        """Seconds of every step that counts; evaluation between two epochs does not.

        Raises:
            RuntimeError: the training ended before there were two steps.
        """
        counted = self._first if self._first is not None else len(self._ends)
        ends = self._ends[counted:] if len(self._ends) > counted + 1 else self._ends
        pairs = [(a[0] == b[0], b[1] - a[1]) for a, b in pairwise(ends)]
        steps = [took for same_epoch, took in pairs if same_epoch] or [took for _, took in pairs]
        if not steps:
            raise RuntimeError(
                f"Expected at least 2 optimiser steps to time but found {len(ends)}."
            )
        return steps


class ModelRecorder(Callback):
    """Parameters and evaluation time of the model of a training, taken when the training ends.

    Args:
        count: count the parameters, too.

    Attributes:
        parameters: how many numbers the gradient of a task's loss reaches, on one batch of each set
            of tasks that was met; those that are frozen are counted, those of heads that do not
            train are not.
        forward_ms: median milliseconds of a forward pass in evaluation mode without gradients;
            ``None`` where batches are of one task each, since no batch then asks for all.
        timed: ``forward``, or ``losses`` where ``task_losses`` does not call the module itself, and
            the whole of it had to be timed.
    """

    least = 5  # forward passes
    seconds = 0.03

    def __init__(self, count: bool) -> None:
        self.count = count
        self.parameters: int | None = None
        self.forward_ms: float | None = None
        self.timed = ""
        self._batches: dict[tuple[str, ...], Any] = {}

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Keep a batch of every set of tasks."""
        record: Any = pl_module.last_step
        if record is not None:
            self._batches.setdefault(tuple(record.tasks), batch)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Count and time."""
        if not self._batches:
            return
        training = pl_module.training
        pl_module.eval()
        with trainer.precision_plugin.forward_context():
            if self.count:
                self.parameters = _reached(pl_module, list(self._batches.values()))
            if len(self._batches) == 1:
                with torch.no_grad():
                    self._time(pl_module, next(iter(self._batches.values())))
        pl_module.train(training)
        self._batches.clear()

    def _time(self, module: LightningModule, batch: Any) -> None:
        calls: list[tuple[Any, Any]] = []
        with module.register_forward_pre_hook(
            lambda _, args, kwargs: calls.append((args, kwargs)), with_kwargs=True
        ):
            _losses(module, batch)
        self.timed = "forward" if len(calls) == 1 else "losses"
        took: list[float] = []
        while len(took) < self.least or sum(took) < self.seconds:
            started = _now(module)
            if len(calls) == 1:
                module(*calls[0][0], **calls[0][1])
            else:
                _losses(module, batch)
            took.append(_now(module) - started)
        self.forward_ms = 1000 * statistics.median(took)


def _losses(module: Any, batch: Any) -> dict[str, Tensor]:
    """The losses that train, by task."""
    found = {}
    for task, loss in module.task_losses(batch, 0).items():
        loss = loss[0] if isinstance(loss, tuple) else loss
        if loss is not None and task in module.training_tasks:
            found[task] = loss
    return found


def _reached(module: LightningModule, batches: Sequence[Any]) -> int:
    """Numbers in the parameters that a loss depends on."""
    parameters = [p for p in module.parameters() if p.is_floating_point() or p.is_complex()]
    frozen = [p for p in parameters if not p.requires_grad]
    reached: set[int] = set()
    try:
        for parameter in frozen:
            parameter.requires_grad_(True)
        # cuDNN has no backward pass of recurrent layers in evaluation mode
        with torch.enable_grad(), torch.backends.cudnn.flags(enabled=False):
            for batch in batches:
                losses = [loss.sum() for loss in _losses(module, batch).values()]
                ones = [torch.ones_like(loss) for loss in losses]
                found = torch.autograd.grad(losses, parameters, ones, allow_unused=True)
                reached |= {i for i, grad in enumerate(found) if grad is not None}
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)
    return sum(parameters[i].numel() for i in reached)


def _now(module: LightningModule) -> float:
    if module.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


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
