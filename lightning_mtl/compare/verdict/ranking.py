"""Which methods may be the best, and how lucky the best of many is."""

from __future__ import annotations

import functools

import numpy as np
from numpy.typing import NDArray
from scipy import integrate, stats

from lightning_mtl.compare.verdict.differences import settled
from lightning_mtl.compare.verdict.joint import Joint
from lightning_mtl.compare.verdict.moderated import Moderated
from lightning_mtl.compare.verdict.scores import Array, check_level


def ties_with_best(scores: Joint | Moderated, alpha: float = 0.05) -> NDArray[np.bool_]:
    r"""Which methods may be the best one, ``(..., A)``.

    Hsu's multiple comparisons with the best (Ann. Statist. 9, 1981), with Bonferroni's quantile:
    :math:`k` stays where :math:`m_k - m_j + t_{1-\alpha/(A-1),\nu}\, \mathrm{se}_{kj} \ge 0` for
    all :math:`j`. The truly best one stays with probability :math:`1 - \alpha`.
    """
    check_level("alpha", alpha)
    methods = scores.scores.shape[-2]
    found = scores.between(range(methods), range(methods))
    found = settled(found, scores.scores, scores.scores)
    return np.asarray((found.upper(alpha / (methods - 1)) >= 0).all(-1))


@functools.cache
def expected_best(methods: int) -> float:
    """The mean of the largest of so many standard normal numbers."""
    if methods < 1:
        raise ValueError(f"Expected at least 1 method but found {methods}.")
    if methods == 1:
        return 0.0

    def density(x: float) -> float:
        return float(
            x * methods * np.exp(stats.norm.logpdf(x) + (methods - 1) * stats.norm.logcdf(x))
        )

    return float(integrate.quad(density, -10, 12, epsabs=1e-12, limit=200)[0])


def luck_of_the_best(scores: Moderated) -> Array:
    """How far above its true mean the best of so many methods stands by luck, were all alike.

    ``expected_best(A)`` standard errors of a mean, what seeds do to all alike left out; ``(...)``.
    """
    methods = scores.mean.shape[-1]
    luck: Array = expected_best(methods) * np.sqrt(scores.raw.mean(-1) / scores.seeds)
    return luck
