"""Is one method better than others, judged from scores over seeds? Pure functions on arrays.

Scores are float64 arrays ``(..., methods, seeds)``, larger is better, and a column belongs to one
seed that all methods share; dimensions before these two are independent repetitions, with which
error rates are simulated. Everything here is numpy and scipy, and knows nothing of trainings.
"""

from __future__ import annotations

from lightning_mtl.compare.verdict.baseline import against_baseline
from lightning_mtl.compare.verdict.bounds import (
    advantage,
    as_good_within,
    better_than_all,
    largest_hidden,
    simultaneous_intervals,
)
from lightning_mtl.compare.verdict.decide import Verdict, decide
from lightning_mtl.compare.verdict.differences import Differences, settled
from lightning_mtl.compare.verdict.joint import Joint
from lightning_mtl.compare.verdict.moderated import Moderated
from lightning_mtl.compare.verdict.paired import Paired
from lightning_mtl.compare.verdict.planning import seeds_needed, smallest_that_shows
from lightning_mtl.compare.verdict.ranking import expected_best, luck_of_the_best, ties_with_best
from lightning_mtl.compare.verdict.scores import as_scores

__all__ = [
    "Differences",
    "Joint",
    "Moderated",
    "Paired",
    "Verdict",
    "advantage",
    "against_baseline",
    "as_good_within",
    "as_scores",
    "better_than_all",
    "decide",
    "expected_best",
    "largest_hidden",
    "luck_of_the_best",
    "seeds_needed",
    "settled",
    "simultaneous_intervals",
    "smallest_that_shows",
    "ties_with_best",
]
