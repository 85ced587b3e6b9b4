"""The shortest vector in the convex hull of the task gradients (MGDA)."""

from __future__ import annotations

from typing import Literal, get_args

import numpy as np
from torch import Tensor

from lightning_mtl.arguments import Scale, one_of, rescaled
from lightning_mtl.balancer import GradientBalancer, Level, as_weights
from lightning_mtl.numerics.quadratic import gramian_array, min_norm_point, to_numpy, unit_gramian

Normalization = Literal["none", "l2", "loss", "loss+"]


def min_norm_weights(
    gramian: Tensor, losses: Tensor | None = None, normalization: Normalization = "none"
) -> Tensor:
    r"""Weights of the shortest convex combination of the (normalised) task gradients.

    .. math:: w = \arg\min_{w \ge 0, \sum_t w_t = 1}
              \Big\lVert \sum_t w_t \, g_t / n_t \Big\rVert^2

    with :math:`n_t = 1` (``"none"``), :math:`\lVert g_t \rVert` (``"l2"``), :math:`\ell_t`
    (``"loss"``) or :math:`\ell_t \lVert g_t \rVert` (``"loss+"``). Exact, by an active set.

    Args:
        gramian: :math:`J J^\top`, shape ``(T, T)``, any float dtype and device.
        losses: positive task losses, shape ``(T,)``; needed for ``"loss"`` and ``"loss+"``.
        normalization: what the task gradients are divided by.

    Returns:
        Weights of shape ``(T,)`` and sum one, in the dtype and on the device of ``gramian``. Equal
        weights on zero gradients if there are any; NaN for input that is not finite or for
        ``"loss"`` and ``"loss+"`` with a loss at or below zero.

    Raises:
        ValueError: ``gramian`` is not square, or ``losses`` are needed and missing.

    Example:
        >>> import torch
        >>> min_norm_weights(torch.tensor([[1.0, 0.0], [0.0, 4.0]]))
        tensor([0.8000, 0.2000])
    """
    matrix = gramian_array(gramian)
    if normalization in ("l2", "loss+") and np.isfinite(matrix).all():
        matrix, _ = unit_gramian(matrix)
    if normalization in ("loss", "loss+"):
        if losses is None:
            raise ValueError(
                f"`normalization={normalization!r}` needs the task losses. Pass `losses`."
            )
        values = to_numpy(losses)
        inverse = 1.0 / np.where(values > 0, values, np.nan)
        matrix = matrix * inverse * inverse[:, None]
    return as_weights(min_norm_point(matrix), gramian)


class MinNorm(GradientBalancer):
    r"""Follow the shortest vector in the convex hull of the task gradients.

    .. math:: d = \sum_t w_t \, g_t, \qquad w = \arg\min_{w \ge 0, \sum_t w_t = 1}
              \Big\lVert \sum_t w_t \, g_t / n_t \Big\rVert^2

    Without normalisation :math:`d` does not increase any task to first order, and it is zero
    exactly at Pareto-stationary points. It is drawn to the smallest gradient: a task whose
    gradient is zero stops the shared parameters.

    Deviations: solved exactly for any number of tasks, where the papers' codes iterate to about
    1e-3 and never give a task the whole weight. With a normalisation only the weights see the
    normalised gradients and the raw ones are combined, as in Sener & Koltun's code, so :math:`d`
    may then conflict with a task, and is not unique where the weights are not (linearly dependent
    gradients). Algorithm 2 of Sener & Koltun updates each task's own parameters with plain
    gradients while their code weighs those too; ``weight_heads`` chooses.

    Args:
        normalization: :math:`n_t`: 1 (``"none"``, as in the paper), :math:`\lVert g_t \rVert`
            (``"l2"``), :math:`\ell_t` (``"loss"``), :math:`\ell_t \lVert g_t \rVert` (``"loss+"``).
            The last two need positive losses.
        weight_heads: weigh the gradients of each task's own parameters by :math:`w_t` too. The
            default follows the paper's Algorithm 2.
        scale: ``"mean"`` for weights with sum one, as in the papers; ``"sum"`` for ``T`` times
            that, as in Navon et al.'s code.
        gradients: what the task gradients are taken by, see
            :class:`~lightning_mtl.GradientBalancer`. ``"representation"`` is MGDA-UB of Sener &
            Koltun.

    Raises:
        ValueError: an argument is none of its choices.

    References:
        Désidéri, *Multiple-gradient descent algorithm (MGDA) for multiobjective optimization*,
        C. R. Math. 350, 2012. Sener & Koltun, *Multi-Task Learning as Multi-Objective
        Optimization*, NeurIPS 2018.
    """

    def __init__(
        self,
        normalization: Normalization = "none",
        weight_heads: bool = False,
        scale: Scale = "mean",
        gradients: Level = "parameters",
    ) -> None:
        super().__init__(gradients=gradients)
        self.normalization: Normalization = one_of(
            self, "normalization", normalization, get_args(Normalization)
        )
        self.weight_heads = weight_heads
        self.scale: Scale = one_of(self, "scale", scale, get_args(Scale))
        self.requires_positive_losses = normalization in ("loss", "loss+")

    def weights(self, gramian: Tensor, losses: Tensor) -> Tensor:
        """See :func:`min_norm_weights`.

        Args:
            gramian: shape ``(T, T)``, any float dtype and device.
            losses: shape ``(T,)``; used with the normalisations ``"loss"`` and ``"loss+"`` only.

        Returns:
            Weights of shape ``(T,)`` in the dtype and on the device of ``gramian``.
        """
        return rescaled(min_norm_weights(gramian, losses, self.normalization), self.scale, "mean")
