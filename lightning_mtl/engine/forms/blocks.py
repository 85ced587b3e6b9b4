"""The Gramian of all shared parameters from a block of them at a time, without J."""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from lightning_mtl.engine.forms.narrow import Probe
from lightning_mtl.engine.gradients.cuts import Block, Part, blocks, parts
from lightning_mtl.engine.gradients.passes import check_length, passed, put
from lightning_mtl.engine.gradients.rows import TaskGradients
from lightning_mtl.engine.gradients.task_losses import TaskLosses
from lightning_mtl.numerics import inner
from lightning_mtl.numerics.flat import places, real, views


class Blocks(Probe):
    r"""Exact weights from :math:`J J^\top = \sum_b J_b J_b^\top`, a block of columns at a time.

    A backward pass a task goes down the graph, all tasks together from block to block: at a place
    that every path passes, the gradient of each task is kept and the rows of the parameters above
    it, whose inner products are known by then, are thrown away. The direction takes one more pass,
    of the weighted losses, when the rows are gone. So J is never there, and no part of the graph is
    gone through twice by a task, unless there is no such place in it: then passes are repeated from
    the last place above. A graph whose backward pass is not linear shows by the length of the
    direction, which the Gramian tells too.

    Args:
        gradients: layout and head gradients.
        number: of blocks, about and at least.
        scale: what losses are multiplied by against underflow in half precision.
    """

    def __init__(self, gradients: TaskGradients, number: int, scale: float) -> None:
        self.number = number
        self.shared = [gradients.parameters[name] for name in gradients.shared or ()]
        self._wanted = {id(p) for p in self.shared}
        self.repeats = False  # whether a part of the graph is gone through more than once
        self.names = {id(p): name for name, p in gradients.parameters.items()}
        super().__init__(gradients, [], representation=False, scale=scale)
        self._gramian = torch.zeros(
            self.num_tasks, self.num_tasks, dtype=torch.float64, device=self.rows.device
        )

    def collect(self, losses: TaskLosses) -> None:
        """The Gramian and head gradients of a micro-batch; keeps the graph for the direction."""
        for t, value, count, _ in losses:
            value = value if count * self.scale == 1 else value * (count * self.scale)
            self.losses[t] = value
            self.gradients.note_root(t, value)
        plan = self._blocks = self._plan()
        self.repeats = any(block.repeats for block in plan)
        self.repeats |= sum(block.top is None for block in plan) > 1  # used in several blocks
        groups = [group for block in plan for group in block.groups]
        self._lie = {id(g): places(real(p.detach()) for p in g) for g in groups}
        self.tensors = max(groups, key=_width) or self.tensors  # nothing may be reached
        self.rows = self._begun(_width(self.tensors))
        above: list[Tensor | None] = [None] * self.num_tasks  # gradients at the top of a block
        for block in plan:
            below: list[Tensor | None] = [None] * self.num_tasks
            for number, group in enumerate(block.groups):
                others = block.others if number == 0 else []
                bottom = block.bottom if number == len(block.groups) - 1 else None
                rows, lie = self._of(group), self._lie[id(group)]
                again = number < len(block.groups) - 1
                for t in range(self.num_tasks):
                    output = self.losses[t] if block.top is None else above[t]
                    grads = self._passed(block.top, output, [*group, *others], bottom, again=again)
                    put(views(rows[t], lie), grads[: len(group)])
                    heads = grads[len(group) : len(group) + len(others)]
                    self.gradients.heads.add(t, [self.names[id(p)] for p in others], heads)
                    below[t] = grads[-1] if bottom is not None else None
                    del grads, heads  # before the next pass makes others
                if group:
                    rows = self.gradients.ranks.sum_(rows)
                    self._gramian += inner.gramian(rows) / self.scale**2
            above = below

    def _begun(self, width: int) -> Tensor:
        """Memory for rows, kept between steps where that is at most a twentieth of J more.

        Memory that is new costs the system more time than to copy into it.
        """
        size = self.num_tasks * width
        if 20 * min(size, _width(self.shared)) <= self.num_tasks * _width(self.shared) and width:
            return self.gradients.narrow_rows(self.tensors, self.rows.dtype)
        return self.rows.new_empty(self.num_tasks, width)

    def _plan(self) -> list[Block]:
        """The blocks of this graph; the same on every rank, whose graphs may differ."""
        found = parts([loss for loss in self.losses if loss is not None])
        known, wanted = self.gradients.parameters, self._wanted
        for part in found:
            part.used = [leaf for leaf in part.used if id(leaf) in self.names]
        plan = blocks(found, wanted, self.number, self.num_tasks)
        ranks = self.gradients.ranks
        if not ranks.alone:
            told = repr([[self.names[id(p)] for p in g] for block in plan for g in block.groups])
            number = float(zlib.crc32(told.encode()))
            ends = ranks.max_(torch.tensor([number, -number], dtype=torch.float64).to(ranks.device))
            if ends.sum() != 0:
                every = Part(None, 0, [*self.shared, *known.values()])
                return blocks([every], wanted, self.number, self.num_tasks)
        return plan

    def _of(self, group: Sequence[Tensor]) -> Tensor:
        """Rows for a group, in the memory that all groups share."""
        width = _width(group)
        return self.rows.flatten()[: self.num_tasks * width].view(self.num_tasks, width)

    def _passed(
        self,
        top: GradientEdge | None,
        output: Tensor | None,
        leaves: Sequence[Tensor],
        bottom: GradientEdge | None,
        *,
        again: bool,
        retain_graph: bool = True,
    ) -> Sequence[Tensor | None]:
        """Gradients at the leaves of a block and at its bottom, from a loss or from the top."""
        grads = passed(top, output, leaves, bottom, again=again, retain_graph=retain_graph)
        shared = [(p, g) for p, g in zip(leaves, grads, strict=False) if id(p) in self._wanted]
        self._dense([p for p, _ in shared], [g for _, g in shared])
        return grads

    def finish(self) -> Tensor:
        """A column of zeros that stands for J, of which there is nothing any more."""
        self.rows = self.rows.new_zeros(self.num_tasks, 1)
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

    def write_shared(self, direction: Tensor, *, every_column: bool) -> None:
        """The weighted losses' way down the blocks; memory grows on it, as in plain training."""
        output: Tensor | None = self._weighted()
        again = any(b.top is None for b in self._blocks[1:])  # from the losses once more
        parts: dict[int, tuple[Tensor, bool]] = {}
        self._squared = self._gramian.new_zeros(())  # length of the direction
        for block in self._blocks:
            output = self._weighted() if block.top is None else output
            for number, group in enumerate(block.groups, 1):
                last = number == len(block.groups)
                bottom, keep = block.bottom if last else None, again or not last
                found = self._passed(
                    block.top, output, group, bottom, again=not last, retain_graph=keep
                )
                parts.update(self._parts(group, found))
                output = found[-1] if bottom is not None else output
                del found  # before the next pass makes others
        weights = self.weights.to(self._gramian) * self.scale
        losses = [loss for loss in self.losses if loss is not None]
        check_length(self._squared.item(), weights, self._gramian, self.rows.dtype, losses)
        own, reached = zip(*(parts.get(id(p), (None, False)) for p in self.shared), strict=True)
        self.gradients.begin_row(reached)
        self.gradients.agree()
        self.gradients.give(own, every_column=every_column)

    def _parts(
        self, group: Sequence[Tensor], grads: Sequence[Tensor | None]
    ) -> dict[int, tuple[Tensor, bool]]:
        """The direction of a group, summed over ranks, and whether this one reaches each part."""
        flat = self.rows.new_empty(_width(group))
        own = views(flat, self._lie[id(group)])
        put(own, grads[: len(own)])
        self.gradients.ranks.sum_(flat)
        self._squared += inner.square(flat)
        triples = zip(group, own, grads, strict=False)
        return {id(p): (part, grad is not None) for p, part, grad in triples}


def _width(group: Sequence[Tensor]) -> int:
    return sum(real(p.detach()).numel() for p in group)
