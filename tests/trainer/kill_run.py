"""A training run in a process of its own that writes a checkpoint every step, to be killed."""

from __future__ import annotations

import logging
import os
import resource
import tempfile
import warnings
from datetime import timedelta
from multiprocessing import get_context
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy

from lightning_mtl import DualBalance
from tests.common.models import Balanced, trainer
from tests.common.ranks import free_port
from tests.ranks.layout_cases import SAFELY
from tests.trainer.test_resume import SavedLoader

EPOCHS, STEPS = 2, 10  # of which each epoch has as many
LOST = 5.0  # seconds after which a rank gives up waiting for another


class Heavy(Balanced):
    """Its checkpoints take a while to write."""

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["ballast"] = torch.zeros(2_000_000)


class Part(SavedLoader):
    """What one rank sees of every batch."""

    def __init__(self, rank: int, world: int) -> None:
        super().__init__()
        self.rank, self.world = rank, world

    def _batches(self, epoch: int, position: int) -> Any:
        for x, targets in super()._batches(epoch, position):
            mine = slice(self.rank, None, self.world)
            yield x[mine], {task: y[mine] for task, y in targets.items()}


def start(folder: Path, world: int = 1, largest: int | None = None) -> list[BaseProcess]:
    """Start the run, or go on with it where its last checkpoint is.

    A server that has imported everything forks the processes, so each starts within a moment.

    Args:
        folder: of the run.
        world: number of ranks.
        largest: bytes that a file may have once a few checkpoints are written.
    """
    (folder / "tmp").mkdir(parents=True, exist_ok=True)
    context = get_context("forkserver")
    context.set_forkserver_preload(["tests.trainer.kill_run"])
    port, processes = free_port(), []
    for rank in range(world):
        arguments = (folder, rank, world, port, largest)
        processes.append(context.Process(target=train, args=arguments, daemon=True))
        processes[-1].start()
    return processes


def train(folder: Path, rank: int, world: int, port: int, largest: int | None) -> None:
    """One rank: train to the end, and write down what it has come to."""
    with (folder / f"log.{rank}.txt").open("w") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    torch.set_num_threads(1)
    tempfile.tempdir = str(folder / "tmp")  # where files are written before they are moved
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "NODE_RANK": "0"}
    os.environ |= {"LOCAL_RANK": str(rank), "RANK": str(rank), "WORLD_SIZE": str(world)}
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    balancer = DualBalance()
    keep = ModelCheckpoint(folder / "saved", every_n_train_steps=1, save_last=True)
    run = trainer(
        devices=world,
        strategy=DDPStrategy(timeout=timedelta(seconds=LOST)) if world > 1 else "auto",
        max_epochs=EPOCHS,
        enable_checkpointing=True,
        use_distributed_sampler=False,
        callbacks=[balancer, keep, *([Full(largest)] if largest else [])],
    )
    module = Heavy(dropout=0.3)
    goes_on = (folder / "saved" / "last.ckpt").exists()  # then the checkpoint brings random numbers
    torch.manual_seed(os.getpid() if goes_on else 7 + rank)
    run.fit(module, Part(rank, world), ckpt_path="last", **SAFELY)
    result = {
        "weights": {name: p.detach() for name, p in module.named_parameters()},
        "state": balancer.state_dict()["state"],
        "momenta": run.optimizers[0].state_dict()["state"],
        "steps": run.global_step,
    }
    torch.save(result, folder / f"final.{rank}.pt")


class Full(Callback):
    """After a few steps no file may be larger than this."""

    def __init__(self, largest: int) -> None:
        self.largest = largest

    def on_train_batch_start(self, run: Any, *args: Any) -> None:
        if run.global_step == 5:
            resource.setrlimit(resource.RLIMIT_FSIZE, (self.largest, resource.RLIM_INFINITY))
