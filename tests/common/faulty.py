"""A module whose losses are tampered with, and everything that a run may change."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from lightning.pytorch import Trainer
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_mtl import Balancer
from tests.common.models import TASKS, Balanced, loader, trainer

Losses = dict[str, Any]
Fault = Callable[[Losses], Any]


class Faulty(Balanced):
    """The network, with the losses of some batches changed: ``faults[batch_idx](losses)``."""

    def __init__(self, faults: Mapping[int, Fault] | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.faults = dict(faults or {})

    def task_losses(self, batch: Any, batch_idx: int) -> Any:
        losses = dict(super().task_losses(batch, batch_idx))
        return self.faults.get(batch_idx, lambda unchanged: unchanged)(losses)


def change(task: str, how: Callable[[Tensor], Any]) -> Fault:
    """A fault in one task's loss."""
    return lambda losses: {**losses, task: how(losses[task])}


def without(task: str) -> Fault:
    """A task that is absent from the batch."""
    return lambda losses: {name: loss for name, loss in losses.items() if name != task}


def batches(
    count: int = 6, leave_out: Sequence[int] = (), tasks: tuple[str, ...] = TASKS
) -> DataLoader:
    """``count`` batches in a fixed order, without some of them."""
    kept = [b for i, b in enumerate(loader(4 * count, tasks=tasks)) if i not in leave_out]
    return DataLoader(kept, batch_size=None)


def state(run: Trainer, module: Any) -> dict[str, Any]:
    """A copy of all that an optimiser step may change."""
    return copy.deepcopy(
        {
            "parameters": {name: p.detach() for name, p in module.named_parameters()},
            "buffers": dict(module.named_buffers()),
            "optimizers": [optimizer.state_dict() for optimizer in run.optimizers],
            "balancers": {
                c.state_key: c.state_dict() for c in run.callbacks if isinstance(c, Balancer)
            },
        }
    )


def same(a: Any, b: Any) -> bool:
    """Bit for bit, through dicts and lists."""
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and torch.equal(a, b)
    if isinstance(a, Mapping):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return a == b


def fitted(module: Any, data: Any, balancers: Sequence[Any] = (), **flags: Any) -> dict[str, Any]:
    """What a run that meets no error ends with."""
    run = trainer(callbacks=list(balancers), **flags)
    run.fit(module, data)
    return {**state(run, module), "steps": run.global_step}


def parameters(module: Any) -> dict[str, Tensor]:
    """A copy of the parameters."""
    return {name: p.detach().clone() for name, p in module.named_parameters()}
