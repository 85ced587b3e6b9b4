"""Differences between methods, each with its standard error."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from scipy import stats

from lightning_mtl.compare.verdict.scores import Array

_SAME = 1e-12  # of the scores' size: rounding, not chance


class Differences(NamedTuple):
    """Of some methods to others.

    Attributes:
        estimate: mean of the one less mean of the other, ``(..., K, J)``.
        error: its standard error; infinite where nothing can be concluded.
        freedom: degrees of freedom of the error, of a shape that broadcasts to these.
        seeds: how many the means are over.
    """

    estimate: Array
    error: Array
    freedom: Array
    seeds: int

    def lower(self, level: float) -> Array:
        """Bounds below which the difference is with probability ``level`` each."""
        return self.estimate - self._reach(level)

    def upper(self, level: float) -> Array:
        """Bounds above which the difference is with probability ``level`` each."""
        return self.estimate + self._reach(level)

    def _reach(self, level: float) -> Array:
        quantile = stats.t.isf(level, self.freedom)
        reach: Array = quantile * self.error
        return reach


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
    error = np.where(constant, np.where(zero, 0.0, np.inf), differences.error)
    return differences._replace(error=error)
