"""Runs that stop and go on in another layout: one process, two, divided columns, FSDP2."""

from __future__ import annotations

import inspect
import json
import logging
import random
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch import Tensor

from lightning_mtl import (
    FAMO,
    Balancer,
    DualBalance,
    Every,
    GradNorm,
    MinNorm,
    PCGrad,
    Smooth,
    TaskTensioner,
)
from tests.common.models import trainer
from tests.ranks.rank_cases import Fsdp2, Labelled, _tensors, _whole, batches

BALANCERS: dict[str, Callable[[], Balancer]] = {
    "MinNorm": MinNorm,
    "DualBalance": DualBalance,
    "TaskTensioner": lambda: TaskTensioner(window=3),
    "FAMO": FAMO,
    "GradNorm": lambda: GradNorm(gradients="parameters"),
    "PCGrad": lambda: PCGrad(seed=3),
    "Every(Smooth(MinNorm))": lambda: Every(2, Smooth(MinNorm())),
}
SAFE = "weights_only" in inspect.signature(Trainer.fit).parameters  # from lightning 2.6 on
SAFELY: dict[str, Any] = {"weights_only": True} if SAFE else {}
STEPS, STOP = 10, 5  # optimiser steps, and after how many of them the checkpoint is written


class Continued(list[Any]):
    """Batches that go on where a checkpoint was written."""

    position = 0

    def __iter__(self) -> Iterator[Any]:
        for batch in self[self.position :]:
            self.position += 1
            yield batch

    def state_dict(self) -> dict[str, int]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.position = state["position"]


class Saver(Callback):
    """A checkpoint in the middle of a run, before its buffers and shards are released."""

    def __init__(self, path: Path | None, step: int = STOP) -> None:
        self.path, self.step = path, step

    def on_train_batch_end(self, run: Any, module: Any, *args: Any) -> None:
        if self.path is not None and run.global_step == self.step:
            run.save_checkpoint(self.path)
            self.path = None  # once: other micro-batches follow at this step


def fit(
    rank: int,
    world: int,
    *,
    method: str,
    layout: str,
    save: Path | None = None,
    resume: Path | None = None,
    dropout: float = 0.0,
) -> dict[str, Any]:
    """A fit of ten batches, or what is left of it.

    Args:
        rank: of this process.
        world: number of processes.
        method: a name of :data:`BALANCERS`.
        layout: ``plain``, ``sharded``, ``fsdp2`` or ``parts`` (FSDP2, a file a process).
        save: where a checkpoint is written.
        resume: the checkpoint to go on from.
        dropout: of the trunk; every rank draws its own.
    """
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    strategy: Any = DDPStrategy() if world > 1 else "auto"
    fsdp2 = layout in ("fsdp2", "parts")
    if fsdp2:
        strategy = ModelParallelStrategy(world, 1, layout == "parts")
    balancer = BALANCERS[method]()
    run = trainer(
        devices=world,
        strategy=strategy,
        use_distributed_sampler=False,
        callbacks=[balancer, Saver(save)],
    )
    model = Fsdp2 if fsdp2 else Labelled
    module = model(counted=False, shard_gradients=layout == "sharded", dropout=dropout)
    # A resumed run starts from other random numbers: the checkpoint has to bring its own.
    torch.manual_seed(rank + (7 if resume is None else 99))
    random.seed(rank + (7 if resume is None else 99))
    data = Continued(batches(rank, world, missing=False)[:STEPS])
    data[STOP][1]["b"].fill_(torch.nan)  # a resumed run starts without one of the tasks
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run.fit(module, data, ckpt_path=resume, **SAFELY)
    return {
        "weights": torch.cat([_whole(p.detach()).flatten() for p in module.net.parameters()]),
        "state": _tensors(balancer) + _momenta(run),
        "drawn": [torch.rand(1).item(), random.random()],
        "steps": run.global_step,
        "told": [str(w.message) for w in caught if "processes" in str(w.message)],
    }


def _momenta(run: Any) -> list[Tensor]:
    """What the optimizer remembers of every parameter."""
    values = [v for s in run.optimizers[0].state.values() for v in s.values()]
    return [_whole(v).flatten() for v in values if isinstance(v, Tensor)]


def run(case: str, rank: int, world: int) -> dict[str, Any]:
    """One case: the arguments of :func:`fit` in JSON."""
    options = json.loads(case)
    for name in ("save", "resume"):
        if name in options:
            options[name] = Path(options[name])
    return fit(rank, world, **options)
