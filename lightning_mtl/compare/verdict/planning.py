"""What would have shown, and how many seeds would show more."""

from __future__ import annotations

import numpy as np

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
    return np.asarray(differences.reach(alpha / tried, power ** (1 / rivals)).max(-1))


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
    for seeds in range(2, most + 1):
        found = differences.over(seeds).reach(level, power ** (1 / rivals))
        if float(found.max()) <= effect:
            return seeds
    return None
