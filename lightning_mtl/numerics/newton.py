"""Alpha-fair weights of task gradients, by Newton's method in relative steps: NumPy, float64."""

from __future__ import annotations

import numpy as np

from lightning_mtl.numerics.quadratic import Array, min_norm_point, unit_gramian

_EPS = float(np.finfo(np.float64).eps)
_STEPS = 50  # near-opposite rows double their weights each step: 26 steps for a gap of 1e-5
_LOWEST = -300.0  # logarithm of the smallest weight, relative to that of orthogonal rows


def alpha_fair(
    gramian: Array,
    alpha: float = 1.0,
    preference: Array | None = None,
    resolution: float = _EPS,
) -> Array:
    r"""Solve :math:`M w = p \, w^{-1/\alpha}`, elementwise, for :math:`w > 0`.

    There is one solution, unless a convex combination of the rows is zero: then there is none.

    Args:
        gramian: inner products :math:`M` of the rows, shape ``(T, T)``.
        alpha: :math:`\alpha`, above zero.
        preference: :math:`p`, above zero, shape ``(T,)``; divided by its mean. ``None`` for ones.
        resolution: relative rounding error of the entries of ``gramian``. A convex combination of
            the unit rows counts as zero when its squared norm is at most four times that.

    Returns:
        Weights of shape ``(T,)``. Zero rows are left out and get 0. If the convex combination
        :math:`\sum_t k_t \, g_t / d_t` of the unit rows is zero, a multiple of
        :math:`k_t / d_t`, with which the rows cancel: the multiple that solves the equation for
        identical rows. NaN if the Gramian is not finite.
    """
    size = len(gramian)
    if not np.isfinite(gramian).all():
        return np.full(size, np.nan)
    weights = np.zeros(size)
    cosines, norms = unit_gramian(gramian)
    p = np.ones(size) if preference is None else preference
    nonzero = np.flatnonzero(norms)
    if not len(nonzero):
        return weights
    if len(nonzero) < size:
        cosines, norms, p = cosines[nonzero[:, None], nonzero], norms[nonzero], p[nonzero]
    p = p / p.mean()
    # u = w * d solves C u = q u^(-1/alpha). Logarithms, because d^(1/alpha) may overflow.
    log_q = np.log(p) + (1.0 / alpha - 1.0) * np.log(norms)
    orthogonal = log_q * (alpha / (1.0 + alpha))
    largest = orthogonal.max()
    start = np.exp(orthogonal - largest)
    zero = 4.0 * resolution
    u = start * _newton(cosines, start, alpha, zero)
    slopes = cosines @ u
    # No convex combination k is shorter than k.slopes / |u|, so this proves that none is zero.
    if slopes.min() > 0 and slopes.min() ** 2 > zero * (u @ slopes):
        weights[nonzero] = u * np.exp(largest) / norms
        return weights
    k = min_norm_point(cosines)
    if k @ cosines @ k <= zero:
        top = log_q[k > 0].max()
        pull = np.log(k @ np.exp(np.minimum(log_q - top, 0.0))) + top
        u, largest = k, (alpha * pull + np.log(len(k))) / (1.0 + alpha)
    weights[nonzero] = u * np.exp(largest) / norms
    return weights


def _newton(cosines: Array, start: Array, alpha: float, zero: float) -> Array:
    r"""Solve :math:`S v = a \, v^{-1/\alpha}` with :math:`S = C_{ij} s_i s_j`, :math:`a = s^2`.

    The stationarity of a convex function, :math:`v^\top S v / 2` minus a sum of powers (logarithms
    for alpha 1). The unknowns are relative steps :math:`\delta`, and the Hessian is scaled to a
    diagonal of ones, so that nothing depends on the scale of a row. Upwards :math:`v` is multiplied
    by :math:`1 + \delta`. Downwards it is divided by :math:`(1 - \delta / \alpha)^\alpha`, which
    never reaches zero, and is the solution at once where the other rows alone push a weight down;
    with that no line search is needed.

    Returns:
        :math:`v`; with as many digits as there are if the rows nearly cancel.
    """
    a = start * start
    matrix = cosines * start * start[:, None]
    power = 1.0 - 1.0 / alpha
    log_v = np.zeros(len(a))
    before = np.inf
    for _ in range(_STEPS):
        v = np.exp(log_v)
        product = matrix @ v
        if v @ product <= zero * (start @ v) ** 2:
            break  # a convex combination that is zero
        pull = a * np.exp(power * log_v)
        gradient = v * product - pull
        diagonal = v * v * a + pull / alpha
        root = np.sqrt(diagonal)
        ratio = v / root
        hessian = matrix * ratio * ratio[:, None]
        hessian.flat[:: len(a) + 1] = 1.0
        try:
            step = np.linalg.solve(hessian, gradient / -root) / root
        except np.linalg.LinAlgError:
            step = gradient / -diagonal
        if gradient @ step > 0:  # rounding has made the Hessian indefinite
            step = gradient / -diagonal
        size = np.abs(step).max()
        if size < 0.1 * min(1.0, alpha):  # it converges quadratically from here
            log_v += np.log1p(step)
            if size < 1e-8 or size > 0.5 * before:  # the latter: only rounding is left
                break
            before = size
        else:
            before = np.inf
            down = np.minimum(step, 0.0)
            log_v += np.log1p(step - down) - alpha * np.log1p(down / -alpha)
            np.maximum(log_v, _LOWEST, out=log_v)
    return np.exp(log_v)
