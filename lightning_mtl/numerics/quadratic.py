"""T x T numerics used by two or more methods: NumPy, float64, relative tolerances only."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from torch import Tensor, device, dtype, finfo, float32, float64

Array = npt.NDArray[np.float64]
Mask = npt.NDArray[np.bool_]

_CPU = device("cpu")
_EPS = float(np.finfo(np.float64).eps)


def to_numpy(tensor: Tensor) -> Array:
    """A small tensor of any float dtype and device as a float64 array."""
    array: Array = tensor.detach().to(_CPU, float64).numpy()
    return array


def resolution(kind: dtype) -> float:
    """Relative rounding error of the entries of a Gramian, for what is to count as zero.

    One in float64 comes from rows that are known to a few units of float32's rounding, as the
    gradients of a network are: within that, rows that point the same way cannot be told apart. One
    in a coarser dtype has been rounded itself.

    Args:
        kind: dtype of the Gramian.
    """
    return (4.0 * finfo(float32).eps) ** 2 if kind == float64 else float(finfo(kind).eps)


def unit_of(size: float) -> float:
    """A power of two to measure numbers of about ``size`` in, so that float32 can hold squares.

    Where it can anyway that is 1, and also for a size that is zero or not finite.
    """
    if not 0 < size < math.inf or 1e-12 < size < 1e12:
        return 1.0
    return math.ldexp(1.0, round(math.log2(size)))


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


def min_norm_point(gramian: Array) -> Array:
    r"""Weights of the shortest vector in the convex hull of the rows.

    .. math:: \min_w \; w^\top M w \quad \text{with } w \ge 0, \; \textstyle\sum_t w_t = 1

    Args:
        gramian: inner products of the rows, shape ``(T, T)``.

    Returns:
        Weights of shape ``(T,)``, at least zero, with sum one. Equal weights on the zero rows if
        there are any (the point is then zero); NaN if the Gramian is not finite.
    """
    size = len(gramian)
    if size == 2:
        return np.array(_min_norm_pair(*gramian.ravel().tolist()))
    if not np.isfinite(gramian).all():
        return np.full(size, np.nan)
    if size == 1:
        return np.ones(1)
    cosines, norms = unit_gramian(gramian)
    zero = norms == 0
    if zero.any():
        return np.asarray(zero / zero.sum())
    return min_norm_of_rays(cosines, norms.min() / norms)


def min_norm_of_rays(cosines: Array, a: Array) -> Array:
    r"""Weights of the shortest vector in the convex hull of the rows :math:`u_t / a_t`.

    For unit rows :math:`u_t`, which keeps all digits when norms are many orders apart: with
    :math:`x_t = w_t / a_t`, :math:`\min x^\top C x` where :math:`a^\top x = 1`. The constraint is
    moved into the objective, :math:`Q = C + a a^\top`, :math:`c = a`: for :math:`x = s v` with
    :math:`a^\top v = 1` the best :math:`s` leaves :math:`q / (1 + q)`, which increases with
    :math:`q = v^\top C v`.

    Args:
        cosines: :math:`C`, inner products of the unit rows, shape ``(T, T)``.
        a: inverse norms, largest 1, shape ``(T,)``.

    Returns:
        Weights of shape ``(T,)``, at least zero, with sum one.
    """
    weights = nnls(cosines + a * a[:, None], a) * a
    return np.asarray(weights / weights.sum())


def dual_cone_weights(gramian: Array, weights: Array) -> Array:
    r"""Weights of the vector nearest to :math:`J^\top w` that conflicts with no row.

    .. math:: \min_d \lVert d - J^\top w \rVert^2 \quad \text{with } J d \ge 0, \qquad
              d = J^\top (w + z), \; z \ge 0

    Args:
        gramian: inner products of the rows, finite, shape ``(T, T)``.
        weights: :math:`w`, shape ``(T,)``, or ``(K, T)`` for ``K`` projections.

    Returns:
        :math:`w + z`, of the shape of ``weights``. Weights of zero rows stay as they are.
    """
    cosines, norms = unit_gramian(gramian)
    c = -(weights * norms) @ cosines
    solve = nnls if c.ndim == 1 else nnls_rows
    return np.asarray(weights + solve(cosines, c) / np.where(norms == 0, 1.0, norms))


def shares(preference: Sequence[float] | None, size: int) -> Array:
    """A preference as weights with sum one; equal ones without it.

    Args:
        preference: numbers above 0, one a task.
        size: number of tasks.
    """
    if preference is None:
        return np.full(size, 1.0 / size)
    weights = np.asarray(preference, dtype=np.float64)
    return np.asarray(weights / weights.sum())


def project_on_simplex(point: Array) -> Array:
    """The nearest vector of at least zero with sum one (Held, Wolfe & Crowder 1974).

    Args:
        point: finite, shape ``(T,)``.
    """
    point = point - point.max()  # which changes nothing, and 1 is not lost in large numbers
    descending = np.sort(point)[::-1]
    level = (np.cumsum(descending) - 1.0) / np.arange(1, len(point) + 1)
    return np.asarray(np.maximum(point - level[(descending > level).nonzero()[0][-1]], 0.0))


def nnls(q: Array, c: Array) -> Array:
    r"""Minimise :math:`\tfrac12 w^\top Q w - c^\top w` over :math:`w \ge 0` by an active set.

    Exact up to rounding: the entries that are free are exchanged in blocks (Júdice & Pires 1994)
    until every sign is right, which takes a few linear systems; where that does not settle, the
    active set of Lawson & Hanson (1974) on the normal equations goes on from there, one entry at a
    time. A slope counts as positive when it exceeds its own rounding error, so the result does not
    depend on the scale of the problem. ``Q`` may be singular.

    Args:
        q: positive semidefinite, shape ``(T, T)``, with a diagonal of about one.
        c: shape ``(T,)``, in the range of ``q`` (otherwise there is no minimum).

    Returns:
        The minimiser (one of them if ``q`` is singular), shape ``(T,)``.
    """
    w, settled = _exchanged(q, c)
    if not settled:
        definite = _definite(q)
        if definite is not q:
            w, settled = _exchanged(definite, c)
        if not settled:
            w = _lawson_hanson(definite, c, np.maximum(w, 0.0))
    return w


def nnls_rows(q: Array, c: Array) -> Array:
    """:func:`nnls` for each row of ``c``, together.

    Args:
        q: positive semidefinite, shape ``(T, T)``, with a diagonal of about one.
        c: shape ``(K, T)``, rows in the range of ``q``.

    Returns:
        The minimisers, shape ``(K, T)``.
    """
    w, left = _exchanged_rows(q, c)
    if len(left):
        definite = _definite(q)
        if definite is not q:
            w[left], left_now = _exchanged_rows(definite, c[left])
            left = left[left_now]
        for k in left:
            w[k] = nnls(definite, c[k])
    return w


def _exchanged(q: Array, c: Array) -> tuple[Array, bool]:
    """Block exchanges for :func:`nnls`, and whether they have settled."""
    size, free = len(c), c > 0
    magnitude, fewest, chances, w = np.abs(c), size + 1, 3, np.zeros(size)
    while chances:
        z, index = np.zeros(size), free.nonzero()[0]
        try:
            z[index] = np.linalg.solve(q[index[:, None], index], c[index])
        except np.linalg.LinAlgError:
            break
        if len(index) == size and z.min() > 0:
            return z, True
        noise = 4 * size * _EPS * (magnitude + np.abs(q) @ np.abs(z))
        wrong = np.where(free, -z, c - q @ z - noise) > 0
        count, w = int(wrong.sum()), z
        if not count:
            return w, True
        chances -= count >= fewest
        fewest = min(fewest, count)
        free ^= wrong
    return w, False


def _exchanged_rows(q: Array, c: Array) -> tuple[Array, npt.NDArray[np.intp]]:
    """Block exchanges for :func:`nnls_rows`, and the rows that have not settled."""
    w, free, size = np.zeros_like(c), c > 0, len(q)
    magnitude, eye = np.abs(q), np.eye(size)
    left = free.any(1).nonzero()[0]
    for _ in range(12):
        if not len(left):
            break
        mask, side = free[left], c[left]
        systems = np.where(mask[:, :, None] & mask[:, None, :], q, eye)
        try:
            z = np.linalg.solve(systems, np.where(mask, side, 0.0)[:, :, None])[:, :, 0]
        except np.linalg.LinAlgError:
            break
        noise = 4 * size * _EPS * (np.abs(side) + np.abs(z) @ magnitude)
        wrong = np.where(mask, -z, side - z @ q - noise) > 0
        unsettled: Mask = np.asarray(wrong.any(1))
        w[left] = np.where(unsettled[:, None], 0.0, z)
        free[left] = mask ^ wrong
        left = left[unsettled]
    return w, left


def _definite(q: Array) -> Array:
    """``q``, made positive definite where rounding of a coarser dtype left it indefinite."""
    smallest = float(np.linalg.eigvalsh(q)[0])
    if smallest >= -16 * len(q) * _EPS:
        return q
    return np.asarray(q - 2 * smallest * np.eye(len(q)))


def _lawson_hanson(q: Array, c: Array, w: Array) -> Array:
    """Add and remove one free entry at a time, from ``w`` of at least zero."""
    size, free = len(c), w > 0
    refused = np.zeros(size, dtype=bool)
    magnitude = np.abs(q)
    w, free = _to_minimum(q, c, w, free)
    for _ in range(10 * size):  # a bound for matrices that rounding has made indefinite
        slope = c - q @ w
        noise = 4 * size * _EPS * (np.abs(c) + magnitude @ w)
        slope[free | refused | (slope <= noise)] = 0.0
        entering = int(slope.argmax())
        if slope[entering] == 0:
            break
        free[entering] = True
        if _solve_free(q, c, free)[entering] <= 0:  # its slope was rounding after all
            free[entering], refused[entering] = False, True
            continue
        w, free = _to_minimum(q, c, w, free)
        refused[:] = False
    return w


def _to_minimum(q: Array, c: Array, w: Array, free: Mask) -> tuple[Array, Mask]:
    """Go to the minimum over the free entries, dropping those that reach zero on the way."""
    z = _solve_free(q, c, free)
    while (negative := free & (z <= 0)).any():
        steps = np.where(negative, w, 0.0) / np.where(negative, w - z, 1.0)
        step = steps[negative].min()
        w = w + step * (z - w)
        free = free & ~(negative & (steps <= step))
        w[~free] = 0.0
        z = _solve_free(q, c, free)
    return z, free


def _solve_free(q: Array, c: Array, free: Mask) -> Array:
    z, index = np.zeros(len(c)), free.nonzero()[0]
    part, side = q[index[:, None], index], c[index]
    try:
        z[index] = np.linalg.solve(part, side)
    except np.linalg.LinAlgError:
        z[index] = np.linalg.lstsq(part, side, rcond=None)[0]
    return z


def _min_norm_pair(aa: float, ab: float, ba: float, bb: float) -> tuple[float, float]:
    """In plain numbers: calls of NumPy would take most of the time."""
    cross = 0.5 * (ab + ba)
    first, second = bb - cross, aa - cross
    if not math.isfinite(first + second):
        return math.nan, math.nan
    if first <= 0 and second <= 0:  # identical rows: any weights do
        return 0.5, 0.5
    if second <= 0:
        return 1.0, 0.0
    if first <= 0:
        return 0.0, 1.0
    total = first + second
    return first / total, second / total
