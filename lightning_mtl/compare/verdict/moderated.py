"""Differences from variances that all methods estimate together: for few seeds and many methods."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy.special import digamma, polygamma

from lightning_mtl.compare.verdict.differences import Differences
from lightning_mtl.compare.verdict.scores import Array, as_scores

_SMALLEST = 1e-5  # of the median variance: the logarithm of zero would carry all others with it


class Moderated:
    r"""Blocked by seed, a variance for each method, moderated by empirical Bayes.

    With :math:`A` methods and :math:`n` seeds, and :math:`Z` the scores less each seed's mean over
    the methods: :math:`v_k = \mathrm{var}(Z_k)\, A/(A-1)` has about :math:`d = (n-1)(A-1)/A`
    degrees of freedom. It is drawn towards the others (:func:`shrunk`) but never below itself:
    :math:`w_k = \max(\tilde s_k^2, v_k)`, with :math:`\nu = \min(d_0 + d, A d)` degrees of freedom.
    Without that floor, variances that differ tenfold between methods make too many findings. With
    two methods this is the paired t.

    Args:
        scores: ``(..., methods, seeds)`` of at least two methods.

    Attributes:
        mean: of every method, ``(..., A)``.
        raw: :math:`v_k`, ``(..., A)``.
        variance: :math:`w_k`, ``(..., A)``.
        freedom: :math:`\nu`, ``(...)``.

    Raises:
        ValueError: one method only, or scores that :func:`as_scores` refuses.
    """

    def __init__(self, scores: Any) -> None:
        self.scores = as_scores(scores)
        methods, self.seeds = self.scores.shape[-2:]
        if methods < 2:
            raise ValueError("Expected at least 2 methods but found 1. Give those to compare.")
        self.mean = self.scores.mean(-1)
        blocked = self.scores - self.scores.mean(-2, keepdims=True)
        self.raw = blocked.var(-1, ddof=1) * methods / (methods - 1)
        freedom = (self.seeds - 1) * (methods - 1) / methods
        self.variance, self.freedom = shrunk(self.raw, freedom)

    def between(self, first: Sequence[int], second: Sequence[int]) -> Differences:
        """Differences of the methods ``first`` to the methods ``second``."""
        k, j = list(first), list(second)
        return Differences(
            self.mean[..., k, None] - self.mean[..., None, j],
            np.sqrt((self.variance[..., k, None] + self.variance[..., None, j]) / self.seeds),
            self.freedom[..., None, None],
            self.seeds,
        )


def shrunk(variances: Array, freedom: float) -> tuple[Array, Array]:
    r"""Variances drawn towards their common prior, floored at themselves, and their freedom.

    Smyth, "Linear models and empirical Bayes methods for assessing differential expression in
    microarray experiments", Stat. Appl. Genet. Mol. Biol. 3 (2004), section 6.2: with
    :math:`e_k = \ln v_k - \psi(d/2) + \ln(d/2)` and :math:`x = \mathrm{var}(e) - \psi'(d/2)`,
    :math:`d_0 = 2\psi'^{-1}(x)` and :math:`s_0^2 = \exp(\bar e + \psi(d_0/2) - \ln(d_0/2))`;
    where :math:`x \le 0` the variances are taken as equal. Deviations: the floor, and that then
    their mean stands for all of them.

    Args:
        variances: ``(..., A)``.
        freedom: :math:`d` of each.

    Returns:
        :math:`w`, ``(..., A)``, and :math:`\nu`, ``(...)``.
    """
    methods = variances.shape[-1]
    least = _SMALLEST * np.median(variances, axis=-1, keepdims=True)
    least = np.where(least > 0, least, _SMALLEST * variances.max(-1, keepdims=True))
    v = np.maximum(variances, np.where(least > 0, least, 1.0))
    e = np.log(v) - digamma(freedom / 2) + np.log(freedom / 2)
    x = (e.var(-1, ddof=1) if methods > 1 else np.zeros(v.shape[:-1])) - polygamma(1, freedom / 2)
    differ = x > 0
    prior = 2 * inverse_trigamma(np.where(differ, x, 1.0))
    location = np.exp(e.mean(-1) + digamma(prior / 2) - np.log(prior / 2))[..., None]
    d0 = prior[..., None]
    pulled = (d0 * location + freedom * v) / (d0 + freedom)
    moderate = np.where(differ[..., None], pulled, v.mean(-1, keepdims=True))
    found = np.where(variances.max(-1, keepdims=True) > 0, np.maximum(moderate, v), 0.0)
    return found, np.where(
        differ, np.minimum(prior + freedom, methods * freedom), methods * freedom
    )


def inverse_trigamma(x: Array) -> Array:
    """``y`` with ``polygamma(1, y) == x``, for ``x`` above 0, by Newton's method on ``1 / x``."""
    x = np.asarray(x, dtype=np.float64)
    y = 0.5 + 1 / x
    for _ in range(12):  # it converges from below, in four to six steps
        trigamma = polygamma(1, y)
        y = y + trigamma * (1 - trigamma / x) / polygamma(2, y)
    return np.where(x > 1e7, 1 / np.sqrt(x), np.where(x < 1e-6, 1 / x, y))
