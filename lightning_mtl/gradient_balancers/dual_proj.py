"""The vector nearest to the average gradient that conflicts with no task (DualProj)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import get_args

import numpy as np
from torch import Tensor

from lightning_mtl.arguments import PerTask, Scale, one_of, rescaled
from lightning_mtl.balancer import GradientBalancer, Level, as_weights
from lightning_mtl.numerics.quadratic import dual_cone_weights, gramian_array, shares


def dual_proj_weights(gramian: Tensor, preference: Sequence[float] | None = None) -> Tensor:
    r"""Weights of the projected average gradient.

    .. math:: d = \arg\min_{x \,:\, J x \ge 0} \Big\lVert x - \sum_t p_t \, g_t \Big\rVert^2

    Exact, by an active set.

    Args:
        gramian: :math:`J J^\top`, shape ``(T, T)``, any float dtype and device.
        preference: :math:`p` up to a factor, ``T`` numbers above 0; ``None`` for :math:`1 / T`.

    Returns:
        Weights of the task gradients in :math:`d`, at least :math:`p`, shape ``(T,)``, in the dtype
        and on the device of ``gramian``; NaN for input that is not finite.

    Raises:
        ValueError: ``gramian`` is not square.

    Example:
        >>> import torch
        >>> dual_proj_weights(torch.tensor([[1.0, -2.0], [-2.0, 8.0]]))
        tensor([1.0000, 0.5000])
    """
    matrix = gramian_array(gramian)
    if not np.isfinite(matrix).all():
        return as_weights(np.full(len(matrix), np.nan), gramian)
    return as_weights(dual_cone_weights(matrix, shares(preference, len(matrix))), gramian)


class DualProj(GradientBalancer):
    r"""Change the average gradient as little as it takes to conflict with no task.

    .. math:: d = \arg\min_{x \,:\, J x \ge 0} \Big\lVert x - \sum_t p_t \, g_t \Big\rVert^2,
              \qquad p_t = 1 / T

    :math:`d` does not increase any task to first order, and it is the average gradient where that
    conflicts with no task. A long gradient dominates the average, and a task that conflicts with
    it is then merely not made worse. A task without gradient takes no part. Each task's own
    parameters get their plain gradients.

    Deviations: the paper projects the gradient of the current task of continual learning onto the
    vectors that conflict with no earlier task; for tasks that are learned together the average
    takes its place, as in the TorchJD library. Solved exactly.

    Args:
        preference: numbers above 0, by task name (1 for tasks not named) or in order, that
            :math:`p` is proportional to, as in the TorchJD library; ``None`` for :math:`p_t = 1 /
            T`.
        scale: ``"mean"`` for the length of an average; ``"sum"`` for ``T`` times that.
        gradients: what the task gradients are taken by, see
            :class:`~lightning_mtl.GradientBalancer`.

    Raises:
        ValueError: an argument is out of range.

    References:
        Equation 11 of Lopez-Paz & Ranzato, *Gradient Episodic Memory for Continual Learning*,
        NeurIPS 2017. The name is that of the TorchJD library.
    """

    def __init__(
        self,
        preference: dict[str, float] | list[float] | None = None,
        scale: Scale = "mean",
        gradients: Level = "parameters",
    ) -> None:
        super().__init__(gradients=gradients)
        self.preference = preference
        self.scale: Scale = one_of(self, "scale", scale, get_args(Scale))
        self._per_task_preference = PerTask(self, "preference", preference)

    def weights(self, gramian: Tensor, losses: Tensor) -> Tensor:
        """See :func:`dual_proj_weights`.

        Args:
            gramian: shape ``(T, T)``, any float dtype and device.
            losses: not used.

        Returns:
            Weights of shape ``(T,)`` in the dtype and on the device of ``gramian``.
        """
        preference = self._per_task_preference.of(self.tasks, len(gramian))
        return rescaled(dual_proj_weights(gramian, preference), self.scale, "mean")
