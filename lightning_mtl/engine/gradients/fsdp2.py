"""Task gradients of parameters that FSDP2 divides over processes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from lightning_mtl.engine.gradients.rows import TaskGradients
from lightning_mtl.engine.gradients.task_losses import TaskLosses
from lightning_mtl.state import Shards


class ShardedParameters(TaskGradients):
    """Each process has the rows of J for its own part of every parameter.

    FSDP2 reduces a gradient when a backward pass reaches its parameter, so each task's gradient is
    one ``backward()`` whose sharded ``.grad`` is read and cleared: rows arrive summed over ranks.
    Inner products are partial sums. Every process has to run the same backward passes, so a task
    has to be present on all ranks or on none.
    """

    def discover(self, losses: TaskLosses) -> None:
        """Take tasks as met: the graph shows the gathered parameters; the first gradients tell."""
        if self.shared is not None:
            self._find([self.shared if t in losses.present else () for t in range(self.num_tasks)])

    def add(
        self,
        task: int,
        loss: Tensor,
        *,
        retain_graph: bool,
        shared: bool = True,
        heads: bool = True,
    ) -> None:
        """One backward pass of ``loss`` on all ranks; see :meth:`TaskGradients.add`."""
        (loss * self.ranks.size).backward(retain_graph=retain_graph)  # FSDP2 takes the mean
        found = {}
        for name, p in self.parameters.items():
            if p.grad is not None:
                found[name] = _local(p.grad)
                p.grad = None
        if self.shared is None:
            self.heads.add(task, self._order, [found.get(name) for name in self._order])
            self._written[task] = True
            return
        split = len(self.shared)
        if shared:
            self.add_to_row(task, [found.get(name) for name in self._order[:split]])
        if heads:
            own = self._order[split:]
            self.heads.add(task, own, [found.get(name) for name in own])

    def finish(self) -> Tensor:
        """This process's columns of the Jacobian, which are summed over ranks already."""
        return self._close()

    def send(self, task: int) -> None:
        """Nothing: FSDP2 has summed the rows."""

    def combined(self) -> Tensor:
        """Row 0, where one combined gradient was added up."""
        return self._close()[0]

    def apart(self) -> Tensor:
        """Its columns of the rows of every micro-batch, shape ``(batches, T, m)``."""
        return torch.stack([*self._apart, self._close()])

    def sum_shards(self, partial: Tensor) -> Tensor:
        """Sums over columns, completed over the processes that have the others."""
        return self.ranks.sum_(partial)

    def _leaf(self, parameter: nn.Parameter) -> Tensor:
        return _local(parameter)

    def _grad(self, parameter: nn.Parameter, local: Tensor) -> Tensor:
        local = local.to(parameter.dtype)
        if not isinstance(parameter, DTensor):
            return local
        grad: Tensor = DTensor.from_local(
            local,
            parameter.device_mesh,
            parameter.placements,
            run_check=False,
            shape=parameter.shape,
            stride=parameter.stride(),
        )
        return grad

    def _sum_heads(self, found: dict[str, Tensor]) -> dict[str, Tensor]:
        return found

    # ------------------------------------------------------- state that follows the columns

    @property
    def shards(self) -> Shards:
        """Itself."""
        return self

    @property
    def total(self) -> int:
        """How many columns all processes have together."""
        return sum(p.numel() for p in self._shared())

    def local(self, tensor: Tensor) -> Tensor:
        """This process's columns of a tensor that has all of them, or just those."""
        if tensor.shape[-1] != self.total:
            return tensor
        rows = []
        for row in tensor.reshape(-1, tensor.shape[-1]):
            parts, offset = [], 0
            for p in self._shared():
                whole = row[offset : offset + p.numel()].reshape(p.shape)
                offset += p.numel()
                mine = distribute_tensor(whole.contiguous(), p.device_mesh, p.placements)
                parts.append(mine.to_local().flatten())
            rows.append(torch.cat(parts))
        return torch.stack(rows).reshape(*tensor.shape[:-1], -1)

    def whole(self, tensor: Tensor) -> Tensor:
        """All columns, from every process's own, in the order of the parameters."""
        rows = []
        for row in tensor.reshape(-1, tensor.shape[-1]):
            parts = row.split(list(self.columns.sizes))
            full = [  # `_grad` makes DTensors here
                self._grad(p, part.reshape(_local(p).shape)).full_tensor().flatten()  # type: ignore[attr-defined]
                for p, part in zip(self._shared(), parts, strict=True)
            ]
            rows.append(torch.cat(full).to(tensor.dtype))
        return torch.stack(rows).reshape(*tensor.shape[:-1], -1)

    def _shared(self) -> list[Any]:
        return [self.parameters[name] for name in self.shared or ()]


def check_sharded(parameters: dict[str, nn.Parameter]) -> None:
    """Refuse parameters that FSDP2 does not synchronise.

    Raises:
        ValueError: a trainable parameter is not sharded.
    """
    whole = [name for name, p in parameters.items() if not isinstance(p, DTensor)]
    if whole:
        raise ValueError(
            f"Expected every trainable parameter sharded by FSDP2 but {whole[:4]} "
            f"{'are' if len(whole) > 1 else 'is'} not, and would differ between ranks. Call "
            f"`fully_shard(self, mesh=...)` last in `configure_model`."
        )


def locals_of(tensors: Iterable[Tensor]) -> Sequence[Tensor]:
    """The parts of tensors that this process has."""
    return [_local(t) for t in tensors]


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
