"""A task: its loss, its metrics, and where its target is."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import nn
from torchmetrics import Metric, MetricCollection
from torchmetrics.wrappers import MetricTracker

STAGES = ("val", "test")

Metrics = Metric | MetricCollection | Sequence[Metric] | Mapping[str, Metric] | None


class Task(nn.Module):
    """One task of a :class:`~lightning_mtl.MultiTaskModule`.

    Args:
        loss: ``loss(prediction, target)`` returns a scalar: the mean over the valid labels.
        metrics: a torchmetrics metric, several of them, or a dict that names them. They are
            updated with ``(prediction, target)`` in validation and test; a value that is a dict of
            numbers is logged entry by entry. Their ``higher_is_better`` gives Δp its sign.
        target: the key of this task's target in the batch; by default the task's own name.
        count: ``count(target)`` returns the number of valid labels in a batch. Give it when labels
            are missing: a batch with none leaves the task out, and means over micro-batches, and
            over the batches of validation and test, are then weighted by valid labels. Without it
            the latter are weighted by samples.
        balance: whether a gradient balancer takes part in this task's gradients. ``False`` adds
            them as they are, and the balancer sees the other tasks only.

    Example:
        >>> import torch
        >>> from torchmetrics.classification import MulticlassAccuracy
        >>> task = Task(torch.nn.CrossEntropyLoss(), MulticlassAccuracy(num_classes=3))
        >>> task.directions()
        {'MulticlassAccuracy': True}
    """

    def __init__(
        self,
        loss: nn.Module | Callable[[Any, Any], Any],  # in YAML a class, or any function by its path
        metrics: Metrics = None,
        *,
        target: str | None = None,
        count: Callable[[Any], Any] | None = None,
        balance: bool = True,
    ) -> None:
        super().__init__()
        if not callable(loss):
            raise TypeError(
                f"Expected argument `loss` to be callable as loss(prediction, target) but got "
                f"{type(loss).__name__}. Pass a loss module such as nn.MSELoss() or a function."
            )
        if isinstance(loss, type) and issubclass(loss, nn.Module):
            raise TypeError(
                f"Expected argument `loss` to be an object but got the class {loss.__name__}. Make "
                f"one: Task({loss.__name__}(...))."
            )
        self.loss: nn.Module | Callable[[Any, Any], Any] = loss
        self.target = target
        self.count = count
        self.balance = balance
        collection = _collection(metrics)
        self.metrics = nn.ModuleDict({stage: collection.clone() for stage in STAGES})

    def stage(self, stage: str) -> MetricCollection:
        """The metrics of ``"val"`` or ``"test"``."""
        metrics = self.metrics[stage]
        assert isinstance(metrics, MetricCollection)
        return metrics

    def directions(self, task: str | None = None) -> dict[str, bool]:
        """``{metric name: higher is better}``.

        Args:
            task: the name of this task, for the message.

        Raises:
            ValueError: a metric does not say which way is better.
        """
        found = {}
        for name, metric in self.stage("val").items():
            if metric.higher_is_better is None:
                whose = "" if task is None else f" of task '{task}'"
                raise ValueError(
                    f"Metric `{name}`{whose} does not say whether higher is better, so Δp has no "
                    f"sign for it. Set its class attribute `higher_is_better` to True or False, or "
                    f"name the metrics that count in `delta_p_metrics`."
                )
            found[str(name)] = bool(metric.higher_is_better)
        return found


def _collection(metrics: Metrics) -> MetricCollection:
    if isinstance(metrics, MetricCollection):
        return metrics
    if isinstance(metrics, MetricTracker):
        raise TypeError(
            "Expected argument `metrics` to be metrics but got a MetricTracker. Give the metric "
            "that it tracks: loggers keep the value of every epoch, and ModelCheckpoint the best."
        )
    if metrics is None:
        metrics = {}
    elif isinstance(metrics, Metric):
        metrics = [metrics]
    several: Any = metrics if isinstance(metrics, Mapping | list | tuple) else [metrics]
    for metric in several.values() if isinstance(several, Mapping) else several:
        if not isinstance(metric, Metric | MetricCollection):
            found, cure = repr(metric), "Pass MeanSquaredError(), say."
            if isinstance(metric, type):
                found, cure = f"the class {metric.__name__}", f"Make one: {metric.__name__}(...)."
            raise TypeError(
                f"Expected argument `metrics` to hold objects of torchmetrics but got {found}. "
                f"{cure}"
            )
    # Lightning logs and resets each metric by itself, which compute groups would not survive.
    return MetricCollection(
        dict(metrics) if isinstance(metrics, Mapping) else list(metrics), compute_groups=False
    )
