"""Task gradients at perturbed parameters, a place for each task; the parameters return from it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_mtl.contract import TaskModule
from lightning_mtl.engine.again import loss_of, replayed
from lightning_mtl.engine.forms.balanced import Balanced
from lightning_mtl.engine.forms.moves import Moves, moved, moves_of
from lightning_mtl.engine.forms.setting import Setting
from lightning_mtl.engine.gradients.layout import no_shared
from lightning_mtl.engine.gradients.rows import TaskGradients
from lightning_mtl.engine.gradients.task_losses import TaskLosses
from lightning_mtl.engine.group import Group


class Perturbed(Balanced):
    """The gradient of each task at parameters of its own, as if it were that of now.

    In this order, on one batch: the gradient of the mean loss (or of each), two losses of each
    task for the estimate, and a forward and backward pass a task. All forward passes but the first
    go unseen. A step whose perturbations are not finite is left unperturbed: the check of task
    gradients that follows names the task.
    """

    @classmethod
    def may_be_late(cls, setting: Setting) -> bool:  # noqa: ARG003 # for others
        """Never: a bad loss would be met at other parameters."""
        return False

    def add(self, losses: TaskLosses, gradients: TaskGradients, stepping: bool) -> None:
        """Collect rows and head gradients; the graph of the losses is used up.

        Raises:
            ValueError: nothing is shared; or a task has no loss when the batch comes again.
        """
        module, group, scale = self.setting.module, self.group, self.setting.scale
        balancer: Any = self.setting.gradient_balancer  # a `Perturbing` one
        if not gradients.shared:
            raise ValueError(no_shared(module, type(balancer).__name__))
        tasks, present = module.training_tasks, group.present()
        balancer.tell(gradients)
        with balancer.only(tasks, None if len(present) == len(tasks) else present):
            moves = moves_of(module, balancer, gradients, losses, group, scale)
        gradients.begin()
        factors = {t: count * scale for t, _, count, _ in losses}
        found: dict[int, Tensor] = {}
        for t, move in zip(present, moves, strict=True):
            value = _add_row(module, gradients, group, t, factors.get(t), move, self.marked)
            if value is not None:
                found[t] = value
        if found:
            finite = torch.stack([value.double() for value in found.values()]).isfinite().tolist()
            for t, usable in zip(found, finite, strict=True):
                if not usable:
                    assert gradients.rows is not None
                    gradients.rows[t].fill_(torch.nan)  # its gradient may look as if nothing were

    def finish(self) -> None:
        """Balance the rows that were found there."""
        self.balance(self.setting.gradients())


def _add_row(
    module: TaskModule,
    gradients: TaskGradients,
    group: Group,
    task: int,
    factor: float | None,
    moves: Moves,
    marked: list[Tensor],
) -> Tensor | None:
    """Add a task's gradient at moved parameters; its loss there. ``None`` on ranks without it.

    They make the forward pass nevertheless: it may exchange something (SyncBatchNorm).
    """
    (micro,), name = group.seen, module.training_tasks[task]
    before = len(marked)
    with moved(moves), replayed(module, micro) as losses:
        value = None
        if factor is not None:
            value = loss_of(module, micro, losses, name)
            value = (value[0] if isinstance(value, tuple) else value).reshape(())
            gradients.add(task, value * factor, retain_graph=False)
            value = value.detach()
        del marked[before:]  # each would keep a graph
    return value
