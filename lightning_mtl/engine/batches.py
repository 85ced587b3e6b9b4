"""What is in a batch, and which of its targets no task looks at, for messages."""

from __future__ import annotations

import difflib
import sys
import weakref
from collections.abc import Mapping
from typing import Any

from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor

from lightning_mtl.contract import TaskModule

_told: weakref.WeakKeyDictionary[Any, set[str]] = weakref.WeakKeyDictionary()


def described(value: Any, depth: int = 0, *, dtype: bool = False) -> str:
    """A batch, or a part of one, in a few words; with the dtype of a tensor if wanted."""
    if isinstance(value, Tensor):
        kind = f" and {value.dtype}" if dtype else ""
        return f"a tensor of shape {tuple(value.shape)}{kind}"
    if isinstance(value, Mapping):
        return f"a dict with the keys {list(value)[:8]}"
    if isinstance(value, (list, tuple)) and depth == 0:
        inside = [described(item, 1) for item in value[:4]]
        more = f" and {len(value) - 4} more" if len(value) > 4 else ""
        return f"a {type(value).__name__} of {len(value)}: {'; '.join(inside)}{more}"
    return f"a {type(value).__name__}"


def say_whose(error: Exception, what: str, task: str, prediction: Any, target: Any) -> None:
    """Note in an error of the user's loss or metric whose it is and what it was given.

    The error keeps its type and message. Python has notes from 3.11 on.
    """
    if sys.version_info >= (3, 11):
        error.add_note(
            f"This was {what} of task '{task}'. Its prediction is "
            f"{described(prediction, dtype=True)}, its target {described(target, dtype=True)}."
        )


def say_none(module: TaskModule, name: str) -> None:
    """Tell once of a loss function that returned nothing: a ``return`` may be missing."""
    if _once(module, f"none {name}"):
        rank_zero_warn(
            f"The loss of task '{name}' returned None for a batch with targets, which then counts "
            f"as one without labels of the task. If that is not meant, look for a `return` that "
            f"is missing."
        )


def _once(module: TaskModule, what: str) -> bool:
    said = _told.setdefault(module, set())
    first = what not in said
    said.add(what)
    return first


def target_keys(module: TaskModule) -> dict[str, str]:
    """The task whose target is under a key, for every key."""
    return {task.target or name: name for name, task in module.tasks.items()}


def check_keys(module: TaskModule, name: str, targets: Mapping[str, Any]) -> None:
    """Tell a misspelled key from a task without labels.

    Args:
        module: whose batch it is.
        name: a task without a target in it.
        targets: of the batch.

    Raises:
        ValueError: there are targets, and none is of any task.
    """
    known = target_keys(module)
    key = module.tasks[name].target or name
    unused = [str(other) for other in targets if other not in known]
    if not unused or key in targets:
        return
    if len(unused) == len(targets):
        raise ValueError(
            f"Expected targets of the tasks under {list(known)} but the batch has {unused}. Rename "
            f"them, or say where a task's target is: `Task(..., target='{unused[0]}')`."
        )
    by_lower = {other.lower(): other for other in unused}
    near = difflib.get_close_matches(key.lower(), by_lower, 1)
    if near and _once(module, f"target {name}"):
        found = by_lower[near[0]]
        rank_zero_warn(
            f"A batch has no target '{key}' for task '{name}', which is then left out, but it has "
            f"{list(map(str, targets))}. If '{found}' is meant, rename it, or give the task "
            f"`target='{found}'`."
        )
