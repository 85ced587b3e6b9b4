"""Which task reaches which parameter: from the first step on, and later."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_mtl.engine.gradients.graph import compiled, reachable
from lightning_mtl.engine.gradients.task_losses import TaskLosses
from lightning_mtl.ranks.one_process import OneProcess


class Reach:
    """What each task has reached so far, by name.

    Args:
        num_tasks: number of active tasks T.

    Attributes:
        by_task: names; ``None`` for a task whose graph nobody has looked at.
        late: parameters outside the rows that turned out to be shared.
        layer: the last that all tasks reach, once it was needed.
        apart: tasks that reach no shared parameter.
    """

    def __init__(self, num_tasks: int) -> None:
        self.by_task: list[set[str] | None] = [None] * num_tasks
        self.late: list[str] = []
        self.layer: list[str] | None = None
        self.apart: set[int] = set()
        self._zero: list[set[str]] = [set() for _ in range(num_tasks)]  # see `keep`

    @property
    def complete(self) -> bool:
        """Whether every task has been met."""
        return all(found is not None for found in self.by_task)

    def unmet(self, tasks: Iterable[int]) -> bool:
        """Whether one of the tasks has not been met before."""
        return any(self.by_task[t] is None for t in tasks)

    def add(self, reached: Sequence[Collection[str]], tasks: Collection[int]) -> None:
        """Note what tasks reach: those in ``tasks``, and others that reach anything."""
        for t, names in enumerate(reached):
            if names or t in tasks:
                found = self.by_task[t]
                self.layer = self.layer if found is not None else None
                self.by_task[t] = {*names} if found is None else {*found, *names}

    def outside(self, shared: Iterable[str]) -> set[int]:
        """Tasks that reach none of the shared parameters."""
        names = set(shared)
        met = enumerate(self.by_task)
        return {t for t, found in met if found is not None and not found & names}

    @property
    def needed(self) -> int:
        """How many tasks make a parameter shared."""
        return min(2, len(self.by_task))

    def shared(self, names: Iterable[str]) -> list[str]:
        """Those of ``names`` that enough tasks reach."""
        met = [found for found in self.by_task if found is not None]
        return [n for n in names if sum(n in found for found in met) >= self.needed]

    def common(self, names: Iterable[str], without: Collection[int]) -> list[str]:
        """Those of ``names`` that every task but some reaches, of which that is known."""
        known = enumerate(self.by_task)
        met = [found for t, found in known if found is not None and t not in without]
        return [n for n in names if all(n in found for found in met)]

    def new(self, heads: Sequence[Collection[str]]) -> list[tuple[int, str]]:
        """Tasks and parameters that they reach for the first time.

        One comparison of sets a task, since it is asked in every step.

        Args:
            heads: names outside the rows that each task reaches in this step.
        """
        first: list[tuple[int, str]] = []
        for t, (found, names) in enumerate(zip(self.by_task, heads, strict=True)):
            if found is not None and not found.issuperset(names):
                first += [(t, n) for n in names if n not in found and n not in self._zero[t]]
        return sorted(first)

    def keep(
        self, first: Sequence[tuple[int, str]], real: Sequence[bool], outside: Sequence[str]
    ) -> None:
        """Note what :meth:`new` found, and whether it makes parameters shared.

        Args:
            first: tasks and names.
            real: whether that is a path, or a zero that a compiled graph gives in its place, which
                is looked at once.
            outside: all names outside the rows, in their order.
        """
        for (t, name), path in zip(first, real, strict=True):
            found = self.by_task[t]
            (found if path and found is not None else self._zero[t]).add(name)
        self.late = self.shared(outside)

    def state(self, order: Sequence[str]) -> dict[str, Any]:
        """As plain containers: for each name a number, with a bit a task that reaches it."""
        bits = [
            sum(1 << t for t, found in enumerate(self.by_task) if found and n in found)
            for n in order
        ]
        met = [found is not None for found in self.by_task]
        apart = sorted(self.apart)
        return {"reached": bits, "met": met, "layer": self.layer, "outside": apart}

    def restore(self, state: Mapping[str, Any], order: Sequence[str]) -> None:
        """Continue with what :meth:`state` gave for the same names."""
        bits, met = state["reached"], state["met"]
        if len(bits) == len(order) and len(met) == len(self.by_task):
            self.layer, self.apart = state["layer"], set(state["outside"])
            self.by_task = [
                {n for n, b in zip(order, bits, strict=True) if b >> t & 1} if known else None
                for t, known in enumerate(met)
            ]


def from_graph(losses: TaskLosses, parameters: Mapping[str, Tensor], num: int) -> list[set[str]]:
    """What each task of a batch reaches, from the graphs of its losses.

    Args:
        losses: with graphs, of bad ones too.
        parameters: of interest, by name.
        num: number of active tasks T.
    """
    names = {id(p): name for name, p in parameters.items()}
    reached: list[set[str]] = [set() for _ in range(num)]
    pairs = [(t, loss) for t, loss, _, _ in losses]
    for t, loss in pairs + losses.left_out:
        reached[t] = {names[i] for i in reachable(loss) if i in names}
    return reached


def paths(
    new: Sequence[tuple[int, str]],
    roots: Iterable[Any],
    heads: Sequence[Mapping[str, Tensor]],
    ranks: OneProcess,
) -> list[bool]:
    """Whether gradients come from paths, and are no zeros that compiled graphs give without one.

    Args:
        new: tasks and names of parameters.
        roots: of the graphs of the losses.
        heads: gradients by name, of each task.
        ranks: which have the same ``new``, and the same network.
    """
    if not compiled(roots):
        return [True] * len(new)
    grads = [heads[t].get(name) for t, name in new]
    flags = torch.tensor([g is not None and bool(g.any()) for g in grads])
    flags = ranks.max_(flags.to(ranks.device, torch.uint8))
    return [bool(flag) for flag in flags.tolist()]


def on_any_rank(
    reached: Sequence[Collection[str]], order: Sequence[str], ranks: OneProcess
) -> list[set[str]]:
    """What each task reaches on any rank: they may have met different tasks."""
    if ranks.alone:
        return [set(names) for names in reached]
    table = torch.tensor([[n in names for n in order] for names in reached])
    table = ranks.max_(table.to(ranks.device, torch.uint8))
    return [{order[i] for i in row.nonzero()[:, 0]} for row in table.cpu()]


def agreed(
    sizes: Sequence[float],
    shared: Sequence[bool],
    heads: Sequence[Collection[str]],
    names: Sequence[str],
    ranks: OneProcess,
) -> tuple[list[float], list[bool], list[set[str]]]:
    """Sums over ranks, and what any of them reached, by one transfer.

    Args:
        sizes: to be summed.
        shared: whether each shared parameter was reached.
        heads: what each task reached of the other parameters.
        names: of those.
        ranks: which all have the same tasks and parameters.
    """
    met = [name in found for found in heads for name in names]
    values = torch.tensor([*sizes, *shared, *met], dtype=torch.float64)
    values = ranks.sum_(values.to(ranks.device)).cpu()
    sums, any_shared, any_met = values.split([len(sizes), len(shared), len(met)])
    table = (any_met > 0).view(len(heads), len(names))
    reached = [{names[i] for i in row.nonzero()[:, 0].tolist()} for row in table]
    return sums.tolist(), (any_shared > 0).tolist(), reached
