"""Small scenes on disk, for the tests of `examples/scenes`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from examples.scenes.data import ScenesDataModule
from examples.scenes.generate import CLASSES, write

HEIGHT, WIDTH = 32, 48


def written(root: Path, train: int = 6, val: int = 3) -> Path:
    """A folder of generated scenes."""
    write(root, train, val, HEIGHT, WIDTH)
    return root


def module(root: Path, **kwargs: Any) -> ScenesDataModule:
    return ScenesDataModule(root, **{"classes": len(CLASSES), "batch_size": 2, **kwargs})
