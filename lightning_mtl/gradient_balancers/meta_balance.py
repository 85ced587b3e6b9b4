"""Auxiliary gradients brought near the size of a target task's gradient (MetaBalance)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

from lightning_mtl.arguments import in_range, one_of
from lightning_mtl.balancer import GradientBalancer, at_least_float32
from lightning_mtl.numerics.storage import combined

Strategy = Literal["both", "shrink", "enlarge"]


def meta_balance_factors(
    averages: Tensor, reference: Tensor, relax: float = 0.7, strategy: Strategy = "both"
) -> Tensor:
    r"""What the task gradients are multiplied by, tensor by tensor.

    .. math:: f_{tk} = r \, \frac{m_{0k}}{m_{tk}} + 1 - r

    Args:
        averages: :math:`m`, averages of the gradient norms of each task on each parameter tensor,
            shape ``(T, K)``, float32 or float64.
        reference: :math:`m_0`, those of the target task, shape ``(K,)``.
        relax: :math:`r`, in [0, 1].
        strategy: ``"shrink"`` leaves alone what is smaller than the target's, ``"enlarge"`` what is
            larger, ``"both"`` nothing.

    Returns:
        Factors of shape ``(T, K)`` in the dtype and on the device of ``averages``; 1 where the
        average is zero, as all gradients so far were.

    Example:
        >>> averages = torch.tensor([[1.0], [4.0], [0.5]])
        >>> meta_balance_factors(averages, averages[0], relax=0.5).flatten()
        tensor([1.0000, 0.6250, 1.5000])
    """
    # An average that has died away may be so small that the quotient overflows.
    quotients = (reference / averages).clamp(max=torch.finfo(averages.dtype).max)
    ratios = torch.where(averages > 0, quotients, 1.0)
    if strategy == "shrink":
        ratios = ratios.clamp(max=1.0)
    elif strategy == "enlarge":
        ratios = ratios.clamp(min=1.0)
    return 1.0 + relax * (ratios - 1.0)


class MetaBalance(GradientBalancer):
    r"""Bring the gradients of auxiliary tasks near the size of the target task's, tensor by tensor.

    .. math:: d_k = \sum_t \Big( r \, \frac{m_{0k}}{m_{tk}} + 1 - r \Big) \, g_{tk}, \qquad
              m_{tk} \leftarrow \beta \, m_{tk} + (1 - \beta) \, \lVert g_{tk} \rVert

    where :math:`g_{tk}` is the gradient of task :math:`t` by the parameter tensor :math:`k`, task 0
    is the target and :math:`m = 0` at first. The target's gradient stays as it is. With :math:`r =
    0` the direction is the plain sum. Each task's own parameters get their plain gradients.

    Deviations: a task whose gradient on a tensor has always been zero is left alone, where the
    formula divides by zero. So that tasks that are absent at times can be compared, each average is
    divided by :math:`1 - \beta^k`, with :math:`k` the steps that the task was there; with all tasks
    in every step that changes nothing. In a step without the target its latest averages hold;
    before its first step the others are summed.

    Args:
        target: the task that the others are to help, by its name or its place in the order of the
            tasks, counted from 0. By hand a place counts the rows of the call.
        strategy: ``"both"`` is what the authors' code does: gradients larger than the target's
            shrink and smaller ones grow. ``"shrink"`` and ``"enlarge"`` do one of the two.
        relax: relax factor :math:`r`, in [0, 1]: with 1 the average sizes become equal. The default
            is that of the authors' code.
        beta: :math:`\beta`, in [0, 1); the default of the authors' code.

    Raises:
        ValueError: an argument is out of range.

    References:
        He et al., *MetaBalance: Improving Multi-Task Recommendations via Adapting Gradient
        Magnitudes of Auxiliary Tasks*, WWW 2022.
    """

    averages: Tensor | None
    count: Tensor | None
    reference: Tensor | None

    def __init__(
        self,
        target: str | int = 0,
        strategy: Strategy = "both",
        relax: float = 0.7,
        beta: float = 0.9,
    ) -> None:
        super().__init__()
        if not (isinstance(target, str) or (type(target) is int and target >= 0)):
            raise ValueError(
                f"Expected `target` of MetaBalance to be a task's name or an integer of at least "
                f"0, found {target!r}."
            )
        self.target = target
        self.strategy: Strategy = one_of(self, "strategy", strategy, get_args(Strategy))
        self.relax = in_range(self, "relax", relax, 0.0, 1.0, open_high=False)
        self.beta = in_range(self, "beta", beta, 0.0, 1.0)
        self._name = target if isinstance(target, str) else None
        self.add_state("averages", 0.0, per_task=True, tensors=True)
        self.add_state("count", 0.0, per_task=True)
        self.add_state("reference", None, tensors=True)

    def check_tasks(self, tasks: Sequence[str]) -> None:
        """Find the target among all tasks of the run.

        Args:
            tasks: every task of the run, in order.

        Raises:
            ValueError: it is not there.
        """
        if isinstance(self.target, str):
            missing = self.target not in tasks
        else:
            missing = self.target >= len(tasks)
        if missing:
            raise ValueError(
                f"Expected `target` of MetaBalance to be one of the tasks {list(tasks)} or their "
                f"place, found {self.target!r}. Name the task that the others are to help."
            )
        self._name = self.target if isinstance(self.target, str) else tasks[self.target]

    def direction(self, jacobian: Tensor, losses: Tensor) -> Tensor:
        """Update the averages and add up the scaled gradients.

        Args:
            jacobian: shape ``(T, P)``; its tensors are those of :attr:`columns`, or one by hand.
            losses: not used.

        Returns:
            The direction, shape ``(P,)``, in the dtype and on the device of ``jacobian``.

        Raises:
            ValueError: the restored state belongs to other tasks or other shared parameters, or
                the target is none of the rows.
        """
        wide = at_least_float32(jacobian)
        columns = self.columns
        sizes = [wide.shape[1]] if columns is None else list(columns.sizes)
        parts = wide.split(sizes, dim=1)
        norms = self.tensor_norms(wide)
        averages = self.per_task_state("averages", norms, norms.shape[1:])
        count = self.per_task_state("count", norms)
        averages.mul_(self.beta).add_(norms, alpha=1 - self.beta)
        count += 1
        means = averages / (1 - self.beta**count)[:, None]
        row = self._target_row(len(norms))
        if row is not None:
            self.reference = means[row].clone()
        if self.reference is None:
            return wide.sum(0).to(jacobian.dtype)
        reference = self.reference.to(means)
        factors = meta_balance_factors(means, reference, self.relax, self.strategy)
        found = [combined(part, factors[:, k]) for k, part in enumerate(parts)]
        return torch.cat(found).to(jacobian.dtype)

    def _target_row(self, size: int) -> int | None:
        """Row of the target; ``None`` when it is absent from this step."""
        if self._name is not None and self.tasks:
            return self.tasks.index(self._name) if self._name in self.tasks else None
        if isinstance(self.target, int) and self.target < size:
            return self.target
        raise ValueError(
            f"Expected `target` of MetaBalance among {size} rows but found {self.target!r}. Used "
            f"by hand, give the number of its row; in a run, let MultiTaskModule tell the names."
        )
