"""Bases that know nothing of MultiTaskModule, before or behind it: what they bring is kept."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

from lightning.pytorch import LightningModule

from lightning_mtl.contract import base_of

# What a foreign base may define in place of ours, and hooks in which both have something to do.
_INSTEAD = ("validation_step", "test_step", "predict_step", "configure_callbacks")
Init = TypeVar("Init", bound=Callable[..., None])
_running: set[tuple[int, str]] = set()  # modules and hooks of foreign bases that run now
_BOTH = ("on_validation_epoch_end", "on_test_epoch_end", "on_load_checkpoint")


def foreign_bases(cls: type, ours: type) -> list[type]:
    """The bases of ``cls`` that do not derive from ``ours``, nor ``ours`` from them."""
    return [b for b in cls.__mro__ if not issubclass(b, ours) and b not in ours.__mro__]


def adopt(cls: Any, ours: Any, foreign: list[type]) -> None:
    """Let what foreign bases define work under ``cls``, whatever the order of its bases.

    Python would hide their steps and hooks where ``ours`` comes first, and ours where they do.

    Args:
        cls: a new subclass of ``ours``.
        ours: MultiTaskModule.
        foreign: the other bases.
    """
    for name in (*_INSTEAD, *_BOTH):
        theirs = next((vars(base)[name] for base in foreign if name in vars(base)), None)
        owner = next(base for base in cls.__mro__ if name in vars(base))
        if theirs is None or (owner is not ours and owner not in foreign):
            continue
        setattr(cls, name, _both(theirs, vars(ours)[name]) if name in _BOTH else theirs)
    owner = next(base for base in cls.__mro__ if "training_step" in vars(base))
    if owner in foreign and cls.task_losses is not ours.task_losses:
        cls.training_step = ours.training_step  # theirs is there for `super().training_step(...)`


def _both(theirs: Callable[..., Any], ours: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(theirs)
    def hook(self: Any, *args: Any, **kwargs: Any) -> Any:
        running = (id(self), ours.__name__)
        _running.add(running)
        try:
            result = theirs(self, *args, **kwargs)
        finally:
            _running.discard(running)
        ours(self, *args, **kwargs)
        return result

    return hook


def last(ours: Callable[..., Any]) -> Callable[..., Any]:
    """A hook of ours that follows one of a foreign base, also where that calls ``super()``."""

    @functools.wraps(ours)
    def hook(self: Any, *args: Any, **kwargs: Any) -> None:
        if (id(self), ours.__name__) not in _running:
            ours(self, *args, **kwargs)

    return hook


def check_constructor(cls: type, ours: type) -> None:
    """Refuse a base behind ``ours`` whose constructor needs arguments, naming the line to write.

    Raises:
        TypeError: it does.
    """
    following = cls.__mro__[cls.__mro__.index(ours) + 1 :]
    base = next(b for b in following if "__init__" in vars(b))
    if base in ours.__mro__:
        return
    needed = [
        name
        for name, p in list(inspect.signature(base).parameters.items())
        if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
    ]
    if needed:
        raise TypeError(
            f"Expected the arguments {needed} of {base.__name__}, a base of {cls.__name__}, which "
            f"`super().__init__` does not pass on. {_lines(cls, base, ', '.join(needed))}"
        )


def without_others(constructor: Init) -> Init:
    """Our constructor, whose ``**others`` are there to be refused, as its signature should be.

    No wrapper: ``save_hyperparameters`` follows the calls of constructors, and ends at other ones.
    """
    signature = inspect.signature(constructor)
    named = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
    constructor.__signature__ = signature.replace(parameters=named)  # type: ignore[attr-defined]
    return constructor


def refuse(others: Iterable[str], cls: type) -> None:
    """Refuse arguments that our constructor does not have, and that may be a foreign base's.

    Raises:
        TypeError: there are some.
    """
    for name in others:
        base = _with_constructor(cls)
        cure = "" if base is None else f". {_lines(cls, base, '...')}"
        raise TypeError(
            f"MultiTaskModule.__init__() got an unexpected keyword argument {name!r}{cure}"
        )


def check_constructed(module: Any) -> None:
    """Refuse a module whose constructor of ours was not called, or before that of another base.

    Raises:
        TypeError: it was not, and our attributes are missing.
    """
    if "_tasks" not in module._modules:
        raise incomplete(type(module))


def incomplete(cls: type) -> TypeError:
    """The error for a module in which a constructor is missing, or came too late."""
    base, cure = _with_constructor(cls), f"Call `super().__init__(tasks=...)` in `{cls.__name__}`."
    return TypeError(
        f"Expected the constructors of all bases of {cls.__name__} to be called, that of "
        f"MultiTaskModule last, but what they set is missing. "
        f"{cure if base is None else _lines(cls, base, '...')}"
    )


def _with_constructor(cls: type) -> type | None:
    """The first foreign base of ``cls`` that has a constructor."""
    return next((b for b in foreign_bases(cls, base_of(cls)) if "__init__" in vars(b)), None)


def _lines(cls: type, base: type, given: str) -> str:
    """What to write in the constructor of ``cls``."""
    if not issubclass(base, LightningModule):  # ours would begin all of nn.Module anew
        return (
            f"{base.__name__} is no LightningModule, so hold an object of it in an attribute "
            f"instead of inheriting from it."
        )
    return (
        f"Write both lines in `{cls.__name__}.__init__`: "
        f"`{base.__name__}.__init__(self, {given})`, then "
        f"`MultiTaskModule.__init__(self, tasks=...)`."
    )


def with_index(task_losses: Callable[..., Any], whose: str, *, bound: bool) -> Callable[..., Any]:
    """``task_losses`` as a function of batch and index, also where it takes the batch alone.

    As Lightning does for ``training_step``.

    Args:
        task_losses: what a user wrote.
        whose: name of the class, for messages.
        bound: whether it gets no ``self``.

    Raises:
        TypeError: it takes something else.
    """
    try:
        parameters = list(inspect.signature(task_losses).parameters.values())[0 if bound else 1 :]
    except (TypeError, ValueError):  # no signature to look at
        return task_losses
    names = [p.name for p in parameters]
    if "dataloader_iter" in names:
        raise TypeError(
            f"Expected `task_losses(self, batch, batch_idx)` of {whose} but found the argument "
            f"`dataloader_iter`, which is not supported: Lightning's loop fetches the batches. "
            f"Take the batch instead."
        )
    by_order = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    both = len(by_order) > 1 or any(p.kind is p.VAR_POSITIONAL for p in parameters)
    given = by_order[: 2 if both else 1]
    index = {"batch_idx"} if not both and "batch_idx" in names[1:] else set()
    variable = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    others = [p for p in parameters if p not in given and p.kind not in variable]
    if (not given and not both) or any(
        p.default is p.empty and p.name not in index for p in others
    ):
        raise TypeError(
            f"Expected `task_losses(self, batch, batch_idx)` or `task_losses(self, batch)` of "
            f"{whose} but found the arguments {names}. Change its signature; the rest belongs into "
            f"the batch or the module."
        )
    if both:
        return task_losses
    if bound:
        return lambda batch, batch_idx=None: task_losses(batch, **dict.fromkeys(index, batch_idx))

    @functools.wraps(task_losses)
    def called(self: Any, batch: Any, batch_idx: int | None = None) -> Any:
        return task_losses(self, batch, **dict.fromkeys(index, batch_idx))

    return called
