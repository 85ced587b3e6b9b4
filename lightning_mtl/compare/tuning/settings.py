"""The settings of a trial, put into the two files that describe a run."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from typing import Any

from lightning_mtl.compare import CompareError

CALLBACKS = "callbacks."


def with_settings(
    specs: Sequence[Mapping[str, Any]], settings: Mapping[str, Any] | None
) -> list[dict[str, Any]]:
    """Callbacks of an entry with the ``callbacks.<number>.<argument>`` of ``settings``.

    ``init_args`` are meant without being written: ``callbacks.0.base.alpha`` is the argument
    ``alpha`` of the ``base`` of the first callback.

    Raises:
        CompareError: a number that the entry has no callback for.
    """
    changed = copy.deepcopy([dict(spec) for spec in specs])
    for key, value in (settings or {}).items():
        if not key.startswith(CALLBACKS):
            continue
        number, _, path = key.removeprefix(CALLBACKS).partition(".")
        if not number.isdecimal() or int(number) >= len(changed) or not path:
            raise CompareError(
                f"Expected `{key}` to name an argument of one of {len(changed)} callbacks, such as "
                f"`callbacks.0.alpha`, but found no callback of that number."
            )
        inner: Any = changed[int(number)]
        *way, last = path.split(".")
        for step in way:
            inner = _arguments(inner).setdefault(step, {})
            if not isinstance(inner, dict):
                raise CompareError(
                    f"Expected `{key}` to lead to an argument but `{step}` holds {inner!r}. Name "
                    f"an argument of a callback, or of a class that is written out in it."
                )
        _arguments(inner)[last] = value
    return changed


def _arguments(spec: dict[str, Any]) -> dict[str, Any]:
    """Where the arguments of a class stand; a plain mapping is its own."""
    if "class_path" not in spec:
        return spec
    if spec.get("init_args") is None:
        spec["init_args"] = {}
    inner: dict[str, Any] = spec["init_args"]
    return inner


def arguments(settings: Mapping[str, Any] | None) -> list[str]:
    """The other settings as the command line of ``lightning-mtl fit`` takes them."""
    return [
        f"--{key}={value if isinstance(value, str) else json.dumps(value)}"
        for key, value in (settings or {}).items()
        if not key.startswith(CALLBACKS)
    ]


def described(settings: Mapping[str, Any]) -> str:
    """Settings in a line."""
    if not settings:
        return "as in the file"
    return ", ".join(f"{key} {_short(value)}" for key, value in settings.items())


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{k}: {_short(v)}" for k, v in value.items()) + "}"
    return str(value)
