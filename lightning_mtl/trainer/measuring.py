"""When a module evaluates: which of its steps Lightning sees, and the callback around them."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from types import MethodType
from typing import Any, TypeVar, cast

from lightning.pytorch import Callback
from torch.nn.parallel import DistributedDataParallel

from lightning_mtl.contract import TaskModule

Step = TypeVar("Step", bound=Callable[..., Any])


class Measuring(Callback):
    """Begins and ends evaluations; attached by the module itself, before all other callbacks.

    So what is measured is logged when they, and the module's own hooks, look for it; and a module
    that overrides its hooks loses nothing.
    """

    # Lightning enters a profiler's context for every hook that is callable, several a step: these
    # have nothing to do here.
    on_train_batch_start: Any = None
    on_train_batch_end: Any = None
    on_before_zero_grad: Any = None
    on_before_backward: Any = None
    on_after_backward: Any = None
    on_before_optimizer_step: Any = None

    def __init__(self, module: TaskModule) -> None:
        self.module = module

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        """Forget an evaluation that was broken off, and share buffers once for all its batches.

        DDP shares them (BatchNorm's averages) in every forward pass, so a process with more batches
        than another would wait for ever.
        """
        if pl_module is not self.module:
            return
        self.module._evaluation.reset(self.module)
        wrapper = trainer.strategy.model
        if isinstance(wrapper, DistributedDataParallel) and wrapper.will_sync_module_buffers():
            wrapper._sync_buffers()
            wrapper.require_forward_param_sync = False  # until the next batch of training

    def on_validation_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Log losses and metrics."""
        if pl_module is self.module:
            self.module._evaluation.end(self.module, "val")

    def on_test_start(self, trainer: Any, pl_module: Any) -> None:
        """Forget an evaluation that was broken off."""
        self.on_validation_start(trainer, pl_module)

    def on_test_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Log losses and metrics."""
        if pl_module is self.module:
            self.module._evaluation.end(self.module, "test")


def with_delta_p(hook: Callable[..., Any], stage: str) -> Callable[..., Any]:
    """Log Δp after the end of an epoch, in which a module may log what Δp is made of."""

    @functools.wraps(hook)
    def ended(self: TaskModule) -> None:
        hook(self)
        if getattr(type(self), hook.__name__) is ended:  # not for one that `super()` called
            self._evaluation.log_delta_p(self, stage)

    ended.logs_delta_p = True  # type: ignore[attr-defined]
    return ended


class _DefaultStep:
    """A step for modules that declare tasks, and for whoever calls it by ``super()``.

    Lightning runs a loop for every step that is not its own. So a module without declared tasks has
    the step that it would have without this class: Lightning's own, or one of another base class.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function

    def __set_name__(self, owner: type, name: str) -> None:
        self.owner, self.name = owner, name

    def __get__(self, module: Any, owner: type | None = None) -> Any:
        if module is None:
            return self.function
        by_super = inspect.getattr_static(type(module), self.name) is not self
        if module.tasks or by_super:
            return MethodType(self.function, module)
        return getattr(super(self.owner, module), self.name)


def default_step(function: Step) -> Step:
    """Make a step of MultiTaskModule one that a module without declared tasks does not have."""
    return cast(Step, _DefaultStep(function))  # typed as the method that it stands for
