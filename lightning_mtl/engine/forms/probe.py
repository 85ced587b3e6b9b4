"""Task gradients at the last shared layer or at the shared representation, instead of all of J."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from lightning_mtl.balancer import Columns, GradientBalancer
from lightning_mtl.contract import TaskModule
from lightning_mtl.engine.gradients.graph import reachable
from lightning_mtl.engine.gradients.heads import HeadGradients, refuse_sparse
from lightning_mtl.engine.gradients.layout import no_shared
from lightning_mtl.engine.gradients.rows import TaskGradients
from lightning_mtl.numerics import inner
from lightning_mtl.numerics.flat import as_grad, real
from lightning_mtl.numerics.storage import combined

if TYPE_CHECKING:
    from lightning_mtl.engine.gradients.task_losses import TaskLosses


class Probe:
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

    kept = corrects = False

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

    def gramian(self, rows: Tensor) -> Tensor:
        """Inner products of the rows, complete over ranks, shape ``(T, T)``, float64."""
        return self.sum_shards(inner.gramian(rows))

    def along(self, rows: Tensor, direction: Tensor) -> Tensor:
        """Inner products of the rows with the direction, shape ``(T,)``."""
        return self.sum_shards(inner.along(rows, direction))

    def length(self, direction: Tensor) -> Tensor:
        """Norm of the direction."""
        return self.sum_shards(inner.gramian(direction[None])[0, 0]).sqrt()

    @property
    def shards(self) -> None:
        """No state follows these columns."""
        return

    def sizes(self, rows: Tensor) -> Tensor:
        """Sizes of rows, complete over ranks."""
        return self.sum_shards(inner.largest(rows))

    def drop(self, task: int) -> None:
        """Forget what task ``task`` contributed."""
        self.losses[task] = None
        self.gradients.drop(task)

    def agree(self) -> None:
        """As that of :class:`TaskGradients`."""
        self.gradients.agree()

    def product(self, weights: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Not without forward mode."""
        raise NotImplementedError

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
            terms = [
                weight * loss
                for weight, loss in zip(self.weights, self.losses, strict=True)
                if loss is not None
            ]
            grads = torch.autograd.grad(sum(terms[1:], terms[0]), shared, allow_unused=True)
        self.gradients.begin_row()
        self.gradients.add_to_row(0, grads)
        self.gradients.agree()
        self.gradients.write_shared(self.gradients.combined(), every_column=False)

    def write_heads(self, weights: Tensor | None) -> None:
        """As that of :class:`TaskGradients`."""
        self.gradients.write_heads(weights)


def open_probe(
    module: TaskModule,
    balancer: GradientBalancer,
    gradients: TaskGradients,
    losses: TaskLosses,
    marked: Sequence[Tensor],
    scale: float,
    products: Callable[[TaskGradients, Tensor], Probe] | None = None,
) -> Probe:
    """Collect the task gradients of a batch at the level that ``balancer`` asks for.

    Args:
        module: whose tasks are balanced.
        balancer: with ``gradients`` other than ``"parameters"``.
        gradients: layout and head gradients.
        losses: of the batch.
        marked: what the module marked as shared representation.
        scale: what losses are multiplied by against underflow in half precision.
        products: makes the probe of a representation that is to be corrected.

    Raises:
        ValueError: the shared parameters are not known yet, there are none, or the representation
            was not marked once.
    """
    level = balancer.gradients
    check_shared(module, balancer, gradients, f"`gradients='{level}'`")
    tensors: Sequence[Tensor] = marked
    if level == "last_layer":
        tensors = last_layer(module, balancer, gradients)
    elif len(marked) != 1 or not marked[0].requires_grad:
        raise ValueError(
            f"Expected one shared representation a batch with `gradients='{level}'` of "
            f"{type(balancer).__name__} but found {len(marked)}. Write `z = "
            f"self.shared_representation(self.encoder(x))` once in `forward`, with a trunk that "
            f"trains."
        )
    probe = Probe(gradients, tensors, representation=level != "last_layer", scale=scale)
    if products is not None:
        probe = products(gradients, *tensors)
    probe.collect(losses)
    return probe


def check_shared(
    module: TaskModule, balancer: GradientBalancer, gradients: TaskGradients, option: str
) -> None:
    """Refuse shared parameters that are not known, or none.

    Raises:
        ValueError: the first step had not every task, or there are no shared parameters.
    """
    if not gradients.known:
        raise ValueError(
            f"Expected every task in the first optimiser step with {option} but some of "
            f"{list(module.training_tasks)} are missing. Override `shared_parameters()` if a task "
            f"may be missing from it."
        )
    if not gradients.shared:
        raise ValueError(no_shared(module, type(balancer).__name__))


def last_layer(
    module: TaskModule,
    balancer: GradientBalancer,
    gradients: TaskGradients,
) -> list[nn.Parameter]:
    """Parameters of the last shared layer: given, or the last that every task reaches.

    Raises:
        ValueError: ``last_shared_layer()`` returns what is no shared parameter, or there is no
            layer that every task reaches.
    """
    given: Iterable[nn.Parameter] | None = module.last_shared_layer()
    if given is None:
        names = _found_layer(module, balancer, gradients)
        return [gradients.parameters[name] for name in names]
    shared = {name: gradients.parameters[name] for name in gradients.shared or ()}
    chosen = list(given)
    known = {id(p) for p in shared.values()}
    if not chosen or any(id(p) not in known for p in chosen):
        raise ValueError(
            f"Expected `last_shared_layer()` of {type(module).__name__} to return shared "
            f"parameters but found others, or none; shared are {list(shared)[-4:]} and those "
            f"before. Return for example `self.encoder[-1].parameters()`."
        )
    return chosen


def _found_layer(
    module: TaskModule,
    balancer: GradientBalancer,
    gradients: TaskGradients,
) -> list[str]:
    """Names of the parameters that all tasks reach, of the module that owns the last of them.

    In the order of ``named_parameters()``, of which what is outside the module has none.
    """
    if gradients.reach.layer is None:
        shared, own = set(gradients.shared or ()), {id(p) for p in module.parameters()}
        names = [n for n, p in gradients.parameters.items() if n in shared and id(p) in own]
        tasks = enumerate(module.training_tasks)
        without = {t for t, task in tasks if task in module.unbalanced_tasks} | gradients.outside
        common = gradients.reach.common(names, without)
        if not common:
            raise ValueError(
                f"Expected a layer that all of the tasks {list(module.training_tasks)} reach with "
                f"`gradients='last_layer'` of {type(balancer).__name__} but found none. Override "
                f"`last_shared_layer()` to name one, or use `gradients='parameters'`."
            )
        owner = common[-1].rpartition(".")[0]
        gradients.reach.layer = [n for n in common if n.rpartition(".")[0] == owner]
    return gradients.reach.layer


def check_behind(
    marked: Sequence[Tensor], losses: Sequence[Tensor], gradients: TaskGradients
) -> None:
    """Refuse a representation that does not carry every task's way to every shared parameter.

    Raises:
        ValueError: a loss reaches a shared parameter past it.
    """
    names = {id(gradients.parameters[name]): name for name in gradients.shared or ()}
    if len(marked) != 1:
        return  # refused when the gradients are taken
    past = {names[i] for loss in losses for i in reachable(loss, marked[0]) if i in names}
    if past:
        raise ValueError(
            f"Expected every shared parameter behind the shared representation but the losses "
            f"reach {sorted(past)[:4]} past it. Mark the tensor that all heads start from with "
            f"`shared_representation`, or use `gradients='last_layer'` or 'parameters'."
        )
