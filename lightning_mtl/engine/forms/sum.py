"""One backward pass of the weighted sum: balancing losses costs what plain training does."""

from __future__ import annotations

from torch import Tensor

from lightning_mtl.engine.forms.weighted import Weighted
from lightning_mtl.engine.gradients.task_losses import TaskLosses


class Sum(Weighted):
    """The sum of losses, times weights for trunk and heads alike."""

    def run(self, losses: TaskLosses, *, stepping: bool) -> Tensor:
        """Take a micro-batch inside the hooks of its own backward pass."""
        setting, every = self.setting, self.setting.trainer.accumulate_grad_batches
        self.note_uneven(losses, stepping)
        total = self._weighted_sum(losses)
        total = total if every == 1 or not losses.tasks else total / every
        if not setting.layout.ranks.alone:
            self._sum_over_ranks(total, losses, stepping)
        elif losses.tasks:
            setting.module.manual_backward(total)
        if stepping:
            self.finish()
        return total

    def finish(self) -> None:
        """The gradients are in ``.grad`` already: look at them."""
        self.close()

    def _sum_over_ranks(self, total: Tensor, losses: TaskLosses, stepping: bool) -> None:
        """The backward pass of one process among several, without its wrapper's reducer."""
        setting, first = self.setting, self.group.received == 1
        summed = setting.layout.summed(setting.trainer.optimizers, first=first)
        if first:
            summed.begin()
        setting.trainer.precision_plugin.pre_backward(total, setting.module)
        if losses.tasks:
            summed.add(0, total * setting.scale, retain_graph=False)
        if stepping:
            summed.agree()
            summed.write_shared(summed.combined(), every_column=False)
        setting.trainer.precision_plugin.post_backward(total, setting.module)

    def _weighted_sum(self, losses: TaskLosses) -> Tensor:
        if self.setting.plain and losses.joint is None:
            return losses.total()
        weights = self.weights_of(losses)
        if not losses.tasks:
            return losses.total()
        values = losses.stacked()
        if self.reused is not None:
            weights = weights * self.of(self.reused, losses, values)
        return values @ weights
