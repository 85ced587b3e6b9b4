"""A gradient balancer that never gets two tasks in one step does nothing: say so."""

from __future__ import annotations

from collections.abc import Sequence

from lightning.pytorch.utilities.rank_zero import rank_zero_warn

_STEPS = 50


class Lonely:
    """Counts the first steps of a fit in which a gradient balancer had one task only.

    Args:
        balancer: its name.
    """

    def __init__(self, balancer: str) -> None:
        self.balancer = balancer
        self.steps = 0
        self.met: set[int] = set()

    def over(self, present: Sequence[int]) -> bool:
        """Take a step with the tasks ``present``; whether there is nothing more to find out."""
        if len(present) > 1:
            return True
        self.met.update(present)
        self.steps += 1
        if self.steps < _STEPS:
            return False
        if len(self.met) > 1:
            rank_zero_warn(
                f"{self.balancer} has had one task in each of the first {_STEPS} optimiser steps, "
                f"and with one there is nothing to balance: it trains as without it. Mix the tasks "
                f"in a batch, or join batches of different tasks into a step with "
                f"`accumulate_grad_batches`; balancing losses (`Scalarization`) works as it is."
            )
        return True
