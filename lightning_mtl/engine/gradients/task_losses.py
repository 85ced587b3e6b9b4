"""The usable losses of one micro-batch, in one process or summed over several."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

_NONE = torch.ones(0)


@dataclass
class TaskLosses:
    """The usable losses of one micro-batch.

    Attributes:
        tasks: indices of the tasks present in this process, ascending.
        values: their losses, scalars with a graph.
        counts: valid labels behind each loss; 1 where the module gave none.
        skip: whether the whole step is to be skipped.
        dropped: whether a bad loss was left out.
        bad: the tasks that it was of, on any rank.
        left_out: index and loss of those left out here: their graph is as good as any.
        joint: sums over ranks of losses times counts, by task, shape ``(T,)``; ``None`` in a run
            of one process.
        joint_counts: sums of counts.
        size: number of processes.
        counted: tasks whose labels were counted in any process, if only to none.
        late: whether they have still to be looked at for finite numbers.
    """

    tasks: list[int]
    values: list[Tensor]
    counts: list[float]
    skip: bool = False
    dropped: bool = False
    bad: set[int] = field(default_factory=set)
    left_out: list[tuple[int, Tensor]] = field(default_factory=list)
    joint: Tensor | None = None
    joint_counts: list[float] = field(default_factory=list)
    size: int = 1
    counted: set[int] = field(default_factory=set)
    late: bool = False
    _total: Tensor | None = None

    def __iter__(self) -> Iterator[tuple[int, Tensor, float, bool]]:
        """``(task index, loss, count, whether it is the last)``."""
        last = len(self.tasks) - 1
        for i, (t, value, count) in enumerate(
            zip(self.tasks, self.values, self.counts, strict=True)
        ):
            yield t, value, count, i == last

    @property
    def present(self) -> list[int]:
        """Indices of the tasks that are there in any process, ascending."""
        if self.joint is None:
            return self.tasks
        return [t for t, count in enumerate(self.joint_counts) if count]

    def means(self) -> Tensor:
        """Mean losses of the tasks that are :attr:`present`, detached, in at least float32."""
        if self.joint is None:
            return self.stacked().detach()
        present = self.present
        counts = [self.joint_counts[t] for t in present]
        return self.joint[present] / self.joint.new_tensor(counts)

    def ones(self) -> Tensor:
        """A weight of one for each task in :attr:`tasks`."""
        return torch.ones(len(self.tasks), device=self.values[0].device) if self.tasks else _NONE

    def shares(self, *, plain: bool = False) -> list[float]:
        """What part of the labels of each task in :attr:`tasks` this process has.

        With ``plain``, what part of the processes it is, as in a mean over processes, except where
        labels are counted.
        """
        if self.joint is None:
            return [1.0] * len(self.tasks)
        return [
            1 / self.size if plain and t not in self.counted else c / self.joint_counts[t]
            for t, c in zip(self.tasks, self.counts, strict=True)
        ]

    def uneven(self, num_tasks: int, *, plain: bool = False) -> bool:
        """Whether a task is absent somewhere, unless ``plain``, or brings a label count."""
        if self.joint is not None:
            return any(
                count != self.size and (t in self.counted or not plain)
                for t, count in enumerate(self.joint_counts)
            )
        if plain:
            here = dict(zip(self.tasks, self.counts, strict=True))
            return any(here.get(t) != 1 for t in self.counted)
        return len(self.tasks) < num_tasks or any(count != 1 for count in self.counts)

    def stacked(self) -> Tensor:
        """The losses as one vector in at least float32."""
        return torch.stack([v if v.dtype.itemsize >= 4 else v.float() for v in self.values])

    def total(self, *, detach: bool = False) -> Tensor:
        """The plain sum of the losses, in at least float32."""
        if self._total is None:
            values = [v if v.dtype.itemsize >= 4 else v.float() for v in self.values]
            self._total = sum(values[1:], values[0]) if values else torch.zeros(())
        return self._total.detach() if detach else self._total
