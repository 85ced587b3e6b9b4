"""What a form of taking gradients is: made for one optimiser step, fed by micro-batch."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from lightning_mtl.engine.forms.setting import Setting
from lightning_mtl.engine.gradients.rows import TaskGradients
from lightning_mtl.engine.gradients.task_losses import TaskLosses
from lightning_mtl.engine.group import Group


class Form:
    """One way of taking the gradients of an optimiser step.

    :meth:`run` takes a micro-batch, and writes ``.grad`` with the last one. A form defines
    :meth:`add` and :meth:`finish`, and leaves what its step did in ``setting.told``.

    Args:
        setting: of the fit.
        group: the micro-batches of the step.
        late: whether losses have still to be looked at for finite numbers.

    Attributes:
        loss_weights: of the loss balancer, of all tasks, where all micro-batches have the same.
        uneven: whether label counts or absent tasks were met under accumulation.
    """

    loss_weights: Tensor | None = None
    uneven = False

    def __init__(self, setting: Setting, group: Group, *, late: bool) -> None:
        self.setting = setting
        self.group = group
        self.late = late

    @classmethod
    def may_be_late(cls, setting: Setting) -> bool:  # noqa: ARG003 # for others
        """Whether losses may be looked at together with the gradients."""
        return True

    @classmethod
    def check(cls, setting: Setting, losses: TaskLosses, marked: Sequence[Tensor]) -> None:
        """Look at the graph in which tasks were met for the first time."""

    def run(self, losses: TaskLosses, *, stepping: bool) -> Tensor:
        """Take a micro-batch inside Lightning's hooks; at the last, write ``.grad``."""
        setting, group = self.setting, self.group
        total, every = losses.total(), setting.trainer.accumulate_grad_batches
        total = total if every == 1 else total / every
        if "on_before_backward" in setting.hooks:
            setting.trainer.precision_plugin.pre_backward(total, setting.module)
        if group.received > 1 or setting.hooks:
            setting.layout.check_frozen(setting.trainer.optimizers, first=False, balanced=True)
        self.add(losses, setting.gradients(), stepping)
        if stepping and not group.skip:
            self.finish()
        if "on_after_backward" in setting.hooks:
            setting.trainer.precision_plugin.post_backward(total, setting.module)
        return total

    def add(self, losses: TaskLosses, gradients: TaskGradients, stepping: bool) -> None:
        """Take the gradients of a micro-batch."""
        raise NotImplementedError(f"{type(self).__name__} must define `add`.")

    def finish(self) -> None:
        """Balance what was taken, and write ``.grad``; or leave the step out."""
        raise NotImplementedError(f"{type(self).__name__} must define `finish`.")
