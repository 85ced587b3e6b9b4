"""Task gradients whose columns are divided over the processes of a data-parallel run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lightning_mtl.balancer import Columns
from lightning_mtl.engine.gradients.rows import TaskGradients
from lightning_mtl.numerics.storage import combine
from lightning_mtl.state import Shards


class ShardedGradients(TaskGradients):
    r"""Each of :math:`W` processes keeps :math:`m = \lceil P / W \rceil` columns of the sum of J.

    Rows are reduce-scattered instead of all-reduced, inner products are partial sums, and the
    direction is gathered: about :math:`(T + 1) P` numbers travel instead of :math:`2 T P`. State
    as large as J is divided too.
    """

    shard: Tensor

    @property
    def width(self) -> int:
        """Columns of a process, the padding of the last one included."""
        return -(-self._total // self.ranks.size)

    @property
    def columns(self) -> Columns:
        """The part of every shared parameter that this process has."""
        whole = super().columns
        start, sizes, offset = self.ranks.rank * self.width, [], 0
        for size in whole.sizes:
            first, last = max(offset, start), min(offset + size, start + self.width)
            sizes.append(max(0, last - first))
            offset += size
        sizes[-1] += self.width - sum(sizes)  # the padding behind the last: zeros that stay zeros
        return Columns(whole.names, tuple(sizes))

    @property
    def total(self) -> int:
        """How many columns all processes have together."""
        return self._total

    def _allocate(self, total: int, like: Tensor) -> Tensor:
        self._total = total
        self.shard = super()._allocate(self.width, like)
        self._own = like.new_empty(self.width)
        return super()._allocate(self.width * self.ranks.size, like)

    def finish(self) -> Tensor:
        """This process's columns of the Jacobian of the step, shape ``(T, m)``."""
        self._close()
        self.send(self.num_tasks - 1)
        for wait in self._sent:
            wait()
        return self.shard

    def _send(self, row: int) -> Callable[[], Any]:
        return self.ranks.start_scatter(self.rows[row], self.shard[row])  # type: ignore[index]

    def apart(self) -> Tensor:
        """Its columns of the rows of every micro-batch, shape ``(batches, T, m)``."""
        whole = [*self._apart, self._close()]
        parts = self.shard.new_zeros(len(whole), *self.shard.shape)
        for rows, part in zip(whole, parts, strict=True):
            for row, own in zip(rows, part, strict=True):
                self.ranks.scatter(row, own)
        return parts

    def sum_shards(self, partial: Tensor) -> Tensor:
        """Sums over columns, completed over the processes that have the others."""
        return self.ranks.sum_(partial)

    @property
    def shards(self) -> Shards:
        """Itself."""
        return self

    def combine(self, weights: Tensor) -> Tensor:
        """This process's part of the direction, shape ``(m,)``."""
        return combine(self.shard, weights, self._own)

    def write_shared(self, direction: Tensor, *, every_column: bool) -> None:
        """Gather the direction from its parts, or take a whole one, into ``.grad``."""
        if direction.numel() != self._direction.numel():
            own = direction.to(self._direction)
            direction = self.ranks.gather_columns(own, self._direction)
        super().write_shared(direction, every_column=every_column)

    # ------------------------------------------------------- state that follows the columns

    def local(self, tensor: Tensor) -> Tensor:
        """This process's columns of a tensor that has all of them, or just those."""
        if tensor.shape[-1] != self._total:
            return tensor
        padding = self.width * self.ranks.size - self._total
        padded = torch.nn.functional.pad(tensor, (0, padding))
        start = self.ranks.rank * self.width
        return padded[..., start : start + self.width].clone()

    def whole(self, tensor: Tensor) -> Tensor:
        """All columns, from every process's own."""
        rows = tensor.reshape(-1, tensor.shape[-1])
        found = [
            self.ranks.gather_columns(
                row.contiguous(), row.new_zeros(self.width * self.ranks.size)
            )[: self._total]
            for row in rows
        ]
        return torch.stack(found).reshape(*tensor.shape[:-1], self._total)
