"""Fits of the tests on a GPU: the modules of the other tests, trained where it is asked for."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import Trainer
from torch import Tensor, nn

from lightning_mtl import Balancer, MultiTaskModule
from tests.common.models import Batched, trainer

TASKS = ("a", "b", "c")


def trainer_on(device: str, *callbacks: Any, **flags: Any) -> Trainer:
    """A silent Trainer on one device."""
    accelerator = "gpu" if device == "cuda" else "cpu"
    return trainer(**{"accelerator": accelerator, "callbacks": list(callbacks), **flags})


def fit(module: Any, batches: Any, device: str, *callbacks: Any, **flags: Any) -> Any:
    """The module after a fit. A module on the GPU comes back to the host."""
    trainer_on(device, *callbacks, **flags).fit(module, batches)
    return module.cpu()


def parameters(module: nn.Module) -> Tensor:
    """All parameters in one vector on the host, in float64."""
    return torch.cat([p.detach().flatten().cpu().double() for p in module.parameters()])


def states(balancer: Balancer) -> list[Tensor]:
    """The tensors in the state of a balancer and of those it wraps, on the host, in float64."""
    found = [v for v in balancer.state_dict()["state"].values() if isinstance(v, Tensor)]
    for nested in balancer.nested().values():
        found += states(nested)
    return [tensor.cpu().double() for tensor in found]


class Images(MultiTaskModule):
    """Convolutions with BatchNorm under two heads; channels_last where it is asked for."""

    def __init__(self, channels_last: bool = False, width: int = 8, **options: Any) -> None:
        super().__init__(["a", "b"], **options)
        torch.manual_seed(1)
        self.trunk = nn.Sequential(
            nn.Conv2d(3, width, 3, padding=1),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, stride=2),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
        )
        self.heads = nn.ModuleDict({task: nn.Linear(width, 1) for task in ("a", "b")})
        self.format = torch.channels_last if channels_last else torch.contiguous_format
        self.to(memory_format=self.format)

    def task_losses(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        x, y = batch
        z = self.trunk(x.contiguous(memory_format=self.format))
        return {
            task: nn.functional.mse_loss(head(z)[:, 0], y[:, i])
            for i, (task, head) in enumerate(self.heads.items())
        }

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)


def images(number: int = 6, size: int = 4) -> Batched:
    """Batches for `Images`; the targets pull against each other."""
    torch.manual_seed(2)
    found = []
    for _ in range(number):
        x = torch.randn(size, 3, 16, 16)
        y = torch.stack([x.mean((1, 2, 3)), -2 * x.mean((1, 2, 3))], 1) + 0.1 * torch.randn(size, 2)
        found.append([x, y])
    return Batched(found)
