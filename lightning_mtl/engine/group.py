"""The micro-batches of one optimiser step."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lightning_mtl.balancer import Balancer, at_least_float32
from lightning_mtl.engine.again import Seen
from lightning_mtl.engine.gradients.task_losses import TaskLosses


@dataclass
class Group:
    """What the micro-batches of an optimiser step have brought so far.

    Attributes:
        observed: whether a callback asked for the task gradients of this step.
        loss_sums: sums of the losses times their counts, by task.
        counts: sums of the counts, 0 for a task that is absent.
        outside: tasks that take no part in the gradient stage.
        seen: its micro-batches, where the losses are needed again.
        counted: tasks that brought label counts.
        received: number of micro-batches.
        skip: whether the step is to be left out.
        dropped: whether a bad loss was left out.
        bad: in how many micro-batches the loss or gradient of a task was bad.
        empty: number of micro-batches without any loss.
        drawn: random states of the balancers before the step, should it be left out.
        overflow: whether half-precision gradients overflowed, so that the scaler skips the step.
    """

    observed: bool
    loss_sums: list[Tensor | None]
    counts: list[float]
    outside: set[int] = field(default_factory=set)
    seen: list[Seen] = field(default_factory=list)
    counted: set[int] = field(default_factory=set)
    received: int = 0
    skip: bool = False
    dropped: bool = False
    bad: Counter[int] = field(default_factory=Counter)
    empty: int = 0
    drawn: list[tuple[Balancer, Tensor | None]] = field(default_factory=list)
    overflow: bool = False

    def add(self, losses: TaskLosses, seen: Seen | None = None) -> None:
        """Count a micro-batch; ``seen`` where its losses are needed again."""
        self.received += 1
        if seen is not None:
            seen.tasks = losses.tasks
            self.seen.append(seen)
        self.skip |= losses.skip
        self.dropped |= losses.dropped
        self.counted |= losses.counted
        if losses.bad:
            self.bad.update(losses.bad)
        elif not losses.present:
            self.empty += 1
        if losses.joint is not None:
            for t in losses.present:
                total, count = losses.joint[t], losses.joint_counts[t]
                before = self.loss_sums[t]
                self.loss_sums[t] = total if before is None else before + total
                self.counts[t] += count
            return
        for t, value, count, _ in losses:
            value = value.detach()
            if count != 1:  # a loss times its labels would soon leave half precision
                value = at_least_float32(value) * count
            before = self.loss_sums[t]
            self.loss_sums[t] = value if before is None else before + value
            self.counts[t] += count

    def close(self) -> None:
        """No more micro-batches: leave the step out where nothing was brought.

        Raises:
            ValueError: a batch that is needed once more was changed in place.
        """
        self.skip |= not any(self.counts)
        for micro in self.seen:
            micro.check()

    def present(self) -> list[int]:
        """Indices of the tasks that are there."""
        return [t for t, count in enumerate(self.counts) if count]

    def divisors(self, plain: bool, size: int) -> list[float]:
        """What the sum of each task's gradients is divided by, 0 for an absent task.

        The counts, so that the mean is over what is there; with ``plain``, as without us, the
        number of micro-batches of all ``size`` processes, except where labels are counted.
        """
        if not plain:
            return self.counts
        every = float(self.received * size)
        return [
            every if count and t not in self.counted else count
            for t, count in enumerate(self.counts)
        ]

    def balanced(self) -> list[int]:
        """Those of them that take part in the gradient stage."""
        return [t for t, count in enumerate(self.counts) if count and t not in self.outside]

    def mean_losses(self) -> Tensor:
        """Mean losses of the tasks that are there."""
        means = []
        for total, count in zip(self.loss_sums, self.counts, strict=True):
            if count and total is not None:
                means.append(total if count == 1 else total / count)
        return torch.stack(means)
