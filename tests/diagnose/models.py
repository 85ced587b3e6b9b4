"""Models and data for the command, importable by name."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_mtl import MultiTaskModule


class Bottleneck(MultiTaskModule):
    """Two regressions through a narrow shared layer, with losses that may differ a thousandfold.

    Args:
        scale: what the loss of ``far`` is multiplied by.
        broken: the loss of ``near`` becomes NaN at this batch.
        tasks: how many there are.
        width: of the shared layer.
        apart: whether the targets are different ones.
    """

    def __init__(
        self,
        scale: float = 1.0,
        broken: int = -1,
        tasks: int = 2,
        width: int = 3,
        apart: bool = True,
    ) -> None:
        super().__init__(["near", "far"][:tasks])
        self.scale, self.broken, self.apart = scale, broken, apart
        self.trunk = nn.Sequential(nn.Linear(8, width), nn.Tanh())
        self.heads = nn.ModuleList(nn.Linear(width, 1) for _ in range(tasks))

    def task_losses(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        x = batch["x"]
        z = self.trunk(x)
        near = x[:, :1] + x[:, 1:2]
        targets = near, x[:, 2:3] - x[:, 3:4] if self.apart else near
        losses = {}
        for name, head, y in zip(self.task_names, self.heads, targets):  # noqa: B905 # maybe 1
            losses[name] = (head(z) - y - 0.1 * batch["noise"]).square().mean()
        if "far" in losses:
            losses["far"] = self.scale * losses["far"]
        if batch_idx == self.broken:
            losses["near"] = losses["near"] * float("nan")
        return losses

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), 0.01)


class Separate(Bottleneck):
    """Two tasks that share nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.other = nn.Sequential(nn.Linear(8, 3), nn.Tanh())

    def task_losses(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        x = batch["x"]
        near = self.heads[0](self.trunk(x)).square().mean()
        return {"near": near, "far": self.heads[1](self.other(x)).square().mean()}


class Unnamed(Bottleneck):
    """Tasks that the first batch names."""

    def __init__(self) -> None:
        super().__init__()
        self._declared = None

    def task_losses(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        z = self.trunk(batch["x"])
        return {n: h(z).square().mean() for n, h in zip(("p", "q"), self.heads, strict=True)}


class Samples(LightningDataModule):
    """Batches drawn anew, of a dict.

    Args:
        batches: in an epoch.
        ragged: also give a tensor of another length, so that batches cannot be divided.
    """

    def __init__(self, batches: int = 400, ragged: bool = False) -> None:
        super().__init__()
        self.batches, self.ragged = batches, ragged

    def train_dataloader(self) -> DataLoader:
        generator = torch.Generator().manual_seed(11)
        found = []
        for _ in range(self.batches):
            batch = {"x": torch.randn(32, 8, generator=generator)}
            batch["noise"] = torch.randn(32, 1, generator=generator)
            if self.ragged:
                batch["more"] = torch.zeros(3)
            found.append(batch)
        return DataLoader(found, batch_size=None)


class NoLoader(LightningDataModule):
    """No training data."""
