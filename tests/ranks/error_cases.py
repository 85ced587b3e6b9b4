"""What one rank, or all of them, got wrong: the error that each rank ends with."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.callbacks import OnExceptionCheckpoint
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch import nn
from torch.distributed.fsdp import fully_shard

from lightning_mtl import DualBalance, MinNorm, Scalarization
from tests.common.models import Batched, trainer
from tests.ranks.rank_cases import TASKS, Fsdp2, Labelled, batches

Make = Callable[[int], Any]


class Wrong(Labelled):
    """``spoil(losses, batch, rank)`` changes what ``task_losses`` returns."""

    def __init__(self, rank: int, spoil: Any = None, **kwargs: Any) -> None:
        super().__init__(False, **kwargs)
        self.rank, self.spoil = rank, spoil

    def task_losses(self, batch: Any, batch_idx: int) -> Any:
        losses = super().task_losses(batch, batch_idx)
        return losses if self.spoil is None else self.spoil(losses, batch_idx, self.rank)


class Named(Wrong):
    """Other names on rank 1, for the same losses."""

    def __init__(self, rank: int, names: Any = TASKS, declare: bool = True, **kwargs: Any) -> None:
        super().__init__(rank, **kwargs)
        self.names = names if rank else TASKS
        self._declared = tuple(self.names) if declare else None

    def task_losses(self, batch: Any, batch_idx: int) -> Any:
        losses = super().task_losses(batch, batch_idx).values()
        return dict(zip(self.names, losses, strict=True))


class HalfSharded(Fsdp2):
    """The heads were forgotten in ``fully_shard``."""

    def configure_model(self) -> None:
        fully_shard(self.net.trunk, mesh=self.device_mesh["data_parallel"])


def unknown(losses: Any, batch: int, rank: int) -> Any:
    return {**losses, "d": losses["a"]} if (batch, rank) == (3, 1) else losses


def detached(losses: Any, batch: int, rank: int) -> Any:
    return {**losses, "c": losses["c"].detach()} if (batch, rank) == (2, 0) else losses


def no_dict(losses: Any, batch: int, rank: int) -> Any:
    return sum(losses.values()) if (batch, rank) == (2, 1) else losses


def bad_on_each(losses: Any, batch: int, rank: int) -> Any:
    return {**losses, "ab"[rank]: losses["c"] * float("inf")} if batch == 2 else losses


def bad_here(losses: Any, batch: int, rank: int) -> Any:
    return {**losses, "b": losses["b"] * torch.nan} if (batch, rank) == (2, 1) else losses


def miscounted(losses: Any, batch: int, rank: int) -> Any:
    return {**losses, "b": (losses["b"], -1)} if (batch, rank) == (1, 1) else losses


def absent_here(losses: Any, batch: int, rank: int) -> Any:
    return {t: v for t, v in losses.items() if (batch, rank, t) != (2, 1, "b")}


def absent_and_bad(losses: Any, batch: int, rank: int) -> Any:
    losses = absent_here(losses, batch, rank)
    return {**losses, "a": losses["a"] * torch.nan} if (batch, rank) == (2, 0) else losses


class AbsentHere(Fsdp2):
    """FSDP2, with a task that only one rank has labels of."""

    def __init__(self, rank: int, spoil: Any = absent_here, **kwargs: Any) -> None:
        super().__init__(False, **kwargs)
        self.rank, self.spoil = rank, spoil

    def task_losses(self, batch: Any, batch_idx: int) -> Any:
        return self.spoil(super().task_losses(batch, batch_idx), batch_idx, self.rank)


class SyncedNorm(Wrong):
    """Has a layer that synchronises itself, as far as the CPU allows: after DDP has looked."""

    def on_train_start(self) -> None:
        self.norm = nn.SyncBatchNorm(4)


def of_others(width: int, tasks: int = 3) -> DualBalance:
    """A balancer with the state of another model."""
    balancer = DualBalance()
    state = balancer.state_dict()
    state["state"]["average"] = torch.ones(tasks, width)
    balancer.load_state_dict(state)
    return balancer


def raises_at_6(losses: Any, batch: int, rank: int) -> Any:
    return {**losses, "a": losses["a"] * torch.nan} if (batch, rank) == (6, 1) else losses


# {case: (module on a rank, callbacks, strategy)}
CASES: dict[str, tuple[Make, list[Any], Any]] = {
    "names": (lambda r: Named(r, "abd"), [], DDPStrategy),
    "order": (lambda r: Named(r, "bac"), [], DDPStrategy),
    "active": (lambda r: Named(r, active_tasks=["b", "c"] if r else ["a", "b"]), [], DDPStrategy),
    "one declares": (lambda r: Named(r, declare=r == 0), [], DDPStrategy),
    "first batch": (lambda r: Named(r, "abd", declare=False), [], DDPStrategy),
    "first batch, and a balancer that knows the names": (
        lambda r: Named(r, "abd", declare=False),
        [lambda: Scalarization({"c": 2.0})],
        DDPStrategy,
    ),
    "a balancer that knows the names": (
        lambda r: Named(r, "abd"),
        [lambda: Scalarization({"c": 2.0})],
        DDPStrategy,
    ),
    "unknown task": (lambda r: Wrong(r, unknown), [MinNorm], DDPStrategy),
    "detached": (lambda r: Wrong(r, detached), [MinNorm], DDPStrategy),
    "no dict": (lambda r: Wrong(r, no_dict), [], DDPStrategy),
    "bad on one": (lambda r: Wrong(r, bad_here), [MinNorm], DDPStrategy),
    "bad on each": (lambda r: Wrong(r, bad_on_each), [], DDPStrategy),
    "miscounted": (lambda r: Wrong(r, miscounted), [MinNorm], DDPStrategy),
    "absent on one": (AbsentHere, [MinNorm], lambda: ModelParallelStrategy(2, 1)),
    "absent on one, and another bad": (
        lambda r: AbsentHere(r, absent_and_bad, on_bad_loss="skip_task"),
        [MinNorm],
        lambda: ModelParallelStrategy(2, 1),
    ),
    "absent on one, synchronised": (
        lambda r: SyncedNorm(r, absent_here),
        [MinNorm],
        DDPStrategy,
    ),
    "not all sharded": (lambda r: HalfSharded(False), [], lambda: ModelParallelStrategy(2, 1)),
    "tensor parallel": (lambda r: Fsdp2(False), [], lambda: ModelParallelStrategy(1, 2)),
    "tensor parallel by default": (lambda r: Fsdp2(False), [], ModelParallelStrategy),
    **{
        f"state of {tasks} tasks and {width} columns, {how}": (
            lambda r, how=how: Wrong(r, shard_gradients=how == "sharded"),
            [lambda width=width, tasks=tasks: of_others(width, tasks)],
            DDPStrategy,
        )
        for how in ("whole", "sharded")
        for tasks, width in ((3, 60), (3, 47), (2, 94))  # 47: what each of two ranks has of 94
    },
}


def run(case: str, rank: int, world: int) -> dict[str, Any]:
    """The error of a case, and whether it changed a parameter.

    Args:
        case: a name of :data:`CASES`; or ``checkpoint FOLDER``.
        rank: of this process.
        world: number of processes.
    """
    if case.startswith("checkpoint "):
        return checkpoint(Path(case.removeprefix("checkpoint ")), rank, world)
    make, balancers, strategy = CASES[case]
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    module = make(rank)
    runner = trainer(
        devices=world,
        strategy=strategy(),
        use_distributed_sampler=False,
        callbacks=[b() for b in balancers],
    )
    error = None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            runner.fit(module, Batched(batches(rank, world, missing=False)[:5]))
        except Exception as found:
            error = (type(found).__name__, str(found))
    return {"error": error, "steps": runner.global_step}


def checkpoint(folder: Path, rank: int, world: int) -> dict[str, Any]:
    """A fit with divided state that ends with an error and writes a checkpoint because of it."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    balancer = DualBalance()
    module = Wrong(rank, raises_at_6, shard_gradients=True)
    runner = trainer(
        devices=world,
        strategy=DDPStrategy(),
        use_distributed_sampler=False,
        enable_checkpointing=True,
        default_root_dir=folder,
        callbacks=[balancer, OnExceptionCheckpoint(folder)],
    )
    try:
        runner.fit(module, Batched(batches(rank, world, missing=False)[:8]))
    except ValueError as found:
        return {"error": (type(found).__name__, str(found)), "steps": runner.global_step}
    return {"error": None, "steps": runner.global_step}
