"""The best worst-case improvement within a ball around the average gradient (CAGrad)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, get_args

import numpy as np
from torch import Tensor

from lightning_mtl.arguments import PerTask, Scale, in_range, one_of, rescaled
from lightning_mtl.balancer import GradientBalancer, Level, as_weights
from lightning_mtl.numerics.quadratic import (
    Array,
    Mask,
    gramian_array,
    min_norm_point,
    nnls,
    resolution,
    shares,
    unit_gramian,
)

_EPS = float(np.finfo(np.float64).eps)

Rescale = Literal[0, 1, 2]


def cagrad_weights(
    gramian: Tensor,
    c: float = 0.4,
    rescale: Rescale = 1,
    preference: Sequence[float] | None = None,
) -> Tensor:
    r"""Weights of the conflict-averse direction.

    .. math:: d = \frac{1}{f} \arg\max_{\lVert d - g_0 \rVert \le c \lVert g_0 \rVert} \min_t \,
              g_t \cdot d = \frac{1}{f} \Big( g_0 + c \lVert g_0 \rVert
              \frac{g_w}{\lVert g_w \rVert} \Big), \qquad
              w = \arg\min_{w \ge 0, \sum_t w_t = 1} \, g_w \cdot g_0
              + c \lVert g_0 \rVert \lVert g_w \rVert

    with :math:`g_w = \sum_t w_t g_t`, :math:`g_0 = \sum_t b_t g_t` and :math:`f = 1`,
    :math:`1 + c^2` or :math:`1 + c` for ``rescale`` 0, 1 or 2. Exact.

    Args:
        gramian: :math:`J J^\top`, shape ``(T, T)``, any float dtype and device.
        c: radius of the ball over :math:`\lVert g_0 \rVert`, at least 0.
        rescale: the choice of :math:`f`.
        preference: :math:`b` up to a factor, ``T`` numbers above 0; ``None`` for :math:`1 / T`.

    Returns:
        Weights of the task gradients in :math:`d`, at least :math:`b / f`, shape ``(T,)``, in the
        dtype and on the device of ``gramian``; NaN for input that is not finite.

    Raises:
        ValueError: ``gramian`` is not square.

    Example:
        >>> import torch
        >>> cagrad_weights(torch.tensor([[1.0, 0.0], [0.0, 4.0]]), c=0.5, rescale=0)
        tensor([1.0590, 0.5000])
    """
    matrix = gramian_array(gramian)
    if not np.isfinite(matrix).all():
        return as_weights(np.full(len(matrix), np.nan), gramian)
    start = shares(preference, len(matrix))
    rounding = 4 * resolution(gramian.dtype)
    factor = {0: 1.0, 1: 1.0 + c * c, 2: 1.0 + c}[rescale]
    return as_weights(_best_in_ball(matrix, start, c, rounding) / factor, gramian)


class CAGrad(GradientBalancer):
    r"""Improve the worst task most, without leaving the neighbourhood of the average gradient.

    .. math:: d = \frac{1}{f} \arg\max_{\lVert d - g_0 \rVert \le c \lVert g_0 \rVert} \min_t \,
              g_t \cdot d, \qquad g_0 = \sum_t b_t g_t, \qquad b_t = 1 / T

    With ``c=0`` it is the average gradient; the larger :math:`c`, the closer to min-norm. The
    paper's convergence to a minimum of the average loss needs :math:`c < 1`; then :math:`d` can
    still conflict with a task, and it does not vanish at Pareto-stationary points. Each task's own
    parameters get their plain gradients.

    Deviations: solved exactly, by equations for the tasks that attain the minimum, where the
    published codes run SLSQP with an absolute tolerance that stops at once for small gradients.
    Where a convex combination of the gradients is zero and the ball reaches a vector that conflicts
    with none, the maximum is 0 and attained by more than one; this takes the one nearest to
    :math:`g_0`. A task without gradient is such a case.

    Args:
        c: radius of the ball over :math:`\lVert g_0 \rVert`, at least 0. The default is that of
            Navon et al.'s code.
        rescale: :math:`f`: 1 (``0``), :math:`1 + c^2` (``1``, as in the authors' code) or
            :math:`1 + c` (``2``).
        preference: numbers above 0, by task name (1 for tasks not named) or in order, that
            :math:`b` is proportional to, in place of the paper's :math:`b_t = 1 / T`; :math:`g_0`
            is then the gradient of a weighted average of the losses.
        scale: ``"mean"`` for the paper's length, that of an average; ``"sum"`` for ``T`` times
            that, as in Navon et al.'s code.
        gradients: what the task gradients are taken by, see
            :class:`~lightning_mtl.GradientBalancer`.

    Raises:
        ValueError: an argument is out of range.

    References:
        Liu et al., *Conflict-Averse Gradient Descent for Multi-task Learning*, NeurIPS 2021.
    """

    def __init__(
        self,
        c: float = 0.4,
        rescale: Rescale = 1,
        preference: dict[str, float] | list[float] | None = None,
        scale: Scale = "mean",
        gradients: Level = "parameters",
    ) -> None:
        super().__init__(gradients=gradients)
        self.c = in_range(self, "c", c)
        self.rescale: Rescale = one_of(self, "rescale", rescale, get_args(Rescale))
        self.preference = preference
        self.scale: Scale = one_of(self, "scale", scale, get_args(Scale))
        self._per_task_preference = PerTask(self, "preference", preference)

    def weights(self, gramian: Tensor, losses: Tensor) -> Tensor:
        """See :func:`cagrad_weights`.

        Args:
            gramian: shape ``(T, T)``, any float dtype and device.
            losses: not used.

        Returns:
            Weights of shape ``(T,)`` in the dtype and on the device of ``gramian``.
        """
        preference = self._per_task_preference.of(self.tasks, len(gramian))
        weights = cagrad_weights(gramian, self.c, self.rescale, preference)
        return rescaled(weights, self.scale, "mean")


def _best_in_ball(matrix: Array, start: Array, c: float, rounding: float) -> Array:
    r"""Weights of the maximiser :math:`d` around :math:`g_0 = J^\top b`.

    The maximum :math:`\mu` is the largest for which the vector nearest to :math:`g_0` with
    :math:`g_t \cdot d \ge \mu` lies in the ball. That vector is :math:`g_0 + \sum_t x_t u_t` with
    unit rows :math:`u_t` and :math:`x \ge 0`, and :math:`x_t > 0` only where :math:`g_t \cdot d =
    \mu`.
    """
    cosines, norms = unit_gramian(matrix)
    lengths = start * norms
    along = cosines @ lengths  # u_t . g_0
    square = float(lengths @ along)
    if c == 0 or square <= rounding * lengths.sum() ** 2:  # no ball, or g_0 = 0 up to rounding
        return start
    radius = c * math.sqrt(square)
    index = norms.nonzero()[0]
    zero_row = len(index) < len(norms)
    if zero_row:
        cosines, norms, along = cosines[index[:, None], index], norms[index], along[index]
    x = _settled(cosines, along, norms, radius)
    # Or x is much longer than its sum of unit rows: a convex combination of gradients is zero.
    stationary = zero_row or (x is not None and x.sum() ** 2 * rounding >= radius**2)
    if x is None or stationary:
        nearest = nnls(cosines, -along)  # mu = 0
        if stationary and nearest @ cosines @ nearest <= radius**2:
            x = nearest
        elif x is None:
            x = _bisected(cosines, along, norms, radius, square, rounding)
            x = nearest if x is None else x
    weights = start.copy()
    weights[index] += x / norms
    return np.asarray(weights)


def _settled(cosines: Array, along: Array, norms: Array, radius: float) -> Array | None:
    """The x of :func:`_best_in_ball` for nonzero rows; ``None`` where rounding forbids."""
    a = norms.min() / norms
    if len(a) == 2:
        return _pair(float(cosines[0, 1]), along, a, radius)
    active = np.zeros(len(a), dtype=bool)
    active[(along / a).argmin()] = True
    for _ in range(12):  # rows are exchanged in blocks; two or three rounds are usual
        found = _with_active(cosines, along, a, radius, active)
        if found is None:
            return None
        x, wrong = found
        if not wrong.any():
            return x
        active ^= wrong
    return None


def _pair(cosine: float, along: Array, a: Array, radius: float) -> Array | None:
    """Two rows in closed form; ``None`` for nearly parallel ones that are both active."""
    (k0, k1), (a0, a1) = along.tolist(), a.tolist()
    if k0 * a1 <= k1 * a0:
        if (k1 + cosine * radius) * a0 >= (k0 + radius) * a1:
            return np.array([radius, 0.0])
    elif (k0 + cosine * radius) * a1 >= (k1 + radius) * a0:
        return np.array([0.0, radius])
    det = 1.0 - cosine * cosine
    if det < 1e-12:
        return None
    p0, p1 = (a0 - cosine * a1) / det, (a1 - cosine * a0) / det
    q0, q1 = (k0 - cosine * k1) / det, (k1 - cosine * k0) / det
    level = _level(a0 * p0 + a1 * p1, a0 * q0 + a1 * q1, k0 * q0 + k1 * q1, radius)
    return np.array([max(level * p0 - q0, 0.0), max(level * p1 - q1, 0.0)])


def _with_active(
    cosines: Array, along: Array, a: Array, radius: float, active: Mask
) -> tuple[Array, Mask] | None:
    """The x with equal progress of the active rows, and the rows where its signs are wrong."""
    index = active.nonzero()[0]
    sides = np.stack((a[index], along[index]))
    try:
        p, q = np.linalg.solve(cosines[index[:, None], index], sides.T).T
    except np.linalg.LinAlgError:
        return None
    aa, ak, kk = float(sides[0] @ p), float(sides[0] @ q), float(sides[1] @ q)
    if not aa > 0:
        return None
    level = _level(aa, ak, kk, radius)
    x = np.zeros(len(a))
    x[index] = level * p - q
    size = np.abs(x)
    if not size.max() <= 1e6 * radius:
        return None
    progress = cosines @ x
    noise = 4 * len(a) * _EPS * (np.abs(along) + abs(level) * a + np.abs(cosines) @ size)
    wrong = np.where(active, -x, level * a - along - progress - noise) > 0
    if not wrong.any() and abs(float(x @ progress) / radius**2 - 1.0) > 1e-9:
        return None
    return x, wrong


def _level(aa: float, ak: float, kk: float, radius: float) -> float:
    """Where the squared length of x, a parabola in the level, is the squared radius."""
    return (ak + math.sqrt(max(ak * ak - aa * (kk - radius * radius), 0.0))) / aa


def _bisected(
    cosines: Array, along: Array, norms: Array, radius: float, square: float, rounding: float
) -> Array | None:
    r"""The same x where rounding leaves no active rows that prove themselves.

    For any :math:`\lambda > 0` the weights w of the shortest convex combination of the rows
    :math:`g_t + \lambda g_0` give :math:`x_t = w_t d_t / \lambda`, which is shorter the larger
    :math:`\lambda` is. ``None`` if it stays in the ball until that combination of :math:`g_t` is
    zero.
    """
    a = norms.min() / norms
    gramian, shift = cosines * norms * norms[:, None], along * norms
    low, high = 0.0, float(norms.max()) / radius  # no convex combination is longer than norms.max()
    x = np.zeros(len(norms))
    for _ in range(200):
        middle = math.sqrt(low * high) if low else 1e-2 * high
        w = min_norm_point(gramian + middle * (shift + shift[:, None]) + middle**2 * square)
        combined = w * norms
        x = combined / middle
        length = float(combined @ cosines @ combined)
        if not low and length <= rounding * combined.sum() ** 2:
            return None
        found = _with_active(cosines, along, a, radius, w > 0)
        if found is not None and not found[1].any():
            return found[0]
        if length > (radius * middle) ** 2:
            low = middle
        else:
            high = middle
        if high <= low * (1 + 4 * _EPS):
            break
    return x
