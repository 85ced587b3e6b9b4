"""Differences between methods, each with its standard error."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from scipy import stats

from lightning_mtl.compare.verdict.scores import Array

_OTHER = 0.2  # of the error rate, for a second rule
_SAME = 1e-12  # of the scores' size: rounding, not chance


class Differences(NamedTuple):
    """Of some methods to others.

    Attributes:
        estimate: mean of the one less mean of the other, ``(..., K, J)``.
        error: its standard error; infinite where nothing can be concluded.
        freedom: degrees of freedom of the error, of a shape that broadcasts to these.
        seeds: how many the means are over.
        other: the same by a second rule. A bound is then the better of the two, the first with four
            fifths of the error rate and the second with one.
    """

    estimate: Array
    error: Array
    freedom: Array
    seeds: int
    other: Differences | None = None

    def lower(self, level: float) -> Array:
        """Bounds below which the difference is with probability ``level`` each."""
        return self.estimate - self.reach(level)

    def upper(self, level: float) -> Array:
        """Bounds above which the difference is with probability ``level`` each."""
        return self.estimate + self.reach(level)

    def reach(self, level: float, power: float | None = None) -> Array:
        """How far a bound is from the estimate, and what has to be added for some ``power``."""
        share = level if self.other is None else (1 - _OTHER) * level
        own = stats.t.isf(share, self.freedom)
        if power is not None:
            own = own + stats.t.ppf(power, self.freedom)
        found: Array = own * self.error
        if self.other is None:
            return found
        return np.minimum(found, self.other.reach(_OTHER * level, power))

    def of(self, method: int) -> Differences:
        """Those of one method, still ``(1, J)``."""
        rows = slice(method, method + 1)
        shape = self.estimate.shape
        return Differences(
            self.estimate[rows],
            self.error[rows],
            np.broadcast_to(self.freedom, shape)[rows],
            self.seeds,
            None if self.other is None else self.other.of(method),
        )

    def over(self, seeds: int) -> Differences:
        """As they would be with other seeds: errors shrink with the root of their number."""
        return Differences(
            self.estimate,
            self.error * np.sqrt(self.seeds / seeds),
            self.freedom * (seeds - 1) / (self.seeds - 1),
            seeds,
            None if self.other is None else self.other.over(seeds),
        )


def settled(differences: Differences, first: Array, second: Array) -> Differences:
    """``differences`` with those marked that do not vary over the seeds at all.

    A paired test calls a constant difference certain. It is not chance at work: no error can be
    given (infinite). Where the difference is zero in every seed the two are the same (error 0).

    Args:
        differences: of ``first`` to ``second``.
        first: scores ``(..., K, seeds)``.
        second: scores ``(..., J, seeds)``.
    """
    by_seed = first[..., :, None, :] - second[..., None, :, :]
    size = np.maximum(np.abs(first).max(-1)[..., :, None], np.abs(second).max(-1)[..., None, :])
    constant = np.ptp(by_seed, axis=-1) <= _SAME * size
    zero = np.abs(differences.estimate) <= _SAME * size
    fixed = np.where(zero, 0.0, np.inf)
    other = differences.other
    return differences._replace(
        error=np.where(constant, fixed, differences.error),
        other=other and other._replace(error=np.where(constant, fixed, other.error)),
    )
