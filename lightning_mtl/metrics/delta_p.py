"""Δp: how much better or worse than single-task training, in percent."""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Mapping, Sequence
from numbers import Real
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torchmetrics import Metric

from lightning_mtl.metrics.plots import bars

Values: TypeAlias = Mapping[str, Mapping[str, Any]]
Directions: TypeAlias = Mapping[str, Mapping[str, bool]]

FORMAT = 1


def delta_p(values: Values, baseline: Values, higher_is_better: Directions) -> dict[str, float]:
    r"""Relative improvement of every task over its single-task baseline, in percent.

    .. math::
        \Delta_{p,t} = \frac{100}{N_t} \sum_{i=1}^{N_t} (-1)^{s_{t,i}}
        \frac{M_{t,i} - B_{t,i}}{\lvert B_{t,i} \rvert}, \qquad
        \Delta_p = \frac{1}{T} \sum_{t=1}^T \Delta_{p,t}

    with :math:`s = 0` when higher is better. :math:`\Delta_p` is a mean over tasks of means over
    each task's metrics, so a task with many metrics weighs no more than another. The absolute
    value in the denominator is ours: without it the sign turns over for a metric whose baseline is
    negative.

    Args:
        values: metrics :math:`M` of the run, ``{task: {metric: value}}``.
        baseline: metrics :math:`B` of the single-task runs, same tasks and metrics.
        higher_is_better: the direction of every metric in the baseline.

    Returns:
        :math:`\Delta_{p,t}` as ``{task: percent}``; :math:`\Delta_p` is their mean.

    Raises:
        ValueError: values of other tasks or metrics than the baseline; a metric without direction;
            a baseline that is zero or not finite.

    Example:
        >>> from lightning_mtl.metrics import delta_p
        >>> lower = {"depth": {"error": False}}
        >>> delta_p({"depth": {"error": 0.75}}, {"depth": {"error": 1.0}}, lower)
        {'depth': 25.0}

    Reference: Maninis et al., CVPR 2019; equations 3 and 4 of Lin et al., arXiv:2308.12029.
    """
    _check_baseline(baseline, higher_is_better)
    _check_names("task", values, baseline)
    by_task: dict[str, float] = {}
    for task, base in baseline.items():
        _check_names(f"metric of task '{task}'", values[task], base)
        differences = []
        for metric, reference in base.items():
            b = _number(reference, task, metric)
            difference = (_number(values[task][metric], task, metric) - b) / abs(b)
            differences.append(difference if higher_is_better[task][metric] else -difference)
        by_task[task] = 100 * sum(differences) / len(differences)
    return by_task


def load_baseline(
    source: Values | str | Path,
) -> tuple[dict[str, dict[str, float]], dict[str, dict[str, bool]]]:
    """Baseline values, and the directions that came with them, from a dict or a file.

    Args:
        source: the path of the ``baseline.json`` that ``lightning-mtl compare`` writes, its
            content, or ``{task: {metric: value}}``, in which a value can also be
            ``{"value": 0.94, "higher_is_better": True}``.

    Returns:
        ``{task: {metric: value}}`` and ``{task: {metric: higher is better}}``; the second lacks
        what the source does not say.

    Raises:
        FileNotFoundError: no such file.
        TypeError: neither a dict nor a path.
        ValueError: not JSON, of another format, or not a baseline.

    Example:
        >>> from lightning_mtl.metrics import load_baseline
        >>> load_baseline({"depth": {"error": {"value": 0.5, "higher_is_better": False}}})
        ({'depth': {'error': 0.5}}, {'depth': {'error': False}})
    """
    if isinstance(source, Mapping):
        content: Any = source
        origin = "the baseline"
        has_format = isinstance(source.get("format"), (int, str))  # else a task of that name
    elif not isinstance(source, str | Path):
        raise TypeError(
            f"Expected a baseline {{task: {{metric: value}}}}, or the path of a `baseline.json`, "
            f"but got {type(source).__name__}. Give each value the names of its task and metric."
        )
    else:
        content = _read(Path(source))
        origin = f"the baseline file {source}"
        has_format = True
    if has_format:
        found = content.get("format") if isinstance(content, Mapping) else _shorten(content)
        if found != FORMAT:
            raise ValueError(
                f'Expected {origin} to say `"format": {FORMAT}` but found {found!r}. Write it with '
                f"`lightning-mtl compare` of this version, or give the values as a dict "
                f"{{task: {{metric: value}}}}."
            )
        content = content.get("tasks")
    if not isinstance(content, Mapping) or not all(
        isinstance(metrics, Mapping) and metrics for metrics in content.values()
    ):
        raise ValueError(
            f"Expected {origin} to give every task its metrics, {{task: {{metric: value}}}}, but "
            f"found {_shorten(content)}. Give each task at least one metric."
        )
    values: dict[str, dict[str, float]] = {}
    directions: dict[str, dict[str, bool]] = {}
    for task, metrics in content.items():
        values[task], directions[task] = {}, {}
        for metric, entry in metrics.items():
            value = entry
            if isinstance(entry, Mapping):
                value = entry.get("value")
                if entry.get("higher_is_better") is not None:
                    directions[task][metric] = entry["higher_is_better"]
            values[task][metric] = _number(value, task, metric)
    return values, directions


class DeltaP(Metric):
    """Relative improvement over single-task baselines in percent; several updates are averaged.

    One update is one run (or one evaluation), so the result over seeds is the mean of each seed's
    Δp, as in the literature. ``compute`` returns ``{"delta_p": ..., "delta_p/<task>": ...}``.
    :func:`~lightning_mtl.metrics.delta_p` has the equation. The average is kept in float32, as in
    other torchmetrics metrics; ``set_dtype(torch.float64)`` changes that.

    Args:
        baseline: metrics of the single-task runs, ``{task: {metric: value}}``, or the path of the
            ``baseline.json`` that ``lightning-mtl compare`` writes.
        higher_is_better: the direction of every metric, ``{task: {metric: bool}}``; goes before
            what a baseline file says and is not needed beside one.
        kwargs: options of :class:`torchmetrics.Metric`.

    Raises:
        ValueError: a metric without direction; a baseline that is zero or not finite.

    Example:
        >>> from lightning_mtl.metrics import DeltaP
        >>> metric = DeltaP(
        ...     baseline={"classify": {"accuracy": 0.80}, "depth": {"error": 0.50}},
        ...     higher_is_better={"classify": {"accuracy": True}, "depth": {"error": False}},
        ... )
        >>> metric.update({"classify": {"accuracy": 0.84}, "depth": {"error": 0.45}})
        >>> {name: round(value.item(), 3) for name, value in metric.compute().items()}
        {'delta_p': 7.5, 'delta_p/classify': 5.0, 'delta_p/depth': 10.0}
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False
    delta_sum: Tensor
    count: Tensor

    def __init__(
        self,
        baseline: Values | str | Path,
        higher_is_better: Directions | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.baseline, self.directions = load_baseline(baseline)
        for task, metrics in (higher_is_better or {}).items():
            self.directions[task] = {**self.directions.get(task, {}), **metrics}
        _check_baseline(self.baseline, self.directions)
        self.add_state("delta_sum", torch.zeros(len(self.baseline)), dist_reduce_fx="sum")
        self.add_state("count", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, values: Values) -> None:
        """Add one run.

        Args:
            values: its metrics, ``{task: {metric: number or scalar tensor}}``, already reduced
                over ranks.
        """
        by_task = delta_p(values, self.baseline, self.directions)
        self.delta_sum += self.delta_sum.new_tensor([by_task[task] for task in self.baseline])
        self.count += 1

    def compute(self) -> dict[str, Tensor]:
        """The mean over tasks and the value of each task, averaged over the updates."""
        by_task = self.delta_sum / self.count
        names = (f"delta_p/{task}" for task in self.baseline)
        return {"delta_p": by_task.mean(), **dict(zip(names, by_task, strict=True))}

    def plot(
        self,
        val: Mapping[str, Tensor] | Sequence[Mapping[str, Tensor]] | None = None,
        ax: Any = None,
    ) -> Any:
        """Bars by task and of their mean; lines over steps when ``val`` is a sequence of results.

        Args:
            val: a result of ``compute`` or ``forward``, or several; by default ``compute()``.
            ax: axes to draw on.

        Returns:
            Figure and axes.
        """
        if isinstance(val, Sequence):
            return self._plot([dict(v) for v in val], ax)
        result = dict(self.compute() if val is None else val)
        mean = result.pop("delta_p")
        by_task = {name.removeprefix("delta_p/"): value for name, value in result.items()}
        return bars({**by_task, "Δp": mean}, ax, ylabel="Δp (%)", signed=True)


def _check_baseline(baseline: Values, higher_is_better: Directions) -> None:
    """Every baseline value can be a denominator and has a direction."""
    if not baseline:
        raise ValueError(
            "Expected a baseline with at least one task but found none. "
            "Give {task: {metric: value}}."
        )
    for task, metrics in baseline.items():
        for metric, value in metrics.items():
            direction = higher_is_better.get(task, {}).get(metric)
            if not isinstance(direction, bool):
                raise ValueError(
                    f"Expected a direction for metric `{metric}` of task '{task}' but found "
                    f"{direction}: without it Δp has no sign. Say whether higher is better, with "
                    f"higher_is_better={{'{task}': {{'{metric}': True}}}} or False."
                )
            number = _number(value, task, metric)
            if number == 0 or not math.isfinite(number):
                raise ValueError(
                    f"Expected a finite baseline other than 0 for metric `{metric}` of task "
                    f"'{task}' but found {number}: no difference can be relative to it. Train that "
                    f"baseline again, or leave the metric out of Δp."
                )


def _check_names(what: str, found: Mapping[str, Any], baseline: Mapping[str, Any]) -> None:
    if set(found) == set(baseline):
        return
    unknown = [name for name in baseline if name not in found]
    missing = [name for name in found if name not in baseline]
    near = difflib.get_close_matches(unknown[0], missing, 1) if unknown else []
    hint = f" Is '{unknown[0]}' of the baseline meant as '{near[0]}'?" if near else ""
    raise ValueError(
        f"Expected a baseline with every {what} of this run, {list(found)}, and no other, but it "
        f"has {list(baseline)}: unknown here {unknown}, missing in the baseline {missing}.{hint} "
        f"Use a baseline of the same tasks and metrics, or leave out on both sides what should "
        f"not count."
    )


def _number(value: Any, task: str, metric: str) -> float:
    if isinstance(value, Tensor) and value.numel() == 1:
        return float(value)
    if isinstance(value, Real) and not isinstance(value, bool):
        return float(value)
    found = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)
    raise ValueError(
        f"Expected metric `{metric}` of task '{task}' to be one number but found {found}. "
        f"Average it first, for example with average='macro'."
    )


def _read(path: Path) -> Any:
    if not path.is_file():
        found = "a folder" if path.is_dir() else "nothing"
        raise FileNotFoundError(
            f"Expected a baseline file at {path} but found {found} there. `lightning-mtl compare` "
            f"writes it as baseline.json in its output folder; a dict {{task: {{metric: value}}}} "
            f"will do too."
        )
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(
            f"Expected the baseline file {path} to be JSON but found something else ({error}). "
            f"Write it again with `lightning-mtl compare`, or correct it by hand."
        ) from error


def _shorten(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 100 else text[:97] + "..."
