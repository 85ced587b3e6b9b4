"""The callback that measures, and moves nothing of the training that it watches."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from lightning_mtl.compare.texts import error_text
from lightning_mtl.diagnose import DiagnoseError
from lightning_mtl.diagnose.gradients import (
    Shared,
    find_shared,
    losses_of,
    noted,
    task_rows,
    with_other_masks,
)
from lightning_mtl.diagnose.halves import UnsplittableError, halves
from lightning_mtl.diagnose.noise import Array, cosines
from lightning_mtl.engine.again import Seen
from lightning_mtl.numerics import inner

_SEED = 20_000_003  # of the second draw of dropout


@dataclass
class Point:
    """One measured optimiser step; G groups of layers, T tasks; all float64.

    Attributes:
        step: its number, from 0.
        losses: of the batch, shape ``(T,)``; NaN for an absent task.
        gramians: of the task gradients by group, shape ``(G, T, T)``.
        pairs: of those on two halves, stacked, shape ``(G, 2T, 2T)``; ``None`` without halves.
        size: samples in a half; 1 where successive batches stand for halves.
        dropout: cosine of each task's gradient to that with other masks, shape ``(T,)``; ``None``
            where nothing is random.
        along_update: cosine of each task's downhill direction to what the optimizer did, ``(T,)``.
        sum_along_update: the same of the sum of the task gradients.
        update: length of what the optimizer did to the shared parameters.
    """

    step: int
    losses: Array
    gramians: Array
    pairs: Array | None = None
    size: int = 1
    dropout: Array | None = None
    along_update: Array | None = None
    sum_along_update: float = np.nan
    update: float = np.nan

    @property
    def gramian(self) -> Array:
        """Of all shared parameters, shape ``(T, T)``."""
        found: Array = self.gramians.sum(axis=0)
        return found


class LossCurve(Callback):
    """Losses of every optimiser step; ends the training after enough of them.

    Args:
        steps: how many are enough.

    Attributes:
        losses: a dict by task for every step that was taken.
    """

    def __init__(self, steps: int) -> None:
        self.steps = steps
        self.losses: list[dict[str, float]] = []
        self._seen: Any = None

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """Note the losses of a step that was taken."""
        record: Any = pl_module.last_step
        if record is None or record is self._seen or trainer.global_step == 0:
            return
        self._seen = record
        self.losses.append(dict(zip(record.tasks, record.losses.tolist(), strict=True)))
        if len(self.losses) >= self.steps:
            trainer.should_stop = True

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """End a training that makes no step, and would go on for ever."""
        if not self.losses:
            trainer.should_stop = True


class GradientRecorder(LossCurve):
    """Measure task gradients at steps spread evenly over a short training.

    Before a measured step the losses of its batch are computed again: on both halves of it, as a
    whole, and, where anything is random, with other masks. Random states, buffers (BatchNorm),
    metrics and the log are put back each time, so that the training is bit for bit what it is
    without the callback. It needs memory for twice T × P numbers and one more copy of the shared
    parameters.

    Args:
        steps: optimiser steps of the training.
        measured: how many of them to measure at most.

    Attributes:
        points: what was measured.
        tasks: names of the tasks, in the order of every row; those outside the gradient stage
            aside.
        unsplittable: why batches could not be divided; empty where they could. Then the batch
            before stands for the second half, and floors are those of whole batches.
        shared: the shared parameters; ``None`` before the first measured step.
        trouble: what stopped the last measurement that failed.
    """

    def __init__(self, steps: int, measured: int) -> None:
        super().__init__(steps)
        due = np.linspace(0, steps - 1, min(measured, steps)).round().astype(int)
        self.due = set(due.tolist())
        self.points: list[Point] = []
        self.tasks: list[str] = []
        self.unsplittable = ""
        self.shared: Shared | None = None
        self.trouble: Exception | None = None
        self._before: Seen | None = None
        self._open: tuple[Point, Tensor, Tensor, int] | None = None

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Measure the gradients of a step that is due, on its first micro-batch."""
        module: Any = pl_module
        if batch_idx % trainer.accumulate_grad_batches:
            return
        self._open = None
        step = len(self.losses)
        seen = noted(module, batch, batch_idx)
        if step in self.due and module.task_names:
            self.due.discard(step)
            try:
                self._measure(module, seen, step, trainer.global_step)
            except DiagnoseError:
                raise
            except Exception as error:  # the training meets it too, and says it better
                self.trouble = error
        elif step in self.due:
            self.due.add(step + 1)  # the first batch has to name the tasks
        self._before = seen if self.unsplittable else None

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """Compare what the optimizer did with the gradients of its step."""
        super().on_train_batch_end(trainer, pl_module, *args)
        if self._open is None or trainer.global_step == self._open[3]:
            return
        point, rows, before, _ = self._open
        self._open = None
        assert self.shared is not None
        update = self.shared.values() - before
        both = torch.cat([rows, rows.sum(0, keepdim=True), update[None]])
        found = cosines(inner.gramian(both).cpu().numpy())[-1]
        point.along_update, point.sum_along_update = -found[: len(rows)], -float(found[-2])
        point.update = float(inner.norms(update[None])[0])
        self.points.append(point)

    def _measure(self, module: Any, seen: Seen, step: int, global_step: int) -> None:
        if not self.tasks:
            outside = module.unbalanced_tasks
            self.tasks = [t for t in module.training_tasks if t not in outside]
        if self.shared is None:
            with losses_of(module, seen, self.tasks) as losses:
                if len(losses) < 2:
                    self.due.add(step + 1)  # tasks in turn, or absent: look at the next batch
                    return
                self.shared = find_shared(module, losses)
        rows, losses_now = self._rows(module, seen)
        if not np.isfinite(losses_now).any():
            return
        pairs, size = self._halves(module, seen)
        point = Point(step, losses_now, self.shared.products(rows, rows), pairs, size)
        point.dropout = self._other_masks(module, seen, rows, losses_now, step)
        self._open = point, rows, self.shared.values(), global_step

    def _rows(self, module: Any, seen: Seen) -> tuple[Tensor, Array]:
        assert self.shared is not None
        with losses_of(module, seen, self.tasks) as losses:
            values = [float(losses[t].detach()) if t in losses else np.nan for t in self.tasks]
            return task_rows(self.shared, losses, self.tasks), np.asarray(values)

    def _halves(self, module: Any, seen: Seen) -> tuple[Array | None, int]:
        """Inner products on two halves, and the samples in one."""
        assert self.shared is not None
        try:
            if self.unsplittable:
                if self._before is None:
                    return None, 1
                pair, size = [self._before, seen], 1
            else:
                first, second, size = halves(seen.batch)
                pair = [replace(seen, batch=part, versions=[]) for part in (first, second)]
            found = torch.cat([self._rows(module, part)[0] for part in pair])
        except Exception as why:  # a loss of the user's may need whole batches
            if not self.points and not self.unsplittable:
                known = isinstance(why, UnsplittableError)
                self.unsplittable = str(why) if known else f"a half fails with {error_text(why)}"
            return None, 1
        return self.shared.products(found, found), size

    def _other_masks(
        self, module: Any, seen: Seen, rows: Tensor, losses: Array, step: int
    ) -> Array | None:
        """Cosines to the gradients with other masks; ``None`` where the losses are the same."""
        other, again = self._rows(module, with_other_masks(module, seen, _SEED + step))
        if np.array_equal(losses, again, equal_nan=True):
            return None
        pairs = [torch.stack(pair) for pair in zip(rows, other, strict=True)]
        return np.asarray([cosines(inner.gramian(pair).cpu().numpy())[0, 1] for pair in pairs])
