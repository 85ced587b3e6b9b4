"""Methods against a baseline that was itself measured over seeds."""

from __future__ import annotations

from typing import Any

import numpy as np

from lightning_mtl.compare.verdict.differences import Differences
from lightning_mtl.compare.verdict.moderated import shrunk
from lightning_mtl.compare.verdict.scores import as_scores


def against_baseline(scores: Any, baseline: Any, moderate: bool = True) -> Differences:
    r"""Differences of every method to a baseline with seeds of its own, ``(..., A, 1)``.

    Welch's: :math:`\mathrm{se}^2 = s_k^2/n + s_b^2/n_b`, with Satterthwaite's degrees of freedom.
    Leaving out the baseline's part, as if it were known, makes too many findings.

    Args:
        scores: ``(..., A, n)``.
        baseline: ``(..., n_b)``, or ``(..., A, n_b)`` where it depends on the method (a relative
            score moves with its baseline the more, the larger it is).
        moderate: draw the variances of the methods together, as :class:`Moderated` does; with one
            method it makes no difference.

    Raises:
        ValueError: fewer than two seeds of either.
    """
    own = as_scores(scores)
    base = np.asarray(baseline, dtype=np.float64)
    base = as_scores(base[..., None, :] if base.ndim < own.ndim else base)
    methods, n = own.shape[-2:]
    n_b = base.shape[-1]
    variance, freedom = own.var(-1, ddof=1), np.full(own.shape[:-2], float(n - 1))
    if moderate and methods > 1:
        variance, freedom = shrunk(variance, n - 1)
    first, second = variance / n, base.var(-1, ddof=1) / n_b
    total = first + second
    parts = first**2 / freedom[..., None] + second**2 / (n_b - 1)
    welch = np.divide(total**2, parts, out=np.ones_like(total), where=parts > 0)
    estimate = own.mean(-1) - base.mean(-1)
    error = np.where(total > 0, np.sqrt(total), np.inf)  # nothing varies: nothing is known
    return Differences(estimate[..., None], error[..., None], welch[..., None], n)
