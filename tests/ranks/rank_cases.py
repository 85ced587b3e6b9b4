"""Fits for the tests of ranks: every method, on data with missing labels, cut over processes."""

from __future__ import annotations

import logging
import warnings
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from lightning_mtl import Balancer, MinNorm
from tests.common.methods import METHODS
from tests.common.models import Balanced, Batched, Samples

TASKS = ("a", "b", "c")
STEPS, BATCH = 20, 12
MEMORY = ("blocks", "bf16", "sharded bf16")
VARIANTS = ("plain", "accumulate", "missing", "sharded", "fsdp2")


class Labelled(Balanced):
    """Means over the labels that are there; a task without any is absent."""

    def __init__(self, counted: bool, lr: float = 0.01, **kwargs: Any) -> None:
        super().__init__(tasks=TASKS, **kwargs)
        self.counted = counted
        self.lr = lr
        self.padded = False

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=self.lr, momentum=0.9, weight_decay=1e-3)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        z = self.net.trunk(x).tanh()
        if self.padded:  # to another length on each rank
            z = z[:, None].expand(-1, 2 + self.trainer.global_rank, -1).contiguous()
        z = self.shared_representation(z)
        z = z.mean(1) if self.padded else z
        return {task: self.net.heads[f"head_{task}"](z).squeeze(-1) for task in TASKS}

    def task_losses(self, batch: Any, batch_idx: int) -> Any:
        x, targets = batch
        losses: dict[str, Any] = {}
        for task, prediction in self(x).items():
            valid = ~targets[task].isnan()
            if valid.any():
                loss = nn.functional.mse_loss(prediction[valid], targets[task][valid])
                losses[task] = (loss, int(valid.sum())) if self.counted else loss
        return losses


class Fsdp2(Labelled):
    """Every parameter divided over the ranks."""

    def configure_model(self) -> None:
        mesh = self.device_mesh["data_parallel"]
        for part in (self.net.trunk, *self.net.heads.values(), self):
            fully_shard(part, mesh=mesh)


def batches(rank: int, world: int, missing: bool, size: int = BATCH) -> Batched:
    """This rank's part of every batch; rank 0 of 1 has the whole."""
    data = Samples(size * STEPS, TASKS)
    found = []
    for step in range(STEPS):
        rows = torch.arange(step * size, (step + 1) * size)
        targets = {task: y[rows].clone() for task, y in data.y.items()}
        if missing:  # labels of one half of a batch, so of one of two ranks; the first batch too
            if step % 3 == 0:
                targets["b"][size // 2 :] = torch.nan
            if step % 4 == 1:
                targets["a"][: size // 2] = torch.nan
            if step % 5 == 2:
                targets["c"][: size // 2 + 2] = torch.nan  # an odd number remains
        part = rows.tensor_split(world)[rank] - rows[0]
        found.append((data.x[rows][part], {t: y[part] for t, y in targets.items()}))
    return Batched(found)


def fit(
    callbacks: list[Any],
    rank: int,
    world: int,
    variant: str,
    strategy: Any = None,
    lr: float = 0.01,
    **kwargs: Any,
) -> tuple[Trainer, Any]:
    """One fit of twenty batches."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    fsdp2 = variant == "fsdp2" and world > 1
    if fsdp2:
        strategy = ModelParallelStrategy(data_parallel_size=world, tensor_parallel_size=1)
    elif strategy is None:
        strategy = DDPStrategy() if world > 1 else "auto"
    every = 2 if variant == "accumulate" else 1
    defaults: dict[str, Any] = {"accumulate_grad_batches": every, "max_epochs": 1}
    run = Trainer(
        accelerator="cpu",
        devices=world,
        strategy=strategy,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        callbacks=callbacks,
        **{**defaults, **kwargs},
    )
    torch.manual_seed(5)
    model = Fsdp2 if fsdp2 else Labelled
    module = model(
        variant == "missing",
        lr,
        shard_gradients=variant.startswith("sharded"),
        gradient_memory=variant.removeprefix("sharded ") if variant in MEMORY else "full",
    )
    module.padded = variant == "padded"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run.fit(module, batches(rank, world, variant == "missing"))
    return run, module


def start() -> Tensor:
    """Parameters before training."""
    return torch.cat([p.detach().flatten() for p in Labelled(False).net.parameters()])


def balancer(name: str) -> Balancer:
    """A fresh balancer of a row of the table of methods, or MinNorm by another level."""
    if name.startswith("by "):
        return MinNorm(gradients=name[3:])  # type: ignore[arg-type]
    return next(m for m in METHODS if m.name == name).make()


def run(case: str, rank: int, world: int) -> dict[str, Any]:
    """Parameters and balancer state after a fit."""
    variant, _, name = case.partition("|")
    method = balancer(name)
    extra = {"accumulate_grad_batches": method.batches} if getattr(method, "batches", 1) > 1 else {}
    # Their directions are long, that of the sum of the losses over one of them or of the longest
    # gradient: twenty steps at the rate of the others make up to 7e-5 of a difference of 1e-7 at
    # the start, in one process too.
    long = name.startswith(("GO4Align(", "DualBalance(beta=0.0, loss_part=False)"))
    lr = 0.002 if long else 0.01
    trainer, module = fit([method], rank, world, variant, lr=lr, **extra)
    return {
        "weights": torch.cat([_whole(p.detach()).flatten() for p in module.net.parameters()]),
        "state": _tensors(method),
        "steps": trainer.global_step,
    }


def _whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _tensors(method: Balancer) -> list[Tensor]:
    found = [v for v in method.state_dict()["state"].values() if isinstance(v, Tensor)]
    for nested in method.nested().values():
        found += _tensors(nested)
    return [v.double() for v in found]
