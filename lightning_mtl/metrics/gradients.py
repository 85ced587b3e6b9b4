"""Norms, cosines and conflicts of task gradients, from their Gramian."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from lightning_mtl.metrics.plots import bars, heat_map


def gradient_norms(gramian: Tensor) -> Tensor:
    r"""Norms :math:`\lVert g_t \rVert = \sqrt{M_{tt}}`, shape ``(T,)``, at least in float32.

    Args:
        gramian: :math:`M = J J^\top`, shape ``(T, T)``.
    """
    dtype = torch.promote_types(gramian.dtype, torch.float32)
    return gramian.diagonal().to(dtype).sqrt()


def gradient_cosines(gramian: Tensor) -> Tensor:
    r"""Cosines :math:`M_{ij} / (\lVert g_i \rVert \lVert g_j \rVert)`, shape ``(T, T)``.

    At least in float32, in the dtype of the Gramian otherwise. A gradient that is zero or not
    finite has no direction: its row and column are NaN.

    Args:
        gramian: :math:`M = J J^\top`, shape ``(T, T)``.
    """
    norms = gradient_norms(gramian)
    norms = norms.where((norms > 0) & norms.isfinite(), torch.nan)
    return (gramian.to(norms.dtype) / torch.outer(norms, norms)).clamp(-1, 1)


def conflict_rate(gramian: Tensor) -> Tensor:
    """Share of task pairs whose gradients have a negative cosine, a scalar.

    Pairs with a gradient that has no direction are not counted; NaN when no pair is left.

    Args:
        gramian: inner products of the task gradients, shape ``(T, T)``.
    """
    conflicts, pairs = _count_conflicts(gramian)
    return conflicts / pairs


def _count_conflicts(gramian: Tensor) -> tuple[Tensor, Tensor]:
    cosines = gradient_cosines(gramian)
    above = torch.ones_like(cosines, dtype=torch.bool).triu(diagonal=1)
    return ((cosines < 0) & above).sum(), (~cosines.isnan() & above).sum()


class _GramianMetric(Metric):
    """A metric of the Gramian of named tasks, some of which can be absent from an update."""

    is_differentiable = False
    full_state_update = False

    def __init__(self, tasks: Sequence[str] | int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        names: tuple[Hashable, ...] = tuple(range(tasks) if isinstance(tasks, int) else tasks)
        if isinstance(tasks, str) or not names or len(set(names)) < len(names):
            raise ValueError(
                f"Expected argument `tasks` of {type(self).__name__} to be different task names or "
                f"their number but got {tasks!r}. Pass, for example, tasks=['segment', 'depth']."
            )
        self.task_names = names

    def _rows(self, gramian: Tensor, tasks: Sequence[Hashable] | None) -> list[int]:
        """Indices of the tasks of this update, after a check of the input."""
        present = self.task_names if tasks is None else tuple(tasks)
        unknown = [task for task in present if task not in self.task_names]
        if unknown or len(set(present)) < len(present):
            raise ValueError(
                f"Expected argument `tasks` of {type(self).__name__} to hold different names out "
                f"of {list(self.task_names)} but got {list(present)}. Name the task of each row of "
                f"the Gramian, or add the task in the constructor."
            )
        expected = (len(present), len(present))
        if tuple(gramian.shape) != expected:
            raise ValueError(
                f"Expected a Gramian of shape {expected} for the tasks {list(present)} but got "
                f"{tuple(gramian.shape)}. Pass J @ J.T; when tasks are absent, name those of its "
                f"rows: update(gramian, tasks=[...])."
            )
        return [self.task_names.index(task) for task in present]

    def update(self, gramian: Tensor, tasks: Sequence[str] | None = None) -> None:
        """Add one step.

        Args:
            gramian: inner products of the task gradients, shape ``(T, T)``, any float dtype.
            tasks: names of its rows when some tasks are absent.
        """
        self._add(self._rows(gramian, tasks), gramian)

    def _add(self, rows: list[int], gramian: Tensor) -> None:
        """Add the Gramian of these tasks."""
        raise NotImplementedError

    def plot(self, val: Tensor | Sequence[Tensor] | None = None, ax: Any = None) -> Any:
        """Draw the value; lines over steps when ``val`` is a sequence of results.

        Args:
            val: a result of ``compute`` or ``forward``, or several; by default ``compute()``.
            ax: axes to draw on.

        Returns:
            Figure and axes.
        """
        if isinstance(val, Sequence):
            lines: list[Any] = [self._lines(v) for v in val]
            return self._plot(lines, ax)
        return self._draw(self.compute() if val is None else val, ax)

    def _lines(self, value: Tensor) -> Tensor | dict[str, Tensor]:
        """A value as what is drawn over steps."""
        return value

    def _draw(self, value: Tensor, ax: Any) -> Any:
        """One value."""
        return self._plot(value, ax)


class GradientNorm(_GramianMetric):
    """Mean norm of every task's gradient, shape ``(T,)``; NaN for a task that was never present.

    States are float32, as in other torchmetrics metrics; ``set_dtype(torch.float64)`` changes that.
    Over ranks, sums and counts are added up. Of one task alone, torchmetrics makes a scalar.

    Args:
        tasks: task names, or their number.
        kwargs: options of :class:`torchmetrics.Metric`.

    Example:
        >>> import torch
        >>> from lightning_mtl.metrics import GradientNorm
        >>> jacobian = torch.tensor([[3.0, 4.0], [0.0, 2.0]])
        >>> norm = GradientNorm(["segment", "depth"])
        >>> norm(jacobian @ jacobian.T)
        tensor([5., 2.])
    """

    plot_lower_bound = 0.0
    norm_sum: Tensor
    count: Tensor

    def __init__(self, tasks: Sequence[str] | int, **kwargs: Any) -> None:
        super().__init__(tasks, **kwargs)
        size = len(self.task_names)
        self.add_state("norm_sum", torch.zeros(size), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros(size, dtype=torch.long), dist_reduce_fx="sum")

    def _add(self, rows: list[int], gramian: Tensor) -> None:
        self.norm_sum[rows] += gradient_norms(gramian).to(self.norm_sum)
        self.count[rows] += 1

    def compute(self) -> Tensor:
        """Mean norms over the steps in which each task was present."""
        return self.norm_sum / self.count

    def _lines(self, value: Tensor) -> dict[str, Tensor]:
        norms = value.reshape(len(self.task_names))
        return {str(name): norm for name, norm in zip(self.task_names, norms, strict=True)}

    def _draw(self, value: Tensor, ax: Any) -> Any:
        return bars(self._lines(value), ax, ylabel="mean gradient norm")


class GradientCosine(_GramianMetric):
    """Mean cosine between the gradients of every two tasks, shape ``(T, T)``.

    A pair counts in the steps in which both gradients are present and have a direction (neither
    zero nor infinite nor NaN); NaN for a pair, or a diagonal entry, that never did.

    Args:
        tasks: task names, or their number.
        kwargs: options of :class:`torchmetrics.Metric`.

    Example:
        >>> import torch
        >>> from lightning_mtl.metrics import GradientCosine
        >>> jacobian = torch.tensor([[3.0, 4.0], [0.0, -2.0]])
        >>> cosine = GradientCosine(["segment", "depth"])
        >>> cosine(jacobian @ jacobian.T)
        tensor([[ 1.0000, -0.8000],
                [-0.8000,  1.0000]])
    """

    plot_lower_bound = -1.0
    plot_upper_bound = 1.0
    cosine_sum: Tensor
    count: Tensor

    def __init__(self, tasks: Sequence[str] | int, **kwargs: Any) -> None:
        super().__init__(tasks, **kwargs)
        shape = (len(self.task_names), len(self.task_names))
        self.add_state("cosine_sum", torch.zeros(shape), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros(shape, dtype=torch.long), dist_reduce_fx="sum")

    def _add(self, rows: list[int], gramian: Tensor) -> None:
        index = torch.tensor(rows, device=self.cosine_sum.device)
        block = (index[:, None], index[None, :])
        cosines = gradient_cosines(gramian).to(self.cosine_sum)
        self.cosine_sum[block] += cosines.nan_to_num(nan=0.0)
        self.count[block] += ~cosines.isnan()

    def compute(self) -> Tensor:
        """Mean cosines, symmetric, with ones on the diagonal."""
        return self.cosine_sum / self.count

    def _lines(self, value: Tensor) -> dict[str, Tensor]:
        names = self.task_names
        matrix = value.reshape(len(names), len(names))
        return {
            f"{names[i]}-{names[j]}": matrix[i, j]
            for i in range(len(names))
            for j in range(i + 1, len(names))
        }

    def _draw(self, value: Tensor, ax: Any) -> Any:
        names = [str(name) for name in self.task_names]
        matrix = value.reshape(len(names), len(names))
        return heat_map(matrix, names, ax, label="gradient cosine")


class ConflictRate(_GramianMetric):
    """Share of task pairs with a negative cosine, over the pairs of all steps; NaN without any.

    Pairs of which a gradient is absent or has no direction are not counted.

    Args:
        tasks: task names, or their number.
        kwargs: options of :class:`torchmetrics.Metric`.

    Example:
        >>> import torch
        >>> from lightning_mtl.metrics import ConflictRate
        >>> rate = ConflictRate(2)
        >>> rate.update(torch.tensor([[6.0, -2.0], [-2.0, 5.25]]))
        >>> rate.update(torch.tensor([[6.0, 2.0], [2.0, 5.25]]))
        >>> rate.compute()
        tensor(0.5000)
    """

    higher_is_better = False
    plot_lower_bound = 0.0
    plot_upper_bound = 1.0
    conflicts: Tensor
    pairs: Tensor

    def __init__(self, tasks: Sequence[str] | int, **kwargs: Any) -> None:
        super().__init__(tasks, **kwargs)
        self.add_state("conflicts", torch.tensor(0), dist_reduce_fx="sum")
        self.add_state("pairs", torch.tensor(0), dist_reduce_fx="sum")

    def _add(self, rows: list[int], gramian: Tensor) -> None:
        conflicts, pairs = _count_conflicts(gramian)
        self.conflicts += conflicts.to(self.conflicts.device)
        self.pairs += pairs.to(self.pairs.device)

    def compute(self) -> Tensor:
        """Conflicting pairs over counted pairs."""
        return self.conflicts / self.pairs
