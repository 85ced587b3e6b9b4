"""The Gramian of all shared parameters from a block of them at a time, without J."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from lightning_mtl.engine.forms.narrow import Probe
from lightning_mtl.engine.gradients.rows import TaskGradients
from lightning_mtl.numerics import inner
from lightning_mtl.numerics.flat import real

if TYPE_CHECKING:
    from lightning_mtl.engine.gradients.task_losses import TaskLosses


class Blocks(Probe):
    r"""Exact weights from :math:`J J^\top = \sum_b J_b J_b^\top`, a block of columns at a time.

    Every block takes a backward pass a task, which stops where its parameters begin; the direction
    then takes one more, of the weighted losses. So the memory of J becomes that of the largest
    block, and the time grows with the number of blocks.

    Args:
        gradients: layout and head gradients.
        number: of blocks at most.
        scale: what losses are multiplied by against underflow in half precision.
    """

    def __init__(self, gradients: TaskGradients, number: int, scale: float) -> None:
        shared = [gradients.parameters[name] for name in gradients.shared or ()]
        self.blocks = _cut(shared, number)
        widest = max(self.blocks, key=lambda block: sum(real(p.detach()).numel() for p in block))
        super().__init__(gradients, widest, representation=False, scale=scale)
        self._gramian = self.rows.new_zeros(len(self.rows), len(self.rows), dtype=torch.float64)

    def collect(self, losses: TaskLosses) -> None:
        """The Gramian and head gradients of a micro-batch; keeps the graph for the direction."""
        for number, block in enumerate(self.blocks):
            sizes = [real(p.detach()).numel() for p in block]
            width = sum(sizes)
            number_of_rows = len(self.rows)
            rows = self.rows.flatten()[: number_of_rows * width].view(number_of_rows, width).zero_()
            for t, value, count, _ in losses:
                if number == 0:
                    self.losses[t] = value = value * (count * self.scale)
                    grads: Sequence[Tensor | None] = self.gradients.add_heads(t, value, block)
                else:
                    value = self.losses[t]  # type: ignore[assignment] # set with the first block
                    grads = torch.autograd.grad(value, block, retain_graph=True, allow_unused=True)
                self._dense(block, grads)
                offset = 0
                for size, grad in zip(sizes, grads, strict=True):
                    if grad is not None:
                        grad = real(grad)
                        rows[t, offset : offset + size].view(grad.shape).copy_(grad)
                    offset += size
            rows = self.gradients.ranks.sum_(rows)
            self._gramian += inner.gramian(rows.div_(self.scale) if self.scale != 1 else rows)

    def finish(self) -> Tensor:
        """The rows of the last block: there is no more of J."""
        return self.rows

    def gramian(self, rows: Tensor) -> Tensor:
        """Inner products of the task gradients over all blocks, shape ``(T, T)``."""
        return self._gramian

    def along(self, rows: Tensor, direction: Tensor) -> Tensor:
        """Inner products of the task gradients with the direction, shape ``(T,)``."""
        return self._gramian @ self.weights.to(self._gramian)

    def length(self, direction: Tensor) -> Tensor:
        """Norm of the direction."""
        weights = self.weights.to(self._gramian)
        return (weights @ self._gramian @ weights).clamp(min=0).sqrt()

    def drop(self, task: int) -> None:
        """Forget what task ``task`` contributed."""
        super().drop(task)
        self._gramian[task] = 0
        self._gramian[:, task] = 0

    def combine(self, weights: Tensor) -> Tensor:
        """Note the weights: the direction is taken when it is written."""
        self.weights = weights.to(self.rows.dtype)
        return weights


def _cut(parameters: Sequence[nn.Parameter], number: int) -> list[list[nn.Parameter]]:
    """Parameters in order, in at most ``number`` parts of about the same size."""
    total, done = sum(p.numel() for p in parameters), 0
    blocks: list[list[nn.Parameter]] = [[]]
    for p in parameters:
        if blocks[-1] and done + p.numel() / 2 > total * len(blocks) / number:
            blocks.append([])
        blocks[-1].append(p)
        done += p.numel()
    return blocks
