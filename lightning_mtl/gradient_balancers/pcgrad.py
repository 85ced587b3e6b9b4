"""Projection of conflicting gradients (PCGrad)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import get_args

import numpy as np
from torch import Tensor

from lightning_mtl.arguments import Scale, one_of, rescaled
from lightning_mtl.balancer import GradientBalancer, Level, as_weights
from lightning_mtl.gradient_balancers._orders import Order, Orders, draw_orders, orders_array
from lightning_mtl.numerics.quadratic import Array, gramian_array, unit_gramian


def pcgrad_weights(
    gramian: Tensor, orders: Sequence[Sequence[int]] | None = None, include_self: bool = False
) -> Tensor:
    r"""Weights of the sum of the projected task gradients.

    Each task starts from :math:`p_i = g_i` and meets the others in its order; where they conflict,
    the component along the original :math:`g_j` is taken out:

    .. math:: p_i \leftarrow p_i - \frac{\min(p_i \cdot g_j, 0)}{\lVert g_j \rVert^2} \, g_j,
              \qquad \sum_i p_i = \sum_j w_j \, g_j

    Only inner products are needed: :math:`p_i = \sum_j A_{ij} g_j` and :math:`p_i \cdot g_j =
    (A M)_{ij}`.

    Args:
        gramian: :math:`M = J J^\top`, shape ``(T, T)``, any float dtype and device.
        orders: for each task a permutation of all tasks, counted from 0: the order in which it
            meets them. ``None`` for ascending order.
        include_self: whether a task meets its own gradient too, at its place in the order, as some
            codes have it; otherwise that place is passed over. It makes a difference from three
            tasks on.

    Returns:
        Weights of shape ``(T,)`` in the dtype and on the device of ``gramian``: ones where no
        gradients conflict. A zero gradient conflicts with none. NaN for input that is not finite.

    Raises:
        ValueError: ``gramian`` is not square, or ``orders`` are no permutations.

    Example:
        >>> import torch
        >>> pcgrad_weights(torch.tensor([[1.0, -1.0], [-1.0, 4.0]]))
        tensor([2.0000, 1.2500])
    """
    matrix = gramian_array(gramian)
    visits = orders_array(orders, len(matrix))
    if not np.isfinite(matrix).all():
        return as_weights(np.full(len(matrix), np.nan), gramian)
    return as_weights(_coefficients(matrix, visits, include_self).sum(0), gramian)


def _coefficients(matrix: Array, visits: Orders, include_self: bool) -> Array:
    """Row ``i`` holds the coefficients of the projected gradient of task ``i``."""
    cosines, norms = unit_gramian(matrix)
    rows = np.arange(len(matrix))
    shares = np.eye(len(matrix))  # of unit gradients, in a projected gradient over its norm
    for met in visits.T:  # task i meets task met[i]
        slopes = np.minimum(np.einsum("ij,ij->i", shares, cosines[met]), 0.0)
        shares[rows, met] -= slopes if include_self else np.where(met == rows, 0.0, slopes)
    lengths = np.where(norms == 0, 1.0, norms)
    return np.asarray(shares * lengths[:, None] / lengths)


class PCGrad(GradientBalancer):
    r"""Take out of each task gradient what conflicts with the others, then add them up.

    .. math:: d = \sum_i p_i, \qquad p_i \leftarrow p_i -
              \frac{\min(p_i \cdot g_j, 0)}{\lVert g_j \rVert^2} \, g_j
              \quad \text{for all } j \ne i \text{ in random order}

    starting from :math:`p_i = g_i`. Without conflicts :math:`d` is the plain sum. For two tasks
    :math:`d` does not increase either of them to first order; from three on a later projection can
    undo an earlier one. Every task meets the others in an order of its own, drawn anew at every
    step. Each task's own parameters get their plain gradients.

    Deviations: none with the default arguments. Public codes differ from the paper and among each
    other: some take the mean over tasks (``scale="mean"``), some let a task meet its own gradient
    (``include_self``), and in one the random order has no effect (``order="ascending"`` with
    ``include_self=True``).

    Args:
        order: ``"random"`` (the paper's) or ``"ascending"``, the order of the tasks, which draws
            nothing.
        include_self: whether a task meets its own gradient too. The paper leaves it out.
        scale: ``"sum"`` (the paper's) or ``"mean"``, which is ``T`` times shorter.
        seed: where the random numbers start; ``None`` takes PyTorch's initial seed.
        gradients: what the task gradients are taken by.

    Raises:
        ValueError: an argument is out of range.

    References:
        Algorithm 1 of Yu et al., *Gradient Surgery for Multi-Task Learning*, NeurIPS 2020.
    """

    def __init__(
        self,
        order: Order = "random",
        include_self: bool = False,
        scale: Scale = "sum",
        seed: int | None = None,
        gradients: Level = "parameters",
    ) -> None:
        super().__init__(gradients=gradients)
        self.order: Order = one_of(self, "order", order, get_args(Order))
        self.include_self = include_self
        self.scale: Scale = one_of(self, "scale", scale, get_args(Scale))
        self.seed = seed
        self.add_generator(seed)

    def weights(self, gramian: Tensor, losses: Tensor) -> Tensor:
        """Draw the orders and see :func:`pcgrad_weights`.

        Args:
            gramian: shape ``(T, T)``, any float dtype and device.
            losses: not used.

        Returns:
            Weights of shape ``(T,)`` in the dtype and on the device of ``gramian``.
        """
        orders = draw_orders(len(gramian), self.order, self.generator)
        return rescaled(pcgrad_weights(gramian, orders, self.include_self), self.scale, "sum")
