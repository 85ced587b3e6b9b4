"""Fits with a loss or a gradient that is not usable on one of several ranks."""

from __future__ import annotations

import functools
import json
import logging
import warnings
from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch import Tensor

from lightning_mtl import Balancer, DualBalance, LogLoss, MinNorm
from tests.common.models import Batched, trainer
from tests.ranks.rank_cases import Fsdp2, Labelled, _tensors, _whole, batches

BALANCERS: dict[str, Callable[[], Balancer] | None] = {
    "none": None,
    "LogLoss": LogLoss,
    "MinNorm": MinNorm,
    "DualBalance": DualBalance,
}
STEPS = 8  # micro-batches


def nan_loss(loss: Tensor, bias: Tensor) -> Tensor:
    """A loss that is not finite."""
    return loss * torch.nan


def negative_loss(loss: Tensor, bias: Tensor) -> Tensor:
    """A loss that has no logarithm."""
    return -loss


def nan_gradient(loss: Tensor, bias: Tensor) -> Tensor:
    """A finite loss, whose gradient is infinity times zero everywhere."""
    return loss + (loss * 0).sqrt()


def nan_head(loss: Tensor, bias: Tensor) -> Tensor:
    """The same in the one number of a head's bias."""
    return loss + (bias * 0).sqrt().sum()


FAULTS = {f.__name__: f for f in (nan_loss, negative_loss, nan_gradient, nan_head)}


class Poisoned:
    """Mixed into a module: ``faults[batch]`` tells what happens to which task's loss there."""

    faults: dict[int, tuple[str, str]]

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.biases: dict[str, Tensor] = {}
        for name, head in self.net.heads.items():  # type: ignore[attr-defined]
            head.register_forward_hook(functools.partial(self._note, name[5:]))

    def _note(self, task: str, head: Any, *args: Any) -> None:
        self.biases[task] = head.bias.clone()  # while FSDP2 has it whole

    def task_losses(self, batch: Any, batch_idx: int) -> Any:
        losses = super().task_losses(batch, batch_idx)  # type: ignore[misc]
        what, task = self.faults.get(batch_idx, ("", ""))
        if what == "absent":
            del losses[task]
        elif what:
            losses[task] = FAULTS[what](losses[task], self.biases[task])
        return losses


class OnDdp(Poisoned, Labelled):
    """Every parameter on every rank."""


class OnFsdp2(Poisoned, Fsdp2):
    """Every parameter divided over the ranks."""


def fit(
    rank: int,
    world: int,
    *,
    method: str,
    layout: str,
    every: int,
    rule: str,
    faults: dict[int, tuple[str, str]],
    left_out: tuple[int, ...] = (),
) -> dict[str, Any]:
    """A fit that meets faults; the parameters it ends with, and the error if there is one.

    Args:
        rank: of this process.
        world: number of processes.
        method: a name of :data:`BALANCERS`.
        layout: ``plain``, ``sharded`` or ``fsdp2``.
        every: micro-batches of an optimiser step.
        rule: ``on_bad_loss``.
        faults: ``{batch: (what, task)}`` on this rank.
        left_out: batches that are not there at all.
    """
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    strategy: Any = DDPStrategy() if world > 1 else "auto"
    if layout == "fsdp2" and world > 1:
        strategy = ModelParallelStrategy(world, 1)
    make = BALANCERS[method]
    balancers = [] if make is None else [make()]
    run = trainer(
        devices=world,
        strategy=strategy,
        accumulate_grad_batches=every,
        use_distributed_sampler=False,
        callbacks=list(balancers),
    )
    model = OnFsdp2 if layout == "fsdp2" and world > 1 else OnDdp
    module: Any = model(counted=False, shard_gradients=layout == "sharded", on_bad_loss=rule)
    module.faults = faults
    data = batches(rank, world, missing=False)[:STEPS]
    error = None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            run.fit(module, Batched(b for i, b in enumerate(data) if i not in left_out))
        except ValueError as found:
            error = (type(found).__name__, str(found))
    return {
        "weights": torch.cat([_whole(p.detach()).flatten() for p in module.net.parameters()]),
        "state": [] if error else [v for b in balancers for v in _tensors(b)],
        "steps": run.global_step,
        "error": error,
    }


def run(case: str, rank: int, world: int) -> dict[str, Any]:
    """One case: the arguments of :func:`fit` in JSON, and the rank that meets the faults."""
    options = json.loads(case)
    where = options.pop("where")
    faults = {int(b): tuple(fault) for b, fault in options.pop("faults").items()}
    return {"value": fit(rank, world, faults=faults if rank == where else {}, **options)}
