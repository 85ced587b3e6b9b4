"""Task gradients made orthogonal and of equal length (Aligned-MTL)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

from lightning_mtl.arguments import PerTask, Scale, one_of, rescaled
from lightning_mtl.balancer import GradientBalancer, Level, as_weights
from lightning_mtl.numerics.quadratic import gramian_array

Mode = Literal["min", "median", "rmse"]

_FLOAT32_EPS = torch.finfo(torch.float32).eps


def aligned_mtl_weights(
    gramian: Tensor, preference: Sequence[float] | None = None, mode: Mode = "min"
) -> Tensor:
    r"""Weights of the sum of the aligned task gradients.

    .. math:: M = V \Lambda V^\top, \qquad w = \sqrt{s} \, V \Lambda^{-1/2} V^\top p

    over the eigenvalues :math:`\lambda` that are not zero, above
    :math:`\lambda_{\max} \, T \varepsilon` with the rounding error :math:`\varepsilon` of float32.

    Args:
        gramian: :math:`M = J J^\top`, shape ``(T, T)``, any float dtype and device.
        preference: :math:`p`, one number above zero a task, divided by their mean; ones if left
            out.
        mode: what :math:`s` is of the :math:`\lambda`: the smallest (``"min"``), the median, the
            lower one of an even number (``"median"``), or the mean (``"rmse"``).

    Returns:
        Weights of shape ``(T,)`` in the dtype and on the device of ``gramian``; some may be
        negative. Zero for tasks without gradient; NaN for input that is not finite.

    Raises:
        ValueError: ``gramian`` is not square.

    Example:
        >>> aligned_mtl_weights(torch.tensor([[1.0, 0.0], [0.0, 9.0]]))
        tensor([1.0000, 0.3333])
    """
    matrix = gramian_array(gramian)
    size = len(matrix)
    if not np.isfinite(matrix).all():
        return as_weights(np.full(size, np.nan), gramian)
    unit = matrix.diagonal().max()
    if unit <= 0:
        return as_weights(np.zeros(size), gramian)
    p = np.ones(size) if preference is None else np.asarray(preference, dtype=np.float64)
    values, vectors = np.linalg.eigh(0.5 * (matrix + matrix.T) / unit)
    kept = values > values[-1] * size * max(_FLOAT32_EPS, torch.finfo(gramian.dtype).eps)
    values, vectors = values[kept], vectors[:, kept]
    if mode == "min":
        s = values[0]
    elif mode == "median":
        s = values[(len(values) - 1) // 2]
    else:
        s = values.mean()
    weights = vectors @ (np.sqrt(s / values) * (p / p.mean() @ vectors))
    return as_weights(np.where(matrix.diagonal() > 0, weights, 0.0), gramian)


class AlignedMTL(GradientBalancer):
    r"""Replace the task gradients by the nearest orthogonal ones of equal length, and add them up.

    .. math:: J = V \Sigma Q^\top, \qquad d = \sqrt{s} \, Q V^\top p = J^\top w, \qquad
              w = \sqrt{s} \, V \Sigma^{-1} V^\top p, \qquad s = \sigma_{\min}^2

    The aligned gradients, the rows of :math:`\sqrt{s} \, V Q^\top`, neither conflict nor dominate
    one another; their sum may still increase a task, as its gradient is not the aligned one.
    Singular values that are zero stay zero. A task with a gradient much shorter than the others
    sets the length of the whole direction.

    Weights may be negative. Parallel gradients, identical or opposite ones, are added up. A task
    with a zero gradient gets weight 0.

    Deviations: none from the authors' code, whose limit for singular values that count as zero is
    used: :math:`\sigma^2 \le \sigma_{\max}^2 T \varepsilon` with the :math:`\varepsilon` of
    float32. The code calls a PyTorch function that no longer exists.

    Args:
        mode: what :math:`s` is of the squared singular values that are not zero: the smallest
            (``"min"``, the paper's), the median (``"median"``, the lower one of an even number) or
            the mean (``"rmse"``), as in the authors' code.
        preference: :math:`p` by task name, 1 for tasks not named; or one number a task, in the
            order of the module's tasks. Above zero; only their ratios matter. The paper's task
            weights.
        weight_heads: weigh the gradients of each task's own parameters by :math:`w_t` too, which
            may be negative. The default follows the codes.
        scale: ``"sum"`` is the formula, ``"mean"`` divides it by the number of tasks.
        gradients: what the task gradients are taken by; see
            :class:`~lightning_mtl.GradientBalancer`. ``"representation"`` is the paper's
            Aligned-MTL-UB.

    Raises:
        ValueError: an entry of ``preference`` is not above zero, or an unknown ``mode``,
            ``scale`` or ``gradients``.

    References:
        Senushkin et al., *Independent Component Alignment for Multi-Task Learning*, CVPR 2023.
    """

    def __init__(
        self,
        mode: Mode = "min",
        preference: dict[str, float] | list[float] | None = None,
        weight_heads: bool = False,
        scale: Scale = "sum",
        gradients: Level = "parameters",
    ) -> None:
        super().__init__(gradients=gradients)
        self.mode: Mode = one_of(self, "mode", mode, get_args(Mode))
        self.preference = preference
        self.weight_heads = weight_heads
        self.scale: Scale = one_of(self, "scale", scale, get_args(Scale))
        self._shares = PerTask(self, "preference", preference)

    def weights(self, gramian: Tensor, losses: Tensor) -> Tensor:
        """See :func:`aligned_mtl_weights`.

        Args:
            gramian: shape ``(T, T)``, any float dtype and device.
            losses: not used.

        Returns:
            Weights of shape ``(T,)`` in the dtype and on the device of ``gramian``.
        """
        shares = self._shares.of(self.tasks, len(gramian))
        return rescaled(aligned_mtl_weights(gramian, shares, self.mode), self.scale, "sum")
