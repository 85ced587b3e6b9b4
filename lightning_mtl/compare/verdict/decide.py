"""The four answers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from lightning_mtl.compare.verdict.bounds import (
    advantage,
    as_good_within,
    better_than_all,
    largest_hidden,
)
from lightning_mtl.compare.verdict.differences import Differences
from lightning_mtl.compare.verdict.planning import seeds_needed, smallest_that_shows

Kind = Literal["yes", "as good", "bounded", "open"]


@dataclass(frozen=True)
class Verdict:
    """Whether one of K methods is better than all of J rivals.

    Attributes:
        kind: ``yes``: one is. ``as good``: a rival is as good as any of them, within the margin.
            ``bounded``: neither was shown, although a difference as large as the margin would have
            shown (in four of five comparisons). ``open``: neither, and it would not have.
        method: index of the method that is better, or else of the one that is ahead.
        rival: index of the rival that is as good, or else of the best one.
        effect: by how much ``method`` is ahead of the best rival.
        beside: by how much it is ahead of ``rival``.
        low: lower bound of ``effect``.
        high: upper bound of it.
        hidden: what no method's advantage exceeds.
        shows: the advantage that would have shown with probability 0.8.
        needed: seeds in all that would show the margin, ``None`` for too many.
        alpha: the error rate, of "yes" and of "as good" each.
        margin: the smallest difference that matters.
    """

    kind: Kind
    method: int
    rival: int
    effect: float
    beside: float
    low: float
    high: float
    hidden: float
    shows: float
    needed: int | None
    alpha: float
    margin: float


def decide(
    differences: Differences,
    margin: float,
    alpha: float = 0.05,
    power: float = 0.8,
) -> Verdict:
    """Answer from the differences of K methods to J rivals, ``(K, J)``.

    A difference that is certain but, as certainly, smaller than the margin is no "yes".

    Args:
        differences: of the methods to the rivals; see :func:`settled` for those that do not vary.
        margin: the smallest difference that matters, fixed before the scores are seen.
        alpha: the error rate.
        power: what counts as "would have shown".
    """
    if differences.estimate.ndim != 2:
        raise ValueError(
            f"Expected differences of shape (methods, rivals) but found "
            f"{differences.estimate.shape}. Decide one comparison at a time."
        )
    estimate, low, high = advantage(differences, alpha)
    winners = better_than_all(differences, alpha)
    good = as_good_within(differences, margin, alpha)
    shows = smallest_that_shows(differences, alpha, power)
    ahead = np.where(winners, estimate, -np.inf) if winners.any() else estimate
    k = int(np.argmax(ahead))
    reach = differences.upper(alpha / differences.estimate.shape[1]).max(0)
    j = int(np.argmin(reach if good.any() else differences.estimate[k]))
    kind: Kind = "open"
    if good.any():
        kind = "as good"
    elif winners.any():
        kind = "yes"
    elif shows[k] <= margin:
        kind = "bounded"
    return Verdict(
        kind,
        k,
        j,
        float(estimate[k]),
        float(differences.estimate[k, j]),
        float(low[k]),
        float(high[k]),
        float(largest_hidden(differences, alpha)),
        float(shows[k]),
        seeds_needed(differences.of(k), margin, alpha, power, tried=len(estimate)),
        alpha,
        margin,
    )
