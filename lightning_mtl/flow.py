"""The training flow: from the losses of a batch to a balanced optimiser step, top to bottom."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.trainer import call
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor

from lightning_mtl.aggregate import aggregate, checked
from lightning_mtl.group import Group
from lightning_mtl.jacobian import TaskGradients
from lightning_mtl.layout import check_frozen, no_shared, shared_names, trainable
from lightning_mtl.loss_balancers import EqualWeighting
from lightning_mtl.losses import (
    TaskLosses,
    all_finite,
    bad_gradients,
    bad_sum,
    check_task_names,
    read_losses,
)
from lightning_mtl.record import StepRecord
from lightning_mtl.resume import sync_progress
from lightning_mtl.stages import attached_balancers, check_tasks

if TYPE_CHECKING:
    from lightning_mtl.module import MultiTaskModule


class Flow:
    """Runs the training steps of one fit.

    Args:
        module: whose losses are balanced.
        trainer: whose callbacks hold the balancers, and whose flags apply.
    """

    def __init__(self, module: MultiTaskModule, trainer: Trainer) -> None:
        self.module = module
        self.trainer = trainer
        callbacks = trainer.callbacks  # type: ignore[attr-defined] # set by a connector
        loss, gradient = attached_balancers(callbacks)
        self.balancers = [b for b in dict.fromkeys((loss, gradient)) if b is not None]
        self.loss_balancer = loss or EqualWeighting()
        self.gradient_balancer = gradient if gradient and gradient.needs_jacobian else None
        self.observers = [c for c in callbacks if hasattr(c, "wants_jacobian")]
        strict = [type(b).__name__ for b in self.balancers if b.requires_positive_losses]
        self._positive_for = strict[0] if strict else None
        self._summed: Group | None = None  # what `record` will tell of a summed backward pass
        self._record: StepRecord | None = None
        self._gradients: TaskGradients | None = None
        self._saved_shared: list[str] | None = None
        self._saved_trainable: list[str] | None = None
        self._group: Group | None = None
        self._observed = False
        self._told = False
        self._first_done = False
        self._uneven = False  # whether label counts or absent tasks were met under accumulation
        self._zero_gradient: set[str] = set()
        if module.task_names:
            check_tasks(self.balancers, module.task_names)

    # ------------------------------------------------------------------ a batch

    def training_step(self, batch: Any, batch_idx: int) -> Tensor | None:
        """One micro-batch, and a balanced optimiser step after the last one of a group."""
        if self._group is None or batch_idx % self.trainer.accumulate_grad_batches == 0:
            self._group = None  # a group that was cut short does not go on in another epoch
            asked = [o.wants_jacobian(self.trainer, self.module) for o in self.observers]
            self._observed = any(asked)  # every observer is asked, none is skipped
        with self._discovery():
            losses = self._read_losses(batch, batch_idx)
        # The forward pass ran under autocast; from here on the arithmetic is exact.
        with _without_autocast(self.module.device.type):
            # Lightning's weight averaging refreshes BatchNorm by forward passes alone.
            if not self.trainer.fit_loop._skip_backward:
                self._train(losses, batch_idx)
            total = losses.total(detach=True) if losses.tasks else None
        if not self.module.automatic_optimization:
            self.module.automatic_optimization = True  # trainer_flags.py says why
        return total

    def _discovery(self) -> AbstractContextManager[Any]:
        """Compiled graphs give zeros where there is no path; find shared parameters without."""
        known = self._gradients is not None and self._gradients.known
        rows = self._observed or self.gradient_balancer is not None
        if rows and not known and "torch._dynamo" in sys.modules:
            stance: AbstractContextManager[Any] = torch.compiler.set_stance("force_eager")
            return stance
        return nullcontext()

    def _read_losses(self, batch: Any, batch_idx: int) -> TaskLosses:
        module = self.module
        losses = module.task_losses(batch, batch_idx)
        if not module.task_names and isinstance(losses, Mapping):
            module._declare(check_task_names(list(losses)))
            check_tasks(self.balancers, module.task_names)
        return read_losses(
            losses,
            module.task_names,
            module.training_tasks,
            positive_for=self._positive_for,
            on_bad_loss=module.on_bad_loss,
            step=self.trainer.global_step + 1,
        )

    def _train(self, losses: TaskLosses, batch_idx: int) -> None:
        stepping = not self.trainer.fit_loop._should_accumulate()
        if self._group is None:
            self._group = self._begin_group(losses, single=stepping)
            self._zero_grad(batch_idx)
        group = self._group
        group.add(losses)
        if stepping:
            self._group = None
            group.skip |= not any(group.counts) or not self._all_seen(group)
        total = None if group.skip else self._backward(losses, group, stepping)
        if stepping and not group.skip:
            self._step_optimizers(batch_idx, total)
            self._log_losses()
        if group.dropped and not self._told:
            self._told = True
            rank_zero_warn(
                f"A loss or a gradient of optimiser step {self.trainer.global_step + group.skip} "
                f"cannot be used and is left out, as `on_bad_loss='{self.module.on_bad_loss}'` "
                f"asks. It is said once; `on_bad_loss='raise'` names the task and the reason."
            )

    def _begin_group(self, losses: TaskLosses, *, single: bool) -> Group:
        """Decide for one optimiser step whether one summed backward pass is enough."""
        num_tasks = len(self.module.training_tasks)
        rows = self._observed or self.gradient_balancer is not None
        if not single:
            self._uneven |= losses.uneven(num_tasks)
            rows = rows or self._uneven or self.loss_balancer.needs_current_losses
        if rows:
            gradients = self._task_gradients()
            gradients.begin()
            if single and len(losses.tasks) == num_tasks and not gradients.known:
                gradients.discover(losses.values)
        return Group(not rows, self._observed, [None] * num_tasks, [0.0] * num_tasks)

    def _all_seen(self, group: Group) -> bool:
        """Whether every task has been met once, without which heads look like shared ones."""
        known = self._gradients is not None and self._gradients.known
        if self._first_done and (known or self.gradient_balancer is None):
            return True
        tasks = self.module.training_tasks
        unseen = [tasks[t] for t, count in enumerate(group.counts) if not count]
        given = self._saved_shared is not None or self.module.shared_parameters() is not None
        if not unseen or given:
            self._first_done = True
        elif not group.dropped:
            raise ValueError(
                f"Expected every task in the first optimiser step but found no loss of {unseen}; "
                f"the declared tasks are {list(tasks)}. Return its loss from `task_losses`, leave "
                f"it out with `active_tasks`, or override `shared_parameters()` if a task may be "
                f"missing from the first step."
            )
        return not unseen or given

    # ------------------------------------------------------------ backward pass

    def _backward(self, losses: TaskLosses, group: Group, stepping: bool) -> Tensor:
        """Backward of one micro-batch inside Lightning's hooks; at the last, write ``.grad``."""
        if group.one_backward:
            return self._one_backward(losses, group, stepping)
        total = losses.total() / self.trainer.accumulate_grad_batches
        self.trainer.precision_plugin.pre_backward(total, self.module)
        gradients = self._task_gradients()
        for t, value, count, last in losses:
            gradients.add(t, value if count == 1 else value * count, retain_graph=not last)
        if stepping:
            self._balance(group)
        self.trainer.precision_plugin.post_backward(total, self.module)
        return total

    def _one_backward(self, losses: TaskLosses, group: Group, stepping: bool) -> Tensor:
        """Backward of the weighted sum: balancing losses costs what plain training does."""
        every = self.trainer.accumulate_grad_batches
        alone = stepping and group.received == 1
        if every > 1 and not (alone or self._uneven) and losses.uneven(len(group.counts)):
            self._uneven = True
            rank_zero_warn(
                "A task is missing from a micro-batch, or brings a label count. This optimiser "
                "step takes it for a zero loss, as Lightning would; from the next one on, means "
                "are taken over the labels that are there, with one backward pass a task."
            )
        total = self._weighted_sum(losses, group)
        if losses.tasks:
            total = total if every == 1 else total / every
            self.module.manual_backward(total)
        if stepping:
            self._refuse_bad_sum(group)
            self._summed = self._summed if group.skip else group
        return total

    def _refuse_bad_sum(self, group: Group) -> None:
        """Leave the step out when the gradient of the summed losses is not finite."""
        grads = [
            grad
            for optimizer in self.trainer.optimizers
            for parameters in optimizer.param_groups
            for p in parameters["params"]
            if (grad := p.grad) is not None
        ]
        if not all_finite(grads):
            names = [self.module.training_tasks[t] for t in group.present()]
            rule, step = self.module.on_bad_loss, self.trainer.global_step + 1
            bad_sum(names, on_bad_loss=rule, step=step)
            group.skip = group.dropped = True

    def _weighted_sum(self, losses: TaskLosses, group: Group) -> Tensor:
        if type(self.loss_balancer) is EqualWeighting or not losses.tasks:
            return losses.total()
        values = losses.stacked()
        weights = group.loss_weights
        if weights is None:
            with self.loss_balancer.only(*self._rows(losses.tasks)):
                weights = self.loss_balancer.loss_weights(values.detach())
            weights = checked(weights, self.loss_balancer, values.detach())
            group.loss_weights = weights
        elif len(weights) != len(values):
            weights = weights[losses.tasks]
        return values @ weights

    def record(self) -> StepRecord | None:
        """What the last optimiser step did; put together when somebody asks."""
        if self._summed is not None:
            self._record = self._summed.record(self.module.training_tasks)
            self._summed = None
        return self._record

    def _balance(self, group: Group) -> None:
        """Balance the task gradients of a whole group and write them to ``.grad``."""
        gradients, balancer = self._task_gradients(), self.gradient_balancer
        discovered = not gradients.known
        jacobian = gradients.finish()
        if balancer is not None and jacobian.shape[1] == 0:
            raise ValueError(no_shared(self.module, type(balancer).__name__))
        gramian = None
        if group.observed or (balancer is not None and balancer.gramian_weighted):
            gramian = jacobian @ jacobian.T
            sizes = gramian.diagonal().tolist()
        else:
            sizes = torch.linalg.vector_norm(jacobian, dim=1).tolist()
        tasks = self.module.training_tasks
        rule, step = self.module.on_bad_loss, self.trainer.global_step + 1
        whole = [row + head for row, head in zip(sizes, gradients.head_sizes(), strict=True)]
        for t in bad_gradients(whole, group.counts, tasks, on_bad_loss=rule, step=step):
            gradients.drop(t)
            jacobian[t].zero_()
            group.counts[t] = 0
            group.dropped = True
            group.skip |= rule == "skip_step" or not any(group.counts)
            gramian = None if gramian is None else jacobian @ jacobian.T
        if group.skip:
            return
        if balancer is not None:
            self._warn_zero_gradients([t for t in group.present() if sizes[t] == 0])
        self._summed = None
        self._record = aggregate(
            gradients,
            jacobian,
            group.mean_losses().to(jacobian),
            group.counts,
            tasks,
            self.loss_balancer,
            balancer,
            gramian,
            share=group.received / self.trainer.accumulate_grad_batches,
            observed=group.observed,
        )
        if discovered and len(group.present()) < len(tasks):
            self._gradients = None  # found without one of the tasks: look again at the next step

    def _warn_zero_gradients(self, zero: list[int]) -> None:
        names = {self.module.training_tasks[t] for t in zero} - self._zero_gradient
        if names:
            self._zero_gradient |= names
            rank_zero_warn(
                f"The gradient of {sorted(names)} is exactly zero on the shared parameters at "
                f"optimiser step {self.trainer.global_step + 1}. Methods that look for a direction "
                f"good for every task (MinNorm) stop the shared parameters then. Look for a "
                f"detached or saturated path, or leave the task out with `active_tasks`."
            )

    # ----------------------------------------------------------- optimiser step

    def _step_optimizers(self, batch_idx: int, total: Tensor | None) -> None:
        """Lightning's own step: its order of hooks, clipping and ``step``, counted once."""
        self.module.automatic_optimization = True
        trainer = self.trainer
        progress = trainer.fit_loop.epoch_loop.automatic_optimization.optim_progress.optimizer.step
        progress.increment_ready()
        loss = None if total is None else total.detach()
        for optimizer in trainer.strategy._lightning_optimizers:
            call._call_lightning_module_hook(
                trainer, "optimizer_step", trainer.current_epoch, batch_idx, optimizer, lambda: loss
            )
        progress.increment_completed()
        sync_progress(trainer)

    def _zero_grad(self, batch_idx: int) -> None:
        """Clear gradients before the first micro-batch of a group, with Lightning's hooks."""
        trainer = self.trainer
        for optimizer in trainer.optimizers:
            call._call_callback_hooks(trainer, "on_before_zero_grad", optimizer)
            call._call_lightning_module_hook(trainer, "on_before_zero_grad", optimizer)
            call._call_lightning_module_hook(
                trainer, "optimizer_zero_grad", trainer.current_epoch, batch_idx, optimizer
            )

    def _log_losses(self) -> None:
        """Log task losses when the logger is due: ``self.log`` costs too much for every step."""
        trainer = self.trainer
        steps = trainer.fit_loop.epoch_loop._batches_that_stepped + 1
        every = trainer.log_every_n_steps  # type: ignore[attr-defined] # set by a connector
        # At an epoch's end also without a logger, for callbacks that watch `train/loss/<task>`.
        due = trainer.is_last_batch or (trainer.loggers and every and steps % every == 0)
        if due and not trainer.barebones and (record := self.record()) is not None:
            for name, value in zip(record.tasks, record.losses, strict=True):
                self.module.log(f"train/loss/{name}", value)

    # ------------------------------------------------------------------- layout

    def _rows(self, present: list[int]) -> tuple[tuple[str, ...], list[int] | None]:
        tasks = self.module.training_tasks
        return tasks, None if len(present) == len(tasks) else present

    def _task_gradients(self) -> TaskGradients:
        if self._gradients is None:
            parameters = trainable(self.module, self.trainer.optimizers)
            saved = self._saved_shared, self._saved_trainable
            shared = shared_names(self.module, parameters, *saved)
            num_tasks = len(self.module.training_tasks)
            self._gradients = TaskGradients(parameters, num_tasks, shared)
        return self._gradients

    def check_frozen(self) -> None:
        """Refuse parameters that were frozen or unfrozen since the first step."""
        if self._gradients is not None and self._gradients.known:
            check_frozen(self.module, self.trainer.optimizers, self._gradients)

    def release(self) -> None:
        """Free the buffers when the fit is over; the layout stays."""
        if self._gradients is not None:
            self._saved_shared = self._gradients.shared
            self._saved_trainable = list(self._gradients.parameters)
            self._gradients = self._group = None

    def state_dict(self) -> dict[str, Any]:
        """Tasks and layout, as plain containers."""
        known = self._gradients is not None and self._gradients.known
        return {
            "declared": list(self.module.task_names),
            "tasks": list(self.module.training_tasks),
            "trainable": list(self._gradients.parameters) if known else self._saved_trainable,  # type: ignore[union-attr]
            "shared": self._gradients.shared if known else self._saved_shared,  # type: ignore[union-attr]
            "first_done": self._first_done,
            "uneven": self._uneven,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue with the saved layout; refuses other tasks."""
        if not self.module.task_names and state["declared"]:
            self.module._declare(tuple(state["declared"]))
        saved, tasks = state["tasks"], list(self.module.training_tasks)
        if tasks and saved and saved != tasks:
            raise ValueError(
                f"Expected a checkpoint of the tasks {tasks} but this one was trained on {saved}. "
                f"Resume with the same tasks in the same order; to start from its weights only, "
                f"use `load_from_checkpoint` and `fit` without `ckpt_path`."
            )
        self._saved_shared, self._saved_trainable = state["shared"], state["trainable"]
        self._first_done = state["first_done"]
        self._uneven = state["uneven"]


def _without_autocast(device_type: str) -> AbstractContextManager[Any]:
    if torch.is_autocast_enabled(device_type):
        return torch.autocast(device_type, enabled=False)
    return nullcontext()
