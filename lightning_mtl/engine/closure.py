"""What optimizers get as closure: the first call finds its gradients there, others take them."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.trainer import call
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor

from lightning_mtl.balancer import GradientBalancer, LossBalancer
from lightning_mtl.contract import Loop, TaskModule
from lightning_mtl.engine.forms.form import Form
from lightning_mtl.engine.forms.setting import Setting
from lightning_mtl.engine.forms.sum import Sum
from lightning_mtl.engine.gradients.task_losses import TaskLosses
from lightning_mtl.engine.group import Group
from lightning_mtl.ranks import OneProcess

# PyTorch's own begin with one call.
_ONCE = {
    kind
    for kind in vars(torch.optim).values()
    if isinstance(kind, type) and kind not in (torch.optim.Optimizer, torch.optim.LBFGS)
}


def _overridden(module: LightningModule) -> bool:
    return type(module).optimizer_step is not LightningModule.optimizer_step


class Running(Protocol):
    """What a closure asks of the training flow."""

    module: TaskModule
    trainer: Trainer
    loop: Loop
    ranks: OneProcess
    setting: Setting
    balancers: list[Any]
    loss_balancer: LossBalancer
    gradient_balancer: GradientBalancer | None
    closure: Closure | None
    first_step: bool
    called_again: bool

    def read_losses(self, batch: Any, batch_idx: int) -> TaskLosses:
        """The losses of a micro-batch, checked."""


def without_autocast(device_type: str) -> AbstractContextManager[Any]:
    """Exact arithmetic, after a forward pass under autocast."""
    if torch.is_autocast_enabled(device_type):
        return torch.autocast(device_type, enabled=False)
    return nullcontext()


class Closure:
    """The closure of one optimizer in one step.

    A call after the first, and a first one after the gradients were cleared, does what it does in
    automatic optimisation: it clears them, and makes a forward and a backward pass of the batch
    with the parameters of now. Loss weights are those of the losses of now. A gradient balancer,
    whose state would move twice in one step, is refused with it.

    Args:
        flow: of the fit.
        batch: the last micro-batch of the step.
        batch_idx: its index.
        form: of the step.
        loss: what the first call returns.
        optimizer: as Lightning wraps it.
    """

    def __init__(
        self,
        flow: Running,
        batch: Any,
        batch_idx: int,
        form: Form,
        loss: Tensor | None,
        optimizer: Any,
    ) -> None:
        self.flow = flow
        self.optimizer = getattr(optimizer, "optimizer", optimizer)
        self.batch = batch
        self.batch_idx = batch_idx
        self.form = form
        self.loss = loss
        self._called = False
        self._there: list[tuple[Tensor, int, Tensor]] = []
        self._before: list[tuple[Tensor, Tensor]] = []
        if type(self.optimizer) in _ONCE and not _overridden(flow.module):
            return  # nothing to look at
        own = [p for group in self.optimizer.param_groups for p in group["params"]]
        self._there = [(p, p._version, p.grad) for p in own if p.grad is not None]
        self._version = self._there[0][2]._version if self._there else 0
        # It may move parameters before it calls again, and that call may be refused: whether it
        # does shows in the first step.
        if flow.first_step or flow.called_again:
            self._before = [(p, p.detach().clone()) for p in flow.setting.trained()]

    def __call__(self) -> Tensor | None:
        """The loss, with gradients of it in ``.grad``."""
        called, self._called = self._called, True
        there, self._there = self._there, []
        if not called and self._find(there):
            return self.loss
        self.flow.called_again = True
        try:
            self._refuse()
            return self._evaluate()
        except BaseException:
            with torch.no_grad():
                for p, before in self._before:
                    p.copy_(before)
            raise

    def _find(self, there: list[tuple[Tensor, int, Tensor]]) -> bool:
        """Whether the gradients of the backward pass are there, or can be put back."""
        if not there:
            return True
        first, _, before = there[0]
        if before._version == self._version:
            if first.grad is before:
                return True  # as in every step of most optimizers
            # Of several micro-batches automatic optimisation would have the last one's left.
            whole = self.flow.balancers or self.batch_idx % self._every == 0
            unmoved = all(p._version == version for p, version, _ in there)
            if first.grad is None and whole and unmoved:
                for p, _, grad in there:
                    p.grad = grad
                return True  # cleared, and no parameter was moved since
        if self.flow.gradient_balancer is None:
            return False  # automatic optimisation takes them in the closure, whatever was there
        return any(bool(p.grad.any()) for p, _, _ in there if p.grad is not None)

    def _refuse(self) -> None:
        flow, name = self.flow, type(self.optimizer).__name__
        found = ""
        if flow.gradient_balancer is not None:
            found = type(flow.gradient_balancer).__name__
        elif self._every > 1 and (flow.balancers or not flow.ranks.alone):
            found = f"`accumulate_grad_batches={self._every}`"
        if found:
            told = "No parameter was changed." if self._before else f"{name} may have moved some."
            raise MisconfigurationException(
                f"Expected {name} to call its closure once a step, while the gradients of the step "
                f"are there, but it did so again, or had cleared them. With {found} gradients are "
                f"taken once a step. {told} Use the balancer `SAMO` for a "
                f"sharpness-aware step, an optimizer such as SGD or AdamW, or no gradient balancer."
            )

    @property
    def _every(self) -> int:
        return int(self.flow.trainer.accumulate_grad_batches)

    def _evaluate(self) -> Tensor:
        """Loss and gradients with the parameters of now, by Lightning's own forward pass."""
        flow = self.flow
        flow.closure, manual = self, flow.module.automatic_optimization
        flow.module._automatic_optimization = False  # for `manual_backward`
        told = flow.setting.told
        torch.clear_autocast_cache()  # it holds the weights of another moment
        try:
            with torch.enable_grad():
                loss: Tensor = call._call_strategy_hook(
                    flow.trainer, "training_step", self.batch, self.batch_idx
                )
        finally:
            flow.closure, flow.module._automatic_optimization = None, manual
            # The record of a step tells of its start.
            flow.setting.told = told
        return loss

    def run(self, batch: Any, batch_idx: int) -> Tensor:
        """Forward and backward pass of the micro-batch, in a group of its own."""
        flow = self.flow
        losses = flow.read_losses(batch, batch_idx)
        number = len(flow.module.training_tasks)
        group = Group(False, [None] * number, [0.0] * number)
        group.add(losses)
        with without_autocast(flow.module.device.type):
            return self._backward(losses, Sum(flow.setting, group, late=losses.late))

    def _backward(self, losses: TaskLosses, form: Form) -> Tensor:
        flow, group = self.flow, form.group
        if not flow.loss_balancer.needs_current_losses:
            form.loss_weights = self.form.loss_weights  # such as were drawn for this step
        if self.batch_idx % self._every == 0:
            flow.loop.zero_grad(self.batch_idx, flow.setting.hooks)
        group.skip |= not any(group.counts)
        total = None if group.skip else form.run(losses, stepping=True)
        if total is None or group.skip:
            raise ValueError(
                f"Expected usable losses and gradients whenever {type(self.optimizer).__name__} "
                f"calls its closure but found others in the midst of its step, which cannot be "
                f"left out any more. Use `on_bad_loss='ignore'` if the optimizer copes with them."
            )
        return total.detach()
