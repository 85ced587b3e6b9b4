"""The direction with the same relative decrease for every task (EDM)."""

from __future__ import annotations

from typing import get_args

import numpy as np
from torch import Tensor

from lightning_mtl.arguments import Scale, one_of, rescaled
from lightning_mtl.balancer import GradientBalancer, Level, as_weights
from lightning_mtl.numerics.quadratic import gramian_array, min_norm_of_rays, unit_gramian


def central_direction_weights(gramian: Tensor) -> Tensor:
    r"""Weights of the central direction.

    .. math:: k = \arg\min_{k \ge 0, \sum_t k_t = 1}
              \Big\lVert \sum_t k_t \, g_t / d_t \Big\rVert^2, \qquad
              w_t = \frac{k_t / d_t}{\sum_s k_s / d_s}, \qquad d_t = \lVert g_t \rVert

    Args:
        gramian: :math:`J J^\top`, shape ``(T, T)``, any float dtype and device.

    Returns:
        Weights of shape ``(T,)`` and sum one, in the dtype and on the device of ``gramian``. Zero
        for tasks without gradient; equal weights if all gradients are zero; NaN for input that is
        not finite.

    Raises:
        ValueError: ``gramian`` is not square.

    Example:
        >>> import torch
        >>> central_direction_weights(torch.tensor([[1.0, 0.0], [0.0, 9.0]]))
        tensor([0.7500, 0.2500])
    """
    matrix = gramian_array(gramian)
    size = len(matrix)
    if not np.isfinite(matrix).all():
        return as_weights(np.full(size, np.nan), gramian)
    cosines, norms = unit_gramian(matrix)
    nonzero = np.flatnonzero(norms)
    if not len(nonzero):
        return as_weights(np.full(size, 1.0 / size), gramian)
    if len(nonzero) < size:
        cosines, norms = cosines[nonzero[:, None], nonzero], norms[nonzero]
    a = norms.min() / norms
    # Of two unit vectors the shortest combination is the middle.
    shares = a if len(a) <= 2 else a * min_norm_of_rays(cosines, np.ones(len(a)))
    weights = np.zeros(size)
    weights[nonzero] = shares / shares.sum()
    return as_weights(weights, gramian)


class CentralDirection(GradientBalancer):
    r"""Follow the direction that decreases every task by the same share of its gradient norm.

    .. math:: v = \gamma \sum_t k_t \, \frac{g_t}{d_t}, \qquad
              k = \arg\min_{k \ge 0, \sum_t k_t = 1}
              \Big\lVert \sum_t k_t \, \frac{g_t}{d_t} \Big\rVert^2, \qquad
              \gamma = \Big( \sum_t \frac{k_t}{d_t} \Big)^{-1}

    The direction lies in the convex hull of the task gradients and does not increase any task to
    first order. For two tasks :math:`v = (d_2 g_1 + d_1 g_2) / (d_1 + d_2)`. Each task's own
    parameters get their plain gradients.

    Deviations: solved exactly for any number of tasks, where the published code has closed forms
    for two tasks or iterates. A task with a zero gradient, for which the paper's equations are
    undefined, is left out.

    Args:
        scale: ``"mean"`` for weights with sum one, as in the papers; ``"sum"`` for ``T`` times
            that.
        gradients: what the task gradients are taken by, see
            :class:`~lightning_mtl.GradientBalancer`.

    Raises:
        ValueError: an argument is none of its choices.

    References:
        Katrutsa et al., *Follow the bisector: a simple method for multi-objective optimization*,
        arXiv 2007.06937. Equations 3 and 4 of Nakamura et al., *Leveraging convergence behavior to
        balance conflicting tasks in multi-task learning*, Neurocomputing 511, 2022.
    """

    def __init__(self, scale: Scale = "mean", gradients: Level = "parameters") -> None:
        super().__init__(gradients=gradients)
        self.scale: Scale = one_of(self, "scale", scale, get_args(Scale))

    def weights(self, gramian: Tensor, losses: Tensor) -> Tensor:
        """See :func:`central_direction_weights`.

        Args:
            gramian: shape ``(T, T)``, any float dtype and device.
            losses: not used.

        Returns:
            Weights of shape ``(T,)`` in the dtype and on the device of ``gramian``.
        """
        return rescaled(central_direction_weights(gramian), self.scale, "mean")
