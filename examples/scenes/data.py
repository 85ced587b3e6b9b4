"""Loaders of NYUv2, Cityscapes and generated scenes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader, Dataset, Subset

from examples.scenes.augment import CropAndFlip
from examples.scenes.files import KINDS, SceneFiles

TASKS = tuple(kind for kind in KINDS if kind != "image")


class ScenesDataModule(LightningDataModule):
    """Scenes in the published form, see :class:`~examples.scenes.files.SceneFiles`.

    The published data has no third part: tables report on the folder ``val``. With ``held_out=0``
    it serves for validation and for test, as there. To choose anything by validation, hold out
    training scenes, and keep ``val`` for the test.

    Args:
        root: the folder of ``train`` and ``val``.
        classes: number of classes: 13 for NYUv2, 7 for Cityscapes, 4 for generated scenes.
        tasks: what is read; Cityscapes has no normals.
        batch_size: scenes a batch, for each process. An incomplete last training batch is left
            out, since batch normalisation cannot do with one scene.
        held_out: training scenes that are used for validation instead, always the same ones.
        augment: crop and flip the training scenes.
        workers: processes that load.

    Raises:
        FileNotFoundError: a missing folder or file.
        ValueError: a file that is not what it should be; an argument out of range.
    """

    def __init__(
        self,
        root: str | Path,
        classes: int = 13,
        tasks: Sequence[str] = TASKS,
        batch_size: int = 8,
        held_out: int = 0,
        augment: bool = False,
        workers: int = 0,
    ) -> None:
        super().__init__()
        self.root = Path(root)
        self.classes = classes
        self.tasks = check_tasks(tasks)
        if batch_size < 2:
            raise ValueError(
                f"Expected `batch_size` to be at least 2 but found {batch_size}: the pooled branch "
                f"of the heads normalises over the scenes of a batch."
            )
        if held_out < 0:
            raise ValueError(f"Expected `held_out` to be at least 0 but found {held_out}.")
        self.batch_size = batch_size
        self.held_out = held_out
        self.augment = augment
        self.workers = workers
        self.parts: dict[str, Dataset[Any]] = {}

    def setup(self, stage: str = "fit") -> None:
        """Check all files and divide the training scenes, once."""
        if self.parts:
            return
        test = self._files("val")
        seen = self._files("train", CropAndFlip() if self.augment else None)
        if len(seen) - self.held_out < self.batch_size:
            raise ValueError(
                f"Expected at least one batch of {self.batch_size} training scenes in "
                f"{self.root / 'train'} but found {len(seen)}, of which {self.held_out} are held "
                f"out. Lower `batch_size` or `held_out`."
            )
        if not self.held_out:
            self.parts = {"train": seen, "val": test, "test": test}
            return
        order = torch.randperm(len(seen), generator=torch.Generator().manual_seed(0)).tolist()
        kept, held = sorted(order[self.held_out :]), sorted(order[: self.held_out])
        plain = self._files("train") if self.augment else seen
        self.parts = {"train": Subset(seen, kept), "val": Subset(plain, held), "test": test}

    def _files(self, split: str, transform: CropAndFlip | None = None) -> SceneFiles:
        return SceneFiles(self.root, split, self.tasks, self.classes, transform)

    def train_dataloader(self) -> DataLoader[Any]:
        return self._loader("train", shuffle=True, drop_last=True)

    def val_dataloader(self) -> DataLoader[Any]:
        return self._loader("val")

    def test_dataloader(self) -> DataLoader[Any]:
        return self._loader("test")

    def _loader(self, part: str, **options: Any) -> DataLoader[Any]:
        return DataLoader(
            self.parts[part],
            self.batch_size,
            num_workers=self.workers,
            persistent_workers=self.workers > 0,
            **options,
        )


def check_tasks(tasks: Sequence[str]) -> tuple[str, ...]:
    """``tasks`` as a tuple of known names."""
    if not tasks or not set(tasks) <= set(TASKS) or len(set(tasks)) != len(tasks):
        raise ValueError(f"Expected `tasks` to be some of {list(TASKS)} but found {list(tasks)}.")
    return tuple(tasks)
