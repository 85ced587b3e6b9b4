"""A method, or a public name, that lacks one of its five places is found here."""

import inspect
import re

import pytest

import lightning_mtl
from lightning_mtl import Balancer, GradientBalancer, LossBalancer
from tests.common.methods import METHODS
from tests.common.places import ROOT

BASES = {Balancer, LossBalancer, GradientBalancer}
BALANCERS = sorted(
    name
    for name in lightning_mtl.__all__
    if inspect.isclass(found := getattr(lightning_mtl, name))
    and issubclass(found, Balancer)
    and found not in BASES
)


def snake(name: str) -> str:
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower()


def packaged() -> set[str]:
    """Classes of balancers that the method packages export."""
    names = set()
    for package in (lightning_mtl.loss_balancers, lightning_mtl.gradient_balancers):
        names |= {name for name in package.__all__ if inspect.isclass(getattr(package, name))}
    return names


def test_every_method_file_is_exported():
    folders = ("loss_balancers", "gradient_balancers")
    files = {
        path.stem
        for folder in folders
        for path in (ROOT / "lightning_mtl" / folder).glob("*.py")
        if not path.stem.startswith("_")
    }
    assert files == {snake(name) for name in BALANCERS}
    assert packaged() == set(BALANCERS)


def test_public_names_exist_once():
    names = lightning_mtl.__all__
    assert len(set(names)) == len(names)
    assert all(hasattr(lightning_mtl, name) for name in names)


@pytest.mark.parametrize("name", BALANCERS)
def test_method_has_a_row_in_the_table_of_tests(name):
    assert name in {row.cls.__name__ for row in METHODS}, f"add a row for {name} to methods.py"


@pytest.mark.parametrize("name", BALANCERS)
def test_method_has_a_docs_page(name):
    page = ROOT / "docs" / "methods" / f"{snake(name)}.md"
    assert page.is_file(), f"add docs/methods/{page.name}"
    text = page.read_text(encoding="utf-8")
    assert f".. autoclass:: lightning_mtl.{name}\n" in text
    for part in ("**When to use.**", "**When not.**", "**Cost.**", "**Head weights.**"):
        assert part in text, f"{page.name} has no {part}"
    index = (page.parent / "index.md").read_text(encoding="utf-8")
    assert re.search(rf"^{page.stem}$", index, re.MULTILINE), f"add {page.stem} to methods/index.md"


@pytest.mark.parametrize("name", BALANCERS)
def test_method_has_a_line_in_the_changelog(name):
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert f"`{name}`" in changelog, f"add a line that names `{name}` to CHANGELOG.md"


@pytest.mark.parametrize("name", sorted(lightning_mtl.__all__))
def test_public_name_is_documented(name):
    if name == "__version__":
        return
    text = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    listed = rf"(\.\. auto\w+:: |:class:`){name}(`|$)"
    assert re.search(listed, text, re.MULTILINE), f"add {name} to docs/api.md"
    assert getattr(lightning_mtl, name).__doc__, f"{name} has no docstring"
