"""One line instead of a parser's seventy: which class or argument was meant."""

from __future__ import annotations

import difflib
import importlib
import inspect
import re
from typing import Any

from lightning.pytorch import Callback, callbacks

import lightning_mtl


def hint(message: str) -> str | None:
    """What is wrong with a class in a parser's message, if it is a name that does not exist.

    Args:
        message: of jsonargparse.
    """
    key = re.match(r'Parser key "([\w.]+)"', message)
    where = f"`{key.group(1)}`: " if key else ""
    if found := re.search(r"import path string: (\w+)\s*$", message, re.MULTILINE):
        known = _callbacks()
        near = _near(found.group(1), known)
        rest = f"Give one of {', '.join(known)}, or" if not near else "Or give"
        return (
            f"{where}there is no class `{found.group(1)}`.{near} {rest} the full import path of a "
            f"class of yours, such as `my_package.MyClass`."
        )
    if found := re.search(r"module '([\w.]+)' has no attribute '(\w+)'", message):
        module, name = found.groups()
        if near := _near(name, list(vars(_imported(module)))):
            return f"{where}`{module}` has no class `{name}`.{near}"
    pattern = r"class_path '([\w.]+)\.(\w+)':\s+Option '(\w+)' is not accepted"
    if found := re.search(pattern, message):
        module, name, option = found.groups()
        given = list(inspect.signature(getattr(_imported(module), name)).parameters)
        return (
            f"{where}`{name}` has no argument `{option}`.{_near(option, given)} Its arguments are "
            f"{', '.join(given) or 'none'}."
        )
    return None


def _imported(module: str) -> Any:
    return importlib.import_module(module)


def _callbacks() -> list[str]:
    """The callbacks that have a short name."""
    ours = {n: getattr(lightning_mtl, n) for n in lightning_mtl.__all__}
    theirs = {n: getattr(callbacks, n) for n in callbacks.__all__}
    return [
        name
        for name, found in {**ours, **theirs}.items()
        if isinstance(found, type) and issubclass(found, Callback) and not inspect.isabstract(found)
    ]


def _near(name: str, known: list[str]) -> str:
    by_lower = {other.lower(): other for other in known}
    near = difflib.get_close_matches(name.lower(), by_lower, 1)
    return f" Did you mean `{by_lower[near[0]]}`?" if near else ""
