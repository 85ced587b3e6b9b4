"""A batch kept for another forward pass: containers copied, tensors watched."""

from __future__ import annotations

import copy
import types
from collections import UserList, deque
from collections.abc import Iterator, Mapping, MutableMapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

_ATOMS = (str, bytes, int, float, complex, bool, type(None), torch.device, torch.dtype, torch.Size)
_OPAQUE = (*_ATOMS, nn.Module, type, types.ModuleType, types.FunctionType, types.MethodType)

_LISTS = (list, deque, UserList)


def copied(value: Any, memo: dict[int, Any] | None = None) -> Any:
    """Containers of a batch anew, at any depth, with the same tensors in them.

    Dicts, lists, tuples, sets, dataclasses and other objects with attributes or slots; arrays of
    numpy are copied. An object that says how it is copied (``__copy__``, as those of PyG) is asked.
    """
    memo = {} if memo is None else memo
    if isinstance(value, (Tensor, *_OPAQUE)):
        return value
    if id(value) in memo:
        return memo[id(value)]
    if isinstance(value, tuple):
        parts = [copied(item, memo) for item in value]
        if all(part is item for part, item in zip(parts, value, strict=True)):
            return value
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    new = memo[id(value)] = _shallow(value)
    if new is value:
        return value
    if isinstance(new, MutableMapping):
        for key in list(new):
            new[key] = copied(new[key], memo)
    elif isinstance(new, _LISTS):
        for i, item in enumerate(list(new)):
            new[i] = copied(item, memo)
    elif not hasattr(type(value), "__copy__"):
        for name, item in _attributes(new).items():
            object.__setattr__(new, name, copied(item, memo))
    return new


def _attributes(value: Any) -> dict[str, Any]:
    """Attributes of an object by name, also those in slots (``dataclass(slots=True)``)."""
    found = {}
    for base in type(value).__mro__:
        slots = vars(base).get("__slots__", ())
        for name in (slots,) if isinstance(slots, str) else slots:
            if name.startswith("__") and not name.endswith("__"):
                name = f"_{base.__name__.lstrip('_')}{name}"  # as Python stores private names
            if name not in ("__dict__", "__weakref__") and hasattr(value, name):
                found[name] = getattr(value, name)
    return {**found, **getattr(value, "__dict__", {})}


def _shallow(value: Any) -> Any:
    try:
        new = copy.copy(value)
    except Exception:  # what cannot be copied is used as it is
        return value
    return new if type(new) is type(value) else value


def iterator_in(value: Any) -> str | None:
    """The type of an iterator in a batch, which cannot be read twice."""
    for item in _leaves(value):
        if isinstance(item, Iterator):
            return type(item).__name__
    return None


def versions(value: Any) -> list[tuple[Tensor, int]]:
    """The tensors of a batch, and how often each was changed in place."""
    found = [item for item in _leaves(value) if isinstance(item, Tensor)]
    return [(t, t._version) for t in found if not t.is_inference()]


def changed(before: list[tuple[Tensor, int]]) -> list[Tensor]:
    """The tensors that were changed in place since."""
    return [tensor for tensor, version in before if tensor._version != version]


def places(value: Any, tensors: list[Tensor], where: str = "batch", depth: int = 0) -> list[str]:
    """Where tensors are in a batch, as one would write it."""
    if isinstance(value, Tensor):
        return [where] if any(value is t for t in tensors) else []
    if depth > 8 or isinstance(value, _OPAQUE):
        return []
    if isinstance(value, Mapping):
        inside = [(f"{where}[{key!r}]", item) for key, item in value.items()]
    elif isinstance(value, (tuple, *_LISTS)):
        inside = [(f"{where}[{i}]", item) for i, item in enumerate(value)]
    else:
        inside = [(f"{where}.{name}", item) for name, item in _attributes(value).items()]
    return [place for name, item in inside for place in places(item, tensors, name, depth + 1)]


def _leaves(value: Any, seen: set[int] | None = None) -> Iterator[Any]:
    """Everything in a batch that is no container."""
    seen = set() if seen is None else seen
    if isinstance(value, _OPAQUE) or id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, (Tensor, np.ndarray, Iterator)):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _leaves(item, seen)
    elif isinstance(value, (tuple, set, frozenset, *_LISTS)):
        for item in value:
            yield from _leaves(item, seen)
    else:
        for item in _attributes(value).values():
            yield from _leaves(item, seen)
