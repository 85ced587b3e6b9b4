"""What pyproject.toml promises: bounds, extras that stay optional, one version, nothing local."""

import re
import subprocess
import sys
from importlib.metadata import entry_points, requires, version
from itertools import pairwise
from pathlib import Path

from packaging.requirements import Requirement

import lightning_mtl
from tests.common.places import ROOT

EXTRAS = ("jsonargparse", "matplotlib", "scikit-learn", "sklearn", "tensorboard", "torchvision")
TEXT = {".py", ".md", ".toml", ".yaml", ".yml", ".cff", ".json", ""}


def core() -> dict[str, Requirement]:
    found = [Requirement(line) for line in requires("lightning-mtl") or []]
    return {r.name: r for r in found if r.marker is None}


def test_core_needs_nothing_else():
    assert set(core()) == {"torch", "lightning", "torchmetrics", "numpy"}


def test_compromised_lightning_releases_are_excluded():
    allowed = core()["lightning"].specifier
    assert not {"2.6.2", "2.6.3"} & set(allowed.filter(["2.5.0", "2.6.1", "2.6.2", "2.6.3"]))
    assert "2.5.0" in allowed
    assert "2.6.6" in allowed
    assert "2.7.0" not in allowed


def test_every_bound_has_a_reason_beside_it():
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    lines = text[: text.index("[project.scripts]")].splitlines()
    for before, line in pairwise(lines):
        if re.search(r'"[^"]*[<>=]=?\d', line):
            assert "#" in line or before.strip().startswith("#"), line


def test_version_has_one_source():
    assert lightning_mtl.__version__ == version("lightning-mtl")


def test_no_trainer_loads_us_unasked():
    registered = entry_points(group="lightning.pytorch.callbacks_factory")
    assert not [e for e in registered if e.value.startswith("lightning_mtl")]


def test_core_imports_without_extras():
    program = f"""
import sys
from importlib.machinery import PathFinder
from importlib.metadata import Distribution, PackageNotFoundError

find_spec, from_name = PathFinder.find_spec, Distribution.from_name

def absent_module(name, path=None, target=None):
    return None if name.split(".")[0] in {EXTRAS!r} else find_spec(name, path, target)

def absent_distribution(name):
    if name in {EXTRAS!r}:
        raise PackageNotFoundError(name)
    return from_name(name)

PathFinder.find_spec, Distribution.from_name = absent_module, absent_distribution
import lightning_mtl
lightning_mtl.DualBalance(), lightning_mtl.GradientNorm(["a", "b"]), lightning_mtl.GradientMonitor()
from lightning_mtl.cli import main
print("status", main(["fit"]))
print("imported", sorted(set({EXTRAS!r}) & set(sys.modules)))
"""
    run = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.splitlines()[-2:] == ["status 2", "imported []"]
    assert 'pip install "lightning-mtl[cli]"' in run.stderr


def test_nothing_local_is_mentioned():
    local = re.compile(
        r"\.\./shared|(?<![\w.:/-])/(work|home|root|Users|tmp)/\w|" + "pypi" + r"\.org"
    )
    skipped = {".git", "_build", "__pycache__", "build", "dist", "demo_results", "lightning_logs"}
    found = []
    for path in ROOT.rglob("*"):
        parts = path.relative_to(ROOT).parts
        made = any(p in skipped or re.match(r"\.(venv|\w+_cache|hypothesis)", p) for p in parts)
        if made or not path.is_file() or path.suffix not in TEXT or path == Path(__file__):
            continue
        lines = path.read_text(encoding="utf-8", errors="ignore").splitlines()
        found += [f"{path.name}: {line.strip()}" for line in lines if local.search(line)]
    assert not found, "\n".join(found)
