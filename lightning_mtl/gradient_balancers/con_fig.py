"""The direction with equal or chosen cosines to all task gradients (ConFIG)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import numpy as np
from torch import Tensor

from lightning_mtl.arguments import PerTask, Scale, one_of, rescaled
from lightning_mtl.balancer import GradientBalancer, Level, as_weights
from lightning_mtl.numerics.bisector import with_projections
from lightning_mtl.numerics.quadratic import Array, gramian_array, resolution, unit_gramian

Length = Literal["projection", "minimum", "maximum", "harmonic", "arithmetic", "geometric"]


def config_weights(
    gramian: Tensor, preference: Sequence[float] | None = None, length: Length = "projection"
) -> Tensor:
    r"""Weights of the direction with given cosines to all task gradients.

    .. math:: x = U^+ p, \qquad d = \Big( \sum_t n_t \, \frac{g_t}{\lVert g_t \rVert} \cdot
              \frac{x}{\lVert x \rVert} \Big) \frac{x}{\lVert x \rVert}

    with the rows :math:`g_t / \lVert g_t \rVert` of :math:`U`.

    Args:
        gramian: :math:`J J^\top`, shape ``(T, T)``, any float dtype and device.
        preference: :math:`p`, one number above zero a task, to which the cosines are in
            proportion; ones if left out.
        length: :math:`n_t`: :math:`\lVert g_t \rVert` (``"projection"``), or for all tasks the
            minimum, maximum, harmonic, arithmetic or geometric mean of these norms.

    Returns:
        Weights of shape ``(T,)`` in the dtype and on the device of ``gramian``; some may be
        negative. Zero for tasks without gradient, and for all tasks if the gradients can only
        cancel one another; NaN for input that is not finite.

    Raises:
        ValueError: ``gramian`` is not square.

    Example:
        >>> import torch
        >>> config_weights(torch.tensor([[1.0, 0.0], [0.0, 9.0]]))
        tensor([2.0000, 0.6667])
    """
    matrix = gramian_array(gramian)
    size = len(matrix)
    if not np.isfinite(matrix).all():
        return as_weights(np.full(size, np.nan), gramian)
    cosines, norms = unit_gramian(matrix)
    p = np.ones(size) if preference is None else np.asarray(preference, dtype=np.float64)
    nonzero = np.flatnonzero(norms)
    weights = np.zeros(size)
    if len(nonzero):
        cosines, norms, p = cosines[nonzero[:, None], nonzero], norms[nonzero], p[nonzero]
        rounding = resolution(gramian.dtype)
        v = with_projections(cosines, p, rounding)
        projections = cosines @ v
        square = v @ projections
        if square > len(nonzero) * rounding * (p @ p):
            weights[nonzero] = (_lengths(norms, length) @ projections / square) * v / norms
    return as_weights(weights, gramian)


class ConFIG(GradientBalancer):
    r"""Follow the direction with the same angle to every task gradient.

    .. math:: x = U^+ p, \qquad d = \Big( \sum_t g_t \cdot \frac{x}{\lVert x \rVert} \Big)
              \frac{x}{\lVert x \rVert}, \qquad
              U = \Big( \frac{g_1}{\lVert g_1 \rVert}, \dots, \frac{g_T}{\lVert g_T \rVert}
              \Big)^\top

    With linearly independent gradients no task increases to first order: the cosines between
    :math:`d` and the task gradients are positive and in proportion to :math:`p` (equal by default).
    :math:`d` is the projection of the summed gradients on that ray, so it is a direction of the
    ``"sum"`` kind. Where no weight is negative it points where
    :class:`~lightning_mtl.CentralDirection` does. Each task's own parameters get their plain
    gradients.

    With linearly dependent gradients the cosines may be out of reach; the nearest projections in
    the least-squares sense are taken, and a task may then increase. Where the gradients can only
    cancel one another (two opposite ones) the direction is zero.

    Deviations: the pseudoinverse of the small matrix of cosines takes the place of a least-squares
    solution with all gradients; the result is the same up to rounding. A task with a zero gradient
    is left out, also from the means that ``length`` names.

    Args:
        preference: the wanted cosines :math:`p` by task name, 1 for tasks not named; or one number
            a task, in the order of the module's tasks. Above zero; only their ratios matter. The
            paper's direction weights.
        length: how long :math:`d` is. ``"projection"``, the paper's choice, is the formula above;
            with the others every :math:`g_t` in its sum has the same norm first: the minimum,
            maximum, harmonic, arithmetic or geometric mean of the norms, as the authors' package
            offers.
        scale: ``"sum"`` is the formula, ``"mean"`` divides it by the number of tasks.
        gradients: what the task gradients are taken by; see
            :class:`~lightning_mtl.GradientBalancer`.

    Raises:
        ValueError: an entry of ``preference`` is not above zero, or an unknown ``length``,
            ``scale`` or ``gradients``.

    References:
        Liu, Chu & Thuerey, *ConFIG: Towards Conflict-free Training of Physics Informed Neural
        Networks*, ICLR 2025, arXiv 2408.11104.
    """

    def __init__(
        self,
        preference: dict[str, float] | list[float] | None = None,
        length: Length = "projection",
        scale: Scale = "sum",
        gradients: Level = "parameters",
    ) -> None:
        super().__init__(gradients=gradients)
        self.preference = preference
        self.length: Length = one_of(self, "length", length, get_args(Length))
        self.scale: Scale = one_of(self, "scale", scale, get_args(Scale))
        self._cosines = PerTask(self, "preference", preference)

    def weights(self, gramian: Tensor, losses: Tensor) -> Tensor:
        """See :func:`config_weights`.

        Args:
            gramian: shape ``(T, T)``, any float dtype and device.
            losses: not used.

        Returns:
            Weights of shape ``(T,)`` in the dtype and on the device of ``gramian``.
        """
        wanted = self._cosines.of(self.tasks, len(gramian))
        return rescaled(config_weights(gramian, wanted, self.length), self.scale, "sum")


def _lengths(norms: Array, length: Length) -> Array:
    """The norms that the task gradients count with in the length of the direction."""
    if length == "projection":
        return norms
    if length == "minimum":
        common = norms.min()
    elif length == "maximum":
        common = norms.max()
    elif length == "harmonic":
        common = norms.min() / np.mean(norms.min() / norms)
    elif length == "arithmetic":
        common = norms.mean()
    else:
        common = np.exp(np.log(norms).mean())
    return np.full(len(norms), common)
