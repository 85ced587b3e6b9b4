"""Validation and test of a MultiTaskModule: losses and metrics by task, and Δp."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor

from lightning_mtl.contract import TaskModule
from lightning_mtl.engine.batches import check_keys, described, say_none, say_whose, target_keys
from lightning_mtl.engine.losses import _with_count, as_count, known_tasks
from lightning_mtl.metrics.delta_p import _check_names, delta_p, load_baseline
from lightning_mtl.task import STAGES
from lightning_mtl.trainer.joined import (
    Means,
    agreed,
    alone,
    compute,
    log,
    means,
    of_all,
    state_of,
    widen,
)
from lightning_mtl.trainer.samples import samples, samples_of_batch


class Evaluation:
    """What a module does outside training.

    Args:
        baseline: single-task results, ``{task: {metric: value}}`` or a ``baseline.json``.
        delta_p_metrics: ``{task: {logged name: higher is better}}`` of a module with its own loop.
    """

    def __init__(
        self,
        baseline: Mapping[str, Mapping[str, Any]] | str | Path | None,
        delta_p_metrics: Mapping[str, Mapping[str, bool]] | None,
    ) -> None:
        self.baseline = None if baseline is None else load_baseline(baseline)[0]
        self.delta_p_metrics = delta_p_metrics
        self._needs_gradients = False
        self._told: set[str] = set()
        self.begin()

    def reset(self, module: TaskModule) -> None:
        """Reset all metrics: ``validate`` leaves inference tensors, which ``fit`` refuses."""
        self.begin()
        for task in module.tasks.values():
            for stage in STAGES:
                task.stage(stage).reset()

    def losses(self, module: TaskModule, batch: Any) -> dict[str, Any]:
        """Losses of the declared tasks in a batch ``(inputs, {task: target})``."""
        inputs, targets = _split(module, batch)
        return self._losses(module, module(inputs), targets)

    @staticmethod
    def _losses(module: TaskModule, predictions: Any, targets: Mapping[str, Any]) -> dict[str, Any]:
        if not isinstance(predictions, Mapping):
            example = ", ".join(f"{name!r}: ..." for name in module.training_tasks)
            raise TypeError(
                f"Expected `forward` to return a dict {{task: prediction}} but got "
                f"{described(predictions)}. Give every prediction its name: "
                f"`return {{{example}}}`."
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
            if as_count(count) == 0:
                continue
            try:
                loss = task.loss(predictions[name], target)
            except Exception as error:
                say_whose(error, "the loss", name, predictions[name], target)
                raise
            if loss is None:
                say_none(module, name)
                continue
            losses[name] = loss if count is None else (loss, count)
        return losses

    def total(self, module: TaskModule, batch: Any, batch_idx: int) -> Tensor | None:
        """The sum of the losses of a batch, for a ``training_step`` called in evaluation."""
        losses = self._with_gradients(lambda given: module.task_losses(given, batch_idx), batch)
        found = [torch.as_tensor(loss).detach() for _, loss, _ in _read(module, losses)]
        found = [v if v.dtype.itemsize >= 4 else v.float() for v in found]
        return sum(found[1:], found[0]) if found else None

    def begin(self) -> None:
        """Start an evaluation."""
        self._means = Means()
        self._measured: set[str] = set()  # tasks whose metrics have seen data
        self._values: dict[str, Any] = {}  # what was logged

    def step(
        self, module: TaskModule, batch: Any, batch_idx: int, stage: str, dataloader_idx: int
    ) -> None:
        """Measure losses and metrics of one batch."""
        if module._trainer is not None:  # a `test_step` that calls `validation_step` tests
            stage = "test" if module.trainer.testing else "val"
        if dataloader_idx > 0:
            raise NotImplementedError(
                f"Expected one {stage} loader but found another: metrics would mix them. Join the "
                f"datasets, or override `{'validation' if stage == 'val' else stage}_step`."
            )
        if not module.tasks:
            losses = self._with_gradients(lambda given: module.task_losses(given, batch_idx), batch)
            cure = "Return pairs (mean, number of valid labels) from `task_losses`."
            for name, loss, count in _read(module, losses):
                size = samples_of_batch(batch, cure) if count is None else count
                self._means.add(name, loss, size)
            return

        def measure(given: Any) -> tuple[Any, dict[str, Any]]:
            inputs, targets = _split(module, given)
            predictions = module(inputs)
            return predictions, self._losses(module, predictions, targets)

        predictions, losses = self._with_gradients(measure, batch)
        inputs, targets = _split(module, batch)
        for name, loss, count in _read(module, losses):
            task = module.tasks[name]
            target = targets[task.target or name]
            if count is None:
                where = f"the target of task '{name}'"
                count = samples(target, inputs, where, "Give the task `Task(count=...)`.")
            self._means.add(name, loss, count)
            if name not in self._measured:
                widen(task.stage(stage).values())
            self._measured.add(name)
            prediction = apply_to_collection(predictions[name], Tensor, Tensor.detach)
            for key, metric in task.stage(stage).items():
                try:
                    metric.update(prediction, target)
                except Exception as error:
                    say_whose(error, f"the metric `{key}`", name, prediction, target)
                    raise

    def _with_gradients(self, measure: Callable[[Any], Any], batch: Any) -> Any:
        """Measure without gradients, as Lightning evaluates; with them if a loss takes some."""
        if not self._needs_gradients:
            try:
                return measure(batch)
            except RuntimeError as error:
                if torch.is_grad_enabled() or "require grad" not in str(error):
                    raise
                self._needs_gradients = True  # for all batches that follow
        try:
            with torch.inference_mode(False), torch.enable_grad():
                return measure(apply_to_collection(batch, Tensor, _outside_inference))
        except RuntimeError as error:
            if "nference" not in str(error):
                raise
            raise RuntimeError(
                "Expected a loss to take gradients in evaluation but it meets tensors of inference "
                "mode that are not part of the batch. Use `Trainer(inference_mode=False)`."
            ) from error

    def end(self, module: TaskModule, stage: str) -> None:
        """Log what one process would have measured on the data of all."""
        trainer = module.trainer
        tasks = {name: module.tasks[name] for name in module.training_tasks if name in module.tasks}
        metrics = {
            name: {f"{stage}/{name}/{key}": m for key, m in task.stage(stage).items()}
            for name, task in tasks.items()
        }
        states: dict[str, Any] = {}
        if not alone(trainer):
            states = {n: state_of(m) for group in metrics.values() for n, m in group.items()}
        # One exchange, in which every process takes part whatever it has seen.
        found = of_all(trainer, (self._means.sums(), self._measured, states))
        measured = set().union(*(seen for _, seen, _ in found))
        losses = means([sums for sums, _, _ in found])
        dtype = torch.float64 if trainer.precision == "64-true" else torch.float32
        forget: dict[str, Callable[[], Any]] = {}

        def values() -> dict[str, Tensor]:
            made: dict[str, Tensor] = {}
            for name in dict.fromkeys([*tasks, *losses]):
                if name in losses:
                    made[f"{stage}/loss/{name}"] = torch.tensor(losses[name], dtype=dtype)
                if name in measured:  # in any process: without data there is nothing to log
                    for metric_name, metric in metrics[name].items():
                        given = [state.get(metric_name, []) for _, _, state in found]
                        numbers = dict(self._numbers(metric_name, compute(metric, given)))
                        made.update(numbers)
                        forget.update(dict.fromkeys(numbers, metric.reset))
            return made

        self._values = agreed(trainer, values)
        self._check_delta_p(module, stage)
        if not trainer.barebones:
            for name, value in self._values.items():
                log(module, name, value, forget.get(name))

    def _numbers(self, name: str, value: Any, *, inside: bool = False) -> Iterator[Any]:
        """``(name, number)`` of a metric's value; a dict has several."""
        if isinstance(value, Mapping):
            found = [
                n for k, v in value.items() for n in self._numbers(f"{name}/{k}", v, inside=True)
            ]
            if found or inside:
                yield from found
                return
        elif isinstance(value, (int, float)) or (isinstance(value, Tensor) and value.numel() == 1):
            yield name, torch.as_tensor(value).detach().cpu().reshape(())
            return
        if not inside:
            shape = f" of shape {tuple(value.shape)}" if isinstance(value, Tensor) else ""
            raise ValueError(
                f"Expected the metric `{name}` to be a number or a dict of numbers but got "
                f"{type(value).__name__}{shape}, which cannot be logged. Average it to one, for "
                f"example with average='macro'; torchmetrics' ClasswiseWrapper names the entries "
                f"of a vector."
            )
        if name not in self._told:
            self._told.add(name)
            rank_zero_info(f"`{name}` is not a number and is not logged.")

    def directions(self, module: TaskModule) -> dict[str, dict[str, bool]]:
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

    def check_baseline(self, module: TaskModule) -> None:
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
        self, module: TaskModule, directions: Mapping[str, Any]
    ) -> dict[str, dict[str, float]]:
        """The baseline without the tasks that `active_tasks` leaves out."""
        assert self.baseline is not None
        declared = {*module.task_names, *(self.delta_p_metrics or ())}
        left_out = declared.difference(module.training_tasks or declared)
        return {t: m for t, m in self.baseline.items() if t in directions or t not in left_out}

    def log_delta_p(self, module: TaskModule, stage: str) -> None:
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
                values.setdefault(task, {})[short] = self._value(task, name, stage, logged)
                ways.setdefault(task, {})[short] = up
        baseline = self._compared(module, directions)
        by_task = delta_p(values, baseline, ways)
        log(module, f"{stage}/delta_p", sum(by_task.values()) / len(by_task))
        for task, value in by_task.items():
            log(module, f"{stage}/delta_p/{task}", value)

    def _check_delta_p(self, module: TaskModule, stage: str) -> None:
        """Refuse a metric of several numbers in Δp: in the sanity check, before training."""
        if self.baseline is None:
            return
        for task, names in self.directions(module).items():
            for name in (in_stage(n, stage) for n in names):
                several = [n for n in self._values if n.startswith(f"{name}/")]
                if several and name not in self._values:
                    raise ValueError(
                        f"Expected one number of the metric '{name}' of task '{task}' for Δp but "
                        f"found {several}. Say with `delta_p_metrics` which of them count, and "
                        f"give the baseline their names, such as '{metric_key(task, several[0])}'."
                    )

    def _value(self, task: str, name: str, stage: str, logged: Mapping[str, Tensor]) -> Tensor:
        own = self.delta_p_metrics is None  # the names are those of declared metrics
        name = in_stage(name, stage)
        if name in self._values:
            value: Tensor = self._values[name]
            return value
        if own and (self._values or name not in logged):
            raise ValueError(
                f"Expected labels of task '{task}' in the {stage} data but its metric "
                f"'{metric_key(task, name)}' saw none, so Δp is not defined. Add such data, or "
                f"leave the task out with `active_tasks`."
            )
        if name not in logged:
            raise ValueError(
                f"Expected the metric '{name}' of task '{task}' (from `delta_p_metrics`) among the "
                f"logged ones but found {sorted(logged)}. Log it with `self.log('{name}', ...)` "
                f"before the epoch ends."
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


def _split(module: TaskModule, batch: Any) -> tuple[Any, Mapping[str, Any]]:
    if not module.tasks:
        raise NotImplementedError(
            f"{type(module).__name__} has no losses: it declares no tasks with theirs and does not "
            f"override `task_losses`. Pass "
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


def _read(module: TaskModule, losses: Any) -> Iterator[tuple[str, Any, float | None]]:
    """``(task, loss, number of labels if given)`` of the active tasks that are there."""
    if not isinstance(losses, Mapping):
        raise TypeError(
            f"Expected `task_losses` to return a dict {{task: loss}} but got "
            f"{type(losses).__name__}."
        )
    for name, loss in losses.items():
        value, count = _with_count(name, loss) if isinstance(loss, tuple) else (loss, None)
        active = not module.training_tasks or name in module.training_tasks
        if not active or value is None or count == 0:
            continue
        if isinstance(value, Tensor) and value.numel() != 1:
            raise ValueError(
                f"Expected the loss of task '{name}' to be a scalar but got shape "
                f"{tuple(value.shape)}. Reduce it, for example with `.mean()`."
            )
        yield name, value, count


def _outside_inference(tensor: Tensor) -> Tensor:
    """A tensor that autograd may keep."""
    return tensor.clone() if tensor.is_inference() else tensor
