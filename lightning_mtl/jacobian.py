"""Task gradients of one optimiser step: a row a task, and the gradients of the heads."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_mtl.balancer import Columns
from lightning_mtl.host import non_finite
from lightning_mtl.losses import TaskLosses
from lightning_mtl.state import Shards
from lightning_mtl.strategies import OneProcess

Named = dict[str, nn.Parameter]


class TaskGradients:
    """Collects one gradient a task, adds up micro-batches, and writes the balanced direction back.

    Shared parameters are those that two or more tasks reach (with one task: all that it reaches).
    They are found from the graph of the first optimiser step, unless given, and stay fixed from
    then on. Their gradients live in one preallocated matrix of shape ``(T, P)``, in float32 or the
    parameters' own dtype where that is wider.

    Args:
        parameters: every trainable parameter by name.
        num_tasks: number of active tasks T.
        shared: names of the shared parameters; ``None`` to find them.
        ranks: the processes of the run, over which gradients are summed.
        in_place: row 0 is the direction itself, when nothing is to be combined.
    """

    def __init__(
        self,
        parameters: Named,
        num_tasks: int,
        shared: Sequence[str] | None = None,
        ranks: OneProcess | None = None,
        *,
        in_place: bool = False,
    ) -> None:
        self._in_place = in_place
        self.ranks = OneProcess() if ranks is None else ranks
        self.num_tasks = num_tasks
        self.parameters = parameters
        self.rows: Tensor | None = None
        self._written = [False] * num_tasks
        self._sent: list[Callable[[], Any]] = []  # to wait for each row's sum over ranks
        # {name: gradient} of each task; while the shared parameters are unknown, of all of them.
        self._heads: list[dict[str, Tensor]] = [{} for _ in range(num_tasks)]
        self._owned = False  # whether head gradients are tensors of our own
        self.shared: list[str] | None = None
        self._columns = Columns((), ())
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
        self._heads = [{} for _ in range(self.num_tasks)]
        self._owned = False
        self._reached = [False] * len(self.shared or ())
        self._apart: list[Tensor] = []
        self._sent = []

    def set_aside(self) -> None:
        """Keep the rows of a micro-batch apart, and start new ones."""
        self._apart.append(self._close().clone())
        self._written = [False] * self.num_tasks

    def apart(self) -> Tensor:
        """The rows of every micro-batch, shape ``(batches, T, P)``, summed over ranks."""
        return self.ranks.sum_(torch.stack([*self._apart, self._close()]))

    def discover(self, losses: TaskLosses) -> None:
        """Find the shared parameters from the graphs of the losses, before any gradient."""
        names = {id(p): name for name, p in self.parameters.items()}
        reached: list[set[str]] = [set() for _ in range(self.num_tasks)]
        for t, loss, _, _ in losses:
            reached[t] = {names[i] for i in reachable(loss) if i in names}
        self._fix(self._shared_of(reached))

    def _shared_of(self, reached: Sequence[set[str]]) -> list[str]:
        needed = min(2, self.num_tasks)
        if not self.ranks.alone:  # ranks may have met different tasks
            table = torch.tensor([[n in names for n in self._order] for names in reached])
            table = self.ranks.max_(table.to(self.ranks.device, torch.uint8))
            reached = [{self._order[i] for i in row.nonzero()[:, 0]} for row in table.cpu()]
        return [n for n in self._order if sum(n in names for names in reached) >= needed]

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
        split = len(self.shared) if self.shared is not None else 0
        first, end = 0 if shared or not split else split, None if heads else split
        inputs = self._inputs[first:end]
        if not inputs:
            return  # a model without heads
        grads = torch.autograd.grad(loss, inputs, retain_graph=retain_graph, allow_unused=True)
        if split and shared:
            self.add_to_row(task, grads[:split])
            grads = grads[split:]
        if not split and any(g is not None and g.layout != torch.strided for g in grads):
            raise ValueError(
                "Expected dense gradients but found sparse ones. Use nn.Embedding(sparse=False), "
                "or train without a gradient balancer."
            )
        if heads:
            self._add_to_heads(task, grads)
        self._written[task] |= shared

    def add_heads(self, task: int, loss: Tensor, others: Sequence[Tensor]) -> list[Tensor | None]:
        """Add the head gradients of ``loss``; returns those of ``others``. Keeps the graph."""
        assert self.shared is not None
        heads = self._inputs[len(self.shared) :]
        grads = torch.autograd.grad(loss, [*others, *heads], retain_graph=True, allow_unused=True)
        self._add_to_heads(task, grads[len(others) :])
        return list(grads[: len(others)])

    def _add_to_heads(self, task: int, grads: Sequence[Tensor | None]) -> None:
        heads = self._heads[task]
        for name, grad in zip(self._order[-len(grads) :] if grads else (), grads, strict=True):
            if grad is not None:
                heads[name] = heads[name] + grad if name in heads else grad

    def add_to_row(self, task: int, grads: Sequence[Tensor | None]) -> None:
        """Add gradients of the shared parameters, in their order, to a row."""
        views = self._row_views[task]
        present = [g for g in grads if g is not None]
        into = views
        if len(present) == len(views):
            self._reached = [True] * len(views)
        else:
            self._reached = [r or g is not None for r, g in zip(self._reached, grads, strict=True)]
            into = [v for v, g in zip(views, grads, strict=True) if g is not None]
            if not self._written[task]:
                self.rows[task].zero_()  # type: ignore[index] # the layout is known here
        if present:
            if self._written[task]:
                torch._foreach_add_(into, present)
            else:
                torch._foreach_copy_(into, present)
        self._written[task] = True

    def begin_row(self) -> None:
        """Start with an empty row 0, as the place to add up one combined gradient."""
        self._written = [False] * self.num_tasks
        self._reached = [False] * len(self.shared or ())

    def drop(self, task: int) -> None:
        """Forget what task ``task`` contributed to this step."""
        self._written[task] = False
        self._heads[task] = {}

    def heads_of(self, task: int) -> dict[str, Tensor]:
        """Gradients of the parameters outside the rows that a task reached in this process."""
        return self._heads[task]

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
        assert self.rows is not None
        if not self._written[0]:
            self.rows[0].zero_()
        return self.ranks.sum_(self.rows[0])

    def sum_shards(self, partial: Tensor) -> Tensor:
        """Sums over columns, completed over the processes that have others: here, nobody has."""
        return partial

    @property
    def shards(self) -> Shards | None:
        """How columns are divided over processes; ``None`` when each has all of them."""
        return None

    def norms(self, rows: Tensor) -> Tensor:
        """Norms of rows, complete over all columns."""
        norms: Tensor = torch.linalg.vector_norm(rows, dim=1)
        return norms

    def _close(self) -> Tensor:
        if self.shared is None:
            self._fix(self._shared_of([set(heads) for heads in self._heads]))
        assert self.rows is not None
        for task in range(len(self._sent), self.num_tasks):
            self._close_row(task)
        return self.rows

    def _close_row(self, task: int) -> None:
        if not self._written[task]:
            self.rows[task].zero_()  # type: ignore[index] # the layout is known here

    def _fix(self, shared: list[str]) -> None:
        """Fix the layout of the rows, and move into them what was collected before it was known."""
        chosen = [self._leaf(self.parameters[name]) for name in shared]
        self._columns = Columns(tuple(shared), tuple(p.numel() for p in chosen))
        devices = {p.device for p in chosen}
        if len(devices) > 1:
            raise ValueError(
                f"Expected the shared parameters on one device but found them on "
                f"{sorted(map(str, devices))}. Keep the shared trunk on one device, or return the "
                f"part on one from `shared_parameters()`."
            )
        self.shared = shared
        names = set(shared)
        self._order = shared + [name for name in self.parameters if name not in names]
        self._inputs = [self.parameters[name] for name in self._order]
        dtype = torch.float32
        for p in chosen:
            dtype = torch.promote_types(dtype, p.dtype)
        total = sum(p.numel() for p in chosen)
        device = chosen[0].device if chosen else None
        self.rows = self._allocate(total, dtype=dtype, device=device)
        self._row_views = [_views(row, chosen) for row in self.rows]
        self._direction = self.rows[0] if self._in_place else torch.zeros_like(self.rows[0])
        self._direction_views = _views(self._direction, chosen)
        self._reached = [any(name in heads for heads in self._heads) for name in shared]
        for task, heads in enumerate(self._heads):
            found = {name: heads.pop(name) for name in shared if name in heads}
            for name, view in zip(shared, self._row_views[task], strict=True):
                if name in found:
                    view.copy_(found[name])

    def _leaf(self, parameter: nn.Parameter) -> Tensor:
        """What of a parameter this process has."""
        return parameter

    def _grad(self, parameter: nn.Parameter, local: Tensor) -> Tensor:
        """What becomes the ``.grad`` of a parameter."""
        return local if local.dtype == parameter.dtype else local.to(parameter.dtype)

    def _allocate(self, total: int, **kwargs: Any) -> Tensor:
        return torch.zeros(self.num_tasks, total, **kwargs)

    def write_shared(self, direction: Tensor, *, every_column: bool) -> None:
        """Make ``direction``, shape ``(P,)``, the ``.grad`` of the shared parameters.

        The gradients are views of one buffer with each parameter's own strides, as fused
        optimizers expect. Parameters that no task reached in this step keep none, as in plain
        training, unless ``every_column``.
        """
        if direction.data_ptr() != self._direction.data_ptr():
            self._direction.copy_(direction)
        columns = zip(self.shared or (), self._direction_views, self._reached, strict=True)
        for name, view, reached in columns:
            if not (reached or every_column):
                continue
            parameter = self.parameters[name]
            parameter.grad = self._grad(parameter, view)

    def combine(self, weights: Tensor) -> Tensor:
        """The direction ``weights @ J``, shape ``(P,)``, in the buffer behind ``.grad``."""
        assert self.rows is not None
        return torch.mv(self.rows.T, weights.to(self._direction), out=self._direction)

    def write_heads(self, weights: Tensor | None) -> None:
        """Make each task's head gradients, times its weight, the ``.grad`` of its own parameters.

        Args:
            weights: shape ``(T,)``; ``None`` for ones.
        """
        if not self._owned:
            self.own_heads()
        grads = [grad for heads in self._heads for grad in heads.values()]
        if weights is not None and grads:
            pairs = zip(weights.tolist(), self._heads, strict=True)
            torch._foreach_mul_(grads, [w for w, heads in pairs for _ in heads])
        found: dict[str, Tensor] = {}
        for heads in self._heads:
            for name, grad in heads.items():
                # A parameter outside the rows may still belong to several tasks: their sum.
                found[name] = found[name] + grad if name in found else grad
        if not self.ranks.alone:
            found = self._sum_heads(found)
        for name, grad in found.items():
            self.parameters[name].grad = self._grad(self.parameters[name], grad)
        self._heads = [{} for _ in range(self.num_tasks)]

    def _sum_heads(self, found: dict[str, Tensor]) -> dict[str, Tensor]:
        """Head gradients summed over ranks, for every parameter that any of them reached."""
        names = self._order[len(self.shared or ()) :]
        chosen = [self.parameters[name] for name in names]
        flat = torch.zeros(
            sum(p.numel() for p in chosen), dtype=self._direction.dtype, device=self.ranks.device
        )
        views = dict(zip(names, _views(flat, chosen), strict=True))
        for name, grad in found.items():
            views[name].copy_(grad)
        self.ranks.sum_(flat)
        reached = [n for n, r in zip(names, self._heads_reached, strict=True) if r]
        return {n: views[n] for n in reached}

    def own_heads(self) -> None:
        """Copy the head gradients, since weights, checks and clipping work in place.

        Two parameters may have got one tensor from autograd, or one with stride 0.
        """
        grads = [grad for heads in self._heads for grad in heads.values()]
        on_cpu = all(grad.device.type == "cpu" for grad in grads)  # where single calls cost less
        copies = iter([g.clone() for g in grads] if on_cpu else torch._foreach_mul(grads, 1.0))
        self._heads = [{name: next(copies) for name in heads} for heads in self._heads]
        self._owned = True

    def heads_flag(self) -> Tensor:
        """A number on the device, above zero if a gradient outside the rows is not finite."""
        self.own_heads()
        return non_finite([grad for heads in self._heads for grad in heads.values()])

    def head_sizes(self) -> list[float]:
        """A number for each task that is not finite where a gradient outside its row is not."""
        grads = [grad for heads in self._heads for grad in heads.values()]
        norms = iter(torch.stack(torch._foreach_norm(grads)).tolist() if grads else ())
        sizes = [sum(next(norms) for _ in heads) for heads in self._heads]
        return sizes if self.ranks.alone else self.agree(sizes)

    def agree(self, sizes: Sequence[float] = ()) -> list[float]:
        """Sums of ``sizes`` over ranks; and parameters that any rank reached are reached."""
        if self.ranks.alone:
            return list(sizes)
        heads = self._order[len(self.shared or ()) :]
        met = [any(name in found for found in self._heads) for name in heads]
        values = torch.tensor([*sizes, *self._reached, *met], dtype=torch.float64)
        values = self.ranks.sum_(values.to(self.ranks.device)).cpu()
        split = len(sizes) + len(self._reached)
        self._reached = (values[len(sizes) : split] > 0).tolist()
        self._heads_reached = (values[split:] > 0).tolist()
        return list(values[: len(sizes)].tolist())


def reachable(loss: Tensor, stop: Tensor | None = None) -> set[int]:
    """Ids of the leaves that a loss depends on, from its graph.

    Args:
        loss: with a graph.
        stop: a tensor behind which not to look.

    Raises:
        ValueError: reentrant activation checkpointing hides a part of the graph.
    """
    todo, seen, leaves = [loss.grad_fn], set(), set()
    if stop is not None:
        seen.add(stop.grad_fn)
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if node.name() == "CheckpointFunctionBackward":
            raise ValueError(
                "Expected the whole graph of the losses but found reentrant activation "
                "checkpointing, which hides the parameters inside from task gradients. Call "
                "`torch.utils.checkpoint.checkpoint(..., use_reentrant=False)`."
            )
        if hasattr(node, "variable"):
            leaves.add(id(node.variable))
        todo += [following for following, _ in node.next_functions]
    return leaves


def _views(flat: Tensor, parameters: Iterable[Tensor]) -> list[Tensor]:
    """Views of ``flat`` in each parameter's strides (``view`` would lose channels_last)."""
    views, offset = [], flat.storage_offset()
    for p in parameters:
        span = 1 + sum((n - 1) * s for n, s in zip(p.shape, p.stride(), strict=True))
        stride = p.stride() if span == p.numel() else torch.empty_like(p).contiguous().stride()
        views.append(flat.as_strided(p.shape, stride, offset))
        offset += p.numel()
    return views
