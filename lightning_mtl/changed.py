"""Arguments of a balancer that are changed after its constructor: taken up, or refused.

A changed argument is one that had been given to the constructor: a balancer is built with it, which
checks it, and what follows from it is taken over. State stays. What counts only when a fit or a
state begins is refused later.
"""

from __future__ import annotations

import copy
import inspect
from typing import Any, Protocol

import torch
from torch import Tensor

# What is read when a fit begins.
_AT_FIT = (
    "gradients",
    "products",
    "batches",
    "requires_positive_losses",
    "requires_nonnegative_losses",
    "needs_jacobian",
    "needs_losses_after",
    "gramian_weighted",
)
# What belongs to a run, not to the arguments.
_OF_A_RUN = {
    "tasks",
    "shards",
    "columns",
    "representation",
    "_told_by",
    "_divided",
    "_generator",
    "_initial_seed",
    "_known_tasks",
    "_given",
    "_settled",
    "_fitting",
}


class Changeable(Protocol):
    """What is asked here of a balancer: see :class:`~lightning_mtl.state.Stateful`."""

    fixed_with_state: tuple[str, ...]
    _defaults: dict[str, Any]
    _given: dict[str, Any]
    _settled: bool
    _fitting: str
    _known_tasks: tuple[str, ...]
    _seed: int | None
    _generator: torch.Generator | None

    def nested(self) -> dict[str, Any]:
        """Balancers that it wraps."""


_arguments: dict[type, tuple[str, ...]] = {}  # by class, once they were asked for


def arguments(cls: type) -> tuple[str, ...]:
    """Names of the constructor's arguments, which are attributes too; none of classes of users.

    Theirs may change attributes as they go: the constructor would have to run at each change.
    """
    found = _arguments.get(cls)
    if found is None:
        constructor = cls.__init__  # type: ignore[misc] # of a class, which is what is asked about
        ours = cls.__module__.partition(".")[0] == "lightning_mtl"
        found = tuple(inspect.signature(constructor).parameters)[1:] if ours else ()
        _arguments[cls] = found
    return found


def settle(balancer: Changeable) -> None:
    """Take up what was changed between the constructor and a fit, before its tasks are known.

    Raises:
        ValueError: a value that the constructor refuses.
    """
    names = arguments(type(balancer))
    for name, value in vars(_built(balancer)).items() if names else ():
        begun = name in balancer._defaults and getattr(balancer, name) is not None
        if name not in _OF_A_RUN and not begun:
            object.__setattr__(balancer, name, value)
    note(balancer)


def look(balancer: Changeable) -> None:
    """Take up what was changed inside a list or dict.

    Raises:
        ValueError: a value that the constructor refuses.
        RuntimeError: an argument that cannot be changed any more.
    """
    for name, before in balancer._given.items():
        now = getattr(balancer, name)
        if now != before:
            object.__setattr__(balancer, name, before)
            change(balancer, name, now)


def change(balancer: Changeable, name: str, value: Any) -> None:
    """Set an argument of a balancer in use.

    Raises:
        ValueError: a value that the constructor refuses.
        RuntimeError: an argument that cannot be changed any more.
    """
    old, new = _built(balancer), _built(balancer, name, value)
    whose, running = type(balancer).__name__, balancer._fitting
    follows = [*_AT_FIT, *balancer.nested(), *(["weight_heads"] if running == "inside" else [])]
    if running and any(_differ(getattr(old, n, None), getattr(new, n, None)) for n in follows):
        raise RuntimeError(
            f"Expected `{name}` of {whose} to stay during a fit, which was laid out for "
            f"{getattr(balancer, name)!r}, but it is set to {value!r}. Set it before `fit`."
        )
    begun = [n for n in balancer._defaults if getattr(balancer, n) is not None]
    first = any(_differ(old._defaults[n], new._defaults[n]) for n in begun)
    first |= bool(begun) and name in type(balancer).fixed_with_state
    first |= old._seed != new._seed and balancer._generator is not None
    if first:
        raise RuntimeError(
            f"`{name}` of {whose} counts when its state begins, which it has with "
            f"{getattr(balancer, name)!r}: {value!r} would not be used. Call `reset()` on the "
            f"balancer before, which starts all its state afresh, or set it before `fit`."
        )
    for attribute, found in vars(new).items():
        state = attribute in balancer._defaults and attribute in begun
        if attribute in _OF_A_RUN or state or not _differ(found, vars(old).get(attribute, ...)):
            continue
        object.__setattr__(balancer, attribute, found)
    if isinstance(value, (dict, list)):  # not a copy: it may be changed again from outside
        object.__setattr__(balancer, name, value)
    check = getattr(balancer, "check_tasks", None)
    if check is not None and balancer._known_tasks:
        check(balancer._known_tasks)
    note(balancer)


def _built(balancer: Changeable, name: str = "", value: Any = None) -> Changeable:
    """Another balancer of the same arguments, but for one."""
    given = {n: getattr(balancer, n) for n in arguments(type(balancer))}
    return type(balancer)(**given if not name else {**given, name: value})


def note(balancer: Changeable) -> None:
    """Mind changes from now on; keep copies of what can be changed from inside."""
    given = {n: getattr(balancer, n) for n in arguments(type(balancer))}
    inside = {n: copy.copy(v) for n, v in given.items() if isinstance(v, (dict, list))}
    balancer._given, balancer._settled = inside, True


def _differ(a: Any, b: Any) -> bool:
    if a is b:
        return False
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return not torch.equal(a, b)
    return type(a) is not type(b) or bool(a != b)
