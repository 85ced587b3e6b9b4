"""What a checkpoint has to hold: one message where it does not, instead of an error from inside."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


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
