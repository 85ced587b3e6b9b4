"""Differences paired by seed, each with a spread of its own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from lightning_mtl.compare.verdict.differences import Differences
from lightning_mtl.compare.verdict.scores import as_scores


class Paired:
    """Student's paired t: what a seed does to both methods drops out of their difference.

    Args:
        scores: ``(..., methods, seeds)``.
    """

    def __init__(self, scores: Any) -> None:
        self.scores = as_scores(scores)

    def between(self, first: Sequence[int], second: Sequence[int]) -> Differences:
        """Differences of the methods ``first`` to the methods ``second``."""
        one = self.scores[..., list(first), :]
        other = self.scores[..., list(second), :]
        by_seed = one[..., :, None, :] - other[..., None, :, :]
        seeds = self.scores.shape[-1]
        return Differences(
            by_seed.mean(-1),
            by_seed.std(-1, ddof=1) / np.sqrt(seeds),
            np.float64(seeds - 1) * np.ones((*by_seed.shape[:-3], 1, 1)),
            seeds,
        )
