"""GradientMonitor: how the tasks get on with each other, in the Trainer's own loggers."""

from __future__ import annotations

import math
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor

from lightning_mtl.contract import other_trainer
from lightning_mtl.engine.record import StepRecord
from lightning_mtl.metrics.gradients import conflict_rate, gradient_cosines, gradient_norms


def step_metrics(record: StepRecord) -> dict[str, float]:
    r"""What :class:`GradientMonitor` logs of one optimiser step.

    With :math:`g_t` the gradient of task :math:`t` before any weighting and :math:`d` the
    direction: ``grad_norm/<t>`` is :math:`\lVert g_t \rVert`; ``grad_cosine/<a>-<b>`` the cosine
    of two task gradients; ``conflict_rate`` the share of task pairs with a negative one;
    ``angle_to_direction/<t>`` the angle between :math:`g_t` and :math:`d` in degrees (over 90 the
    step raises that task's loss, to first order); ``loss_weight/<t>`` and ``gradient_weight/<t>``
    the weights that the balancers gave. All begin with ``mtl/``.

    Args:
        record: ``module.last_step``.

    Returns:
        Numbers by name. What is not defined is left out: cosines, conflicts and angles of a
        gradient that is zero or not finite, pairs when there is one task, and what the record
        lacks.
    """
    names = record.tasks
    found: dict[str, Tensor] = _by_task("loss_weight", names, record.loss_weights)
    if record.gradient_weights is not None:
        found |= _by_task("gradient_weight", names, record.gradient_weights)
    if record.gramian is not None:
        gramian = _on_host(record.gramian)
        norms = gradient_norms(gramian)
        cosines = gradient_cosines(gramian)
        found |= _by_task("grad_norm", names, norms)
        found |= {
            f"mtl/grad_cosine/{names[i]}-{names[j]}": cosines[i, j]
            for i in range(len(names))
            for j in range(i + 1, len(names))
        }
        found["mtl/conflict_rate"] = conflict_rate(gramian)
        if record.alignment is not None and record.direction_norm is not None:
            cosines = _on_host(record.alignment) / norms / _on_host(record.direction_norm)
            angles = torch.rad2deg(torch.acos(cosines.clamp(-1, 1)))
            found |= _by_task("angle_to_direction", names, angles)
    values = {name: float(value) for name, value in found.items()}
    return {name: value for name, value in values.items() if not math.isnan(value)}


class GradientMonitor(Callback):
    """Log gradient norms, cosines, conflicts, angles and weights by task name, to every logger.

    Works with TensorBoard, CSV, W&B and any other logger of the Trainer, on the axis that
    ``self.log`` uses. The names and what they mean are those of
    :func:`~lightning_mtl.monitor.step_metrics`. On the steps it logs, each task's gradient is
    computed apart also when no balancer needs it; the other steps cost nothing.

    Args:
        every_n_steps: log the first optimiser step and every ``n``-th from then on (``n``, ``2n``,
            ...); micro-batches of one step count once.

    Raises:
        ValueError: ``every_n_steps`` is not a positive whole number.
        TypeError: at ``setup``, when the module is no ``MultiTaskModule``.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> from lightning_mtl.monitor import GradientMonitor
        >>> monitor = GradientMonitor(every_n_steps=10)
    """

    def __init__(self, every_n_steps: int = 50) -> None:
        if type(every_n_steps) is not int or every_n_steps < 1:
            raise ValueError(
                f"Expected argument `every_n_steps` of GradientMonitor to be a whole number from 1 "
                f"on but got {every_n_steps!r}. Pass 1 to log every optimiser step."
            )
        self.every_n_steps = every_n_steps
        self._steps_before = 0

    def wants_jacobian(self, trainer: Trainer, pl_module: LightningModule) -> bool:
        """Whether the coming optimiser step will be logged, so that it needs task gradients."""
        return bool(trainer.loggers) and self._is_due(trainer.global_step + 1)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse a module that keeps no record of its steps; warn when there is no logger."""
        if wrong := other_trainer(trainer):
            raise TypeError(wrong)
        if stage != "fit":
            return
        if not hasattr(pl_module, "last_step"):
            raise TypeError(
                f"Expected GradientMonitor to watch a MultiTaskModule but found "
                f"{type(pl_module).__name__}. Let it inherit from lightning_mtl.MultiTaskModule, "
                f"or remove the callback."
            )
        if not trainer.loggers:
            rank_zero_warn(
                "GradientMonitor expected a logger but the Trainer has none, so nothing is logged. "
                "Pass one, for example Trainer(logger=CSVLogger('logs')) and not `barebones=True`, "
                "or remove the callback."
            )

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Note how many steps were made before this batch."""
        self._steps_before = trainer.global_step

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Log the record that this batch made, if it is one that was asked for."""
        if (
            not trainer.loggers
            or not trainer.is_global_zero
            or not self._is_due(trainer.global_step)
        ):
            return
        if trainer.global_step == self._steps_before:
            return  # a micro-batch, or a step that was skipped
        record: Any = pl_module.last_step
        metrics = step_metrics(record)
        step = trainer.fit_loop.epoch_loop._batches_that_stepped  # the axis of `self.log`
        for logger in trainer.loggers:
            logger.log_metrics(metrics, step=step)

    def _is_due(self, step: int) -> bool:
        return step == 1 or step % self.every_n_steps == 0


def _by_task(quantity: str, names: tuple[str, ...], values: Tensor) -> dict[str, Tensor]:
    pairs = zip(names, _on_host(values), strict=True)
    return {f"mtl/{quantity}/{name}": value for name, value in pairs}


def _on_host(values: Tensor) -> Tensor:
    """Float64 on the CPU: a few numbers, of steps that are logged only."""
    return values.detach().cpu().double()
