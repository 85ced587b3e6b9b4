"""From the losses of a micro-batch to ``.grad``: the forms that a backward pass can take."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor

from lightning_mtl.balancer import GradientBalancer, LossBalancer
from lightning_mtl.contract import TaskModule
from lightning_mtl.engine.forms.blocks import Blocks
from lightning_mtl.engine.forms.perturbed import perturbed_rows
from lightning_mtl.engine.forms.probe import Probe, check_shared, open_probe
from lightning_mtl.engine.forms.products import Products
from lightning_mtl.engine.gradients.fsdp2 import locals_of
from lightning_mtl.engine.gradients.host import non_finite, to_host
from lightning_mtl.engine.gradients.layout import Layout, no_shared
from lightning_mtl.engine.gradients.rows import TaskGradients
from lightning_mtl.engine.gradients.task_losses import TaskLosses
from lightning_mtl.engine.group import Group
from lightning_mtl.engine.guards import Limit, bad_gradients, bad_losses, bad_sum
from lightning_mtl.engine.losses import check_every_task
from lightning_mtl.engine.record import StepRecord
from lightning_mtl.engine.two_stages import aggregate, checked, of_all


class Backward:
    """Takes the gradients of a group's micro-batches and leaves the balanced ones in ``.grad``.

    Args:
        module: whose losses are balanced.
        trainer: whose flags and precision apply.
        layout: which parameters are shared.
        loss_balancer: first stage.
        gradient_balancer: second stage, if there is one.
    """

    def __init__(
        self,
        module: TaskModule,
        trainer: Trainer,
        layout: Layout,
        loss_balancer: LossBalancer,
        gradient_balancer: GradientBalancer | None,
    ) -> None:
        self.module = module
        self.trainer = trainer
        self.layout = layout
        self.loss_balancer = loss_balancer
        self.gradient_balancer = gradient_balancer
        self.limit: Limit | None = None  # what a balancer asks of losses
        # An absent task then counts for zero, as when users add the losses up themselves.
        self.plain = loss_balancer.all_ones and gradient_balancer is None
        self.scaler: Any = getattr(trainer.precision_plugin, "scaler", None)
        self.hooks: set[str] = set()  # those of a backward pass that somebody listens to
        self._summed: Group | None = None  # what `record` will tell of a summed backward pass
        self._record: StepRecord | Callable[[], StepRecord] | None = None
        self._zero_gradient: set[str] = set()

    def gradients(self) -> TaskGradients:
        """Buffers for the task gradients."""
        return self.layout.gradients(self.trainer.optimizers)

    def rows_of(self, present: list[int]) -> tuple[tuple[str, ...], list[int] | None]:
        """Names of all tasks, and which of them are there; ``None`` for all."""
        tasks = self.module.training_tasks
        return tasks, None if len(present) == len(tasks) else present

    def outside(self) -> set[int]:
        """Tasks that take no part in the gradient stage: by wish, or for want of a path to it."""
        names, found = self.module.unbalanced_tasks, set(self.layout.outside)
        if names:
            found |= {t for t, name in enumerate(self.module.training_tasks) if name in names}
        return found

    @property
    def scale(self) -> float:
        """What losses are multiplied by, so that half-precision gradients do not vanish."""
        return float(self.scaler.get_scale()) if self.scaler is not None else 1.0

    def run(self, losses: TaskLosses, group: Group, *, stepping: bool) -> Tensor:
        """Backward of one micro-batch inside Lightning's hooks; at the last, write ``.grad``."""
        if group.form == "sum":
            return self._one_backward(losses, group, stepping)
        total, every = losses.total(), self.trainer.accumulate_grad_batches
        total = total if every == 1 else total / every
        if "on_before_backward" in self.hooks:
            self.trainer.precision_plugin.pre_backward(total, self.module)
        if group.received > 1 or self.hooks:
            self.layout.check_frozen(self.trainer.optimizers, first=False, balanced=True)
        gradients = self.gradients()
        if group.form == "reuse":
            self._reuse(losses, group, gradients, stepping)
        elif group.form == "probe":
            assert self.gradient_balancer is not None
            probe = self._probe(losses, group, gradients)
            self._balance(group, probe)
            if not group.skip:
                self._refuse_bad_sum(group)
        elif group.form == "perturbed":
            assert self.gradient_balancer is not None
            perturbed_rows(
                self.module, self.gradient_balancer, gradients, losses, group, self.scale
            )
            self._balance(group, gradients)
        else:
            self._add_rows(losses, group, gradients, stepping)
            if stepping and not group.skip:
                self._balance(group, gradients)
        if "on_after_backward" in self.hooks:
            self.trainer.precision_plugin.post_backward(total, self.module)
        return total

    def _probe(self, losses: TaskLosses, group: Group, gradients: TaskGradients) -> Probe:
        """Task gradients by a few columns at a time, in place of all rows of J."""
        module, balancer = self.module, self.gradient_balancer
        assert balancer is not None
        if balancer.gradients != "parameters":
            marked = group.representation
            products = None
            if balancer.products:

                def products(gradients: TaskGradients, z: Tensor) -> Probe:
                    (seen,) = group.seen
                    return Products(gradients, z, self.scale, module, seen)

            return open_probe(module, balancer, gradients, losses, marked, self.scale, products)
        check_shared(module, balancer, gradients, "`gradient_memory='blocks'`")
        probe = Blocks(gradients, module.gradient_blocks, self.scale)
        probe.collect(losses)
        return probe

    def _add_rows(
        self, losses: TaskLosses, group: Group, gradients: TaskGradients, stepping: bool
    ) -> None:
        """One backward pass a task."""
        balancer = self.gradient_balancer
        apart = balancer is not None and balancer.batches > 1
        if balancer is not None and apart:
            if group.dropped:  # a bad loss: of batches that are taken apart none can do without
                group.skip = True
                return
            check_every_task(losses, self.module.training_tasks, balancer)
            if group.received > 1:
                gradients.set_aside()
        scale = self.scale
        for t, value, count, last in losses:
            value = value if count * scale == 1 else value * (count * scale)
            wanted = group.wanted is None or t in group.wanted or not gradients.known
            gradients.add(t, value, retain_graph=not last, shared=wanted)
            if stepping and not apart:
                gradients.send(t)  # while the next row is taken
        if stepping and not apart:
            gradients.send(gradients.num_tasks - 1)  # ranks without tasks too

    def _reuse(
        self, losses: TaskLosses, group: Group, gradients: TaskGradients, stepping: bool
    ) -> None:
        """One trunk backward pass with weights that are known, and one of the heads."""
        self._note_uneven(losses, group, stepping)
        omega = self._loss_weights(losses, group)
        if losses.tasks:
            values = losses.stacked() * (self.scale / self.trainer.accumulate_grad_batches)
            shared = self._of(group.reused, losses, values)
            heads = values.new_ones(()) if group.reused_heads is None else group.reused_heads
            heads = self._of(heads, losses, values) if heads.ndim else heads
            gradients.add(0, values @ (omega * shared), retain_graph=True, heads=False)
            gradients.add(0, values @ (omega * heads), retain_graph=False, shared=False)
        if stepping:
            gradients.agree()
            gradients.write_shared(gradients.combined(), every_column=False)
            gradients.write_heads(None)
            self._refuse_bad_sum(group)
            self._summed = self._summed if group.skip else group

    def _one_backward(self, losses: TaskLosses, group: Group, stepping: bool) -> Tensor:
        """Backward of the weighted sum: balancing losses costs what plain training does."""
        self._note_uneven(losses, group, stepping)
        every = self.trainer.accumulate_grad_batches
        total = self._weighted_sum(losses, group)
        total = total if every == 1 or not losses.tasks else total / every
        if not self.layout.ranks.alone:
            self._sum_over_ranks(total, losses, group, stepping)
        elif losses.tasks:
            self.module.manual_backward(total)
        if stepping:
            self._refuse_bad_sum(group)
            self._summed = self._summed if group.skip else group
        return total

    def _sum_over_ranks(
        self, total: Tensor, losses: TaskLosses, group: Group, stepping: bool
    ) -> None:
        """The backward pass of one process among several, without its wrapper's reducer."""
        summed = self.layout.summed(self.trainer.optimizers, first=group.received == 1)
        if group.received == 1:
            summed.begin()
        self.trainer.precision_plugin.pre_backward(total, self.module)
        if losses.tasks:
            summed.add(0, total * self.scale, retain_graph=False)
        if stepping:
            summed.agree()
            summed.write_shared(summed.combined(), every_column=False)
        self.trainer.precision_plugin.post_backward(total, self.module)

    def _note_uneven(self, losses: TaskLosses, group: Group, stepping: bool) -> None:
        """Say what a task that is missing from a micro-batch of summed losses leads to."""
        apart = self.trainer.accumulate_grad_batches > 1 and not (stepping and group.received == 1)
        if apart and not group.uneven and losses.uneven(len(group.counts), plain=self.plain):
            group.uneven = True
            rank_zero_warn(
                "A task is missing from a micro-batch, or brings a label count. This optimiser "
                "step takes it for a zero loss, as Lightning would; from the next one on, means "
                "are taken over the labels that are there, with one backward pass a task."
            )

    def _refuse_bad_sum(self, group: Group) -> None:
        """Leave the step out when the gradient of the summed losses is not finite.

        A gradient scaler looks for itself, and skips the step.
        """
        if self.scaler is not None or self.module.on_bad_loss == "ignore":
            return
        grads = [grad for p in self.trained() if (grad := p.grad) is not None]
        flag = non_finite(locals_of(grads))
        if self.layout.ranks.sharded_parameters:  # each process sees its part only
            flag = self.layout.ranks.max_(flag.to(self.layout.ranks.device))
        present, weights = group.present(), group.loss_weights
        late = [group.mean_losses()] if group.late and group.form in ("sum", "reuse") else []
        if late and weights is not None:
            late.append(weights if len(present) == len(weights) else weights[present])
        flag, *late = to_host(flag, *late)
        names = [self.module.training_tasks[t] for t in present]
        rule, step = self.module.on_bad_loss, self.trainer.global_step + 1
        bad: set[int] = set()
        if late:
            values = dict(enumerate(late[0].tolist()))
            bad = bad_losses(values, names, self.limit, on_bad_loss=rule, step=step)
            if len(late) == 2 and not bad:
                checked(late[1], self.loss_balancer, late[0])
        if flag.item() and not bad:
            bad_sum(names, on_bad_loss=rule, step=step)
            bad = set(range(len(present)))  # a sum does not tell
        if bad:
            group.skip = group.dropped = True
            group.bad.update(present[i] for i in bad)
            for p in self.trained():
                p.grad = None

    def _weighted_sum(self, losses: TaskLosses, group: Group) -> Tensor:
        if self.plain and losses.joint is None:
            return losses.total()
        weights = self._loss_weights(losses, group)
        if not losses.tasks:
            return losses.total()
        values = losses.stacked()
        if group.reused is not None:
            weights = weights * self._of(group.reused, losses, values)
        return values @ weights

    def _loss_weights(self, losses: TaskLosses, group: Group) -> Tensor:
        """Weights of the losses of a micro-batch, times this process's share in each."""
        if self.loss_balancer.all_ones:
            weights = losses.ones()
        else:
            if group.loss_weights is None:
                means, rows = losses.means(), self.rows_of(losses.present)
                with self.loss_balancer.only(*rows):
                    found = self.loss_balancer.loss_weights(means)
                    look = self.module.on_bad_loss != "ignore" and not group.late
                    found = checked(found, self.loss_balancer, means, look=look)
                group.loss_weights = of_all(found, rows[1], len(rows[0]), means)
            weights = self._of(group.loss_weights, losses, group.loss_weights)
        shares = losses.shares(plain=self.plain)
        return weights if losses.joint is None else weights * weights.new_tensor(shares)

    def _of(self, weights: Tensor | None, losses: TaskLosses, like: Tensor) -> Tensor:
        """Weights of the tasks of a micro-batch, from those of all tasks."""
        assert weights is not None
        weights = weights.to(like)
        return weights if len(weights) == len(losses.tasks) else weights[losses.tasks]

    def record(self) -> StepRecord | None:
        """What the last optimiser step did; put together when somebody asks."""
        if self._summed is not None:
            self._record = self._summed.record(self.module.training_tasks)
            self._summed = None
        elif callable(self._record):
            self._record = self._record()
        return self._record

    def _balance(self, group: Group, gradients: TaskGradients | Probe) -> None:
        """Balance the task gradients of a whole group and write them to ``.grad``."""
        balancer = self.gradient_balancer
        discovered = not self.layout.known
        apart = None
        if balancer is not None and balancer.batches > 1 and isinstance(gradients, TaskGradients):
            apart = gradients.apart()
        jacobian = gradients.finish() if apart is None else apart.sum(0)
        scale = self.scale
        if scale != 1:
            jacobian = jacobian.div_(scale)
            apart = None if apart is None else apart.div_(scale)
        if discovered:
            self.layout.settle(balancer)
        if balancer is not None and jacobian.shape[1] == 0:
            if self.layout.complete:
                raise ValueError(no_shared(self.module, type(balancer).__name__))
            balancer = None  # the tasks so far share nothing: each trains what it reaches
        gramian, sizes, losses = self._small(group, gradients, jacobian)
        if discovered or group.outside:
            group.outside = self.outside()
        tasks, present = self.module.training_tasks, group.present()
        if sizes is not None:
            if self.scaler is not None and not math.isfinite(sum(sizes)):
                self._overflow(group)
                return
            rule, step = self.module.on_bad_loss, self.trainer.global_step + 1
            bad: set[int] = set()
            if group.late:
                values = dict(zip(present, losses.tolist(), strict=True))
                bad |= bad_losses(values, tasks, self.limit, on_bad_loss=rule, step=step)
            squared = gramian is not None and jacobian.dtype == torch.float64
            bad |= bad_gradients(sizes, group.counts, tasks, squared, on_bad_loss=rule, step=step)
            for t in bad:
                gradients.drop(t)
                jacobian[t].zero_()
                group.counts[t] = 0
                group.dropped = True
                group.bad[t] += 1
                group.skip |= rule == "skip_step" or not any(group.counts)
                group.skip |= apart is not None or group.wanted is not None
            if group.skip:
                return
            if bad:
                kept = [i for i, t in enumerate(present) if t not in bad]
                losses, present = losses[kept], group.present()
                if gramian is not None:
                    gramian = gradients.gramian(jacobian)
        if group.dropped:
            gradients.agree()  # what only a dropped task reached gets no gradient
        if balancer is not None and group.wanted is None and sizes is not None:
            balanced = group.balanced()
            self._warn_zero_gradients([t for t in balanced if sizes[t] == 0])
        self._summed = None
        self._record = aggregate(
            gradients,
            jacobian,
            losses,
            group.divisors(self.plain, self.layout.ranks.size),
            tasks,
            self.loss_balancer,
            balancer,
            gramian,
            share=group.received / self.trainer.accumulate_grad_batches,
            loss_scale=scale,
            observed=group.observed,
            apart=apart,
            look=self.module.on_bad_loss != "ignore",
            outside=group.outside,
        )

    def _small(
        self, group: Group, gradients: TaskGradients | Probe, jacobian: Tensor
    ) -> tuple[Tensor | None, list[float] | None, Tensor]:
        """The Gramian where it is needed, a size for each task, and the losses that are there.

        All of them on the host, by one transfer. A size is not finite where a gradient of the task
        is not; there are none where nothing asks for them.
        """
        balancer = self.gradient_balancer
        losses = group.mean_losses().to(torch.promote_types(jacobian.dtype, torch.float32))
        weighted = balancer is not None and balancer.gramian_weighted
        checks = self.module.on_bad_loss != "ignore" or self.scaler is not None
        if not (weighted or group.observed or checks):
            return None, None, losses
        sums = weighted or group.observed
        table = gradients.gramian(jacobian) if sums else gradients.sizes(jacobian)
        if not checks:
            table, losses = to_host(table, losses)
            self._turn_up(table.diagonal() if sums else table)
            return table, None, losses
        alone = self.layout.ranks.alone
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
        outside = self.layout.outside
        if outside:
            outside.difference_update([t for t in outside if sizes[t] != 0])

    def _overflow(self, group: Group) -> None:
        """Leave gradients that make the scaler skip the step of every optimizer."""
        group.overflow = True
        for p in self.trained():
            p.grad = torch.full_like(p, torch.nan)

    def trained(self) -> list[Tensor]:
        """Every parameter of every optimizer."""
        groups = [group for o in self.trainer.optimizers for group in o.param_groups]
        return [p for group in groups for p in group["params"]]

    def _warn_zero_gradients(self, zero: list[int]) -> None:
        names = {self.module.training_tasks[t] for t in zero} - self._zero_gradient
        if names:
            self._zero_gradient |= names
            rank_zero_warn(
                f"The gradient of {sorted(names)} is exactly zero on the shared parameters at "
                f"optimiser step {self.trainer.global_step + 1}. Methods that look for a direction "
                f"good for every task (MinNorm) stop the shared parameters then. Look for a "
                f"detached or saturated path, leave the task out with `active_tasks`, or keep it "
                f"out of the gradient stage with `Task(..., balance=False)` or `unbalanced_tasks`."
            )
