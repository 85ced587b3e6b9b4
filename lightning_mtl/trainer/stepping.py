"""Lightning's own optimiser step, its hooks and its bookkeeping, called from the flow."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.plugins.precision import Precision
from lightning.pytorch.trainer import call
from torch import Tensor

from lightning_mtl.balancer import GradientBalancer
from lightning_mtl.contract import TaskModule
from lightning_mtl.trainer.resume import sync_progress
from lightning_mtl.trainer.supported import check_batches


class Stepping:
    """Lightning's loop as the engine needs it: see :class:`~lightning_mtl.contract.Loop`.

    Args:
        trainer: whose optimizers step.
        module: that is trained.
    """

    def __init__(self, trainer: Trainer, module: TaskModule) -> None:
        self.trainer = trainer
        self.module = module

    def check(self, balancer: GradientBalancer | None) -> None:
        """Refuse a gradient balancer that cannot work with the flags of now."""
        check_batches(self.trainer, balancer)

    def step(self, batch_idx: int, closure: Callable[[Any], Callable[[], Tensor | None]]) -> bool:
        """Lightning's own step: its order of hooks, clipping and ``step``, counted once.

        Args:
            batch_idx: of the batch.
            closure: makes the closure of an optimizer.

        Returns:
            Whether it was taken; a gradient scaler skips it when half precision has overflowed.
        """
        trainer = self.trainer
        progress = trainer.fit_loop.epoch_loop.automatic_optimization.optim_progress.optimizer.step
        progress.increment_ready()
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        scale = 1.0 if scaler is None else scaler.get_scale()
        optimizers = trainer.strategy._lightning_optimizers
        for i, optimizer in enumerate(optimizers):
            with _one_update(scaler, last=i == len(optimizers) - 1):
                call._call_lightning_module_hook(
                    trainer,
                    "optimizer_step",
                    trainer.current_epoch,
                    batch_idx,
                    optimizer,
                    closure(optimizer),
                )
        progress.increment_completed()
        sync_progress(trainer)
        return scaler is None or scaler.get_scale() >= scale

    def listened(self) -> set[str]:
        """Which of the hooks that are ours to call reach somebody.

        A call that reaches nobody takes Lightning tens of microseconds; in a step of a tiny network
        that is much. Asked once an epoch.
        """
        found, trainer = set(), self.trainer
        for name in ("on_before_zero_grad", "on_before_backward", "on_after_backward"):
            nothing = (getattr(Callback, name), getattr(LightningModule, name))
            for listener in (self.module, *trainer.callbacks):  # type: ignore[attr-defined] # a connector's
                hook = getattr(listener, name)
                if callable(hook) and getattr(hook, "__func__", hook) not in nothing:
                    found.add(name)
        precision = type(trainer.precision_plugin)
        if precision.pre_backward is not Precision.pre_backward:
            found.add("on_before_backward")
        if precision.post_backward is not Precision.post_backward:
            found.add("on_after_backward")
        return found

    def zero_grad(self, batch_idx: int, hooks: set[str]) -> None:
        """Clear gradients before the first micro-batch of a group, with Lightning's hooks."""
        trainer = self.trainer
        for optimizer in trainer.optimizers:
            if "on_before_zero_grad" in hooks:
                call._call_callback_hooks(trainer, "on_before_zero_grad", optimizer)
                call._call_lightning_module_hook(trainer, "on_before_zero_grad", optimizer)
            call._call_lightning_module_hook(
                trainer, "optimizer_zero_grad", trainer.current_epoch, batch_idx, optimizer
            )

    def losses_due(self) -> bool:
        """Whether task losses are to be logged: ``self.log`` costs too much for every step."""
        trainer = self.trainer
        steps = trainer.fit_loop.epoch_loop._batches_that_stepped + 1
        every = trainer.log_every_n_steps  # type: ignore[attr-defined] # set by a connector
        # At an epoch's end also without a logger, for callbacks that watch `train/loss/<task>`.
        due = trainer.is_last_batch or (trainer.loggers and every and steps % every == 0)
        return bool(due) and not trainer.barebones

    def log_losses(self, names: Iterable[str], losses: Iterable[Tensor]) -> None:
        """Log the task losses of a step."""
        for name, value in zip(names, losses, strict=True):
            self.module.log(f"train/loss/{name}", value)


@contextmanager
def _one_update(scaler: Any, *, last: bool) -> Iterator[None]:
    """Let the scaler change its scale once a step, after the last optimizer."""
    if scaler is None or last:
        yield
        return
    scaler.update = lambda: None
    try:
        yield
    finally:
        del scaler.update
