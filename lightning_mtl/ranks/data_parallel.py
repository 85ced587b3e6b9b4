"""Data-parallel runs: every process has all parameters and its own batches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch import Tensor

from lightning_mtl.ranks.one_process import OneProcess


class DataParallel(OneProcess):
    """The processes of a DDP run. All collectives of the flow go through here.

    DDP's own reducer takes no part: it averages one gradient a parameter, while balancing needs
    every task's. Task gradients are taken by ``torch.autograd.grad``, which fires none of its
    hooks.
    """

    alone = False

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self.size = dist.get_world_size()
        self.rank = dist.get_rank()
        self.device = device
        self.dtype = dtype

    def sum_(self, tensor: Tensor) -> Tensor:
        """The sum over processes, in place and returned."""
        dist.all_reduce(tensor)
        return tensor

    def start_sum(self, tensor: Tensor) -> Callable[[], Any]:
        """Begin the sum over processes, in place; call what is returned before it is used."""
        work: Any = dist.all_reduce(tensor, async_op=True)
        wait: Callable[[], Any] = work.wait
        return wait

    def max_(self, tensor: Tensor) -> Tensor:
        """The largest value over processes, in place and returned."""
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
        return tensor

    def copy_first(self, tensor: Tensor) -> None:
        """Overwrite a tensor by that of the first process."""
        here = tensor.detach().to(self.device)
        dist.broadcast(here, 0)
        tensor.detach().copy_(here)

    def gather(self, value: Any) -> list[Any]:
        """What every process has, in the order of ranks; plain values only."""
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, value)
        return found

    def scatter(self, row: Tensor, part: Tensor) -> Tensor:
        """This process's part of the sum of ``row`` over processes, written to ``part``."""
        dist.reduce_scatter_tensor(part, row)
        return part

    def start_scatter(self, row: Tensor, part: Tensor) -> Callable[[], Any]:
        """Begin what :meth:`scatter` does; call what is returned before ``part`` is used."""
        work: Any = dist.reduce_scatter_tensor(part, row, async_op=True)
        wait: Callable[[], Any] = work.wait
        return wait

    def gather_columns(self, part: Tensor, row: Tensor) -> Tensor:
        """All processes' parts in the order of ranks, written to ``row``."""
        dist.all_gather_into_tensor(row, part)
        return row


def ranks_of(trainer: Trainer) -> OneProcess:
    """How the processes of a Trainer agree."""
    if not isinstance(trainer.strategy, (DDPStrategy, ModelParallelStrategy)):
        return OneProcess()
    dtype = torch.float64 if trainer.precision == "64-true" else torch.float32
    ranks = DataParallel(trainer.strategy.root_device, dtype)
    ranks.sharded_parameters = isinstance(trainer.strategy, ModelParallelStrategy)
    return ranks
