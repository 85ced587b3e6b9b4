"""What a checkpoint has to hold: one message where it does not, instead of an error from inside."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def entry(saved: Any, name: str, kinds: type | tuple[type, ...], owner: str) -> Any:
    """The entry ``name`` of what a checkpoint holds for ``owner``.

    Args:
        saved: a mapping, if nobody has altered it.
        name: of the entry.
        kinds: what it may be an instance of.
        owner: for the message.

    Raises:
        ValueError: there is none, or it is something else.
    """
    if not isinstance(saved, Mapping):
        raise unreadable(owner, f"a {type(saved).__name__} in place of a dict")
    if name not in saved:
        raise unreadable(owner, f"no entry '{name}'")
    value = saved[name]
    if not isinstance(value, kinds):
        raise unreadable(owner, f"a {type(value).__name__} as '{name}'")
    return value


def names_in(saved: Any, name: str, owner: str) -> list[str]:
    """The entry ``name`` as a list of strings.

    Raises:
        ValueError: it is none.
    """
    found: list[str] = entry(saved, name, list, owner)
    if not all(isinstance(item, str) for item in found):
        raise unreadable(owner, f"other things than names in '{name}'")
    return found


def unreadable(owner: str, found: str) -> ValueError:
    """The error for a checkpoint that was altered, or written by another version."""
    return ValueError(
        f"Expected a checkpoint of this version of lightning_mtl but found {found} in what it "
        f"holds for {owner}: it was altered, or written by another version. Resume with the "
        f"version that wrote it, or start from its weights with `load_from_checkpoint` and `fit` "
        f"without `ckpt_path`."
    )


def finite(value: Any, default: Any = 0.0) -> bool:
    """Whether the numbers in a state are finite; infinity is fine where it is the first value."""
    if isinstance(value, Mapping):
        return all(finite(v) for v in value.values())
    if isinstance(value, (list, tuple)):
        return all(finite(v) for v in value)
    if isinstance(value, float):
        value = torch.tensor(value)
    if not isinstance(value, Tensor) or not (value.is_floating_point() or value.is_complex()):
        return True
    first = torch.as_tensor(default) if isinstance(default, (float, Tensor)) else torch.zeros(())
    if first.isinf().any():  # "none yet"
        return not bool(value.isnan().any())
    return bool(value.isfinite().all())


def alike(value: Any, default: Any, per_task: bool) -> bool:
    """Whether a saved state is of the kind that was declared."""
    if per_task:
        return value is None or isinstance(value, Tensor)
    if isinstance(default, Tensor):
        return isinstance(value, Tensor) and value.shape == default.shape
    if isinstance(default, (bool, int, float)):
        return isinstance(value, (bool, int, float, Tensor))
    return default is None or isinstance(value, (type(default), type(None)))


def described(value: Any) -> str:
    """A few words for a value in a message."""
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    return f"a {type(value).__name__}"


def generator_of(state: Tensor, owner: str) -> torch.Generator:
    """A generator of random numbers in a saved state.

    Raises:
        ValueError: it is none.
    """
    found = torch.Generator()
    try:
        found.set_state(state.cpu())
    except (RuntimeError, TypeError) as error:
        raise unreadable(owner, "no state of a generator as 'generator'") from error
    return found
