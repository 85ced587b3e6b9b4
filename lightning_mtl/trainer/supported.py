"""What a MultiTaskModule refuses when a fit is set up, each with what to use instead."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import BackboneFinetuning, BatchSizeFinder, LearningRateFinder
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, SingleDeviceStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from lightning_mtl.balancer import Balancer, GradientBalancer, Perturbing
from lightning_mtl.contract import PACKAGES, TaskModule, base_of

if TYPE_CHECKING:
    from lightning_mtl.engine.step import Flow

_CURES = {
    LearningRateFinder: (
        "it replaces the Trainer's callbacks while it searches, so the balancers would take no "
        "part. Compare learning rates in short fits instead"
    ),
    BatchSizeFinder: (
        "it replaces the Trainer's callbacks while it searches, so the balancers would take no "
        "part. Try batch sizes in short fits instead"
    ),
    BackboneFinetuning: (
        "the shared parameters are fixed at the first step and it unfreezes them later. Train the "
        "heads in a first `fit` with the trunk frozen and no gradient balancer, then unfreeze and "
        "call `fit` with a new Trainer"
    ),
}


def check_trainer(trainer: Trainer, module: TaskModule, callbacks: Sequence[Callback]) -> None:
    """Refuse combinations that would train something else than the user asked for."""
    name, base = type(module).__name__, base_of(type(module))
    compiled = module._compiler_ctx  # by `torch.compile(module)`, which puts steps on the object
    step = compiled["original_training_step"] if compiled else vars(module).get("training_step")
    if step and getattr(step, "__func__", None) is not type(module).training_step:
        raise MisconfigurationException(
            f"`training_step` was set on an object of {name}, but there MultiTaskModule balances. "
            f"Set `task_losses` instead, a function of the batch that returns a dict "
            f"{{task: loss}}."
        )
    if type(module).training_step is not base.training_step:
        owner = next(c for c in type(module).__mro__ if "training_step" in vars(c))
        if not issubclass(owner, base):
            raise MisconfigurationException(
                f"{name} has the `training_step` of {owner.__name__}, which adds its losses up. "
                f"Define `task_losses(self, batch, batch_idx)` in {name} and return a dict "
                f"{{task: loss}}."
            )
        raise MisconfigurationException(
            f"{name} overrides `training_step`, which is where MultiTaskModule balances. Rename "
            f"it to `task_losses(self, batch, batch_idx)` and return a dict {{task: loss}} instead "
            f"of their sum."
        )
    balanced = any(hasattr(c, "needs_jacobian") or hasattr(c, "loss_weights") for c in callbacks)
    for callback in callbacks:
        if isinstance(callback, type) or not hasattr(callback, "on_exception"):
            # Lightning would call its `on_exception` because of this error, and tell of that only.
            attached = trainer.callbacks  # type: ignore[attr-defined] # set by a connector
            trainer.callbacks = [c for c in attached if isinstance(c, Callback)]  # type: ignore[attr-defined]
            found, made = repr(callback), "MinNorm"
            if isinstance(callback, type):
                found, made = f"the class {callback.__name__}", callback.__name__
            raise MisconfigurationException(
                f"Expected callbacks as objects but found {found}. Write `callbacks=[{made}()]`."
            )
        if not isinstance(callback, Callback):
            raise MisconfigurationException(
                f"Expected callbacks of the `lightning` package but found "
                f"{type(callback).__module__}.{type(callback).__qualname__}. Import "
                f"it from `lightning.pytorch` instead of `pytorch_lightning`: the two are "
                f"different packages."
            )
        for refused, cure in _CURES.items():
            searches = refused is not BackboneFinetuning
            if isinstance(callback, refused) and not (searches and not balanced):
                raise MisconfigurationException(
                    f"{type(callback).__name__} is not supported with {name}: {cure}."
                )
    _check_strategy(trainer)
    _tell_of_held_balancers(module, callbacks)


def _tell_of_held_balancers(module: TaskModule, callbacks: Sequence[Callback]) -> None:
    """A balancer in an attribute looks attached and does nothing."""
    balancers = [c for c in callbacks if isinstance(c, Balancer)]
    known = {id(b) for c in balancers for b in (c, *_inside(c))}
    for name, value in vars(module).items():
        if isinstance(value, Balancer) and id(value) not in known:
            rank_zero_warn(
                f"{type(module).__name__} holds {type(value).__name__} in `{name}`, but balancers "
                f"are callbacks and this one takes no part. Write `Trainer(callbacks=[...])`, or "
                f"return [self.{name}] from `configure_callbacks`."
            )


def _check_strategy(trainer: Trainer) -> None:
    """Refuse strategies whose gradients cannot be taken task by task."""
    strategy, name = trainer.strategy, type(trainer.strategy).__name__
    if "XLA" in name:  # SingleDeviceXLAStrategy too
        raise MisconfigurationException(
            f"Expected a single device, DDP or FSDP2 but found {name}: task gradients have not "
            f"been made to work on XLA devices. Train on GPUs or on the CPU, with 'auto' or 'ddp'."
        )
    if isinstance(strategy, (SingleDeviceStrategy, DDPStrategy)):
        return
    if not isinstance(strategy, ModelParallelStrategy):
        cures = {
            "FSDPStrategy": "it frees what the next task's backward pass needs. Use FSDP2: "
            "`ModelParallelStrategy(data_parallel_size=..., tensor_parallel_size=1)` with "
            "`fully_shard` in `configure_model`",
            "DeepSpeedStrategy": "DeepSpeed owns the backward pass and the step. Use FSDP2: "
            "`ModelParallelStrategy(data_parallel_size=..., tensor_parallel_size=1)` with "
            "`fully_shard` in `configure_model`",
        }
        cure = cures.get(name, "it gives no task gradients to average over ranks. Use 'ddp'")
        raise MisconfigurationException(
            f"Expected a single device, DDP or FSDP2 but found {name}: {cure}."
        )
    if getattr(trainer.precision_plugin, "scaler", None) is not None:
        raise MisconfigurationException(
            f"Expected a precision without a gradient scaler under FSDP2 but found "
            f"'{trainer.precision}'. Use `precision='bf16-mixed'` or '32-true'."
        )
    sizes = strategy._tensor_parallel_size
    if sizes != 1 and not (sizes == "auto" and strategy.num_processes == 1):
        raise MisconfigurationException(
            f"Expected `tensor_parallel_size=1` of ModelParallelStrategy but found {sizes!r}: "
            f"gradients divided inside a layer are not balanced. Use `ModelParallelStrategy("
            f"data_parallel_size=..., tensor_parallel_size=1)`."
        )


def explain_folder(trainer: Trainer, exception: BaseException) -> None:
    """Say what a folder given as checkpoint is; Lightning only finds that it is none of its files.

    It knows the path only once it loads, after every check of a set-up.
    """
    one_file = isinstance(trainer.strategy, (SingleDeviceStrategy, DDPStrategy))
    given = isinstance(exception, IsADirectoryError) and trainer.ckpt_path is not None
    if one_file and given and Path(str(trainer.ckpt_path)).is_dir():
        exception.strerror = (  # type: ignore[attr-defined] # an OSError
            f"Expected a checkpoint in one file with {type(trainer.strategy).__name__} but found a "
            f"folder, as FSDP2 writes it. Load it with ModelParallelStrategy; with "
            f"`save_distributed_checkpoint=False` that writes checkpoints in one file, which every "
            f"strategy loads"
        )


def check_optimizers(trainer: Trainer, module: TaskModule) -> None:
    """Refuse no optimizer, and one that evaluates the loss several times a step beside balancers.

    What returns ``None`` on purpose has a mock in its place, of which Lightning tells.
    """
    if not trainer.optimizers:
        raise MisconfigurationException(
            f"Expected {type(module).__name__} to be trained but no optimizer of "
            f"`configure_optimizers` holds a trainable parameter. Return one, "
            f"`SGD(self.parameters(), ...)`, instead of an empty list."
        )
    if module._flow is None or not module._flow.balancers:
        return
    for optimizer in trainer.optimizers:
        if isinstance(optimizer, torch.optim.LBFGS):
            raise MisconfigurationException(
                f"LBFGS is not supported with {type(module).__name__}: it evaluates the losses "
                f"several times a step, and balancing happens once. Use a first-order optimizer "
                f"such as SGD or AdamW, or no balancer."
            )


def refuse_other_package(cls: type) -> None:
    """Refuse a class that derives from the LightningModule of ``pytorch_lightning`` too."""
    for base in cls.__mro__:
        if base.__module__.partition(".")[0] == "pytorch_lightning":
            raise TypeError(
                f"{cls.__name__} derives from {base.__module__}.{base.__name__}. {PACKAGES}"
            )


def own_step(found: str) -> MisconfigurationException:
    """The error for manual optimisation that was left in ``task_losses``."""
    return MisconfigurationException(
        f"Expected `task_losses` to return losses only but it calls {found}: backward passes and "
        f"optimizer steps follow it, once a batch. Return {{task: loss}} instead, without "
        f"`zero_grad`, `manual_backward` and `step`; several optimizers, clipping and schedulers "
        f"are Lightning's to run. Losses that need steps in turn (a GAN) want a plain "
        f"LightningModule with manual optimisation."
    )


def watch_own_steps(trainer: Trainer, flow: Flow) -> list[Any]:
    """Refuse steps of the optimizers inside ``task_losses``; returns handles of the hooks."""

    def refuse(*_: Any) -> None:
        if flow.in_losses:
            raise own_step("`step` of an optimizer")

    known = [o for o in trainer.optimizers if isinstance(o, torch.optim.Optimizer)]
    return [optimizer.register_step_pre_hook(refuse) for optimizer in known]


def check_batches(trainer: Trainer, balancer: GradientBalancer | None) -> None:
    """Refuse a number of micro-batches that a gradient balancer cannot work with."""
    every = trainer.accumulate_grad_batches
    if balancer is None:
        return
    name = type(balancer).__name__
    for inner in _inside(balancer):
        if isinstance(inner, Perturbing):
            inside = type(inner).__name__
            raise MisconfigurationException(
                f"Expected {inside} outermost but found it inside {name}, for which no gradients "
                f"are taken at perturbed parameters. Write `{inside}({name}(...))` instead."
            )
    if balancer.perturbs:
        _check_perturbing(trainer, balancer)
    _check_memory(trainer, balancer)
    if balancer.gradients != "parameters" and isinstance(trainer.strategy, ModelParallelStrategy):
        raise MisconfigurationException(
            f"Expected `gradients='parameters'` of {name} under FSDP2 but found "
            f"'{balancer.gradients}', which needs whole parameters. Use `strategy='ddp'`."
        )
    if balancer.gradients != "parameters" and every > 1:
        raise MisconfigurationException(
            f"Expected `accumulate_grad_batches=1` with `gradients='{balancer.gradients}'` of "
            f"{name} but found {every}: the direction needs the graph of the whole step. Use "
            f"`gradients='parameters'`, or larger batches without accumulation."
        )
    if balancer.batches not in (1, every):
        raise MisconfigurationException(
            f"Expected `accumulate_grad_batches={balancer.batches}` with "
            f"{name}(batches={balancer.batches}) but found {every}: it takes that many batches "
            f"apart in every optimiser step. Set the flag of the Trainer."
        )


def _check_memory(trainer: Trainer, balancer: GradientBalancer) -> None:
    """Refuse ways to keep task gradients that a balancer or a strategy cannot work with."""
    module: Any = trainer.lightning_module
    memory, name = module.gradient_memory, type(balancer).__name__
    several = isinstance(trainer.strategy, (DDPStrategy, ModelParallelStrategy))
    if memory == "host" and several:
        raise MisconfigurationException(
            "Expected one process with `gradient_memory='host'` but found several: task gradients "
            "are summed over processes on their devices. Use `shard_gradients=True`, or 'bf16'."
        )
    if memory != "blocks" or balancer.gradients != "parameters":
        return
    found = ""
    if not balancer.gramian_weighted or balancer.perturbs or balancer.batches > 1:
        found = f"{name}, which needs task gradients whole"
    elif trainer.accumulate_grad_batches > 1:
        found = f"`accumulate_grad_batches={trainer.accumulate_grad_batches}`"
    elif isinstance(trainer.strategy, ModelParallelStrategy):
        found = "FSDP2, which divides them already"
    elif module.shard_gradients:
        found = "`shard_gradients=True`"
    if found:
        raise MisconfigurationException(
            f"Expected a method with weights from the Gramian and the graph of the whole step with "
            f"`gradient_memory='blocks'` but found {found}. Use `gradient_memory='bf16'`, or "
            f"'full' with `shard_gradients=True` under `strategy='ddp'`."
        )


def _inside(balancer: Balancer) -> Iterator[Balancer]:
    """The balancers that one wraps, at any depth."""
    for nested in balancer.nested().values():
        yield nested
        yield from _inside(nested)


def _check_perturbing(trainer: Trainer, balancer: GradientBalancer) -> None:
    """Refuse what goes by parts where all parameters have to move at once."""
    name, every = type(balancer).__name__, trainer.accumulate_grad_batches
    if every > 1:
        raise MisconfigurationException(
            f"Expected `accumulate_grad_batches=1` with {name} but found {every}: the parameters "
            f"at which it takes gradients follow from the whole batch. Use larger batches without "
            f"accumulation, or the `base` of {name} alone."
        )
    if isinstance(trainer.strategy, ModelParallelStrategy):
        raise MisconfigurationException(
            f"Expected whole parameters with {name} but found FSDP2: it moves each task to "
            f"parameters of its own. Use `strategy='ddp'`, or the `base` of {name} alone."
        )
    if getattr(trainer.lightning_module, "shard_gradients", False):
        raise MisconfigurationException(
            f"Expected `shard_gradients=False` with {name}: every process moves all parameters and "
            f"needs all columns. Set it so, or use the `base` of {name} alone."
        )
