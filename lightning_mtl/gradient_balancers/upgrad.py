"""The average of the task gradients, each projected so that it conflicts with none (UPGrad)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import get_args

import numpy as np
from torch import Tensor

from lightning_mtl.arguments import PerTask, Scale, one_of, rescaled
from lightning_mtl.balancer import GradientBalancer, Level, as_weights
from lightning_mtl.numerics.quadratic import dual_cone_weights, gramian_array, shares


def upgrad_weights(gramian: Tensor, preference: Sequence[float] | None = None) -> Tensor:
    r"""Weights of the average of the projected task gradients.

    .. math:: d = \sum_t p_t \, \pi(g_t), \qquad
              \pi(g) = \arg\min_{x \,:\, J x \ge 0} \lVert x - g \rVert^2

    Exact, by one quadratic program for each task that conflicts with another.

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
        >>> upgrad_weights(torch.tensor([[1.0, -1.0], [-1.0, 4.0]]))
        tensor([1.0000, 0.6250])
    """
    matrix = gramian_array(gramian)
    if not np.isfinite(matrix).all():
        return as_weights(np.full(len(matrix), np.nan), gramian)
    rows = np.diag(shares(preference, len(matrix)))
    return as_weights(dual_cone_weights(matrix, rows).sum(0), gramian)


class UPGrad(GradientBalancer):
    r"""Project every task gradient onto the vectors that conflict with no task, then average.

    .. math:: d = \sum_t p_t \, \pi(g_t), \qquad
              \pi(g) = \arg\min_{x \,:\, J x \ge 0} \lVert x - g \rVert^2, \qquad p_t = 1 / T

    :math:`d` does not increase any task to first order. It is the average gradient where no two
    task gradients conflict, and it grows in proportion to every task gradient as long as the
    others do not change. A task without gradient takes no part in the conflicts. Each task's own
    parameters get their plain gradients.

    Deviations: solved exactly, without the paper's code's :math:`10^{-4}` on the diagonal, which
    changes the weights by as much, and without its threshold below which small gradients are
    averaged with all their conflicts.

    Args:
        preference: numbers above 0, by task name (1 for tasks not named) or in order, that
            :math:`p` is proportional to; ``None`` for :math:`p_t = 1 / T`. It enters as in the
            paper's code, the TorchJD library: the gradient of task ``t`` is multiplied by
            :math:`p_t` before its projection.
        scale: ``"mean"`` for the paper's length, that of an average; ``"sum"`` for ``T`` times
            that.
        gradients: what the task gradients are taken by, see
            :class:`~lightning_mtl.GradientBalancer`.

    Raises:
        ValueError: an argument is out of range.

    References:
        Quinton & Rey, *Jacobian Descent for Multi-Objective Optimization*, arXiv 2406.16232.
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
        """See :func:`upgrad_weights`.

        Args:
            gramian: shape ``(T, T)``, any float dtype and device.
            losses: not used.

        Returns:
            Weights of shape ``(T,)`` in the dtype and on the device of ``gramian``.
        """
        preference = self._per_task_preference.of(self.tasks, len(gramian))
        return rescaled(upgrad_weights(gramian, preference), self.scale, "mean")
