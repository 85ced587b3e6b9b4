r"""Claims about several methods at once, by bounds on their differences.

"Method k is better than *every* rival" is an intersection-union test: each comparison is made at
the level of the whole, since all have to hold, and only the number of methods that are tried costs
a correction.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from lightning_mtl.compare.verdict.differences import Differences
from lightning_mtl.compare.verdict.scores import Array, check_level, check_margin


def better_than_all(
    differences: Differences, alpha: float = 0.05, tried: int | None = None
) -> NDArray[np.bool_]:
    r"""Which of K methods are better than every one of J rivals, ``(..., K)``.

    :math:`m_k - m_j > t_{1-\alpha/K,\nu}\, \mathrm{se}_{kj}` for all :math:`j`. Where no method is
    better than the best rival, one is named with a probability of at most ``alpha``.

    Args:
        differences: of the K methods to the J rivals.
        alpha: the error rate.
        tried: how many methods to correct for; all K unless they were chosen on other data.
    """
    check_level("alpha", alpha)
    tried = differences.estimate.shape[-2] if tried is None else tried
    return np.asarray((differences.lower(alpha / tried) > 0).all(-1))


def advantage(
    differences: Differences, alpha: float = 0.05, tried: int | None = None
) -> tuple[Array, Array, Array]:
    r"""By how much each method is ahead of the best rival: estimate, lower and upper bound.

    The advantage is :math:`\min_j (\mu_k - \mu_j)`. The lower bounds are below it for all methods
    at once, each upper bound is above it, both with probability :math:`1 - \alpha`.
    """
    check_level("alpha", alpha)
    methods, rivals = differences.estimate.shape[-2:]
    tried = methods if tried is None else tried
    return (
        differences.estimate.min(-1),
        differences.lower(alpha / tried).min(-1),
        differences.upper(alpha / rivals).min(-1),
    )


def largest_hidden(differences: Differences, alpha: float = 0.05) -> Array:
    r"""What no method's advantage over the best rival exceeds, at level ``alpha``, ``(...)``.

    :math:`\min_j \max_k (m_k - m_j + t_{1-\alpha/J,\nu}\, \mathrm{se}_{kj})`. The largest over the
    methods needs no correction, since the truly best of them is one of them; the choice of the
    rival does.
    """
    check_level("alpha", alpha)
    rivals = differences.estimate.shape[-1]
    return np.asarray(differences.upper(alpha / rivals).max(-2).min(-1))


def as_good_within(
    differences: Differences, margin: float, alpha: float = 0.05
) -> NDArray[np.bool_]:
    """Which rivals no method exceeds by ``margin``, ``(..., J)``; false for one at most ``alpha``.

    Args:
        differences: of the K methods to the J rivals.
        margin: the smallest difference that matters, fixed before the scores are seen.
        alpha: the error rate.
    """
    check_level("alpha", alpha)
    check_margin(margin)
    rivals = differences.estimate.shape[-1]
    return np.asarray((differences.upper(alpha / rivals) < margin).all(-2))


def simultaneous_intervals(differences: Differences, alpha: float = 0.05) -> tuple[Array, Array]:
    """Two-sided intervals that hold for all differences at once, each ``(..., K, J)``."""
    check_level("alpha", alpha)
    methods, rivals = differences.estimate.shape[-2:]
    level = alpha / (2 * methods * rivals)
    return differences.lower(level), differences.upper(level)
