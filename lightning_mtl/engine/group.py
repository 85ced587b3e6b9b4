"""The micro-batches of one optimiser step."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from lightning_mtl.balancer import Balancer, at_least_float32
from lightning_mtl.engine.again import Seen
from lightning_mtl.engine.gradients.task_losses import TaskLosses
from lightning_mtl.engine.record import StepRecord

Form = Literal["sum", "rows", "reuse", "probe", "perturbed"]


@dataclass
class Group:
    """What the micro-batches of an optimiser step have brought so far.

    Attributes:
        late: whether its losses have still to be looked at for finite numbers.
        observed: whether a callback asked for the task gradients of this step.
        loss_sums: sums of the losses times their counts, by task.
        counts: sums of the counts, 0 for a task that is absent.
        form: how its gradients are taken: one backward pass of the weighted ``"sum"``; task
            gradients as ``"rows"`` of J; one trunk backward pass with weights to ``"reuse"``; a
            ``"probe"`` of the task gradients at the last layer or representation; or rows at
            ``"perturbed"`` parameters.
        loss_weights: weights of the loss balancer with one backward pass, of all tasks, 0 for
            absent ones, shape ``(T,)``; ``None`` for ones.
        reused: weights of the gradient balancer that hold from an earlier step, in the same form.
        reused_heads: weights of the head gradients that go with them; ``None`` for ones.
        wanted: tasks whose rows are needed; ``None`` for all.
        outside: tasks that take no part in the gradient stage.
        seen: its micro-batches, where the losses are needed again.
        uneven: whether label counts or absent tasks were met under accumulation.
        counted: tasks that brought label counts.
        representation: what the module marked as shared representation.
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
    form: Form = "sum"
    loss_weights: Tensor | None = None
    reused: Tensor | None = None
    reused_heads: Tensor | None = None
    wanted: set[int] | None = None
    outside: set[int] = field(default_factory=set)
    seen: list[Seen] = field(default_factory=list)
    uneven: bool = False
    counted: set[int] = field(default_factory=set)
    representation: list[Tensor] = field(default_factory=list)
    received: int = 0
    late: bool = False
    skip: bool = False
    dropped: bool = False
    bad: Counter[int] = field(default_factory=Counter)
    empty: int = 0
    drawn: list[tuple[Balancer, Tensor | None]] = field(default_factory=list)
    overflow: bool = False

    def add(self, losses: TaskLosses) -> None:
        """Count a micro-batch."""
        self.received += 1
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

    def record(self, tasks: Sequence[str]) -> StepRecord:
        """The record of a step that took one backward pass."""
        means, present = self.mean_losses(), self.present()
        ones = means.new_ones(len(means))
        return StepRecord(
            tasks=tuple(tasks[t] for t in present),
            losses=means,
            loss_weights=ones if self.loss_weights is None else self.loss_weights[present],
            gradient_weights=None if self.reused is None else self.reused[present],
        )
