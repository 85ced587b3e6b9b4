"""MultiTaskModule: what a user subclasses. The training flow itself is in engine/step.py."""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn

from lightning_mtl.contract import OnBadLoss, TaskModule
from lightning_mtl.engine.losses import check_task_names, known_tasks
from lightning_mtl.engine.record import StepRecord
from lightning_mtl.engine.step import Flow
from lightning_mtl.numerics.storage import Memory
from lightning_mtl.saved import entry
from lightning_mtl.subclasses.inherit import (
    adopt,
    check_constructed,
    check_constructor,
    foreign_bases,
    incomplete,
    last,
    refuse,
    with_index,
    without_others,
)
from lightning_mtl.subclasses.reserved import GUARDED, assigned, check_class
from lightning_mtl.task import Task
from lightning_mtl.trainer.evaluation import Evaluation
from lightning_mtl.trainer.flags import TrainerFlags
from lightning_mtl.trainer.measuring import Measuring, default_step, with_delta_p
from lightning_mtl.trainer.supported import check_trainer, own_step, refuse_other_package


def _with_flags(
    configure_callbacks: Callable[[Any], Any],
) -> Callable[[MultiTaskModule], list[Callback]]:
    @functools.wraps(configure_callbacks)
    def configured(self: MultiTaskModule) -> list[Callback]:
        check_constructed(self)
        found = configure_callbacks(self)
        callbacks = list(found) if isinstance(found, Sequence) else [found]
        attached = [*callbacks, *self.trainer.callbacks]  # type: ignore[attr-defined]
        if self.trainer.state.fn == TrainerFn.FITTING:
            check_trainer(self.trainer, self, attached)  # before BackboneFinetuning's `setup`
        if not any(isinstance(c, TrainerFlags) and c.module is self for c in attached):
            callbacks.append(TrainerFlags(self))
            others = [c for c in self.trainer.callbacks if not isinstance(c, Measuring)]  # type: ignore[attr-defined]
            self.trainer.callbacks = [Measuring(self), *others]  # type: ignore[attr-defined]
        # From here until `setup`, Lightning validates flags that suit automatic optimisation.
        self._automatic_optimization = True
        if type(self).validation_step is MultiTaskModule.validation_step:
            warnings.filterwarnings(
                "ignore", message="You defined a `validation_step` but have no `val_dataloader`"
            )
        return callbacks

    configured.attaches_flags = True  # type: ignore[attr-defined]
    return configured


def _with_skip(on_train_batch_start: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(on_train_batch_start)
    def started(self: MultiTaskModule, *args: Any, **kwargs: Any) -> Any:
        result = on_train_batch_start(self, *args, **kwargs)
        if result == -1:  # no batch follows that would end the manual phase
            self._automatic_optimization = True
        return result

    started.ends_phase = True  # type: ignore[attr-defined]
    return started


def _check_tasks(tasks: Mapping[str, Any]) -> None:
    for name, task in tasks.items():
        if not isinstance(task, Task):
            raise TypeError(
                f"Expected task '{name}' to be a Task but got {type(task).__name__}. Wrap its "
                f"loss: Task(loss, metrics)."
            )
    if len({id(task) for task in tasks.values()}) < len(tasks):
        raise ValueError(
            f"Expected a Task of its own for each of {list(tasks)} but found one under two names, "
            f"which would mix their metrics. Make a new Task for each."
        )


class MultiTaskModule(TaskModule):
    """A LightningModule whose task losses are balanced by the callbacks of its Trainer.

    Either declare ``tasks``, return ``{task: prediction}`` from ``forward`` and give batches
    ``(inputs, {task: target})``; or override :meth:`task_losses` and keep the rest of your
    Lightning code. Everything else is ordinary Lightning: ``configure_optimizers``, Trainer flags,
    loggers, checkpoints. Without a balancer among the callbacks it trains on the plain sum of the
    losses.

    Args:
        tasks: ``{name: Task}``; or only the names when :meth:`task_losses` is overridden; or
            ``None``, and the names are those of the first batch.
        active_tasks: train on these tasks only; one name gives the single-task baseline. Default
            all.
        on_bad_loss: what a loss that is not finite (or not positive under a logarithm) leads to:
            ``"raise"`` an error that names task and step, ``"skip_task"`` for this batch, or
            ``"skip_step"``; with these it never reaches a parameter. ``"ignore"`` looks at nothing,
            like plain Lightning, so that no step waits for the device because of it.
        max_skipped_steps: so many optimiser steps in a row may be left out, for bad losses or for
            want of any, before the fit ends with an error; without accumulation that is as many
            batches.
        unbalanced_tasks: tasks that take no part in the gradient stage, as with
            ``Task(..., balance=False)``; for tasks that are not declared.
        baseline: single-task results for Δp, ``{task: {metric: value}}`` or the ``baseline.json``
            of ``lightning-mtl compare``.
        shard_gradients: with several processes, let each keep a part of the columns of the task
            gradients instead of all of them: less memory, also for state as large as they are.
        gradient_memory: where task gradients are kept. ``"full"``: on the device, in float32 or
            wider. ``"bf16"``: half of that, to three digits. ``"host"``: in the memory of the host,
            and with them state as large as they are; every row travels there. ``"blocks"``: those
            of a part of the parameters at a time, for methods with weights from the Gramian; the
            weights are exact, and one more backward pass is taken. docs/cost.md has the prices.
        gradient_blocks: in about how many parts ``"blocks"`` takes the shared parameters, or more
            where they cost nothing.
        delta_p_metrics: for modules with their own loop, ``{task: {logged name: higher is
            better}}``.
    """

    # TorchScript compiles `forward`; losses and metrics are no part of it, and not of its language.
    __jit_ignored_attributes__ = ("_tasks",)
    __jit_unused_properties__ = [  # noqa: RUF012 # as in LightningModule, a list
        *LightningModule.__jit_unused_properties__,
        *("tasks", "task_names", "active_tasks", "training_tasks", "unbalanced_tasks", "last_step"),
    ]

    if TYPE_CHECKING:  # TorchScript reads what stands in a class
        _evaluation: Evaluation
        _flow: Flow | None  # made anew by every fit

    @without_others
    def __init__(
        self,
        tasks: Mapping[str, Task] | Sequence[str] | None = None,
        *,
        active_tasks: Sequence[str] | None = None,
        on_bad_loss: OnBadLoss = "raise",
        max_skipped_steps: int = 100,
        unbalanced_tasks: Sequence[str] = (),
        shard_gradients: bool = False,
        gradient_memory: Memory = "full",
        gradient_blocks: int = 4,
        baseline: Mapping[str, Mapping[str, Any]] | str | Path | None = None,
        delta_p_metrics: Mapping[str, Mapping[str, bool]] | None = None,
        **others: NoReturn,
    ) -> None:
        refuse(others, type(self))
        if "_modules" not in vars(self):  # else a base's constructor has been called before
            check_constructor(type(self), MultiTaskModule)
            super().__init__()
        elif "_automatic_optimization" not in vars(self):  # one of nn.Module, not Lightning's
            raise incomplete(type(self))
        # `reserved.py` checks what is assigned to these, here and later.
        self.on_bad_loss: OnBadLoss = on_bad_loss
        self.gradient_memory: Memory = gradient_memory
        self.gradient_blocks = gradient_blocks
        self.max_skipped_steps = max_skipped_steps
        self._automatic_optimization = False
        self.shard_gradients = shard_gradients
        self._declared: tuple[str, ...] | None = None
        self.names_from_batch = False  # whether the first batch named the tasks
        self._active: tuple[str, ...] | None = None
        self._tasks = nn.ModuleDict()
        if tasks is not None:
            self._declared = check_task_names(list(tasks) if isinstance(tasks, Mapping) else tasks)
        if isinstance(tasks, Mapping):
            _check_tasks(tasks)
            # Prefixed: an entry of nn.ModuleDict cannot be named like one of its methods.
            self._tasks = nn.ModuleDict({f"task_{name}": task for name, task in tasks.items()})
            own = [name for name, task in tasks.items() if not task.balance]
            unbalanced_tasks = (*dict.fromkeys((*unbalanced_tasks, *own)),)
        self._unbalanced = frozenset(check_task_names(unbalanced_tasks) if unbalanced_tasks else ())
        self._check_unbalanced()
        self.active_tasks = active_tasks
        self._evaluation = Evaluation(baseline, delta_p_metrics)
        self._flow = None

    # ---------------------------------------------------------------- for users

    @property
    def tasks(self) -> dict[str, Task]:
        """The declared tasks by name; empty when the module computes its losses itself."""
        return {name[len("task_") :]: task for name, task in self._tasks.items()}  # type: ignore[misc]

    @property
    def task_names(self) -> tuple[str, ...]:
        """Names of all tasks; empty before the first batch of a module that declares none."""
        return self._declared or ()

    @property
    def active_tasks(self) -> tuple[str, ...] | None:
        """Names of the tasks that train, ``None`` for all. Set it before ``fit``."""
        return self._active

    @active_tasks.setter
    def active_tasks(self, names: Sequence[str] | None) -> None:
        flow = getattr(self, "_flow", None)
        running = flow is not None and not flow.over
        if running and self._declared is not None and names != self._active:
            raise RuntimeError("Expected `active_tasks` to stay during a fit. Set it before `fit`.")
        if names is not None:
            names = check_task_names(names)
            if self._declared is not None:
                known_tasks(names, self._declared, "`active_tasks`")
                names = tuple(n for n in self._declared if n in names)
        self._active = names

    @property
    def training_tasks(self) -> tuple[str, ...]:
        """Names of the tasks that train, in the order of every per-task vector."""
        return self._active or self.task_names

    @property
    def unbalanced_tasks(self) -> frozenset[str]:
        """Names of the tasks that take no part in the gradient stage."""
        return self._unbalanced

    def _check_unbalanced(self) -> None:
        if self._declared is not None:
            known_tasks(sorted(self._unbalanced), self._declared, "`unbalanced_tasks`")

    def _declare(self, names: tuple[str, ...]) -> None:
        """Take the names of the first batch for those of the tasks."""
        self._declared, self.names_from_batch = names, True
        self._check_unbalanced()
        self.active_tasks = self._active  # names them in this order, refuses unknown ones

    @property
    def last_step(self) -> StepRecord | None:
        """What the last optimiser step of the fit did; ``None`` before the first."""
        return self._flow.record() if self._flow is not None else None

    def task_losses(self, batch: Any, batch_idx: int) -> Mapping[str, Any]:
        """The loss of every task in a batch; override it for your own training code.

        Returns:
            ``{task: loss}``: scalars with a graph. A value may be ``(mean, n_valid)``, so that
            means over micro-batches are weighted by valid labels. A missing key or ``None`` is a
            task absent from this batch.
        """
        return self._evaluation.losses(self, batch)

    def shared_parameters(self) -> Iterable[nn.Parameter] | None:
        """The parameters whose task gradients are balanced; ``None`` finds them from the graph.

        Found are those that two or more tasks reach in the first optimiser step, and later those
        that it skipped. Override it when a task may be missing from that step, or to balance a
        part of the trunk only.
        """
        return None

    def last_shared_layer(self) -> Iterable[nn.Parameter] | None:
        """The parameters that ``gradients="last_layer"`` looks at.

        ``None`` stands for the module that owns the last parameter that all tasks reach, in the
        order of ``named_parameters()``. Override it where that is not the layer before the heads.
        """
        return None

    def shared_representation(self, z: Tensor) -> Tensor:
        """Mark the tensor that all heads start from, for ``gradients="representation"``.

        Call it once in ``forward``, ``z = self.shared_representation(self.encoder(x))``; it
        returns ``z`` as it is, and costs nothing without such a balancer. With
        ``"representation+1"`` and ``"+2"`` the forward pass runs once or twice more, and ends
        here: what must be put back after it belongs into ``finally``.
        """
        if self._flow is not None:
            self._flow.mark(z)
        return z

    def metric_directions(self) -> dict[str, dict[str, bool]]:
        """``{task: {logged name: higher is better}}`` of the metrics that Δp is made of."""
        return self._evaluation.directions(self)

    @default_step
    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Losses and metrics of every active task, for the joined data of all processes.

        Only for declared tasks; a module with its own ``task_losses`` has it by ``super()``.
        """
        self._evaluation.step(self, batch, batch_idx, "val", dataloader_idx)

    @default_step
    def test_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Losses and metrics of every active task, for the joined data of all processes.

        Only for declared tasks; a module with its own ``task_losses`` has it by ``super()``.
        """
        self._evaluation.step(self, batch, batch_idx, "test", dataloader_idx)

    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
        """Predictions of every task for the inputs of a batch."""
        pair = isinstance(batch, (tuple, list)) and bool(self.tasks)
        if pair and (len(batch) == 1 or isinstance(batch[1], Mapping)):
            return self(batch[0])
        return self(batch)

    @last
    def on_validation_epoch_end(self) -> None:
        """Free to override: Δp is logged after it when there is a baseline."""

    @last
    def on_test_epoch_end(self) -> None:
        """Free to override: Δp is logged after it when there is a baseline."""

    # ------------------------------------------------------------ for Lightning

    @last
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse to resume from other tasks while no weight is loaded yet; call ``super()`` too."""
        state = checkpoint.get("callbacks", {}).get(TrainerFlags.__name__)
        if self._flow is not None and state and self.trainer.state.fn == TrainerFn.FITTING:
            self._flow.load_state_dict(entry(state, "flow", dict, "the run"))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor | None:
        """One micro-batch, and a balanced optimiser step after the last one of a group.

        Called by a validation or test step it returns the sum of the losses and trains nothing.
        """
        if self._flow is None or not self.trainer.training:
            return self._evaluation.total(self, batch, batch_idx)
        return self._flow.training_step(batch, batch_idx)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "_current_fx_name":  # a string, which Lightning sets around every hook
            object.__setattr__(self, name, value)  # without a look for parameters
        else:
            super().__setattr__(name, assigned(self, name, value) if name in GUARDED else value)

    def register_buffer(self, name: str, tensor: Tensor | None, persistent: bool = True) -> None:
        """As in every module, but not under a reserved name."""
        super().register_buffer(name, assigned(self, name, tensor), persistent)

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """As in every module, but not under a reserved name."""
        super().register_parameter(name, assigned(self, name, param))

    def add_module(self, name: str, module: nn.Module | None) -> None:
        """As in every module, but not under a reserved name."""
        super().add_module(name, assigned(self, name, module))

    def manual_backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """As Lightning's; refused inside :meth:`task_losses`, after which the flow does it."""
        if self._flow is not None and self._flow.in_losses:
            raise own_step("`manual_backward`")
        super().manual_backward(loss, *args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles leave the Trainer behind, and with it the running fit."""
        return {**super().__getstate__(), "_flow": None}

    @_with_flags
    def configure_callbacks(self) -> list[Callback]:
        """Callbacks of the module; what keeps Trainer flags working is attached in any case."""
        return []

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Refuse reserved names, keep what other bases define, attach our callback in any case."""
        super().__init_subclass__(**kwargs)
        refuse_other_package(cls)
        foreign = foreign_bases(cls, MultiTaskModule)
        check_class(cls, foreign)
        adopt(cls, MultiTaskModule, foreign)
        if inspect.isfunction(task_losses := vars(cls).get("task_losses")):
            cls.task_losses = with_index(task_losses, cls.__name__, bound=False)  # type: ignore[method-assign]
        elif isinstance(task_losses, (staticmethod, classmethod)):
            static = isinstance(task_losses, staticmethod)  # which gets no `self`
            called = with_index(task_losses.__func__, cls.__name__, bound=static)
            cls.task_losses = type(task_losses)(called)  # type: ignore[method-assign, assignment]
        if not hasattr(cls.configure_callbacks, "attaches_flags"):
            cls.configure_callbacks = _with_flags(cls.configure_callbacks)  # type: ignore[method-assign]
        start = cls.on_train_batch_start
        if start is not LightningModule.on_train_batch_start and not hasattr(start, "ends_phase"):
            cls.on_train_batch_start = _with_skip(cls.on_train_batch_start)  # type: ignore[method-assign]
        for stage, name in (("val", "on_validation_epoch_end"), ("test", "on_test_epoch_end")):
            hook = getattr(cls, name)
            if not hasattr(hook, "logs_delta_p"):
                setattr(cls, name, with_delta_p(hook, stage))
