"""T x T numerics used by two or more methods: NumPy, float64, relative tolerances only."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from torch import Tensor, float64

Array = npt.NDArray[np.float64]

_EPS = float(np.finfo(np.float64).eps)


def to_numpy(tensor: Tensor) -> Array:
    """A small tensor of any float dtype and device as a float64 array."""
    array: Array = tensor.detach().to(device="cpu", dtype=float64).numpy()
    return array


def unit_gramian(gramian: Array) -> tuple[Array, Array]:
    """Cosines between the rows of a Jacobian, and their norms.

    Args:
        gramian: inner products of the rows, shape ``(T, T)``.

    Returns:
        The matrix of cosines, zero in the rows and columns of zero rows, and the norms ``(T,)``.
    """
    norms = np.sqrt(np.maximum(gramian.diagonal(), 0.0))
    zero = norms == 0
    inverse = 1.0 / (norms + zero)
    cosines = 0.5 * (gramian + gramian.T) * inverse * inverse[:, None]
    cosines = np.minimum(np.maximum(cosines, -1.0), 1.0)
    cosines.flat[:: len(norms) + 1] = 1.0
    if zero.any():
        cosines[zero] = cosines[:, zero] = 0.0
    return cosines, norms


def nnls(q: Array, c: Array) -> Array:
    r"""Minimise :math:`\tfrac12 w^\top Q w - c^\top w` over :math:`w \ge 0` by an active set.

    Exact up to rounding: the active set of Lawson & Hanson (1974) on the normal equations, after a
    first try with every entry free. A slope counts as positive when it exceeds its own rounding
    error, so the result does not depend on the scale of the problem. ``Q`` may be singular.

    Args:
        q: positive semidefinite, shape ``(T, T)``, with a diagonal of about one.
        c: shape ``(T,)``, in the range of ``q`` (otherwise there is no minimum).

    Returns:
        The minimiser (one of them if ``q`` is singular), shape ``(T,)``.
    """
    size = len(c)
    w = _solve(q, c)
    if w.min() > 0:
        return w
    w = np.zeros(size)
    free = np.zeros(size, dtype=bool)
    refused = np.zeros(size, dtype=bool)
    magnitude = np.abs(q)
    for _ in range(10 * size):  # a bound for matrices that rounding has made indefinite
        slope = c - q @ w
        noise = 4 * size * _EPS * (np.abs(c) + magnitude @ w)
        slope[free | refused | (slope <= noise)] = 0.0
        entering = int(slope.argmax())
        if slope[entering] == 0:
            break
        free[entering] = True
        z = _solve_free(q, c, free)
        if z[entering] <= 0:  # its slope was rounding after all
            free[entering], refused[entering] = False, True
            continue
        while free.any() and (negative := free & (z <= 0)).any():
            steps = np.where(negative, w, 0.0) / np.where(negative, w - z, 1.0)
            step = steps[negative].min()
            w += step * (z - w)
            free &= ~(negative & (steps <= step))
            w[~free] = 0.0
            z = _solve_free(q, c, free)
        w = z
        refused[:] = False
    return w


def min_norm_point(gramian: Array) -> Array:
    r"""Weights of the shortest vector in the convex hull of the rows.

    .. math:: \min_w \; w^\top M w \quad \text{with } w \ge 0, \; \textstyle\sum_t w_t = 1

    Solved for unit rows, :math:`u_t = w_t d_t / d_{\min}`, which keeps all digits when norms are
    many orders apart: :math:`\min u^\top C u` with :math:`a^\top u = 1`, :math:`a_t =
    d_{\min} / d_t`. The constraint is moved into the objective, :math:`Q = C + a a^\top`,
    :math:`c = a`: for :math:`u = s v` with :math:`a^\top v = 1` the best :math:`s` leaves
    :math:`q / (1 + q)`, which increases with :math:`q = v^\top C v`.

    Args:
        gramian: inner products of the rows, shape ``(T, T)``.

    Returns:
        Weights of shape ``(T,)``, at least zero, with sum one. Equal weights on the zero rows if
        there are any (the point is then zero); NaN if the Gramian is not finite.
    """
    size = len(gramian)
    if not np.isfinite(gramian).all():
        return np.full(size, np.nan)
    if size == 1:
        return np.ones(1)
    if size == 2:
        return _min_norm_pair(gramian)
    cosines, norms = unit_gramian(gramian)
    zero = norms == 0
    if zero.any():
        return np.asarray(zero / zero.sum())
    a = norms.min() / norms
    weights = nnls(cosines + a * a[:, None], a) * a
    return np.asarray(weights / weights.sum())


def gramian_array(gramian: Tensor) -> Array:
    """A Gramian as a float64 array.

    Raises:
        ValueError: it is not square.
    """
    if gramian.ndim != 2 or gramian.shape[0] != gramian.shape[1] or not len(gramian):
        raise ValueError(
            f"Expected `gramian` of shape (T, T) with T >= 1, found {tuple(gramian.shape)}. "
            f"Pass `jacobian @ jacobian.T`, with one row of the Jacobian a task."
        )
    return to_numpy(gramian)


def _min_norm_pair(gramian: Array) -> Array:
    cross = 0.5 * float(gramian[0, 1] + gramian[1, 0])
    first, second = float(gramian[1, 1]) - cross, float(gramian[0, 0]) - cross
    if first <= 0 and second <= 0:  # identical rows: any weights do
        return np.array([0.5, 0.5])
    if second <= 0:
        return np.array([1.0, 0.0])
    if first <= 0:
        return np.array([0.0, 1.0])
    total = first + second
    return np.array([first / total, second / total])


def _solve_free(q: Array, c: Array, free: npt.NDArray[np.bool_]) -> Array:
    z = np.zeros(len(c))
    index = np.flatnonzero(free)
    z[index] = _solve(q[index[:, None], index], c[index])
    return z


def _solve(q: Array, c: Array) -> Array:
    try:
        return np.asarray(np.linalg.solve(q, c), dtype=np.float64)
    except np.linalg.LinAlgError:
        return np.asarray(np.linalg.lstsq(q, c, rcond=None)[0], dtype=np.float64)
