"""Task gradients that two stages balance: looked at, agreed on, and written as one direction."""

from __future__ import annotations

import math
from collections.abc import Collection

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor

from lightning_mtl.engine.forms.form import Form
from lightning_mtl.engine.forms.narrow import Probe
from lightning_mtl.engine.gradients.host import to_host
from lightning_mtl.engine.gradients.layout import no_shared
from lightning_mtl.engine.gradients.rows import TaskGradients
from lightning_mtl.engine.guards import bad_gradients, bad_losses
from lightning_mtl.engine.two_stages import aggregate


class Balanced(Form):
    """A form with a gradient for each task.

    Attributes:
        wanted: tasks whose rows are needed; ``None`` for all.
        marked: what the module marked as shared representation.
    """

    wanted: Collection[int] | None = None
    marked: list[Tensor]

    def balance(self, gradients: TaskGradients | Probe, apart: Tensor | None = None) -> None:
        """Balance the task gradients of a step and write them to ``.grad``.

        Args:
            gradients: of the step.
            apart: rows of its micro-batches, for a balancer that takes them apart.
        """
        setting, group = self.setting, self.group
        balancer = setting.gradient_balancer
        discovered = not setting.layout.known
        jacobian = gradients.finish() if apart is None else apart.sum(0)
        scale = setting.scale
        if scale != 1:
            jacobian = jacobian.div_(scale)
            apart = None if apart is None else apart.div_(scale)
        if discovered:
            setting.layout.settle(balancer)
        if balancer is not None and jacobian.shape[1] == 0:
            if setting.layout.complete:
                raise ValueError(no_shared(setting.module, type(balancer).__name__))
            balancer = None  # the tasks so far share nothing: each trains what it reaches
        gramian, sizes, losses = self._small(gradients, jacobian)
        if discovered or group.outside:
            group.outside = setting.outside()
        tasks, present = setting.module.training_tasks, group.present()
        if sizes is not None:
            if setting.scaler is not None and not math.isfinite(sum(sizes)):
                self._overflow()
                return
            bad = self._bad(jacobian, sizes, losses, gramian is not None)
            for t in bad:
                self.without(t, gradients, jacobian)
            if group.skip:
                return
            if bad:
                kept = [i for i, t in enumerate(present) if t not in bad]
                losses, present = losses[kept], group.present()
                if gramian is not None:
                    gramian = gradients.gramian(jacobian)
        if group.dropped:
            gradients.agree()  # what only a dropped task reached gets no gradient
        if balancer is not None and self.wanted is None and sizes is not None:
            balanced = group.balanced()
            self._warn_zero_gradients([t for t in balanced if sizes[t] == 0])
        setting.told = aggregate(
            gradients,
            jacobian,
            losses,
            group.divisors(setting.plain, setting.layout.ranks.size),
            tasks,
            setting.loss_balancer,
            balancer,
            gramian,
            share=group.received / setting.trainer.accumulate_grad_batches,
            loss_scale=scale,
            observed=group.observed,
            apart=apart,
            look=setting.module.on_bad_loss != "ignore",
            outside=group.outside,
        )

    def _bad(
        self,
        jacobian: Tensor,
        sizes: list[float],
        losses: Tensor,
        squares: bool,
    ) -> set[int]:
        """Tasks whose gradient, or loss where that is looked at late, cannot be used."""
        setting, group = self.setting, self.group
        tasks, rule = setting.module.training_tasks, setting.module.on_bad_loss
        step, bad = setting.trainer.global_step + 1, set[int]()
        if self.late:
            values = dict(zip(group.present(), losses.tolist(), strict=True))
            bad |= bad_losses(values, tasks, setting.limit, on_bad_loss=rule, step=step)
        squared = squares and jacobian.dtype == torch.float64
        return bad | bad_gradients(sizes, group.counts, tasks, squared, on_bad_loss=rule, step=step)

    def without(self, task: int, gradients: TaskGradients | Probe, jacobian: Tensor) -> None:
        """Take a task out of the step, or leave the step out."""
        group, rule = self.group, self.setting.module.on_bad_loss
        gradients.drop(task)
        jacobian[task].zero_()
        group.counts[task] = 0
        group.dropped = True
        group.bad[task] += 1
        group.skip |= rule == "skip_step" or not any(group.counts) or self.wanted is not None

    def _small(
        self, gradients: TaskGradients | Probe, jacobian: Tensor
    ) -> tuple[Tensor | None, list[float] | None, Tensor]:
        """The Gramian where it is needed, a size for each task, and the losses that are there.

        All of them on the host, by one transfer. A size is not finite where a gradient of the task
        is not; there are none where nothing asks for them.
        """
        setting, group, balancer = self.setting, self.group, self.setting.gradient_balancer
        losses = group.mean_losses().to(torch.promote_types(jacobian.dtype, torch.float32))
        weighted = balancer is not None and balancer.gramian_weighted
        checks = setting.module.on_bad_loss != "ignore" or setting.scaler is not None
        if not (weighted or group.observed or checks):
            return None, None, losses
        sums = weighted or group.observed
        table = gradients.gramian(jacobian) if sums else gradients.sizes(jacobian)
        if not checks:
            table, losses = to_host(table, losses)
            self._turn_up(table.diagonal() if sums else table)
            return table, None, losses
        alone = setting.layout.ranks.alone
        table, losses, flag = to_host(
            table, losses, gradients.heads.flag() if alone else losses.new_zeros(())
        )
        row_sizes = table.diagonal() if sums else table
        self._turn_up(row_sizes)
        sizes: list[float] = row_sizes.tolist()
        if flag.item() or not alone:
            sizes = [s + head for s, head in zip(sizes, gradients.head_sizes(), strict=True)]
        return table if sums else None, sizes, losses

    def _turn_up(self, sizes: Tensor) -> None:
        """Let tasks take part that had no way to shared parameters before."""
        outside = self.setting.layout.outside
        if outside:
            outside.difference_update([t for t in outside if sizes[t] != 0])

    def _overflow(self) -> None:
        """Leave gradients that make the scaler skip the step of every optimizer."""
        self.group.overflow = True
        for p in self.setting.trained():
            p.grad = torch.full_like(p, torch.nan)

    def _warn_zero_gradients(self, zero: list[int]) -> None:
        setting = self.setting
        names = {setting.module.training_tasks[t] for t in zero} - setting.zero_gradient
        if names:
            setting.zero_gradient |= names
            rank_zero_warn(
                f"The gradient of {sorted(names)} is exactly zero on the shared parameters at "
                f"optimiser step {setting.trainer.global_step + 1}. Methods that look for a "
                f"direction good for every task (MinNorm) stop the shared parameters then. Look "
                f"for a detached or saturated path, leave the task out with `active_tasks`, or "
                f"keep it out of the gradient stage with `Task(..., balance=False)` or "
                f"`unbalanced_tasks`."
            )
