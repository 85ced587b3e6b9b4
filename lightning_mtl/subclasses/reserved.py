"""Names that belong to MultiTaskModule: what may be assigned to them, and what to do instead."""

from __future__ import annotations

from collections.abc import Sequence, Set
from typing import Any, get_args

from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor, nn

from lightning_mtl.arguments import one_of, whole
from lightning_mtl.contract import OnBadLoss, TaskModule
from lightning_mtl.engine.step import Flow
from lightning_mtl.numerics.storage import Memory
from lightning_mtl.subclasses.inherit import with_index
from lightning_mtl.task import Task
from lightning_mtl.trainer.evaluation import Evaluation

# Arguments that may also be set as attributes.
_ARGUMENTS = (
    "active_tasks",
    "on_bad_loss",
    "max_skipped_steps",
    "gradient_memory",
    "gradient_blocks",
    "shard_gradients",
)
# Methods that a subclass may define.
_METHODS = {
    "task_losses": "returns the losses of a batch",
    "shared_parameters": "returns the parameters whose task gradients are balanced",
    "last_shared_layer": 'returns the parameters that `gradients="last_layer"` looks at',
    "metric_directions": "returns which way the metrics of Δp are better",
}
# What only MultiTaskModule sets or defines.
_OWN = {
    "tasks": "holds the declared tasks, which are given to `super().__init__(tasks=...)`",
    "task_names": "holds the names of all tasks, given to `super().__init__(tasks=...)`",
    "training_tasks": "holds the names of the tasks that train; choose them by `active_tasks`",
    "last_step": "holds what the last optimiser step did",
    "shared_representation": "marks the tensor that all heads start from",
    "_tasks": "holds the declared tasks",
    "_declared": "holds the names of the declared tasks",
    "_active": "holds the names of the tasks that train",
    "names_from_batch": "says whether the first batch named the tasks",
    "unbalanced_tasks": "holds the names of tasks that take no part in the gradient stage",
    "_unbalanced": "holds the names of tasks that take no part in the gradient stage",
    "_check_unbalanced": "checks the names of tasks that take no part in the gradient stage",
    "_declare": "takes the names of the first batch for those of the tasks",
    "_evaluation": "validates and tests",
    "_flow": "trains",
}
# Lightning's, which the flow sets: what a user sets has no effect.
_SWITCH = "automatic_optimization"
RESERVED = frozenset([*_ARGUMENTS, *_METHODS, *_OWN])
GUARDED = RESERVED | {_SWITCH}  # what `assigned` has to see


def assigned(module: TaskModule, name: str, value: Any) -> Any:
    """What to store for an assignment: the value itself, if it may have that name.

    Raises:
        AttributeError: the name is not for users, or it is too early.
        TypeError: anything but a function for a method.
        ValueError: no valid value of an argument.
    """
    if name == _SWITCH and "_modules" in vars(module):
        rank_zero_warn(_no_switch(type(module).__name__, value))
        return module.automatic_optimization
    if name not in RESERVED:
        return value
    whose = type(module).__name__
    if "_modules" not in vars(module):
        raise AttributeError(
            f"Expected `super().__init__()` before `{name}` of {whose} is set: it is a name of "
            f"MultiTaskModule. Give it there if it is one of its arguments; if it is your own, "
            f"call it `my_{name.lstrip('_')}`."
        )
    if name in _ARGUMENTS:
        return _argument(module, name, value)
    if name in _METHODS:
        if callable(value) and not isinstance(value, (nn.Module, Tensor)):
            return with_index(value, whose, bound=True) if name == "task_losses" else value
        raise TypeError(
            f"Expected `{name}` of {whose} to be a method, which {_METHODS[name]}, but got "
            f"{type(value).__name__}. {_rename(name)}"
        )
    if not _is_ours(name, value):
        raise AttributeError(
            f"`{name}` of {whose} is a name of MultiTaskModule and cannot be set to a "
            f"{type(value).__name__}: it {_OWN[name]}. {_rename(name)}"
        )
    return value


def _no_switch(whose: str, value: Any) -> str:
    return (
        f"`automatic_optimization = {value}` of {whose} has no effect: MultiTaskModule runs the "
        f"backward passes and the steps itself, whatever is set. Remove it; a module with its own "
        f"manual optimisation stays a LightningModule."
    )


def _argument(module: TaskModule, name: str, value: Any) -> Any:
    if name == "on_bad_loss":
        if not isinstance(value, str) or value not in get_args(OnBadLoss):
            raise ValueError(
                f"Expected argument `on_bad_loss` to be one of {get_args(OnBadLoss)} but got "
                f"{value!r}."
            )
        return value
    if name == "gradient_memory":
        return _settled(module, name, one_of(module, name, value, get_args(Memory)))
    if name in ("gradient_blocks", "max_skipped_steps"):
        return whole(module, name, value)
    if name == "shard_gradients":
        return _settled(module, name, _flag(module, name, value))
    names = value is None or isinstance(value, (Sequence, Set))
    if not names or isinstance(value, str):
        raise TypeError(
            f"Expected `active_tasks` of {type(module).__name__} to be a list of task names, or "
            f"None for all tasks, but got {type(value).__name__}. If it is your own, rename it."
        )
    return value  # its setter compares it with the declared tasks


def _settled(module: TaskModule, name: str, value: Any) -> Any:
    """What a fit is laid out for, and checks with its balancers when it begins."""
    flow = getattr(module, "_flow", None)
    if flow is not None and not flow.over and value != getattr(module, name):
        raise RuntimeError(
            f"Expected `{name}` of {type(module).__name__} to stay {getattr(module, name)!r} "
            f"during a fit, which was laid out for it, but it is set to {value!r}. Set it before "
            f"`fit`."
        )
    return value


def _flag(module: TaskModule, name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise TypeError(
            f"Expected `{name}` of {type(module).__name__} to be True or False but got {value!r}."
        )
    return value


def _is_ours(name: str, value: Any) -> bool:
    """Whether a value is what MultiTaskModule itself puts under one of its private names."""
    if name == "_tasks":
        return isinstance(value, nn.ModuleDict) and all(
            key.startswith("task_") and isinstance(task, Task) for key, task in value.items()
        )
    if name in ("_declared", "_active"):
        return value is None or (
            isinstance(value, tuple) and all(isinstance(task, str) for task in value)
        )
    if name == "names_from_batch":
        return isinstance(value, bool)
    if name == "_unbalanced":
        return isinstance(value, frozenset)
    if name == "_flow":
        return value is None or isinstance(value, Flow)
    return name == "_evaluation" and isinstance(value, Evaluation)


def _rename(name: str) -> str:
    return f"Rename yours, for example to `my_{name.lstrip('_')}`."


def check_class(cls: type, foreign: list[type]) -> None:
    """Refuse a class, or a base that knows nothing of ours, which uses a reserved name otherwise.

    Args:
        cls: a new subclass of MultiTaskModule.
        foreign: its bases that do not derive from MultiTaskModule.

    Raises:
        TypeError: it does.
    """
    for owner in (cls, *foreign):
        if isinstance(value := vars(owner).get(_SWITCH), bool):
            raise TypeError(_no_switch(owner.__name__, value))
        for name in RESERVED.intersection(vars(owner)):
            found = vars(owner)[name]
            method = callable(found) and not isinstance(found, type)
            if name in _METHODS and (method or isinstance(found, (staticmethod, classmethod))):
                continue
            if name in _ARGUMENTS:
                cure = f"Give it to `super().__init__({name}=...)`, or rename it if it is your own."
                what = "is an argument of the constructor"
            else:
                cure = _rename(name)
                what = _OWN.get(name) or f"has to be a method, which {_METHODS.get(name)}"
            if owner is not cls:
                cure += (
                    f" If {owner.__name__} is not yours, hold such a module in an attribute "
                    f"instead of inheriting from it."
                )
            raise TypeError(
                f"`{name}` of {owner.__name__} is a name of MultiTaskModule: there it {what}. "
                f"{cure}"
            )
