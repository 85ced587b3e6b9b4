"""The networks of the benchmarks: a shared trunk and a small head a task, on random data."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torchvision
from torch import Tensor, nn


class Network(nn.Module):
    """A trunk, a linear head a task, and the mean squared error of each."""

    def __init__(self, trunk: nn.Module, features: int, tasks: int) -> None:
        super().__init__()
        self.trunk = trunk
        self.heads = nn.ModuleDict({f"task{t}": nn.Linear(features, 1) for t in range(tasks)})

    def losses(
        self, batch: list[Tensor], mark: Callable[[Tensor], Tensor] = lambda z: z
    ) -> dict[str, Tensor]:
        z = mark(self.trunk(batch[0]))
        return {
            task: nn.functional.mse_loss(head(z).squeeze(-1), batch[1][:, t])
            for t, (task, head) in enumerate(self.heads.items())
        }


@dataclass(frozen=True)
class Model:
    """A network and a batch for it; everything is drawn with seed 0."""

    name: str
    tasks: int
    trunk: Callable[[], tuple[nn.Module, int]]
    inputs: tuple[int, ...]

    def network(self) -> Network:
        torch.manual_seed(0)
        trunk, features = self.trunk()
        return Network(trunk, features, self.tasks)

    def batch(self) -> list[Tensor]:
        torch.manual_seed(1)
        return [torch.randn(*self.inputs), torch.randn(self.inputs[0], self.tasks)]


def mlp(*widths: int) -> Callable[[], tuple[nn.Module, int]]:
    """Linear layers with a ReLU behind each."""

    def make() -> tuple[nn.Module, int]:
        layers: list[nn.Module] = []
        for wide, narrow in zip(widths[:-1], widths[1:], strict=True):
            layers += [nn.Linear(wide, narrow), nn.ReLU()]
        return nn.Sequential(*layers), widths[-1]

    return make


def resnet(name: str) -> Callable[[], tuple[nn.Module, int]]:
    """One of torchvision's, without its classifier."""

    def make() -> tuple[nn.Module, int]:
        trunk: Any = getattr(torchvision.models, name)()
        features = trunk.fc.in_features
        trunk.fc = nn.Identity()
        return trunk, features

    return make


WIDE = mlp(256, 512, 512, 512, 512)  # 0.9 million parameters

MODELS = {
    model.name: model
    for model in (
        Model("tiny MLP, T=2", 2, mlp(16, 32, 32), (32, 16)),
        Model("MLP 0.9M, T=3", 3, WIDE, (128, 256)),
        Model("MLP 0.9M, T=11", 11, WIDE, (128, 256)),
        Model("MLP 0.9M, T=40", 40, WIDE, (128, 256)),
        Model("ResNet-18, T=3", 3, resnet("resnet18"), (16, 3, 64, 64)),
    )
}
