"""The house: imports go down, from floor to floor, and never in a circle, for types neither."""

from __future__ import annotations

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import lightning_mtl

PACKAGE = Path(lightning_mtl.__file__).parent
# From the top down. A file stands on the floor of its longest prefix, and may import from its own
# floor and from those below.
FLOORS = [
    ["__main__", "cli"],
    ["compare", "parsing"],
    ["__init__"],
    ["module", "monitor", "reserved", "inherit"],
    ["trainer"],
    ["engine"],
    ["engine.forms"],
    ["engine.two_stages", "engine.group", "engine.again"],
    ["engine.losses", "engine.stages", "engine.guards", "engine.record", "engine.batches"],
    ["engine.gradients"],
    ["gradient_balancers", "loss_balancers"],
    ["balancer"],
    ["state"],
    ["changed", "contract", "arguments", "metrics"],
    ["task", "saved", "ranks", "numerics", "version", "engine.keep"],
]
ROOMS = 24  # files and folders at the top, `py.typed` aside


def dotted(path: Path) -> str:
    """A file as a module's name within the package."""
    parts = list(path.relative_to(PACKAGE).with_suffix("").parts)
    if parts[-1] == "__init__" and len(parts) > 1:
        parts.pop()
    return ".".join(parts)


FILES = {dotted(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def imports(name: str, text: str) -> dict[str, str]:
    """Files that ``text`` imports, each with a name that it takes, wherever the import stands."""
    found: dict[str, str] = {}
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            pairs = [(alias.name, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name} imports by dots, which this test does not follow."
            pairs = [(f"{node.module}.{alias.name}", alias.name) for alias in node.names]
        else:
            continue
        for path, taken in pairs:
            parts = path.split(".")
            if parts[0] != "lightning_mtl":
                continue
            inner = ".".join(parts[1:])
            while inner and inner not in FILES:
                inner = inner.rpartition(".")[0]
            target = inner or "__init__"
            if target != name:
                found.setdefault(target, taken)
    return found


def floor(name: str) -> int:
    """The number of a file's floor, from the top."""
    known = {prefix: i for i, row in enumerate(FLOORS) for prefix in row}
    while name not in known:
        assert "." in name, f"Expected {name} on one of the floors of tests/package/test_house.py."
        name = name.rpartition(".")[0]
    return known[name]


def climbs(edges: dict[str, dict[str, str]]) -> list[str]:
    """Imports that go up."""
    return [
        f"{source} takes `{taken}` from {target}, which stands above it"
        for source, targets in edges.items()
        for target, taken in targets.items()
        if floor(target) < floor(source)
    ]


EDGES = {name: imports(name, path.read_text()) for name, path in FILES.items()}


def test_imports_go_down() -> None:
    assert climbs(EDGES) == []


def test_there_is_no_circle() -> None:
    try:
        TopologicalSorter(EDGES).prepare()
    except CycleError as error:
        pytest.fail(" takes from ".join(reversed(error.args[1])))


def test_what_the_test_would_find() -> None:
    text = "def f():\n    from lightning_mtl.module import MultiTaskModule\n"
    found = imports("engine.losses", text)
    assert climbs({"engine.losses": found}) == [
        "engine.losses takes `MultiTaskModule` from module, which stands above it"
    ]
    text = "if TYPE_CHECKING:\n    from lightning_mtl import MinNorm\n"
    assert imports("balancer", text) == {"__init__": "MinNorm"}


def test_the_top_has_few_rooms() -> None:
    rooms = [p.name for p in PACKAGE.iterdir() if p.name not in ("py.typed", "__pycache__")]
    assert len(rooms) <= ROOMS, sorted(rooms)


def test_public_names_only() -> None:
    names = {name for name in dir(lightning_mtl) if not name.startswith("__")}
    assert names == set(lightning_mtl.__all__) - {"__version__"}


FORMS = [name for name in FILES if name.startswith("engine.forms.")]


def test_a_form_is_a_file_of_its_own_and_a_step_one_function() -> None:
    for name in FORMS:
        assert len(FILES[name].read_text().splitlines()) <= 200, name
    text = FILES["engine.step"].read_text()
    assert len(text.splitlines()) <= 400
    nodes = [n for n in ast.walk(ast.parse(text)) if isinstance(n, ast.FunctionDef)]
    (step,) = [n for n in nodes if n.name == "training_step"]
    assert step.end_lineno is not None
    assert step.end_lineno - step.lineno < 60


@pytest.mark.parametrize("name", [*FORMS, "engine.step", "engine.two_stages", "engine.idle"])
def test_objects_are_asked_not_types(name: str) -> None:
    ours = ("Balancer", "Weighting", "Perturbing", "Gradients", "Probe", "Rows", "Form")
    for node in ast.walk(ast.parse(FILES[name].read_text())):
        call = isinstance(node, ast.Call) and getattr(node.func, "id", "") == "isinstance"
        same = isinstance(node, ast.Compare) and ast.unparse(node.left).startswith("type(")
        if call or same:
            assert not any(word in ast.unparse(node) for word in ours), ast.unparse(node)
