"""Small models for the tests: the same network as MultiTaskModule and as plain Lightning."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchmetrics import MeanSquaredError

from lightning_mtl import GradientBalancer, MultiTaskModule, Task

TASKS = ("a", "b")


def sgd(parameters: Any) -> torch.optim.Optimizer:
    """Momentum and weight decay, so that a skipped or doubled step shows."""
    return torch.optim.SGD(parameters, lr=0.01, momentum=0.9, weight_decay=1e-3)


class Network(nn.Module):
    """A trunk and a linear head for each task."""

    def __init__(self, tasks: tuple[str, ...] = TASKS, dropout: float = 0.0) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Dropout(dropout), nn.Linear(8, 6))
        self.heads = nn.ModuleDict({f"head_{task}": nn.Linear(6, 1) for task in tasks})

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        z = self.trunk(x).tanh()
        return {name[5:]: head(z).squeeze(-1) for name, head in self.heads.items()}


class Sum(GradientBalancer):
    """Equal weighting the long way round: one gradient a task, then their sum."""

    def weights(self, gramian: Tensor, losses: Tensor) -> Tensor:
        return torch.ones_like(losses)


Configure = Callable[[Any], Any]


class Balanced(MultiTaskModule):
    """The network under MultiTaskModule, tasks declared."""

    def __init__(
        self,
        configure: Configure | None = None,
        tasks: tuple[str, ...] = TASKS,
        dropout: float = 0.0,
        **kwargs: Any,
    ) -> None:
        super().__init__({t: Task(nn.MSELoss(), MeanSquaredError()) for t in tasks}, **kwargs)
        torch.manual_seed(1)
        self.net = Network(tasks, dropout)
        self.configure = configure or (lambda module: sgd(module.net.parameters()))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return self.net(x)

    def configure_optimizers(self) -> Any:
        return self.configure(self)


class Plain(LightningModule):
    """The same under Lightning's automatic optimisation of the summed loss."""

    def __init__(
        self,
        configure: Configure | None = None,
        tasks: tuple[str, ...] = TASKS,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.net = Network(tasks, dropout)
        self.configure = configure or (lambda module: sgd(module.net.parameters()))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, targets = batch
        predictions = self.net(x)
        return sum(nn.functional.mse_loss(predictions[t], targets[t]) for t in predictions)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        x, targets = batch
        for task, prediction in self.net(x).items():
            loss = nn.functional.mse_loss(prediction, targets[task])
            self.log(f"val/loss/{task}", loss, batch_size=len(x))

    def configure_optimizers(self) -> Any:
        return self.configure(self)


class Samples(Dataset):
    """Random regression targets, one for each task; `b` pulls against `a`."""

    def __init__(self, size: int = 80, tasks: tuple[str, ...] = TASKS, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.x = torch.randn(size, 4, generator=generator)
        self.y = {
            task: (-1) ** i * self.x.sum(1) * (1 + i) + torch.randn(size, generator=generator)
            for i, task in enumerate(tasks)
        }

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> tuple[Tensor, dict[str, Tensor]]:
        return self.x[index], {task: y[index] for task, y in self.y.items()}


class Batched(list[Any]):
    """Batches as a loader, to which Lightning adds no batch dimension."""


def loader(size: int = 80, batch_size: int = 4, tasks: tuple[str, ...] = TASKS) -> DataLoader:
    """Batches in a fixed order."""
    return DataLoader(Samples(size, tasks), batch_size=batch_size)


def trainer(tmp_path: Any = None, **kwargs: Any) -> Trainer:
    """A silent Trainer on one CPU; 20 batches unless said otherwise."""
    defaults: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 1,
        "max_epochs": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "default_root_dir": tmp_path,
    }
    return Trainer(**{**defaults, **kwargs})


def resume_from(path: Any) -> dict[str, Any]:
    """Arguments of ``fit`` that resume from a file, which loads with ``weights_only=True``."""
    torch.load(path, weights_only=True)
    safe = "weights_only" in inspect.signature(Trainer.fit).parameters  # from lightning 2.6 on
    return {"ckpt_path": path, **({"weights_only": True} if safe else {})}


def weights(module: nn.Module) -> Tensor:
    """All parameters of the network in one vector."""
    return torch.cat([p.detach().flatten() for p in module.net.parameters()])
