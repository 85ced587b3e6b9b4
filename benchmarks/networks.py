"""The networks of the benchmarks: a shared trunk and a small head a task, on random data."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import torch
from resnets import resnet_trunk
from torch import Tensor, nn

Trunk = Callable[[], tuple[nn.Module, int]]  # makes a trunk, and says how many features it has


class Network(nn.Module):
    """A trunk, a linear head a task, and the mean squared error of each.

    Args:
        trunk: from inputs to features.
        features: how many there are.
        tasks: number of tasks.
        first: what the loss of the first task is multiplied by.
    """

    def __init__(self, trunk: nn.Module, features: int, tasks: int, first: float = 1.0) -> None:
        super().__init__()
        self.trunk = trunk
        self.first = first
        self.heads = nn.ModuleDict({f"task{t}": nn.Linear(features, 1) for t in range(tasks)})

    def losses(
        self, batch: list[Tensor], mark: Callable[[Tensor], Tensor] = lambda z: z
    ) -> dict[str, Tensor]:
        z = mark(self.trunk(batch[0]))
        losses = {
            task: nn.functional.mse_loss(head(z).squeeze(-1), batch[1][:, t])
            for t, (task, head) in enumerate(self.heads.items())
        }
        if self.first != 1:
            losses["task0"] = losses["task0"] * self.first
        return losses


@dataclass(frozen=True)
class Model:
    """A network and a batch for it; everything is drawn with seed 0 and 1."""

    name: str
    tasks: int
    trunk: Trunk
    inputs: tuple[int, ...]
    device: str = "cpu"
    dtype: torch.dtype = torch.float32
    first: float = 1.0
    clock: Callable[[], float] = time.perf_counter

    def network(self) -> Network:
        torch.manual_seed(0)
        trunk, features = self.trunk()
        network = Network(trunk, features, self.tasks, self.first)
        return network.to(self.device, self.dtype)

    def batch(self) -> list[Tensor]:
        torch.manual_seed(1)
        drawn = torch.randn(*self.inputs), torch.randn(self.inputs[0], self.tasks)
        return [x.to(self.device, self.dtype) for x in drawn]

    def shared(self) -> int:
        """Number of shared parameters, P."""
        return sum(p.numel() for p in self.trunk()[0].parameters())


def mlp(*widths: int) -> Trunk:
    """Linear layers with a ReLU behind each."""

    def make() -> tuple[nn.Module, int]:
        layers: list[nn.Module] = []
        for wide, narrow in pairwise(widths):
            layers += [nn.Linear(wide, narrow), nn.ReLU()]
        return nn.Sequential(*layers), widths[-1]

    return make


def square(width: int, layers: int) -> Trunk:
    """As many layers of one width."""
    return mlp(*[width] * (layers + 1))


def resnet(name: str, first: int = 64) -> Trunk:
    """``"resnet18"`` or ``"resnet50"``, without a classifier."""
    return partial(resnet_trunk, name, first)


class Mean(nn.Module):
    """The mean over a sequence."""

    def forward(self, z: Tensor) -> Tensor:
        return z.mean(1)


def transformer(layers: int, width: int, heads: int) -> Trunk:
    """An encoder, and the mean over its sequence. No dropout: every way takes the same step."""

    def make() -> tuple[nn.Module, int]:
        layer = nn.TransformerEncoderLayer(width, heads, 4 * width, dropout=0.0, batch_first=True)
        return nn.Sequential(nn.TransformerEncoder(layer, layers), Mean()), width

    return make


WIDE = mlp(256, 512, 512, 512, 512)  # 0.9 million parameters

MODELS = {
    model.name: model
    for model in (
        Model("tiny MLP, T=2", 2, mlp(16, 32, 32), (32, 16)),
        Model("tiny MLP, T=2, losses 100 : 1", 2, mlp(16, 32, 32), (32, 16), first=100.0),
        Model("MLP 0.9M, T=3", 3, WIDE, (128, 256)),
        Model("MLP 0.9M, T=11", 11, WIDE, (128, 256)),
        Model("MLP 0.9M, T=40", 40, WIDE, (128, 256)),
        Model("ResNet-18, T=3", 3, resnet("resnet18"), (16, 3, 64, 64)),
    )
}
