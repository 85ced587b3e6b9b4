"""Alpha-fair weights of the task gradients (FairGrad)."""

from __future__ import annotations

from typing import get_args

from torch import Tensor

from lightning_mtl.arguments import Scale, in_range, one_of, rescaled
from lightning_mtl.balancer import GradientBalancer, Level, as_weights
from lightning_mtl.numerics.newton import alpha_fair
from lightning_mtl.numerics.quadratic import gramian_array, resolution


def fair_grad_weights(gramian: Tensor, alpha: float = 1.0) -> Tensor:
    r"""Weights of the alpha-fair direction.

    .. math:: M w = w^{-1/\alpha}, \qquad w > 0

    Args:
        gramian: :math:`M = J J^\top`, shape ``(T, T)``, any float dtype and device.
        alpha: :math:`\alpha`, above zero.

    Returns:
        Weights of shape ``(T,)`` in the dtype and on the device of ``gramian``. Zero for tasks
        without gradient; weights with which the gradients cancel where a convex combination of
        them is zero, to the precision of ``gramian``; NaN for input that is not finite.

    Raises:
        ValueError: ``gramian`` is not square.

    Example:
        >>> import torch
        >>> fair_grad_weights(torch.tensor([[1.0, 0.0], [0.0, 8.0]]), alpha=2.0)
        tensor([1.0000, 0.2500])
    """
    matrix = gramian_array(gramian)
    return as_weights(alpha_fair(matrix, alpha, None, resolution(gramian.dtype)), gramian)


class FairGrad(GradientBalancer):
    r"""Follow the direction whose task improvements are alpha-fair.

    .. math:: d = \sum_t w_t \, g_t, \qquad M w = w^{-1/\alpha}, \qquad M = J J^\top

    To first order a step improves task :math:`t` by :math:`g_t \cdot d = w_t^{-1/\alpha} > 0`, and
    :math:`d` points where :math:`\sum_t (g_t \cdot d)^{1 - \alpha} / (1 - \alpha)` is largest on a
    ball. :math:`\alpha = 1` is proportional fairness, the equation of
    :class:`~lightning_mtl.NashMTL`, and does not change when a loss is multiplied by a constant;
    :math:`\alpha \to 0` sums the gradients; :math:`\alpha \to \infty` makes the smallest
    improvement largest. When all losses are multiplied by :math:`s`, the direction is multiplied by
    :math:`s^{(1 - \alpha) / (1 + \alpha)}`.

    There is no solution where a convex combination of the gradients is zero (a Pareto-stationary
    point): the weights then make the direction zero. A task with a zero gradient is left out and
    gets weight 0.

    Deviations: the equation is solved by Newton's method, to rounding for :math:`\alpha` from 0.05
    to 10, where the authors' code calls a least-squares solver, which returns weights in the
    thousands at the points above. That code multiplies the shared direction by the number of tasks
    (``scale="sum"``) and clips its norm to one; Lightning's ``gradient_clip_val`` clips all
    gradients together.

    Args:
        alpha: :math:`\alpha`, above zero; the default of the authors' code. Their run scripts
            use 2.
        weight_heads: weigh the gradients of each task's own parameters by :math:`w_t` too, as
            LibMTL does. The authors' code does not.
        scale: ``"mean"`` is the equation, ``"sum"`` multiplies the weights by the number of tasks,
            those of each task's own parameters included.
        gradients: what the task gradients are taken by; see
            :class:`~lightning_mtl.GradientBalancer`.

    Raises:
        ValueError: ``alpha`` is not above zero, or an unknown ``scale`` or ``gradients``.

    References:
        Ban & Ji, *Fair Resource Allocation in Multi-Task Learning*, ICML 2024.
    """

    def __init__(
        self,
        alpha: float = 1.0,
        weight_heads: bool = False,
        scale: Scale = "mean",
        gradients: Level = "parameters",
    ) -> None:
        super().__init__(gradients=gradients)
        self.alpha = in_range(self, "alpha", alpha, open_low=True)
        self.weight_heads = weight_heads
        self.scale: Scale = one_of(self, "scale", scale, get_args(Scale))

    def weights(self, gramian: Tensor, losses: Tensor) -> Tensor:
        """See :func:`fair_grad_weights`.

        Args:
            gramian: shape ``(T, T)``, any float dtype and device.
            losses: not used.

        Returns:
            Weights of shape ``(T,)`` in the dtype and on the device of ``gramian``.
        """
        return rescaled(fair_grad_weights(gramian, self.alpha), self.scale, "mean")
