"""Task gradients of a batch beside the training: taken, and nothing of the training moved."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lightning_mtl.contract import TaskModule
from lightning_mtl.diagnose import DiagnoseError
from lightning_mtl.engine.again import Seen, remember, replayed
from lightning_mtl.engine.closure import without_autocast
from lightning_mtl.engine.gradients.graph import reachable
from lightning_mtl.engine.gradients.layout import shared_names, trainable
from lightning_mtl.numerics import inner
from lightning_mtl.numerics.flat import real

WHO = "`lightning-mtl diagnose`"
MOST_GROUPS = 16


class Shared:
    """The shared parameters of a module, in groups of layers.

    Args:
        names: of the parameters, in the module's order.
        parameters: by name.

    Attributes:
        groups: names of the groups, in order: modules, as deep as :data:`MOST_GROUPS` allows.
        slices: columns of each group.
    """

    def __init__(self, names: Sequence[str], parameters: Mapping[str, nn.Parameter]) -> None:
        self.names = list(names)
        self.parameters = [parameters[name] for name in names]
        labels = layer_groups(names)
        self.groups = list(dict.fromkeys(labels))
        self.slices: list[slice] = []
        sizes = [real(p.detach()).numel() for p in self.parameters]
        order = sorted(range(len(names)), key=lambda i: self.groups.index(labels[i]))
        self.parameters = [self.parameters[i] for i in order]
        self.names = [self.names[i] for i in order]
        start = 0
        for group in self.groups:
            end = start + sum(n for n, label in zip(sizes, labels, strict=True) if label == group)
            self.slices.append(slice(start, end))
            start = end
        self.total = start

    def values(self) -> Tensor:
        """All of them now, one row, a copy."""
        found = [real(p.detach()).reshape(-1) for p in self.parameters]
        return torch.cat([v if v.dtype.itemsize >= 4 else v.float() for v in found])

    def products(self, first: Tensor, second: Tensor) -> np.ndarray[Any, np.dtype[np.float64]]:
        """Inner products of rows on every group, shape ``(G, R, S)``, float64."""
        found = [inner.products(first[:, part], second[:, part]) for part in self.slices]
        return torch.stack(found).cpu().numpy()


def layer_groups(names: Sequence[str]) -> list[str]:
    """A group for each parameter: its module, or the one above where there would be too many.

    Args:
        names: as of ``named_parameters()``.
    """
    paths = [name.split(".")[:-1] or [name] for name in names]
    deepest = max((len(path) for path in paths), default=1)
    for depth in range(deepest, 0, -1):
        found = [".".join(path[:depth]) for path in paths]
        if len(set(found)) <= MOST_GROUPS:
            return found
    different = list(dict.fromkeys(found))  # too many at the top: neighbours together
    size = -(-len(different) // MOST_GROUPS)
    of = {label: different[i // size * size] for i, label in enumerate(different)}
    last = {of[label]: label for label in different}
    return [
        of[label] if last[of[label]] == of[label] else f"{of[label]} … {last[of[label]]}"
        for label in found
    ]


def find_shared(module: TaskModule, losses: Mapping[str, Tensor]) -> Shared:
    """What two or more tasks reach, or what ``shared_parameters()`` names.

    Args:
        module: in a fit.
        losses: of a batch, with graphs.

    Raises:
        DiagnoseError: the tasks share nothing that an optimizer trains.
    """
    parameters = trainable(module, module.trainer.optimizers)
    names = shared_names(module, parameters, None)
    if names is None:
        reached = [reachable(loss) for loss in losses.values()]
        names = [n for n, p in parameters.items() if sum(id(p) in r for r in reached) > 1]
    if not names:
        raise DiagnoseError(
            f"Expected parameters that two or more of the tasks {list(losses)} share but found "
            f"none, so no balancer could do anything. Unfreeze the trunk, check that every task's "
            f"loss goes through it, or name the parameters in `shared_parameters()`."
        )
    return Shared(names, parameters)


@contextmanager
def losses_of(module: TaskModule, seen: Seen, tasks: Sequence[str]) -> Iterator[dict[str, Tensor]]:
    """Task losses of a batch once more, with graphs; all random states are put back.

    Those of Python and NumPy too, which augmentations inside ``task_losses`` draw from.

    Args:
        module: in a fit.
        seen: the batch.
        tasks: the tasks to look at; absent ones are left out.
    """
    compiled = "torch._dynamo" in sys.modules  # whose graphs give zeros where there is no path
    states = random.getstate(), np.random.get_state()
    try:
        eager = torch.compiler.set_stance("force_eager") if compiled else nullcontext()
        with eager, torch.enable_grad(), replayed(module, seen) as found:
            losses = {}
            for task in tasks:
                value = found.get(task)
                value = value[0] if isinstance(value, tuple) else value
                if isinstance(value, Tensor) and value.requires_grad:
                    losses[task] = value.reshape(())
            with without_autocast(module.device.type):
                yield losses
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])


def task_rows(shared: Shared, losses: Mapping[str, Tensor], tasks: Sequence[str]) -> Tensor:
    """Task gradients on the shared parameters, shape ``(T, P)``; zeros for an absent task.

    Args:
        shared: whose columns they are.
        losses: with graphs, which are freed.
        tasks: the rows.
    """
    like = shared.values()
    rows = like.new_zeros(len(tasks), shared.total)
    last = list(losses)[-1] if losses else None
    for row, task in zip(rows, tasks, strict=True):
        if task not in losses:
            continue
        grads = torch.autograd.grad(
            losses[task], shared.parameters, retain_graph=task != last, allow_unused=True
        )
        start = 0
        for parameter, grad in zip(shared.parameters, grads, strict=True):
            size = real(parameter.detach()).numel()
            if grad is not None:
                dense = grad.to_dense() if grad.is_sparse else grad
                row[start : start + size] = real(dense).reshape(-1)
            start += size
    return rows


def with_other_masks(module: TaskModule, seen: Seen, seed: int) -> Seen:
    """The same batch before another draw of dropout and of whatever else is random."""
    states = [torch.Generator().manual_seed(seed).get_state()]
    if module.device.type == "cuda":
        states.append(torch.Generator(module.device).manual_seed(seed).get_state())
    return Seen(seen.batch, seen.batch_idx, states, seen.balancer, seen.versions)


def noted(module: TaskModule, batch: Any, batch_idx: int) -> Seen:
    """A batch before its forward pass.

    Raises:
        DiagnoseError: it cannot be read twice.
    """
    try:
        return remember(module, batch, batch_idx, WHO)
    except TypeError as error:
        raise DiagnoseError(str(error)) from error
