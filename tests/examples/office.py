"""A small stand-in on disk, for the tests of `examples/office`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from examples.office.data import OfficeDataModule
from examples.office.standin import SHARES, write

DOMAINS = tuple(SHARES)


def written(root: Path, count: int = 120) -> Path:
    """A folder of digits in four renderings."""
    write(root, count=count)
    return root


def module(root: Path, **kwargs: Any) -> OfficeDataModule:
    given = {"domains": DOMAINS, "classes": 10, "size": 28, "batch_size": 4}
    return OfficeDataModule(root, **{**given, **kwargs})
