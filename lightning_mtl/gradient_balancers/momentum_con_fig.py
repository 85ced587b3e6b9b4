"""A conflict-free direction from the momenta of the tasks, one task gradient a step (M-ConFIG)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from lightning_mtl.arguments import in_range, whole
from lightning_mtl.balancer import GradientBalancer, at_least_float32
from lightning_mtl.numerics import inner
from lightning_mtl.numerics.bisector import with_projections
from lightning_mtl.numerics.quadratic import Array, resolution, to_numpy, unit_gramian, unit_of
from lightning_mtl.numerics.storage import combined


def implied_gradient(smoothed: Tensor, before: Tensor, beta: float = 0.9) -> Tensor:
    r"""The gradient that moves a running mean from one value to the next.

    .. math:: g = \frac{m_k - \beta \, m_{k-1}}{1 - \beta}
              \qquad \text{so that} \qquad m_k = \beta \, m_{k-1} + (1 - \beta) \, g

    Args:
        smoothed: the running mean :math:`m_k`, any shape, float dtype and device.
        before: :math:`m_{k-1}`, of the same shape.
        beta: :math:`\beta`, in [0, 1).

    Returns:
        Of the shape, dtype and device of ``smoothed``.

    Example:
        >>> implied_gradient(torch.tensor([1.0, 3.0]), torch.tensor([1.0, 1.0]), beta=0.5)
        tensor([1., 5.])
    """
    return (smoothed - beta * before) / (1 - beta)


class MomentumConFIG(GradientBalancer):
    r"""Go where the momenta of all tasks point, with one new task gradient a step.

    .. math:: m_t \leftarrow \beta_1 m_t + (1 - \beta_1) g_t \quad \text{for the task whose turn it
              is}, \qquad \hat g = \mathcal G(\hat m_1, \dots, \hat m_T), \qquad
              d = \frac{\hat g}{\sqrt{\hat v} + \varepsilon}

    :math:`\hat m_t = m_t / (1 - \beta_1^{k_t})` after :math:`k_t` turns of task :math:`t`;
    :math:`\mathcal G` is ConFIG, the direction of equal cosine with every :math:`\hat m_t`, as long
    as the sum of their projections on it. :math:`v` is one second moment for all tasks: that of the
    gradient from which the moment :math:`(1 - \beta_1^k) \, \hat g` would have come,
    :func:`implied_gradient`, with :math:`\hat v = v / (1 - \beta_2^k)`. With one task this is Adam.

    **Turns.** In a step it is the turn of the task, of those that are there, that has waited most
    steps in which it was there. Tasks that have not had a turn go first, of two that had theirs in
    one step the first remains first, and equals go by the number of their turns, then in order.
    With all tasks in every step that is 1, 2, ..., T, 1, 2, ..., however many turns a step has: of
    three tasks with two turns (1, 2), (3, 1), (2, 3). A task that is away keeps its momentum and
    its place in the queue. Until every task of the step has had a turn the direction is zero, so
    with one turn a step the shared parameters rest in the first :math:`T - 1` steps. Each task's
    own parameters get their plain gradients in every step.

    **Optimizer.** The direction has the length of an Adam step over the learning rate. Train the
    shared parameters with ``torch.optim.SGD`` without momentum, as the authors advise, and without
    gradient clipping; Adam would normalise them twice. It keeps a number for every element of the
    Jacobian, and two for every shared parameter.

    Deviations: none known from the authors' code, which was read where the paper is silent: the
    zero direction at the start, and :math:`k`, which counts from the first step that is not zero.
    Momenta that are linearly dependent go through the pseudoinverse, as in ConFIG; momenta that
    only cancel one another give a zero direction, and a zero momentum takes no part.

    Args:
        beta1: of the first moments, in [0, 1). All defaults are those of the authors' code.
        beta2: of the second moment, in [0, 1).
        eps: :math:`\varepsilon`, at least 0.
        rows_per_step: how many tasks have their turn in a step, at least 1. More make the momenta
            fresher when there are many tasks; each costs a trunk backward pass.

    Raises:
        ValueError: an argument is out of range.

    References:
        Liu, Chu & Thuerey, *ConFIG: Towards Conflict-free Training of Physics Informed Neural
        Networks*, ICLR 2025, arXiv 2408.11104, Algorithm 1.
    """

    average: Tensor | None
    turns: Tensor | None
    second: Tensor | None
    smoothed: Tensor | None
    step: Tensor
    unit: float

    def __init__(
        self,
        beta1: float = 0.9,
        beta2: float = 0.999,
        eps: float = 1e-8,
        rows_per_step: int = 1,
    ) -> None:
        super().__init__()
        self.beta1 = in_range(self, "beta1", beta1, 0.0, 1.0)
        self.beta2 = in_range(self, "beta2", beta2, 0.0, 1.0)
        self.eps = in_range(self, "eps", eps)
        self.rows_per_step = whole(self, "rows_per_step", rows_per_step)
        self.add_state("average", 0.0, per_task=True, columns=True)
        # How many it had; steps since the last, and by a fraction its place among those of a step.
        self.add_state("turns", 0.0, per_task=True)
        self.add_state("second", None, columns=True)
        self.add_state("smoothed", None, columns=True)
        self.add_state("step", torch.zeros((), dtype=torch.int64))
        self.add_state("unit", 0.0)  # of the second moment, once there is one

    def wanted(self, present: int) -> Sequence[int]:
        """Rows of the tasks whose turn it is, ascending. Changes nothing.

        Args:
            present: number of tasks that are there.

        Raises:
            ValueError: the state belongs to other tasks.
        """
        return sorted(self._queue(present))

    def _queue(self, present: int) -> list[int]:
        """Rows of the tasks whose turn it is, in the order in which they have waited for it."""
        if self.turns is None:
            return list(range(min(self.rows_per_step, present)))
        if len(self.turns) != present:
            raise self._other_run("turns", (present, 2), self.turns)
        turns = enumerate(self.turns.tolist())
        queue = sorted((had > 0, -waits, had, t) for t, (had, waits) in turns)
        return [t for *_, t in queue[: self.rows_per_step]]

    def direction(self, jacobian: Tensor, losses: Tensor) -> Tensor:
        """Update the momenta of the tasks whose turn it is and combine all of them.

        Args:
            jacobian: shape ``(T, P)``, any float dtype; only the rows :meth:`wanted` are read.
            losses: not used.

        Returns:
            The direction, shape ``(P,)``, in the dtype and on the device of ``jacobian``.

        Raises:
            ValueError: the restored state belongs to other tasks or other shared parameters.
        """
        like = at_least_float32(jacobian[:, :1])
        average = self.per_task_state("average", like, jacobian.shape[1:])
        turns = self.per_task_state("turns", like, (2,))
        chosen = self._queue(len(jacobian))
        turns[:, 1] += 1
        for place, t in enumerate(chosen):
            average[t].mul_(self.beta1).add_(jacobian[t], alpha=1 - self.beta1)
            turns[t, 0] += 1
            turns[t, 1] = 1 - (place + 1) / len(chosen)
        had = to_numpy(turns[:, 0])
        if not had.all():
            return torch.zeros_like(jacobian[0])

        self.step += 1
        k = int(self.step)
        correction = 1 / (1 - self.beta1**had)
        gramian = self.sum_shards(inner.gramian(average))
        matrix = to_numpy(gramian) * np.outer(correction, correction)
        weights = _conflict_free(matrix, resolution(gramian.dtype)) * correction
        common = combined(average, torch.from_numpy(weights))
        smoothed = common * (1 - self.beta1**k)
        if self.unit == 0:
            square = float(weights @ to_numpy(gramian) @ weights)
            self.unit = unit_of(math.sqrt(max(square, 0.0)))
        estimate = implied_gradient(smoothed, self._shared("smoothed", smoothed), self.beta1)
        estimate /= self.unit
        second = self._shared("second", smoothed)
        self.second = second.mul_(self.beta2).addcmul_(estimate, estimate, value=1 - self.beta2)
        self.smoothed = smoothed
        length = (second / (1 - self.beta2**k)).sqrt_().add_(self.eps / self.unit)
        # A square beyond the range of its dtype would make the step zero without a word.
        length += length - length
        return torch.where(length == 0, 0.0, common / self.unit / length).to(jacobian.dtype)

    def _shared(self, name: str, like: Tensor) -> Tensor:
        state = self.column_state(name)
        return torch.zeros_like(like) if state is None else state.to(like)


def _conflict_free(gramian: Array, resolution: float) -> Array:
    """Weights of ConFIG: equal cosines with every row, as long as the sum of the projections."""
    size = len(gramian)
    if not np.isfinite(gramian).all():
        return np.full(size, np.nan)
    cosines, norms = unit_gramian(gramian)
    solution = with_projections(cosines, np.ones(size), resolution)
    projections = cosines @ solution
    square = solution @ projections
    if square <= size * size * resolution:  # the rows only cancel one another
        return np.zeros(size)
    return np.asarray(norms @ projections / square * solution / np.where(norms == 0, 1.0, norms))
