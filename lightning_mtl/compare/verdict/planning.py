"""What would have shown, and how many seeds would show more."""

from __future__ import annotations

import numpy as np
from scipy import stats

from lightning_mtl.compare.verdict.differences import Differences
from lightning_mtl.compare.verdict.scores import Array, check_level, check_margin


def smallest_that_shows(
    differences: Differences, alpha: float = 0.05, power: float = 0.8, tried: int | None = None
) -> Array:
    r"""The advantage that :func:`better_than_all` finds with probability ``power``, ``(..., K)``.

    :math:`(t_{1-\alpha/K,\nu} + t_{p,\nu})\, \max_j \mathrm{se}_{kj}` with :math:`p` the ``power``
    to the :math:`1/J`: the method has to pass against each of J rivals that are all alike. An
    approximation, with the errors that were found; with three seeds it is a rough one.
    """
    check_level("alpha", alpha)
    check_level("power", power)
    methods, rivals = differences.estimate.shape[-2:]
    tried = methods if tried is None else tried
    return _shows(differences.error, differences.freedom, alpha / tried, power ** (1 / rivals))


def _shows(error: Array, freedom: Array, alpha: float, power: float) -> Array:
    quantiles = stats.t.isf(alpha, freedom) + stats.t.ppf(power, freedom)
    shows: Array = (quantiles * error).max(-1)
    return shows


def seeds_needed(
    differences: Differences,
    effect: float,
    alpha: float = 0.05,
    power: float = 0.8,
    tried: int | None = None,
    most: int = 200,
) -> int | None:
    """How many seeds in all would show ``effect``, for the one method in ``differences``.

    Errors are taken to shrink with the root of the number of seeds, degrees of freedom to grow with
    that number less one.

    Args:
        differences: of the method to its rivals, as found so far.
        effect: an advantage above 0.
        alpha: the error rate.
        power: with what probability it should show.
        tried: how many methods to correct for.
        most: where to give up.

    Returns:
        The number, at least two; ``None`` when it is above ``most``.
    """
    check_margin(effect)
    _, rivals = differences.estimate.shape[-2:]
    level = alpha / (1 if tried is None else tried)
    if not np.isfinite(differences.error).all():
        return None
    one = differences.error * np.sqrt(differences.seeds)
    for seeds in range(2, most + 1):
        freedom = differences.freedom * (seeds - 1) / (differences.seeds - 1)
        found = _shows(one / np.sqrt(seeds), freedom, level, power ** (1 / rivals))
        if float(found.max()) <= effect:
            return seeds
    return None
