"""What a training would meet, tried in a process of its own before the grid: data, optimizers."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import pickle
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.utils._pytree import tree_flatten

from lightning_mtl.compare.build import RunCLI
from lightning_mtl.compare.pool import PATIENCE, end, ended_with, start_method
from lightning_mtl.compare.stopping import left_to_parent, undisturbed
from lightning_mtl.compare.texts import error_text
from lightning_mtl.compare.worker import end_with_parent
from lightning_mtl.parsing import use_current_directory


@dataclass
class Rehearsal:
    """What was met.

    Attributes:
        errors: why a stage (``train``, ``val``, ``test``) cannot be had, by stage.
        batches: a digest of the first batch and the number of batches, by stage.
        optimizers: names of their classes.
        decay: whether one of them has weight decay.
        limited: whether epochs or steps limit the training.
    """

    errors: dict[str, str] = field(default_factory=dict)
    batches: dict[str, str] = field(default_factory=dict)
    optimizers: list[str] = field(default_factory=list)
    decay: bool = False
    limited: bool = False

    @property
    def same_data(self) -> bool:
        """Whether validation and test begin with the same batch and are as long."""
        return "val" in self.batches and self.batches["val"] == self.batches.get("test")


class _Enough(BaseException):
    """Ends a stage before its first step; no ``except Exception`` of a user's stops it."""


class _Spy(Callback):
    """Looks at what a stage has prepared and ends it."""

    def __init__(self, found: Rehearsal) -> None:
        self.found = found

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Everything is set up: optimizers, loaders."""
        groups = [group for o in trainer.optimizers for group in o.param_groups]
        self.found.optimizers = [type(o).__name__ for o in trainer.optimizers]
        self.found.decay = any("weight_decay" in group for group in groups)
        loop = trainer.fit_loop
        self.found.limited = (loop.max_epochs or 0) > 0 or loop.max_steps > 0
        self._look("train", trainer.train_dataloader, trainer.num_training_batches)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The loaders of the validation are there."""
        self._look("val", trainer.val_dataloaders, trainer.num_val_batches)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The loaders of the test are there."""
        self._look("test", trainer.test_dataloaders, trainer.num_test_batches)

    def _look(self, stage: str, loaders: Any, length: Any) -> None:
        several = isinstance(loaders, list | tuple)
        firsts = [next(iter(loader), None) for loader in (loaders if several else [loaders])]
        if any(first is None for first in firsts):
            raise ValueError(f"`{stage}_dataloader` has no batch")
        self.found.batches[stage] = f"{_digest(firsts)} {length}"
        raise _Enough


def rehearse(config: str, stages: Sequence[str]) -> Rehearsal:
    """Set up a training and the evaluations of ``stages``, each up to its first step.

    That takes a process, since data modules may prepare anything in ``setup``, and runs should not
    inherit it. What it prints is not kept.

    Args:
        config: path of the config.
        stages: of ``train``, ``val`` and ``test``.
    """
    context: Any = multiprocessing.get_context(start_method())
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_rehearse, args=(config, list(stages), sender))
    with undisturbed():
        process.start()
    sender.close()
    patience = 0
    try:
        found: Rehearsal = receiver.recv()
        patience = PATIENCE
    except (EOFError, OSError):
        process.join()
        found = Rehearsal(errors={"train": f"its process {ended_with(process.exitcode)}"})
    finally:
        with undisturbed():
            end(process, patience)
            receiver.close()
    return found


def _rehearse(config: str, stages: list[str], connection: Connection) -> None:
    left_to_parent()
    end_with_parent()
    use_current_directory()
    torch.set_num_threads(1)
    found = Rehearsal()
    with suppress(OSError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, 1)
        os.dup2(nowhere, 2)
        sys.stdout = sys.stderr = os.fdopen(nowhere, "w")
    for stage in stages:
        try:
            _stage(stage, config, found)
        except BaseException as error:  # a user's SystemExit too
            found.errors[stage] = error_text(error)
    with suppress(OSError):
        sys.stdout.flush()
        sys.stderr.flush()
    connection.send(found)


def _stage(stage: str, config: str, found: Rehearsal) -> None:
    cli = RunCLI(config, 0, [_Spy(found)], may_stop_early=False)
    by_stage: dict[str, Callable[..., Any]] = {
        "train": cli.trainer.fit,
        "val": cli.trainer.validate,
        "test": cli.trainer.test,
    }
    with suppress(_Enough):
        by_stage[stage](cli.model, datamodule=cli.datamodule)
        raise ValueError(f"`{stage}_dataloader` has no batch")


def _digest(batches: Any) -> str:
    leaves, _ = tree_flatten(batches)
    digest = hashlib.sha256()
    for leaf in leaves:
        if isinstance(leaf, torch.Tensor):
            content = leaf.detach().cpu().contiguous()
            digest.update(repr((content.dtype, content.shape)).encode())
            digest.update(content.reshape(-1).view(torch.uint8).numpy().tobytes())
        else:
            with suppress(Exception):  # what cannot be told apart counts as the same
                digest.update(pickle.dumps(leaf))
    return digest.hexdigest()
