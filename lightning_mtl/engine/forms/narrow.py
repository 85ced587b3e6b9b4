"""Task gradients at the last shared layer or at the shared representation, instead of all of J."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lightning_mtl.balancer import Columns
from lightning_mtl.engine.gradients.heads import HeadGradients, refuse_sparse
from lightning_mtl.engine.gradients.over_columns import OverColumns
from lightning_mtl.engine.gradients.rows import TaskGradients
from lightning_mtl.numerics.flat import as_grad, real
from lightning_mtl.numerics.storage import combined

if TYPE_CHECKING:
    from lightning_mtl.engine.gradients.task_losses import TaskLosses


class Probe(OverColumns):
    """Task gradients with respect to a few tensors, for one step; then one trunk backward pass.

    It stands in for :class:`TaskGradients` where a step is balanced: rows are gradients with
    respect to ``tensors``, head gradients are those of the task, and writing the direction takes
    one backward pass through the trunk.

    Args:
        gradients: layout and head gradients.
        tensors: parameters of the last shared layer, or the shared representation alone.
        representation: whether ``tensors`` is the representation.
        scale: what losses are multiplied by against underflow in half precision.
    """

    def __init__(
        self,
        gradients: TaskGradients,
        tensors: Sequence[Tensor],
        *,
        representation: bool,
        scale: float,
    ) -> None:
        self.scale = scale
        self.gradients = gradients
        self.num_tasks = gradients.num_tasks
        self.tensors = list(tensors)
        self.representation = real(tensors[0].detach()) if representation else None
        self.losses: list[Tensor | None] = [None] * gradients.num_tasks
        self.rows = gradients.narrow_rows(self.tensors)

    kept = repeats = False

    @property
    def columns(self) -> Columns:
        """What the columns of the rows are."""
        if self.representation is not None:
            return Columns(("representation",), (self.rows.shape[1],))
        names = {id(p): name for name, p in self.gradients.parameters.items()}
        sizes = tuple(real(t.detach()).numel() for t in self.tensors)
        return Columns(tuple(names[id(t)] for t in self.tensors), sizes)

    def collect(self, losses: TaskLosses) -> None:
        """The rows and head gradients of a micro-batch; keeps the graph for the direction."""
        for t, value, count, _ in losses:
            value = value if count * self.scale == 1 else value * (count * self.scale)
            self.losses[t] = value
            grads = self.gradients.add_heads(t, value, self.tensors)
            self._dense(self.tensors, grads)
            parts = [
                real(g if g is not None else torch.zeros_like(tensor)).flatten()
                for g, tensor in zip(grads, self.tensors, strict=True)
            ]
            torch.cat([p.to(self.rows.dtype) for p in parts], out=self.rows[t])
        for t, loss in enumerate(self.losses):
            if loss is None:
                self.rows[t].zero_()

    def _dense(self, tensors: Sequence[Tensor], grads: Sequence[Tensor | None]) -> None:
        """Refuse sparse gradients by name."""
        if any(g is not None and g.layout != torch.strided for g in grads):
            by_id = {id(p): name for name, p in self.gradients.parameters.items()}
            names = [by_id.get(id(t), "the representation") for t in tensors]
            found = [(n, g) for n, g in zip(names, grads, strict=True) if g is not None]
            refuse_sparse([n for n, _ in found], [g for _, g in found])

    def finish(self) -> Tensor:
        """The rows, shape ``(T, width of the tensors)``; those of parameters summed over ranks."""
        if self.representation is None:
            self.gradients.ranks.sum_(self.rows)
        return self.rows

    def sum_shards(self, partial: Tensor) -> Tensor:
        """Sums over columns, completed over ranks: each has the representation of its batch."""
        return partial if self.representation is None else self.gradients.ranks.sum_(partial)

    @property
    def shards(self) -> None:
        """No state follows these columns."""
        return

    def drop(self, task: int) -> None:
        """Forget what task ``task`` contributed."""
        self.losses[task] = None
        self.gradients.drop(task)

    def agree(self) -> None:
        """As that of :class:`TaskGradients`."""
        self.gradients.agree()

    def note_late(self) -> None:
        """As that of :class:`TaskGradients`."""
        self.gradients.note_late()

    @property
    def heads(self) -> HeadGradients:
        """Those of the tasks."""
        return self.gradients.heads

    def head_sizes(self) -> list[float]:
        """As those of :class:`TaskGradients`."""
        return self.gradients.head_sizes()

    def combine(self, weights: Tensor) -> Tensor:
        """The direction at the tensors, ``weights @ rows``."""
        self.weights = weights.to(self.rows.dtype)
        return combined(self.rows, weights)

    def write_shared(self, direction: Tensor, *, every_column: bool) -> None:
        """One trunk backward pass of the combined gradient, into ``.grad``."""
        shared = [self.gradients.parameters[name] for name in self.gradients.shared or ()]
        if self.representation is not None:
            (z,) = self.tensors
            outputs = [as_grad(direction.view_as(real(z.detach())), z)]
            grads = torch.autograd.grad([z], shared, outputs, allow_unused=True)
        else:
            grads = torch.autograd.grad(self._weighted(), shared, allow_unused=True)
        self.gradients.begin_row()
        self.gradients.add_to_row(0, grads)
        self._sum_row()

    def _weighted(self) -> Tensor:
        """The sum of the losses times their weights in the direction."""
        pairs = zip(self.weights, self.losses, strict=True)
        terms = [weight * loss for weight, loss in pairs if loss is not None]
        total: Tensor = sum(terms[1:], terms[0])
        return total

    def _sum_row(self) -> None:
        """Row 0 of every rank, summed, into ``.grad``."""
        self.gradients.agree()
        self.gradients.write_shared(self.gradients.combined(), every_column=False)

    def write_heads(self, weights: Tensor | None) -> None:
        """As that of :class:`TaskGradients`."""
        self.gradients.write_heads(weights)
