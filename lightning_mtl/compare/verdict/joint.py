"""The rule of a comparison without a confirmation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lightning_mtl.compare.verdict.differences import Differences
from lightning_mtl.compare.verdict.moderated import Moderated
from lightning_mtl.compare.verdict.paired import Paired


class Joint:
    """:class:`Moderated` with four fifths of the error rate, :class:`Paired` with one fifth.

    Moderated variances are far better with few seeds; but blocks are means over all methods, so one
    method with a spread many times that of the others hides what is plain for two steady ones.
    A difference is found by either. With two methods the rules are one, and get all of the rate.

    Args:
        scores: ``(..., methods, seeds)`` of at least two methods.
    """

    def __init__(self, scores: Any) -> None:
        self.moderated = Moderated(scores)
        self.scores = self.moderated.scores
        self.paired = Paired(self.scores)

    def between(self, first: Sequence[int], second: Sequence[int]) -> Differences:
        """Differences of the methods ``first`` to the methods ``second``."""
        pairs = self.paired.between(first, second)
        if self.scores.shape[-2] == 2:
            return pairs
        return self.moderated.between(first, second)._replace(other=pairs)
