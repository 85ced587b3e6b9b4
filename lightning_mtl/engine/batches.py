"""What is in a batch, and which of its targets no task looks at, for messages."""

from __future__ import annotations

import difflib
import weakref
from collections.abc import Mapping
from typing import Any

from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor

from lightning_mtl.contract import TaskModule

_told: weakref.WeakKeyDictionary[Any, set[str]] = weakref.WeakKeyDictionary()


def described(value: Any, depth: int = 0) -> str:
    """A batch in a few words."""
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    if isinstance(value, Mapping):
        return f"a dict with the keys {list(value)[:8]}"
    if isinstance(value, (list, tuple)) and depth == 0:
        inside = [described(item, 1) for item in value[:4]]
        more = f" and {len(value) - 4} more" if len(value) > 4 else ""
        return f"a {type(value).__name__} of {len(value)}: {'; '.join(inside)}{more}"
    return f"a {type(value).__name__}"


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
    said = _told.setdefault(module, set())
    if near and name not in said:
        said.add(name)
        found = by_lower[near[0]]
        rank_zero_warn(
            f"A batch has no target '{key}' for task '{name}', which is then left out, but it has "
            f"{list(map(str, targets))}. If '{found}' is meant, rename it, or give the task "
            f"`target='{found}'`."
        )
