"""The training flow: from the losses of a batch to a balanced optimiser step, top to bottom."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
import torch._functorch.config
from lightning.pytorch import Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor

from lightning_mtl.balancer import at_least_float32
from lightning_mtl.contract import Loop, TaskModule
from lightning_mtl.engine.again import Changes, Reached, losses_again, remember
from lightning_mtl.engine.closure import Closure, without_autocast
from lightning_mtl.engine.forms.choose import choose, kinds
from lightning_mtl.engine.forms.form import Form
from lightning_mtl.engine.forms.setting import Setting
from lightning_mtl.engine.gradients.layout import Layout
from lightning_mtl.engine.gradients.task_losses import TaskLosses
from lightning_mtl.engine.group import Group
from lightning_mtl.engine.guards import limit_of
from lightning_mtl.engine.idle import Idle, draw_again, random_states, run_or_leave_out
from lightning_mtl.engine.lonely import Lonely
from lightning_mtl.engine.losses import check_task_names, check_total, read_losses
from lightning_mtl.engine.record import StepRecord
from lightning_mtl.engine.stages import (
    attached_balancers,
    check_tasks,
    same_tasks,
    warn_of_one_task,
)
from lightning_mtl.loss_balancers import EqualWeighting
from lightning_mtl.ranks import ranks_of
from lightning_mtl.saved import entry, names_in


class Flow:
    """Runs the training steps of one fit.

    Args:
        module: whose losses are balanced.
        trainer: whose callbacks hold the balancers, and whose flags apply.
        loop: what lets its optimizers step.
    """

    def __init__(self, module: TaskModule, trainer: Trainer, loop: Loop) -> None:
        self.loop = loop
        self.module = module
        self.trainer = trainer
        callbacks = trainer.callbacks  # type: ignore[attr-defined] # set by a connector
        loss, gradient = attached_balancers(callbacks)
        self.balancers = [b for b in dict.fromkeys((loss, gradient)) if b is not None]
        self.loss_balancer = loss or EqualWeighting()
        self.gradient_balancer = gradient if gradient and gradient.needs_jacobian else None
        self.observers = [c for c in callbacks if hasattr(c, "wants_jacobian")]
        self._limit = limit_of(self.balancers)
        self._learners = [b for b in self.balancers if b.learns]
        asking = [b for b in self.balancers if getattr(b, "needs_losses_after", False)]
        self._again = bool(asking)
        balancer = self.gradient_balancer
        if balancer and (balancer.perturbs or balancer.products):
            asking.append(balancer)
        self._asker = type(asking[0]).__name__ if asking else ""  # who needs a batch once more
        self._changes = Changes(module, self._asker)
        self._representation: list[Tensor] = []
        self.closure: Closure | None = None  # that runs a forward pass again
        self.first_step = True
        self.called_again = False  # whether an optimizer was seen to call its closure again
        self.replaying = False  # whether a forward pass is made again up to the representation
        self.over = False  # whether the fit has ended
        self.ranks = ranks_of(trainer)
        same_tasks(module.training_tasks, self.ranks)
        for attached in self.balancers:
            attached.share_seed(self.ranks.gather(torch.initial_seed())[0])
        self.layout = Layout(module, self.ranks)
        self.setting = Setting(
            module, trainer, self.layout, self.loss_balancer, balancer, self._limit
        )
        self._kinds = kinds(balancer)
        self._form: Form | None = None  # of the step that has begun
        self._synced: bool | None = None  # whether BatchNorm has collectives of its own
        self._observed = False
        self._told = False
        self._idle = Idle(module.max_skipped_steps)
        self.in_losses = False  # whether the user's `task_losses` is running
        self._heard = False  # whether it is known who listens to hooks
        self._first_done = False
        self._counted: set[int] = set()  # tasks that have brought label counts
        self._lonely = Lonely(type(gradient).__name__) if self.gradient_balancer else None
        self._uneven = False  # whether label counts or absent tasks were met under accumulation
        if self.gradient_balancer is not None or self.observers:
            # A compiled backward pass may otherwise free what the next task's pass needs.
            torch._functorch.config.donated_buffer = False
        marked = gradient is not None and gradient.gradients.startswith("representation")
        if marked and "torch._dynamo" in sys.modules:
            # Inside a compiled graph no path would lead from the representation to the losses.
            self.mark = torch.compiler.disable(self.mark)  # type: ignore[method-assign]
        if module.task_names:
            self._check_tasks()
        loop.check(self.gradient_balancer)
        self._every = trainer.accumulate_grad_batches

    # ------------------------------------------------------------------ a batch

    def training_step(self, batch: Any, batch_idx: int) -> Tensor | None:
        """One micro-batch, and a balanced optimiser step after the last one of a group."""
        if self.closure is not None:
            return self.closure.run(batch, batch_idx)
        called = self.module._current_fx_name == "training_step"  # by Lightning, not in a hook
        if self.module.automatic_optimization or not called:
            # Lightning searches for a learning rate or a batch size, without our callback.
            return self.read_losses(batch, batch_idx).total()
        self._ask(batch_idx)
        seen = remember(self.module, batch, batch_idx, self._asker) if self._asker else None
        self._representation = []  # a new list: the one before belongs to its step
        with self._discovery(), self._changes.looked_for():
            losses = self.read_losses(batch, batch_idx)
        # The forward pass ran under autocast; from here on the arithmetic is exact.
        with without_autocast(self.module.device.type):
            # Lightning's weight averaging refreshes BatchNorm by forward passes alone.
            if self.trainer.fit_loop._skip_backward:
                return self._returned(losses)
            stepping = not self.trainer.fit_loop._should_accumulate()
            losses.counted |= self._counted
            self._counted = losses.counted
            form = self._form or self._begin(losses, batch_idx, single=stepping)
            self._form, group = None if stepping else form, form.group
            group.add(losses, seen)
            if stepping:
                self._first_done = True
                group.close()
            # The gradients; with the last micro-batch looked at, balanced and written to `.grad`.
            total = None
            if not group.skip:
                total = run_or_leave_out(form, losses, stepping=stepping)
            self._uneven |= form.uneven
            if stepping and not group.skip:
                self.module._automatic_optimization = True
                if self._lonely is not None and self._lonely.over(group.present()):
                    self._lonely = None
                loss = None if total is None else total.detach()
                if self.loop.step(batch_idx, partial(Closure, self, batch, batch_idx, form, loss)):
                    self._learn(group)
                    self._idle.stepped()
                else:
                    self._idle.overflowed(self.setting.scale)
                self.first_step = False
                self.layout.grow(self.gradient_balancer, self.trainer.optimizers)
                if not group.overflow and self.loop.losses_due():
                    self._log_losses()
            elif stepping:
                draw_again(group.drawn)
                self._idle.left_out(group, self.module.training_tasks)
            self._say(group)
            return self._returned(losses)

    def _ask(self, batch_idx: int) -> None:
        """Who listens to hooks, once an epoch; and who looks at the step that begins."""
        if batch_idx == 0 or not self._heard:
            self._heard = True
            self.setting.hooks = self.loop.listened()
        if self._form is None or batch_idx % self.trainer.accumulate_grad_batches == 0:
            self._form = None  # a step that was cut short does not go on in another epoch
            asked = [o.wants_jacobian(self.trainer, self.module) for o in self.observers]
            self._observed = any(asked)  # every observer is asked, none is skipped

    def _returned(self, losses: TaskLosses) -> Tensor | None:
        """The plain sum, as Lightning gives it to hooks."""
        total = losses.total(detach=True) if losses.tasks else None
        if total is not None and self.trainer.accumulate_grad_batches > 1:
            total = total / self.trainer.accumulate_grad_batches
        if not self.module.automatic_optimization:
            self.module._automatic_optimization = True  # trainer/flags.py says why
        return total

    def _say(self, group: Group) -> None:
        """Say that something was left out, once; end a fit that goes on without steps."""
        rule = self.module.on_bad_loss
        if group.dropped and not self._told:
            self._told = True
            rank_zero_warn(
                f"A loss or a gradient of optimiser step {self.trainer.global_step + group.skip} "
                f"cannot be used and is left out, as `on_bad_loss='{rule}'` "
                f"asks. It is said once; `on_bad_loss='raise'` names the task and the reason."
            )
        if self._idle.missed:
            self._idle.check(rule, self.trainer.global_step)

    def _discovery(self) -> AbstractContextManager[Any]:
        """Compiled graphs give zeros where there is no path; find shared parameters without."""
        known = self.layout.complete or (self.layout.given and self.layout.known)
        rows = self._observed or self.gradient_balancer is not None
        if rows and not known and "torch._dynamo" in sys.modules:
            stance: AbstractContextManager[Any] = torch.compiler.set_stance("force_eager")
            return stance
        return nullcontext()

    def read_losses(self, batch: Any, batch_idx: int) -> TaskLosses:
        """The losses of a micro-batch, checked."""
        module = self.module
        self.in_losses = True
        try:
            losses = module.task_losses(batch, batch_idx)
        finally:
            self.in_losses = False
        if not module.task_names:
            self._declare(losses)
        return read_losses(
            losses,
            module.task_names,
            module.training_tasks,
            limit=self._limit,
            on_bad_loss=module.on_bad_loss,
            step=self.trainer.global_step + 1,
            ranks=self.ranks,
            lockstep=self._lockstep(),
            late=self._late(),
            from_batch=module.names_from_batch,
        )

    def _late(self) -> bool:
        """Whether losses are looked at together with the gradients, by one transfer to the host.

        Only in a step of one micro-batch. What is bad is then left out as a whole, before
        anything is balanced; a task can be left out of a sum of losses no more, only the step.
        """
        may = self.ranks.alone and all(kind.may_be_late(self.setting) for kind in self._kinds)
        may &= not torch.is_anomaly_enabled()  # which ends at the first NaN
        once = self.trainer.accumulate_grad_batches == 1 and self._first_done
        rows = self.gradient_balancer is not None or self._observed
        found = self.layout.complete or not rows
        return may and once and found and self.setting.scaler is None

    def _lockstep(self) -> str:
        """Why every rank has to run the same backward passes, if so."""
        if self.ranks.alone:
            return ""
        if self.ranks.sharded_parameters:
            return "FSDP2"
        if self._synced is None:  # once layers have been converted
            layers = self.module.modules()
            self._synced = any(isinstance(m, torch.nn.SyncBatchNorm) for m in layers)
        every = self.trainer.accumulate_grad_batches
        rows = self.gradient_balancer is not None or self.observers or every > 1
        return "SyncBatchNorm" if self._synced and rows else ""

    def _declare(self, losses: Any) -> None:
        """Take the tasks of the first batch for those of the module."""
        names = list(losses) if isinstance(losses, Mapping) else []
        same_tasks(names, self.ranks)
        if names:
            check_total(losses)
            self.module._declare(check_task_names(names))
            self._check_tasks()

    def _check_tasks(self) -> None:
        module = self.module
        check_tasks(self.balancers, module.task_names)
        balanced = [t for t in module.training_tasks if t not in module.unbalanced_tasks]
        warn_of_one_task(self.gradient_balancer, balanced)

    def _begin(self, losses: TaskLosses, batch_idx: int, *, single: bool) -> Form:
        """Begin an optimiser step: clear gradients, and choose the form that takes new ones."""
        self.loop.zero_grad(batch_idx, self.setting.hooks)
        size, balancer = len(self.module.training_tasks), self.gradient_balancer
        group = Group(self._observed, [None] * size, [0.0] * size)
        if not single:
            self._uneven |= losses.uneven(size, plain=self.setting.plain)
        group.drawn = random_states(self.balancers)
        if balancer is not None and self.trainer.accumulate_grad_batches != self._every:
            self.loop.check(balancer)  # a callback may change it
            self._every = self.trainer.accumulate_grad_batches
        return choose(
            self.setting,
            group,
            losses,
            single=single,
            uneven=self._uneven,
            marked=self._representation,
        )

    def mark(self, representation: Tensor) -> None:
        """Note the shared representation of the batch."""
        if self.replaying:
            self.replaying = False
            raise Reached(representation)
        if torch.is_grad_enabled():
            self._representation.append(representation)

    def _log_losses(self) -> None:
        record = self.record()
        if record is not None:
            self.loop.log_losses(record.tasks, record.losses)

    def _learn(self, group: Group) -> None:
        """Let balancers learn from a step that was taken."""
        if not self._learners:
            return
        present = group.present()
        tasks = self.module.training_tasks
        losses = at_least_float32(group.mean_losses())
        after = None
        if self._again and group.seen:
            names = [tasks[t] for t in present]
            after = losses_again(self.module, group.seen, names, self.ranks, stepped=True)
            after = after.to(losses)
        for balancer in self._learners:
            rows, part = present, list(range(len(present)))
            if balancer is not self.loss_balancer:
                rows = group.balanced()
                part = [i for i, t in enumerate(present) if t in rows]
            if not rows:
                continue
            with balancer.only(*self.setting.rows_of(rows)):
                balancer.update(losses[part], None if after is None else after[part])

    # ------------------------------------------------------------ record and state

    def record(self) -> StepRecord | None:
        """What the last optimiser step did."""
        return self.setting.record()

    def check_trained(self) -> None:
        """Refuse a fit that ends without a step; one that was resumed may have had none to make."""
        if self.trainer.ckpt_path is None or self.trainer.global_step == 0:
            self._idle.finish(self.module.on_bad_loss)

    def check_frozen(self) -> None:
        """Refuse parameters that were frozen or unfrozen since the first step."""
        balanced = self.gradient_balancer is not None
        self.layout.check_frozen(self.trainer.optimizers, first=True, balanced=balanced)

    def release(self, *, broken: bool = False) -> None:
        """Free the buffers when the fit is over; the layout stays.

        After an error states stay divided, for a checkpoint that is written because of it: the
        ranks may no longer meet here.
        """
        for balancer in self.balancers:
            if balancer.shards is None or not broken:
                balancer.unshard()
        self.layout.release()
        self._form = None
        self.over = True

    def state_dict(self) -> dict[str, Any]:
        """Tasks and layout, as plain containers."""
        return {
            "declared": list(self.module.task_names),
            "tasks": list(self.module.training_tasks),
            **self.layout.state_dict(),
            "first_done": self._first_done,
            "uneven": self._uneven,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue with the saved layout; refuses other tasks."""
        declared = names_in(state, "declared", "the run")
        saved = names_in(state, "tasks", "the run")
        first_done = entry(state, "first_done", bool, "the run")
        uneven = entry(state, "uneven", bool, "the run")
        if not self.module.task_names and declared:
            self.module._declare(tuple(declared))
        tasks = list(self.module.training_tasks)
        if tasks and saved and saved != tasks:
            raise ValueError(
                f"Expected a checkpoint of the tasks {tasks} but this one was trained on {saved}. "
                f"Resume with the same tasks in the same order; to start from its weights only, "
                f"use `load_from_checkpoint` and `fit` without `ckpt_path`."
            )
        self.layout.load_state_dict(state)
        self._first_done, self._uneven = first_done, uneven
