"""Combinations of rows with given projections on the unit rows: NumPy, float64."""

from __future__ import annotations

import numpy as np

from lightning_mtl.numerics.quadratic import Array, min_norm_point, unit_gramian

_EPS = float(np.finfo(np.float64).eps)


def with_projections(cosines: Array, wanted: Array, resolution: float = _EPS) -> Array:
    r"""Coefficients :math:`v = C^+ p` of unit rows, whose sum has the projections ``wanted``.

    The shortest vector with these projections, or with the nearest ones in the least-squares sense
    where rows depend on each other.

    Args:
        cosines: inner products :math:`C` of the unit rows, shape ``(T, T)``.
        wanted: :math:`p`, shape ``(T,)``.
        resolution: relative rounding error of the cosines; eigenvalues below ``4 T`` times that,
            relative to the largest, count as zero.

    Returns:
        :math:`v`, shape ``(T,)``.
    """
    cutoff = 4 * len(cosines) * resolution
    inverse = np.linalg.pinv(cosines, rcond=cutoff, hermitian=True)
    return np.asarray(inverse @ wanted)


def equal_projections(gramian: Array, resolution: float = _EPS) -> Array:
    r"""Weights, of sum one, of the combination with equal projections on all unit rows.

    :math:`w_t \propto (C^+ 1)_t / d_t` with :math:`d_t` the norm of row ``t``. Where these
    projections are not equal after all (rows that depend on each other), are not positive, or make
    a combination longer than the longest row, which no convex one is, the combination of
    non-negative weights with the largest smallest projection takes its place.

    Args:
        gramian: inner products of the rows, shape ``(T, T)``.
        resolution: relative rounding error of its entries.

    Returns:
        Weights of shape ``(T,)``, some of which may be negative. Zero rows are left out and get 0;
        equal weights if all rows are zero. NaN if the Gramian is not finite.
    """
    size = len(gramian)
    if not np.isfinite(gramian).all():
        return np.full(size, np.nan)
    cosines, norms = unit_gramian(gramian)
    nonzero = np.flatnonzero(norms)
    if not len(nonzero):
        return np.full(size, 1.0 / size)
    if len(nonzero) < size:
        cosines, norms = cosines[nonzero[:, None], nonzero], norms[nonzero]
    shares = _equal_shares(cosines, norms, resolution)
    if shares is None:
        shares = min_norm_point(cosines) * (norms.min() / norms)
    weights = np.zeros(size)
    weights[nonzero] = shares / shares.sum()
    return weights


def _equal_shares(cosines: Array, norms: Array, resolution: float) -> Array | None:
    v = with_projections(cosines, np.ones(len(norms)), resolution)
    projections = cosines @ v
    shares = v * (norms.min() / norms)
    total = shares.sum()
    equal = np.abs(projections - 1.0).max() <= np.sqrt(resolution)
    length = np.sqrt(max(float(v @ projections), 0.0)) * norms.min()
    return shares if equal and length <= total * norms.max() else None  # not if total < 0 either
