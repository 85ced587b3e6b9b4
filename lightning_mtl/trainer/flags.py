"""What manual optimisation would lose: Trainer flags, LR schedulers, progress, random state.

Lightning asks ``module.automatic_optimization`` in several places. Only the choice of the loop
that runs a batch has to see ``False``; its validator, schedulers, loggers and checkpoint callbacks
do the right thing when they see ``True``. So the module is manual exactly from the start of a
batch to the end of its ``training_step`` (and while optimizers are set up, since automatic mode
refuses several), and everything else is Lightning's own code, unchanged.
"""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.core.optimizer import (
    _configure_optimizers,
    _configure_schedulers_automatic_opt,
    _validate_optimizers_attached,
    _validate_scheduler_api,
)
from lightning.pytorch.trainer.states import TrainerFn
from torch.nn.parallel import DistributedDataParallel

from lightning_mtl.contract import TaskModule
from lightning_mtl.engine.step import Flow
from lightning_mtl.saved import entry
from lightning_mtl.trainer.compiled import compile_losses
from lightning_mtl.trainer.resume import get_rng, restore_loader, rng_of, set_rng, sync_progress
from lightning_mtl.trainer.stepping import Stepping
from lightning_mtl.trainer.supported import check_optimizers, explain_folder, watch_own_steps


class TrainerFlags(Callback):
    """Attached by the module itself; not for users."""

    # Lightning enters a profiler's context for every hook that is callable, several a step: these
    # have nothing to do here.
    on_before_zero_grad: Any = None
    on_before_backward: Any = None
    on_after_backward: Any = None
    on_before_optimizer_step: Any = None
    on_train_batch_end: Any = None

    def __init__(self, module: TaskModule) -> None:
        self.module = module
        self.flow: Flow | None = None
        self._schedulers: list[Any] | None = None
        self._rng: dict[str, Any] | None = None
        self._watching: list[Any] = []  # hooks of the optimizers

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles leave the running fit behind, and with it the Trainer's loaders."""
        running: dict[str, Any] = {"flow": None, "_schedulers": None, "_watching": []}
        return {**vars(self), **running}

    # ------------------------------------------------------------ set-up

    def setup(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        """Start a flow, which finds the balancers among the callbacks."""
        if pl_module is not self.module:
            return  # another module runs under the same Trainer now
        self.module._automatic_optimization = False
        compile_losses(self.module)
        self.module._evaluation.reset(self.module)
        if stage != "predict":
            self.module._evaluation.check_baseline(self.module)
        if stage == "fit":
            self._rng = None
            self.flow = self.module._flow = Flow(
                self.module, trainer, Stepping(trainer, self.module)
            )
            self._capture_schedulers()

    def _capture_schedulers(self) -> None:
        """Parse the schedulers as automatic mode would; manual mode drops ``monitor``."""
        module = self.module
        self._release_schedulers()
        self._schedulers = None
        original = module.configure_optimizers
        self._had_own = "configure_optimizers" in vars(module)

        def captured() -> Any:
            configured: Any = original()
            if configured is None:
                return None
            optimizers, schedulers, monitor = _configure_optimizers(configured)
            self._schedulers = _configure_schedulers_automatic_opt(schedulers, monitor)
            _validate_optimizers_attached(optimizers, self._schedulers)
            _validate_scheduler_api(self._schedulers, module)
            return optimizers

        captured.original = original  # type: ignore[attr-defined]
        module.configure_optimizers = captured  # type: ignore[method-assign]

    def _release_schedulers(self) -> None:
        original = getattr(self.module.configure_optimizers, "original", None)
        if original is not None:
            if self._had_own:
                self.module.configure_optimizers = original  # type: ignore[method-assign]
            else:
                del self.module.configure_optimizers

    def on_fit_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Put the schedulers in place; Lightning does its bookkeeping as in automatic mode."""
        if pl_module is not self.module:
            return
        self._release_schedulers()
        if self._schedulers is not None:
            trainer.strategy.lr_scheduler_configs = self._schedulers
        check_optimizers(trainer, self.module)
        if self.flow is not None:
            self.flow.layout.capture(trainer.optimizers)
            self._watching = watch_own_steps(trainer, self.flow)
        self.module._automatic_optimization = True

    def teardown(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        """Free the buffers."""
        self._stop_watching()
        if self.flow is not None:
            self.flow.release()

    def on_exception(self, trainer: Trainer, pl_module: Any, exception: BaseException) -> None:
        """Leave ``configure_optimizers`` as it was, and free the buffers."""
        explain_folder(trainer, exception)
        self._release_schedulers()
        self._stop_watching()
        if self.flow is not None:
            self.flow.release(broken=True)

    def _stop_watching(self) -> None:
        for hook in self._watching:
            hook.remove()
        self._watching = []

    # ---------------------------------------------------------- training

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Continue with the random state of a checkpoint."""
        if pl_module is not self.module:
            return
        sync_progress(trainer)
        if self._rng is not None:
            set_rng(self._rng)
            self._rng = None
            restore_loader(trainer)

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int
    ) -> None:
        """Let Lightning run the batch through the manual loop."""
        if pl_module is not self.module:
            return
        if batch_idx == 0:  # every `on_train_epoch_start`, where users unfreeze, has run by now
            assert self.flow is not None
            self.flow.check_frozen()
        self.module._automatic_optimization = False
        wrapper = trainer.strategy.model
        if isinstance(wrapper, DistributedDataParallel):
            # Without this, buffers (BatchNorm) are not kept in step after the first batch, since
            # DDP's own reduction never runs.
            wrapper.require_forward_param_sync = True

    def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Refuse a fit that made no step."""
        if pl_module is self.module and self.flow is not None:
            self.flow.check_trained()

    # -------------------------------------------------------- checkpoint

    def state_dict(self) -> dict[str, Any]:
        """Layout and random state, as tensors and plain containers."""
        if self.flow is None:
            return {}
        rng = self.flow.ranks.gather(get_rng(self.module.device))
        return {"flow": self.flow.state_dict(), "rng": rng}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` saved."""
        fitting = self.module.trainer.state.fn == TrainerFn.FITTING
        if self.flow is not None and state_dict and fitting:  # not validation that loads
            self.flow.load_state_dict(entry(state_dict, "flow", dict, "the run"))
            self._rng = rng_of(entry(state_dict, "rng", list, "the run"), self.flow.ranks)
