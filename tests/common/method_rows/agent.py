"""Rows of the method whose weights an agent chooses: drawn at random, and by the agent."""

from __future__ import annotations

from torch import Tensor

from lightning_mtl.loss_balancers.improvable_gap_v2 import ImprovableGapV2
from tests.common.method_rows.row import Method


class EpochAStep(ImprovableGapV2):
    """Every step is an epoch, so that the agent acts soon."""

    def update(self, losses: Tensor, after: Tensor | None = None) -> None:
        super().update(losses, after)
        self.end_epoch()


def acting() -> EpochAStep:
    """It acts from the second step on, and learns from the third on."""
    return EpochAStep(
        base_epoch=0, learning_epoch=1, acting_epoch=1, learn_every=2, capacity=8, batch_size=4
    )


ROWS = [
    Method("ImprovableGapV2", ImprovableGapV2, scale=0.0, equivariant=False, has_state=True),
    Method(
        "ImprovableGapV2(acting)",
        acting,
        scale=0.0,
        equivariant=False,
        has_state=True,
        warm_up=3,
    ),
]
