"""Two regressions from one input through a shared layer, with a trouble that is put in."""

from __future__ import annotations

from typing import Any

import torch
from lightning import LightningDataModule
from torch import Tensor, nn
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    RandomSampler,
    SequentialSampler,
    TensorDataset,
)
from torchmetrics import MeanSquaredError

from lightning_mtl import MultiTaskModule, Task

TASKS = ("first", "second")
INPUTS, FEATURES = 16, 8
Batch = tuple[Tensor, dict[str, Tensor]]


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
        linear: leave the tanh out.
        lr: learning rate.
        weight_decay: of AdamW.
        steps: over which the rate falls along a cosine.
        baseline: single-task results for Δp, as in :class:`~lightning_mtl.MultiTaskModule`.
    """

    def __init__(
        self,
        scale: float = 1.0,
        width: int = 16,
        linear: bool = False,
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
        self.trunk = nn.Sequential(nn.Linear(INPUTS, width), nn.Identity() if linear else nn.Tanh())
        self.heads = nn.ModuleDict({name: nn.Linear(width, 1) for name in TASKS})

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        z = self.trunk(x)
        return {name: head(z)[:, 0] for name, head in self.heads.items()}

    def configure_optimizers(self) -> dict[str, Any]:
        own = self.hparams
        optimizer = torch.optim.AdamW(self.parameters(), own.lr, weight_decay=own.weight_decay)
        decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, own.steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": decay, "interval": "step"}}


class Teacher(LightningDataModule):
    """Targets of a fixed random network, of variance 1 before the noise; drawn when asked for.

    Args:
        noise: standard deviation of what nobody can predict.
        train: training samples; validation and test have 4,096 each.
        batch_size: samples a batch.
        linear: leave the tanh out.
    """

    def __init__(
        self, noise: float = 0.1, train: int = 6_400, batch_size: int = 32, linear: bool = False
    ) -> None:
        super().__init__()
        self.noise, self.train, self.batch_size = noise, train, batch_size
        self.bend = nn.Identity() if linear else nn.Tanh()

    def _loader(self, stage: int, count: int, batch_size: int, *, shuffle: bool) -> DataLoader[Any]:
        fixed = torch.Generator().manual_seed(0)
        features = 2 * torch.randn(INPUTS, FEATURES, generator=fixed) / INPUTS**0.5
        mixtures = torch.randn(FEATURES, len(TASKS), generator=fixed)
        many = torch.randn(4096, INPUTS, generator=fixed)
        scale = (self.bend(many @ features) @ mixtures).std(0)
        generator = torch.Generator().manual_seed(1 + stage)
        x = torch.randn(count, INPUTS, generator=generator)
        y = self.bend(x @ features) @ (mixtures / scale)
        rows = TensorDataset(x, y + self.noise * torch.randn(y.shape, generator=generator))
        order = RandomSampler(rows) if shuffle else SequentialSampler(rows)
        batches = BatchSampler(order, batch_size, drop_last=False)  # rows of a batch by one index
        return DataLoader(rows, sampler=batches, batch_size=None, collate_fn=named)

    def train_dataloader(self) -> DataLoader[Any]:
        return self._loader(0, self.train, self.batch_size, shuffle=True)

    def val_dataloader(self) -> DataLoader[Any]:
        return self._loader(1, 4096, 512, shuffle=False)

    def test_dataloader(self) -> DataLoader[Any]:
        return self._loader(2, 4096, 512, shuffle=False)


def named(rows: tuple[Tensor, Tensor]) -> Batch:
    """A batch with a target for each task."""
    return rows[0], dict(zip(TASKS, rows[1].T, strict=True))
