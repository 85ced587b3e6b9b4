"""Fits for the tests of ranks: parameters outside the module, found late, complex or sparse."""

from __future__ import annotations

import json
from typing import Any

import torch
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn

from lightning_mtl import DualBalance, MinNorm, MultiTaskModule
from tests.common.models import Batched, trainer
from tests.ranks.rank_cases import _tensors

BALANCERS: dict[str, Any] = {
    "none": list,
    "MinNorm": lambda: [MinNorm()],
    "DualBalance": lambda: [DualBalance()],
    "last layer": lambda: [MinNorm(gradients="last_layer")],
}


class Late(MultiTaskModule):
    """A layer outside the module, and one that rank 0 takes for ``a`` and rank 1 for ``b``."""

    def __init__(self, rank: int, world: int, counted: bool, **kwargs: Any) -> None:
        super().__init__(tasks=("a", "b"), **kwargs)
        self.counted = counted
        torch.manual_seed(1)
        self.trunk, self.late = nn.Linear(4, 6), nn.Linear(6, 6)
        self.heads = nn.ModuleList([nn.Linear(6, 1), nn.Linear(6, 1)])
        self.outside = [nn.Linear(6, 6)]
        with torch.no_grad():
            self.outside[0].weight += rank  # DDP does not see to it
        self.rank, self.world = rank, world

    def task_losses(self, batch: Any, batch_idx: int) -> Any:
        x, y = batch
        z = self.outside[0](self.trunk(x).tanh()).tanh()
        losses = {}
        for t, task in enumerate(("a", "b")):
            rows = slice(None) if self.world > 1 else slice(t * len(x) // 2, (t + 1) * len(x) // 2)
            if batch_idx > 1 and self.world > 1 and self.rank != t:
                continue  # from batch 2 on, a rank has the labels of one task
            here = rows if batch_idx > 1 else slice(None)
            inner = z[here] + self.late(z[here]).tanh() if batch_idx > 1 else z[here]
            loss = (self.heads[t](inner).squeeze(-1) - y[here] * (-1) ** t).square().mean()
            losses[task] = (loss, len(inner)) if self.counted else loss
        return losses

    def configure_optimizers(self) -> Any:
        own = [*self.parameters(), *self.outside[0].parameters()]
        return torch.optim.SGD(own, lr=0.05, momentum=0.9)

    def all(self) -> Tensor:
        own = [*self.parameters(), *self.outside[0].parameters()]
        return torch.cat([p.detach().flatten() for p in own])


def batches(rank: int, world: int) -> Batched:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(6, 8, 4, generator=generator)
    parts = [part.tensor_split(world)[rank] for part in x]
    return Batched([(part, part.sum(1)) for part in parts])


class Unusual(MultiTaskModule):
    """A complex shared matrix, or a head with sparse gradients."""

    def __init__(self, kind: str, **kwargs: Any) -> None:
        super().__init__(tasks=("a", "b"), **kwargs)
        torch.manual_seed(1)
        self.trunk = nn.Linear(4, 6)
        self.turn = (
            nn.Parameter(torch.randn(6, 6, dtype=torch.complex64)) if "complex" in kind else None
        )
        self.table = nn.Embedding(8, 6, sparse=True) if "sparse" in kind else None
        self.heads = nn.ModuleList([nn.Linear(6, 1), nn.Linear(6, 1)])

    def task_losses(self, batch: Any, batch_idx: int) -> Any:
        x, y = batch
        z = self.trunk(x).tanh()
        if self.turn is not None:
            turned = z.to(self.turn.dtype) @ self.turn
            z = turned.abs() + 0.3 * turned.imag
        first = z if self.table is None else z + self.table((x[:, 0].abs() * 4).long().clamp(max=7))
        found = [head(z).squeeze(-1) for head, z in zip(self.heads, (first, z), strict=True)]
        return {
            t: (f - y * (-1) ** i).square().mean()
            for i, (t, f) in enumerate(zip("ab", found, strict=True))
        }

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.05)

    def all(self) -> Tensor:
        parts = [torch.view_as_real(p) if p.is_complex() else p for p in self.parameters()]
        return torch.cat([p.detach().flatten() for p in parts])


def fit(
    rank: int, world: int, name: str, sharded: bool, rule: str, kind: str = ""
) -> dict[str, Any]:
    """A fit of six batches."""
    balancers = BALANCERS[name]()
    # Without a balancer a task that a rank has not is a zero loss, unless labels are counted.
    options: dict[str, Any] = {"shard_gradients": sharded, "on_bad_loss": rule}
    module: Any = Late(rank, world, name == "none", **options)
    if kind:
        module = Unusual(kind, **options)
    strategy: Any = DDPStrategy() if world > 1 else "auto"
    flags = {"devices": world, "strategy": strategy, "use_distributed_sampler": False}
    run = trainer(callbacks=balancers, **flags)
    run.fit(module, batches(rank, world))
    layout = module._flow.state_dict()["shared"] if module._flow is not None else None
    return {
        "weights": module.all(),
        "state": [t for b in balancers for t in _tensors(b)],
        "steps": run.global_step,
        "shared": layout,
    }


def run(case: str, rank: int, world: int) -> dict[str, Any]:
    """One case on one rank."""
    return fit(rank, world, *json.loads(case))
