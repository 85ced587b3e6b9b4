"""A balancer that is equal weighting by another name, in a run of its own."""

from __future__ import annotations

import torch
from lightning import LightningModule, Trainer
from torch import Tensor

from lightning_mtl import LossBalancer


class Copy(LossBalancer):
    """Weights of one; the initial weights are drawn anew, and with them what the run draws after.

    Args:
        number: which copy; with the run's own seed it says which numbers are drawn.
    """

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number

    def loss_weights(self, losses: Tensor) -> Tensor:
        """Ones, shape ``(T,)``."""
        return torch.ones_like(losses)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Reset every layer that can be reset."""
        torch.manual_seed(1000 * (torch.initial_seed() + 1) + self.number)
        for layer in pl_module.modules():
            if hasattr(layer, "reset_parameters"):
                layer.reset_parameters()
