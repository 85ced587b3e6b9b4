"""The combination of task gradients with equal projections on all of them (IMTL-G)."""

from __future__ import annotations

from typing import get_args

from torch import Tensor

from lightning_mtl.arguments import Scale, one_of, rescaled
from lightning_mtl.balancer import GradientBalancer, Level, as_weights
from lightning_mtl.numerics.bisector import equal_projections
from lightning_mtl.numerics.quadratic import gramian_array, resolution


def imtlg_weights(gramian: Tensor) -> Tensor:
    r"""Weights, of sum one, of the direction with equal projections on all task gradients.

    .. math:: \frac{g_t \cdot d}{\lVert g_t \rVert} = c \;\; \text{for all } t, \qquad
              d = \sum_t w_t \, g_t, \qquad \sum_t w_t = 1

    Args:
        gramian: :math:`J J^\top`, shape ``(T, T)``, any float dtype and device.

    Returns:
        Weights of shape ``(T,)`` and sum one, in the dtype and on the device of ``gramian``; some
        may be negative. The weights of the central direction where there is no such :math:`d`
        with :math:`c > 0` that is at most as long as the longest gradient. Zero for tasks without
        gradient; equal weights if all gradients are zero; NaN for input that is not finite.

    Raises:
        ValueError: ``gramian`` is not square.

    Example:
        >>> import torch
        >>> imtlg_weights(torch.tensor([[1.0, 0.0], [0.0, 9.0]]))
        tensor([0.7500, 0.2500])
    """
    matrix = gramian_array(gramian)
    return as_weights(equal_projections(matrix, resolution(gramian.dtype)), gramian)


class IMTLG(GradientBalancer):
    r"""Follow the direction that has the same projection on every task gradient.

    .. math:: d = \sum_t w_t \, g_t, \qquad w \propto M^{-1} \big( \lVert g_1 \rVert, \dots,
              \lVert g_T \rVert \big)^\top, \qquad \sum_t w_t = 1, \qquad M = J J^\top

    A weight is negative when its gradient lies between the others, closer to :math:`d` than equal
    projections allow: the combination then goes against this gradient so far that its projection
    comes down to those of the others. All projections are still equal and positive, so every task
    improves to first order, but the direction can be very short. Where no weight is negative the
    direction is that of :class:`~lightning_mtl.CentralDirection`, which never goes against a
    gradient. Each task's own parameters get their plain gradients.

    Deviations: three guards. As published the weights are divided by their sum, which can be zero
    or negative; the direction then has a common projection below zero and increases every task, or
    is arbitrarily long. Where the sum is not positive, or the direction would be longer than the
    longest gradient (no convex combination is), the central direction is followed instead.
    Linearly dependent gradients go through the pseudoinverse; if no direction has equal
    projections on them, again the central direction. A task with a zero gradient, for which the
    equations are undefined, is left out.

    Args:
        scale: ``"mean"`` for weights of sum one, as in the paper; ``"sum"`` multiplies them by the
            number of tasks.
        gradients: what the task gradients are taken by; see
            :class:`~lightning_mtl.GradientBalancer`.

    Raises:
        ValueError: an unknown ``scale`` or ``gradients``.

    References:
        Liu et al., *Towards Impartial Multi-task Learning*, ICLR 2021.
    """

    def __init__(self, scale: Scale = "mean", gradients: Level = "parameters") -> None:
        super().__init__(gradients=gradients)
        self.scale: Scale = one_of(self, "scale", scale, get_args(Scale))

    def weights(self, gramian: Tensor, losses: Tensor) -> Tensor:
        """See :func:`imtlg_weights`.

        Args:
            gramian: shape ``(T, T)``, any float dtype and device.
            losses: not used.

        Returns:
            Weights of shape ``(T,)`` in the dtype and on the device of ``gramian``.
        """
        return rescaled(imtlg_weights(gramian), self.scale, "mean")
