"""Two regressions from one input through a shared layer, with a trouble that is put in."""

from __future__ import annotations

from typing import Any

import torch
from lightning import LightningDataModule
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics import MeanSquaredError

from lightning_mtl import MultiTaskModule, Task

TASKS = ("first", "second")
Sample = tuple[Tensor, dict[str, Tensor]]


class Scaled(nn.Module):
    """Mean squared error times a number: a unit of measurement, say."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.scale = scale

    def forward(self, prediction: Tensor, target: Tensor) -> Tensor:
        return self.scale * (prediction - target).square().mean()


class TwoRegressions(MultiTaskModule):
    """A shared layer with tanh, and a linear head for each task; Adam, the rate falls to zero.

    Args:
        scale: what the loss of the first task is multiplied by.
        width: of the shared layer.
        lr: learning rate.
        weight_decay: of AdamW.
        steps: over which the rate falls along a cosine.
        baseline: single-task results for Δp, as in :class:`~lightning_mtl.MultiTaskModule`.
    """

    def __init__(
        self,
        scale: float = 1.0,
        width: int = 16,
        lr: float = 0.01,
        weight_decay: float = 0.0,
        steps: int = 600,
        baseline: str | None = None,
    ) -> None:
        losses = {"first": Scaled(scale), "second": Scaled(1.0)}
        super().__init__(
            tasks={name: Task(loss, MeanSquaredError()) for name, loss in losses.items()},
            baseline=baseline,
        )
        self.save_hyperparameters()
        self.trunk = nn.Sequential(nn.Linear(INPUTS, width), nn.Tanh())
        self.heads = nn.ModuleDict({name: nn.Linear(width, 1) for name in TASKS})

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        z = self.trunk(x)
        return {name: head(z)[:, 0] for name, head in self.heads.items()}

    def configure_optimizers(self) -> dict[str, Any]:
        own = self.hparams
        optimizer = torch.optim.AdamW(self.parameters(), own.lr, weight_decay=own.weight_decay)
        decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, own.steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": decay, "interval": "step"}}


INPUTS, FEATURES = 16, 8


class Teacher(LightningDataModule):
    """Targets of a fixed random network, of variance 1 before the noise; drawn when asked for.

    Args:
        noise: standard deviation of what nobody can predict.
        train: training samples; validation and test have 4,096 each.
        batch_size: samples a batch.
    """

    def __init__(self, noise: float = 0.1, train: int = 6_400, batch_size: int = 32) -> None:
        super().__init__()
        self.noise, self.train, self.batch_size = noise, train, batch_size

    def _drawn(self, stage: int, count: int) -> list[Sample]:
        fixed = torch.Generator().manual_seed(0)
        features = 2 * torch.randn(INPUTS, FEATURES, generator=fixed) / INPUTS**0.5
        mixtures = torch.randn(FEATURES, len(TASKS), generator=fixed)
        scale = (torch.tanh(torch.randn(4096, INPUTS, generator=fixed) @ features) @ mixtures).std(0)
        generator = torch.Generator().manual_seed(1 + stage)
        x = torch.randn(count, INPUTS, generator=generator)
        y = torch.tanh(x @ features) @ (mixtures / scale)
        y = y + self.noise * torch.randn(y.shape, generator=generator)
        columns = TensorDataset(x, *y.T)
        return [(row[0], dict(zip(TASKS, row[1:], strict=True))) for row in columns]

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self._drawn(0, self.train), self.batch_size, shuffle=True)  # type: ignore[arg-type] # a list is a data set

    def val_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self._drawn(1, 4096), 512)  # type: ignore[arg-type] # likewise

    def test_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self._drawn(2, 4096), 512)  # type: ignore[arg-type] # likewise
