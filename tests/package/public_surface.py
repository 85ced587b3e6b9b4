"""What users can name: public names, their attributes and the arguments they take.

``python -m tests.package.public_surface`` writes it anew, where a change to it is meant.
"""

from __future__ import annotations

import inspect
import json
from typing import Any

import lightning_mtl
from lightning_mtl import metrics
from tests.common.places import DATA

PATH = DATA / "public_surface.json"
MODULES = {"lightning_mtl": lightning_mtl, "lightning_mtl.metrics": metrics}
BASES = (lightning_mtl.Balancer, lightning_mtl.LossBalancer, lightning_mtl.GradientBalancer)


def surface() -> dict[str, Any]:
    """``{module.name: what it has}``, in plain containers."""
    found: dict[str, Any] = {}
    for where, module in MODULES.items():
        for name in sorted(module.__all__):
            value = getattr(module, name)
            found[f"{where}.{name}"] = _of_class(value) if inspect.isclass(value) else _call(value)
    return found


def _of_class(value: type) -> dict[str, str]:
    """Public attributes that the package defines, by name; methods with their arguments."""
    attributes = {"()": _call(value)}
    for kind in reversed(value.__mro__):
        if kind.__module__.partition(".")[0] == "lightning_mtl":
            own = vars(kind)
            for name in [*own, *inspect.get_annotations(kind)]:
                if not name.startswith("_"):
                    found = own.get(name)
                    attributes[name] = _call(found) if callable(found) else "attribute"
    for base in BASES:  # said once, with the base
        if issubclass(value, base) and value is not base:
            known = _of_class(base)
            attributes = {n: a for n, a in attributes.items() if n == "()" or known.get(n) != a}
    return dict(sorted(attributes.items()))


def _call(value: Any) -> str:
    """Names and defaults of arguments; how their types are written is not promised."""
    try:
        signature = inspect.signature(value)
    except (TypeError, ValueError):
        return "value"
    bare = [p.replace(annotation=inspect.Parameter.empty) for p in signature.parameters.values()]
    return str(inspect.Signature(bare))


if __name__ == "__main__":
    PATH.write_text(json.dumps(surface(), indent=1) + "\n")
