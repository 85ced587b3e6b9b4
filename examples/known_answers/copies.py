"""A callback that makes another run of the same method, so that its copies differ by luck alone."""

from __future__ import annotations

import torch
from lightning import Callback, LightningModule, Trainer


class OtherStart(Callback):
    """Draws the initial weights anew, and with them what the run draws after.

    Args:
        number: which start; with the run's own seed it says which numbers are drawn.
    """

    def __init__(self, number: int) -> None:
        self.number = number

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Reset every layer that can be reset."""
        torch.manual_seed(1000 * (torch.initial_seed() + 1) + self.number)
        for layer in pl_module.modules():
            if hasattr(layer, "reset_parameters"):
                layer.reset_parameters()
