"""Task gradients of one optimiser step: a row a task, and the gradients of the heads."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_mtl.balancer import Columns
from lightning_mtl.engine.gradients.heads import HeadGradients, refuse_sparse, summed_heads
from lightning_mtl.engine.gradients.over_columns import OverColumns
from lightning_mtl.engine.gradients.reach import Reach, agreed, from_graph, on_any_rank, paths
from lightning_mtl.engine.gradients.task_losses import TaskLosses
from lightning_mtl.numerics.flat import Line, as_grad, check_device, places, real, views, wide
from lightning_mtl.numerics.storage import Memory, allocate, combine, narrow
from lightning_mtl.ranks import OneProcess
from lightning_mtl.state import Shards

Named = dict[str, nn.Parameter]


class TaskGradients(OverColumns):
    """Collects one gradient a task, adds up micro-batches, and writes the balanced direction back.

    Shared parameters are those that two or more tasks reach (with one task: all that it reaches),
    found from the graph of the first optimiser step unless given. Their gradients live in one
    matrix of shape ``(T, P)``, in float32 or the parameters' own dtype where that is wider.

    Args:
        parameters: every trainable parameter by name.
        num_tasks: number of active tasks T.
        shared: names of the shared parameters; ``None`` to find them.
        ranks: the processes of the run, over which gradients are summed.
        memory: where and how the rows are kept.
        in_place: there is one row, the direction itself, when nothing is to be combined.
    """

    kept = True
    representation: Tensor | None = None

    def __init__(
        self,
        parameters: Named,
        num_tasks: int,
        shared: Sequence[str] | None = None,
        ranks: OneProcess | None = None,
        *,
        memory: Memory = "full",
        in_place: bool = False,
    ) -> None:
        self._memory: Memory = memory
        self._in_place = in_place
        self.ranks = OneProcess() if ranks is None else ranks
        self.num_tasks = num_tasks
        self.parameters = parameters
        self.rows: Tensor | None = None
        self._written = [False] * num_tasks
        self._sent: list[Callable[[], Any]] = []  # to wait for each row's sum over ranks
        self.heads = HeadGradients(num_tasks)  # of all parameters, while the shared are unknown
        self.shared: list[str] | None = None
        self.reach = Reach(num_tasks)
        self.before: list[str] = []  # shared in a layout of which this one is an extension
        self._columns = Columns((), ())
        self._line: Line | None = None  # of directions, and of the one row if there is one
        self._narrow: Tensor | None = None  # rows of a few columns, see `narrow_rows`
        self._order = list(parameters)
        self._inputs = list(parameters.values())
        if shared is not None:
            self._fix(list(shared))

    @property
    def known(self) -> bool:
        """Whether the shared parameters have been found or given."""
        return self.shared is not None

    @property
    def columns(self) -> Columns:
        """What the columns of the rows are."""
        return self._columns

    def begin(self) -> None:
        """Start a new optimiser step."""
        self._written = [False] * self.num_tasks
        self.heads.begin()
        self._reached = [False] * len(self.shared or ())
        self._met: Sequence[Collection[str]] | None = None  # by task, on any rank
        self._apart: list[Tensor] = []
        self._roots: dict[int, Any] = {}  # of the graphs of this step, by task
        self._sent = []

    def set_aside(self) -> None:
        """Keep the rows of a micro-batch apart, and start new ones."""
        self._apart.append(self._close().clone())
        self._written = [False] * self.num_tasks

    def apart(self) -> Tensor:
        """The rows of every micro-batch, shape ``(batches, T, P)``, summed over ranks."""
        return self.ranks.sum_(torch.stack([*self._apart, self._close()]))

    def discover(self, losses: TaskLosses) -> None:
        """Find the shared parameters from the graphs of the losses, before any gradient.

        Where they are known already, only note what the tasks reach.
        """
        reached = from_graph(losses, self.parameters, self.num_tasks)
        left_out = [t for t, _ in losses.left_out]
        self._find(reached, [*losses.present, *losses.bad, *left_out])

    def note_late(self) -> None:
        """Look for parameters outside the rows that a second task has reached by now."""
        if self._met is None and not self.ranks.alone:
            self.agree()
        heads = [h.keys() for h in self.heads.by_task] if self._met is None else self._met
        new = self.reach.new(heads)
        if new:
            found = paths(new, self._roots.values(), self.heads.by_task, self.ranks)
            self.reach.keep(new, found, self._order[len(self.shared or ()) :])

    def _find(self, reached: Sequence[Collection[str]], tasks: Collection[int] = ()) -> None:
        self.reach.add(on_any_rank(reached, self._order, self.ranks), tasks)
        if self.shared is None:
            found = self.reach.shared(self._order)
            self._fix([*self.before, *(n for n in found if n not in set(self.before))])
        self.note_outside()

    @property
    def outside(self) -> set[int]:
        """Tasks that reach no shared parameter."""
        return self.reach.apart

    def note_outside(self) -> None:
        """Note the tasks without any way to a shared parameter."""
        self.reach.apart = self.reach.outside(self.shared or ())

    def add(
        self,
        task: int,
        loss: Tensor,
        *,
        retain_graph: bool,
        shared: bool = True,
        heads: bool = True,
    ) -> None:
        """Add the gradient of ``loss``, a scalar, to row ``task`` and to its head gradients.

        Args:
            task: the row.
            loss: with a graph.
            retain_graph: whether the graph is needed once more.
            shared: whether the row is wanted; always so while the layout is unknown.
            heads: whether the gradients of the other parameters are wanted.
        """
        split = len(self.shared or ())
        first, end = 0 if shared or not split else split, None if heads else split
        inputs = self._inputs[first:end]
        if not inputs:
            return  # a model without heads
        grads = torch.autograd.grad(loss, inputs, retain_graph=retain_graph, allow_unused=True)
        if split and shared:
            self.add_to_row(task, grads[:split])
            grads = grads[split:]
        if heads:
            self._roots[task] = loss.grad_fn
            self.heads.add(task, self._order[split:], grads)
        self._written[task] |= shared

    def add_heads(self, task: int, loss: Tensor, others: Sequence[Tensor]) -> list[Tensor | None]:
        """Add the head gradients of ``loss``; returns those of ``others``. Keeps the graph."""
        assert self.shared is not None
        heads = self._inputs[len(self.shared) :]
        self._roots[task] = loss.grad_fn
        grads = torch.autograd.grad(loss, [*others, *heads], retain_graph=True, allow_unused=True)
        self.heads.add(task, self._order[len(self.shared) :], grads[len(others) :])
        return list(grads[: len(others)])

    def note_root(self, task: int, loss: Tensor) -> None:
        """Note where the graph of a task begins, for parameters that are found shared later."""
        self._roots[task] = loss.grad_fn

    def add_to_row(self, task: int, grads: Sequence[Tensor | None]) -> None:
        """Add gradients of the shared parameters, in their order, to a row."""
        self._own_row()
        parts = self._row_views[task]
        present = [g for g in grads if g is not None]
        if self._any_complex:
            present = [real(g) for g in present]
        into = parts
        if len(present) == len(parts):
            self._reached = [True] * len(parts)
        else:
            self._reached = [r or g is not None for r, g in zip(self._reached, grads, strict=True)]
            into = [v for v, g in zip(parts, grads, strict=True) if g is not None]
            if not self._written[task]:
                self.rows[task].zero_()  # type: ignore[index] # the layout is known here
        if present:
            try:
                if self._written[task]:
                    if present[0].device != into[0].device:  # which copies to the host, adds not
                        present = [g.to(into[0].device) for g in present]
                    torch._foreach_add_(into, present)
                else:
                    torch._foreach_copy_(into, present)
            except RuntimeError:
                names = [n for n, g in zip(self.shared or (), grads, strict=True) if g is not None]
                refuse_sparse(names, present)  # looked at when it fails: a look a step would cost
                raise
        self._written[task] = True

    def row_views(self, row: int) -> list[Tensor]:
        """A row as gradients of the shared parameters, in their shapes."""
        return self._row_views[row]

    def narrow_rows(self, tensors: Sequence[Tensor], dtype: torch.dtype | None = None) -> Tensor:
        """Rows as wide as all of ``tensors``, with what the last step left in them."""
        if not tensors:
            return self._like.new_empty(self.num_tasks, 0)
        self._narrow = narrow(self._narrow, self.num_tasks, tensors, dtype)
        return self._narrow

    def begin_row(self, reached: Sequence[bool] | None = None) -> None:
        """Start with an empty row 0, as the place to add up one combined gradient.

        Args:
            reached: which shared parameters it reaches, where it is not added up here.
        """
        self._written = [False] * self.num_tasks
        self._reached = [False] * len(self.shared or ()) if reached is None else list(reached)

    def drop(self, task: int) -> None:
        """Forget what task ``task`` contributed to this step."""
        self._written[task] = False
        self.heads.by_task[task] = {}

    def finish(self) -> Tensor:
        """The Jacobian of the step, shape ``(T, P)``, summed over ranks.

        Rows of tasks that added nothing are zero.
        """
        rows = self._close()
        if not self._sent:
            return self.ranks.sum_(rows)
        for wait in self._sent:
            wait()
        return rows

    def send(self, task: int) -> None:
        """Begin to sum the rows up to ``task`` over ranks, while the others are being taken.

        Rows go in the order of tasks on every rank, also those of tasks that a rank has not.
        """
        if self.shared is None or self.ranks.alone:
            return
        for row in range(len(self._sent), task + 1):
            self._close_row(row)
            self._sent.append(self._send(row))

    def _send(self, row: int) -> Callable[[], Any]:
        return self.ranks.start_sum(self.rows[row])  # type: ignore[index] # the layout is known

    def combined(self) -> Tensor:
        """Row 0, summed over ranks, where one combined gradient was added up."""
        self._own_row()
        assert self.rows is not None
        if not self._written[0]:
            self.rows[0].zero_()
        return self.ranks.sum_(self.rows[0])

    @property
    def shards(self) -> Shards | None:
        """How columns are divided over processes; ``None`` when each has all of them."""
        return None

    def _close(self) -> Tensor:
        if self.shared is None:
            self._find(self.heads.by_task)
        self._own_row()
        assert self.rows is not None
        for task in range(len(self._sent), len(self.rows)):
            self._close_row(task)
        return self.rows

    def _close_row(self, task: int) -> None:
        if not self._written[task]:
            self.rows[task].zero_()  # type: ignore[index] # the layout is known here

    def _fix(self, shared: list[str]) -> None:
        """Fix the layout of the rows, and move into them what was collected before it was known."""
        chosen = [real(self._leaf(self.parameters[name])) for name in shared]
        self._any_complex = any(self.parameters[name].is_complex() for name in shared)
        self._columns = Columns(tuple(shared), tuple(p.numel() for p in chosen))
        check_device(chosen)
        self.shared = shared
        names = set(shared)
        self._order = shared + [name for name in self.parameters if name not in names]
        self._inputs = [self.parameters[name] for name in self._order]
        self._like = (chosen or [torch.zeros(0)])[0].new_empty(0, dtype=wide(chosen))
        self._places = places(chosen)
        if not (self._in_place and self._memory == "blocks"):  # which needs no row of this width
            self._new_rows()
        self._reached = [any(name in heads for heads in self.heads.by_task) for name in shared]
        for task, heads in enumerate(self.heads.by_task):
            found = {name: heads.pop(name) for name in shared if name in heads}
            if found:
                self._own_row()
            parts = self._row_views[task] if found else ()
            for name, view in zip(shared, parts, strict=bool(found)):
                if name in found:
                    refuse_sparse([name], [found[name]])
                    view.copy_(real(found[name]))

    def _new_rows(self) -> None:
        self.rows = self._allocate(sum(self._columns.sizes), self._like)
        self._row_views = [views(row, self._places) for row in self.rows]
        self._line = Line(self.rows[0], self._places) if self._in_place else None

    def _own_row(self) -> None:
        """Have rows; leave the one row to whoever keeps gradients that are parts of it."""
        if self.rows is None:
            self._new_rows()
        elif self._in_place and self._line is not None and self._line.given:
            if self._line.kept():
                self._new_rows()
            self._line.given = False

    def _leaf(self, parameter: nn.Parameter) -> Tensor:
        """What of a parameter this process has."""
        return parameter

    def _grad(self, parameter: nn.Parameter, local: Tensor) -> Tensor:
        """What becomes the ``.grad`` of a parameter."""
        return as_grad(local, parameter)

    def _allocate(self, total: int, like: Tensor) -> Tensor:
        number = 1 if self._in_place and total else self.num_tasks
        return allocate(number, total, self._memory, like, like.dtype)

    @property
    def _direction(self) -> Tensor:
        """Where the direction of this step is put: on the device, in float32 or wider."""
        if self._line is None or (not self._in_place and self._line.kept()):
            assert self.rows is not None
            self._line = Line(self._like.new_empty(self.rows.shape[1]), self._places)
        return self._line.vector

    def write_shared(self, direction: Tensor, *, every_column: bool) -> None:
        """Make ``direction``, shape ``(P,)``, the ``.grad`` of the shared parameters.

        The gradients are views of one vector with each parameter's own strides, as fused
        optimizers expect. The next step takes another one where hooks keep some. Parameters that no
        task reached in this step keep none, as in plain training, unless ``every_column``.
        """
        vector = self._direction
        if direction.data_ptr() != vector.data_ptr():
            vector.copy_(direction)
        assert self._line is not None
        self._line.given = True
        self.give(self._line.views, every_column=every_column)

    def give(self, parts: Sequence[Tensor | None], *, every_column: bool) -> None:
        """Make parts of a direction, in the order of the shared parameters, their ``.grad``."""
        for name, part, reached in zip(self.shared or (), parts, self._reached, strict=True):
            if part is not None and (reached or every_column):
                parameter = self.parameters[name]
                parameter.grad = self._grad(parameter, part)

    def combine(self, weights: Tensor) -> Tensor:
        """The direction ``weights @ J``, shape ``(P,)``, in the vector behind ``.grad``."""
        assert self.rows is not None
        if not self.shared:
            return self._direction  # nothing is shared, so far
        return combine(self.rows, weights, self._direction)

    def write_heads(self, weights: Tensor | None) -> None:
        """Make each task's head gradients, times its weight, the ``.grad`` of its own parameters.

        Args:
            weights: shape ``(T,)``; ``None`` for ones.
        """
        found = self.heads.weighted(weights)
        if not self.ranks.alone:
            found = self._sum_heads(found)
        for name, grad in found.items():
            self.parameters[name].grad = self._grad(self.parameters[name], grad)
        self.heads.begin()
        self._roots = {}

    def _sum_heads(self, found: dict[str, Tensor]) -> dict[str, Tensor]:
        """Head gradients summed over ranks, for every parameter that any of them reached."""
        own = {name: self.parameters[name] for name in self._order[len(self.shared or ()) :]}
        parts = summed_heads(found, own, self.ranks, self._like.dtype)
        met = {name for found in self._met or () for name in found}
        return {name: part for name, part in parts.items() if name in met}

    def head_sizes(self) -> list[float]:
        """A number for each task, the same on every rank, not finite where a head gradient is."""
        sizes = self.heads.sizes()
        return sizes if self.ranks.alone else self.agree(sizes)

    def agree(self, sizes: Sequence[float] = ()) -> list[float]:
        """Sums of ``sizes`` over ranks; and parameters that any rank reached are reached."""
        if self.ranks.alone:
            return list(sizes)
        heads = self._order[len(self.shared or ()) :]
        sums, self._reached, self._met = agreed(
            sizes, self._reached, self.heads.by_task, heads, self.ranks
        )
        return sums
