"""Validation and test of a MultiTaskModule: losses and metrics by task, and Δp."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from lightning_mtl.batches import check_keys, described, target_keys
from lightning_mtl.losses import known_tasks
from lightning_mtl.metrics.delta_p import _check_names, delta_p, load_baseline
from lightning_mtl.task import STAGES

if TYPE_CHECKING:
    from lightning_mtl.module import MultiTaskModule


class Evaluation:
    """What a module does outside training.

    Args:
        baseline: single-task results, ``{task: {metric: value}}`` or a ``baseline.json``.
        delta_p_metrics: ``{task: {logged name: higher is better}}`` of a module with its own loop.
    """

    def __init__(
        self,
        baseline: Mapping[str, Mapping[str, float]] | str | Path | None,
        delta_p_metrics: Mapping[str, Mapping[str, bool]] | None,
    ) -> None:
        self.baseline = None if baseline is None else load_baseline(baseline)[0]
        self.delta_p_metrics = delta_p_metrics

    @staticmethod
    def reset(module: MultiTaskModule) -> None:
        """Reset all metrics: ``validate`` leaves inference tensors, which ``fit`` refuses."""
        for task in module.tasks.values():
            for stage in STAGES:
                task.stage(stage).reset()

    def losses(self, module: MultiTaskModule, batch: Any) -> dict[str, Any]:
        """Losses of the declared tasks in a batch ``(inputs, {task: target})``."""
        inputs, targets = _split(module, batch)
        return self._losses(module, module(inputs), targets)

    @staticmethod
    def _losses(
        module: MultiTaskModule, predictions: Any, targets: Mapping[str, Any]
    ) -> dict[str, Any]:
        if not isinstance(predictions, Mapping):
            raise TypeError(
                f"Expected `forward` to return a dict {{task: prediction}} but got "
                f"{type(predictions).__name__}."
            )
        losses: dict[str, Any] = {}
        for name in module.training_tasks:
            task = module.tasks[name]
            target = targets.get(task.target or name)
            if target is None:
                check_keys(module, name, targets)
                continue
            if name not in predictions:
                raise ValueError(
                    f"Expected a prediction of task '{name}' but `forward` returned "
                    f"{sorted(map(str, predictions))}. Add the key '{name}' to its dict."
                )
            count = None if task.count is None else task.count(target)
            if count == 0:
                continue
            loss = task.loss(predictions[name], target)
            losses[name] = loss if count is None else (loss, count)
        return losses

    def step(
        self, module: MultiTaskModule, batch: Any, batch_idx: int, stage: str, dataloader_idx: int
    ) -> None:
        """Log losses and metrics of one batch."""
        if dataloader_idx > 0:
            raise NotImplementedError(
                f"Expected one {stage} loader but found another: metrics would mix them. Join the "
                f"datasets, or override `{'validation' if stage == 'val' else stage}_step`."
            )
        if not module.tasks:
            losses = module.task_losses(batch, batch_idx)
            if not isinstance(losses, Mapping):
                raise TypeError(
                    f"Expected `task_losses` to return a dict {{task: loss}} but got "
                    f"{type(losses).__name__}."
                )
            for name, loss in losses.items():
                value, size = loss if isinstance(loss, tuple) else (loss, None)
                active = not module.training_tasks or name in module.training_tasks
                if active and value is not None and size != 0:
                    size = None if size is None else int(size)
                    module.log(f"{stage}/loss/{name}", value, batch_size=size, on_epoch=True)
            return
        inputs, targets = _split(module, batch)
        predictions = module(inputs)
        for name, loss in self._losses(module, predictions, targets).items():
            task = module.tasks[name]
            target = targets[task.target or name]
            value, size = loss if isinstance(loss, tuple) else (loss, _length(target))
            module.log(f"{stage}/loss/{name}", value, batch_size=int(size), on_epoch=True)
            for key, metric in task.stage(stage).items():
                metric.update(predictions[name].detach(), target)
                module.log(f"{stage}/{name}/{key}", metric, batch_size=int(size), on_epoch=True)

    def directions(self, module: MultiTaskModule) -> dict[str, dict[str, bool]]:
        """``{task: {logged name: higher is better}}`` with the names that validation logs."""
        if self.delta_p_metrics is not None:
            if module.task_names:
                known_tasks(list(self.delta_p_metrics), module.task_names, "`delta_p_metrics`")
            active = module.training_tasks or self.delta_p_metrics
            return {t: dict(names) for t, names in self.delta_p_metrics.items() if t in active}
        return {
            name: {f"val/{name}/{key}": up for key, up in task.directions(name).items()}
            for name, task in module.tasks.items()
            if name in module.training_tasks
        }

    def check_baseline(self, module: MultiTaskModule) -> None:
        """Refuse a baseline of other tasks or metrics before anything runs."""
        if self.baseline is None:
            return
        directions = self.directions(module)
        if not directions:
            raise ValueError(
                f"Expected `delta_p_metrics` beside `baseline` but found none: "
                f"{type(module).__name__} computes its own losses, so Δp has no metrics. Give "
                f"{{task: {{logged name: higher is better}}}}, or leave out `baseline`."
            )
        baseline = self._compared(module, directions)
        _check_names("task", directions, baseline)
        for task, names in directions.items():
            found = {metric_key(task, name): up for name, up in names.items()}
            _check_names(f"metric of task '{task}'", found, baseline[task])

    def _compared(
        self, module: MultiTaskModule, directions: Mapping[str, Any]
    ) -> dict[str, dict[str, float]]:
        """The baseline without the tasks that `active_tasks` leaves out."""
        assert self.baseline is not None
        declared = {*module.task_names, *(self.delta_p_metrics or ())}
        left_out = declared.difference(module.training_tasks or declared)
        return {t: m for t, m in self.baseline.items() if t in directions or t not in left_out}

    def log_delta_p(self, module: MultiTaskModule, stage: str) -> None:
        """Log ``<stage>/delta_p`` and ``<stage>/delta_p/<task>`` in percent."""
        if self.baseline is None or module.trainer.sanity_checking:
            return
        values: dict[str, dict[str, Any]] = {}
        ways: dict[str, dict[str, bool]] = {}
        logged = module.trainer.callback_metrics
        directions = self.directions(module)
        for task, names in directions.items():
            for name, up in names.items():
                short = metric_key(task, name)
                values.setdefault(task, {})[short] = self._value(module, task, name, stage, logged)
                ways.setdefault(task, {})[short] = up
        baseline = self._compared(module, directions)
        by_task = delta_p(values, baseline, ways)
        module.log(f"{stage}/delta_p", sum(by_task.values()) / len(by_task))
        for task, value in by_task.items():
            module.log(f"{stage}/delta_p/{task}", value)

    @staticmethod
    def _value(
        module: MultiTaskModule, task: str, name: str, stage: str, logged: Mapping[str, Tensor]
    ) -> Tensor:
        if module.tasks:
            metric: Any = module.tasks[task].stage(stage)[metric_key(task, name)]
            if metric.update_count == 0:
                raise ValueError(
                    f"Expected labels of task '{task}' in the {stage} data but its metric "
                    f"'{metric_key(task, name)}' saw none, so Δp is not defined. Add such data, or "
                    f"leave the task out with `active_tasks`."
                )
            value: Tensor = metric.compute()
            return value
        name = in_stage(name, stage)
        if name not in logged:
            raise ValueError(
                f"Expected the metric '{name}' of task '{task}' (from `delta_p_metrics`) among the "
                f"logged ones but found {sorted(logged)}. Log it with `self.log('{name}', ...)` "
                f"before the epoch ends, and call `super().on_validation_epoch_end()` last."
            )
        return logged[name]


def in_stage(name: str, stage: str) -> str:
    """What a metric logged as ``val...`` in validation is called in another stage."""
    return stage + name.removeprefix("val") if name.startswith(("val/", "val_")) else name


def metric_key(task: str, name: str) -> str:
    """The name of a metric in a baseline: without the stage and the task it is logged under."""
    for prefix in ("val/", "test/", f"{task}/"):
        name = name.removeprefix(prefix)
    return name


def _split(module: MultiTaskModule, batch: Any) -> tuple[Any, Mapping[str, Any]]:
    if not module.tasks:
        raise NotImplementedError(
            f"{type(module).__name__} declares no tasks and does not override `task_losses`. Pass "
            f"`tasks={{name: Task(loss, metrics)}}` to `super().__init__`, or override "
            f"`task_losses(self, batch, batch_idx)` to return {{task: loss}}."
        )
    if not (isinstance(batch, (tuple, list)) and len(batch) == 2 and isinstance(batch[1], Mapping)):
        raise TypeError(
            f"Expected a batch (inputs, {{task: target}}) but got {described(batch)}. Let the "
            f"dataset return `x, {{{', '.join(f'{key!r}: ...' for key in target_keys(module))}}}`, "
            f"or override `task_losses(self, batch, batch_idx)`."
        )
    return batch[0], batch[1]


def _length(target: Any) -> int:
    return len(target) if isinstance(target, Tensor) and target.ndim else 1
