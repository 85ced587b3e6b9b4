"""What the forms with one backward pass of a weighted sum have in common."""

from __future__ import annotations

from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor

from lightning_mtl.engine.forms.bad_sum import refuse_bad_sum
from lightning_mtl.engine.forms.form import Form
from lightning_mtl.engine.forms.setting import Setting
from lightning_mtl.engine.gradients.task_losses import TaskLosses
from lightning_mtl.engine.group import Group
from lightning_mtl.engine.record import StepRecord
from lightning_mtl.engine.two_stages import checked, of_all


class Weighted(Form):
    """Losses times weights that are known before any gradient.

    Args:
        setting: of the fit.
        group: the micro-batches of the step.
        late: whether losses have still to be looked at for finite numbers.
        uneven: whether label counts or absent tasks were met in steps before.
        reused: weights of the gradient balancer from an earlier step, of all tasks.
    """

    def __init__(
        self,
        setting: Setting,
        group: Group,
        *,
        late: bool,
        uneven: bool = False,
        reused: Tensor | None = None,
    ) -> None:
        super().__init__(setting, group, late=late)
        self.uneven = uneven
        self.reused = reused

    @classmethod
    def may_be_late(cls, setting: Setting) -> bool:
        """With a loss balancer that can do with bad losses; no task can leave a sum any more."""
        stateless = vars(type(setting.loss_balancer)).get("stateless", False)
        return stateless and setting.module.on_bad_loss != "skip_task"

    def note_uneven(self, losses: TaskLosses, stepping: bool) -> None:
        """Say what a task that is missing from a micro-batch of summed losses leads to."""
        setting, group = self.setting, self.group
        apart = setting.trainer.accumulate_grad_batches > 1 and not (
            stepping and group.received == 1
        )
        if apart and not self.uneven and losses.uneven(len(group.counts), plain=setting.plain):
            self.uneven = True
            rank_zero_warn(
                "A task is missing from a micro-batch, or brings a label count. This optimiser "
                "step takes it for a zero loss, as Lightning would; from the next one on, means "
                "are taken over the labels that are there, with one backward pass a task."
            )

    def weights_of(self, losses: TaskLosses) -> Tensor:
        """Weights of the losses of a micro-batch, times this process's share in each."""
        setting = self.setting
        if setting.loss_balancer.all_ones:
            weights = losses.ones()
        else:
            if self.loss_weights is None:
                means, rows = losses.means(), setting.rows_of(losses.present)
                with setting.loss_balancer.only(*rows):
                    found = setting.loss_balancer.loss_weights(means)
                    look = setting.module.on_bad_loss != "ignore" and not self.late
                    found = checked(found, setting.loss_balancer, means, look=look)
                self.loss_weights = of_all(found, rows[1], len(rows[0]), means)
            weights = self.of(self.loss_weights, losses, self.loss_weights)
        shares = losses.shares(plain=setting.plain)
        return weights if losses.joint is None else weights * weights.new_tensor(shares)

    def of(self, weights: Tensor | None, losses: TaskLosses, like: Tensor) -> Tensor:
        """Weights of the tasks of a micro-batch, from those of all tasks."""
        assert weights is not None
        weights = weights.to(like)
        return weights if len(weights) == len(losses.tasks) else weights[losses.tasks]

    def close(self) -> None:
        """Look at the gradients, and note what the step did."""
        refuse_bad_sum(self.setting, self.group, self.late, self.loss_weights)
        if not self.group.skip:
            self.setting.told = self._record

    def _record(self) -> StepRecord:
        """Losses and weights of one backward pass."""
        tasks, group = self.setting.module.training_tasks, self.group
        means, present = group.mean_losses(), group.present()
        ones = means.new_ones(len(means))
        return StepRecord(
            tasks=tuple(tasks[t] for t in present),
            losses=means,
            loss_weights=ones if self.loss_weights is None else self.loss_weights[present],
            gradient_weights=None if self.reused is None else self.reused[present],
        )
