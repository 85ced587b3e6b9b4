"""One backward pass a task: rows of all shared parameters."""

from __future__ import annotations

from torch import Tensor

from lightning_mtl.engine.forms.balanced import Balanced
from lightning_mtl.engine.forms.narrow import Probe
from lightning_mtl.engine.gradients.rows import TaskGradients
from lightning_mtl.engine.gradients.task_losses import TaskLosses
from lightning_mtl.engine.losses import check_every_task


class Rows(Balanced):
    """Rows of J, added up over micro-batches, or apart for a balancer with ``batches``."""

    @property
    def apart(self) -> bool:
        """Whether the balancer takes the micro-batches apart."""
        balancer = self.setting.gradient_balancer
        return balancer is not None and balancer.batches > 1

    def add(self, losses: TaskLosses, gradients: TaskGradients, stepping: bool) -> None:
        """One backward pass a task."""
        setting, group, apart = self.setting, self.group, self.apart
        balancer = setting.gradient_balancer
        if balancer is not None and apart:
            if group.dropped:  # a bad loss: of batches that are taken apart none can do without
                group.skip = True
                return
            check_every_task(losses, setting.module.training_tasks, balancer)
            if group.received > 1:
                gradients.set_aside()
        scale = setting.scale
        for t, value, count, last in losses:
            value = value if count * scale == 1 else value * (count * scale)
            wanted = self.wanted is None or t in self.wanted or not gradients.known
            gradients.add(t, value, retain_graph=not last, shared=wanted)
            if stepping and not apart:
                gradients.send(t)  # while the next row is taken
        if stepping and not apart:
            gradients.send(gradients.num_tasks - 1)  # ranks without tasks too

    def finish(self) -> None:
        """Balance the rows of all micro-batches."""
        gradients = self.setting.gradients()
        self.balance(gradients, gradients.apart() if self.apart else None)

    def without(self, task: int, gradients: TaskGradients | Probe, jacobian: Tensor) -> None:
        """Take a task out of the step; batches that are taken apart cannot do without."""
        super().without(task, gradients, jacobian)
        self.group.skip |= self.apart
