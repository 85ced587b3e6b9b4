"""Scenes on disk: the folders of .npy files in which NYUv2 and Cityscapes are passed around."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

IGNORED = -1  # the label of pixels without a class
WHERE = (
    "The preprocessed NYUv2 and Cityscapes are linked from the repositories of MTAN and LibMTL; "
    "`python -m examples.scenes.generate --out FOLDER` writes small scenes in the same form."
)

Batch = tuple[Tensor, dict[str, Tensor]]


class Kind(NamedTuple):
    """What a folder holds: its names, the last dimension of its arrays, and their numbers."""

    folders: tuple[str, ...]
    channels: int | None
    whole: bool = False


# Task: its files. `label_7` is what Cityscapes calls its 7 classes.
KINDS = {
    "image": Kind(("image",), 3),
    "segment": Kind(("label", "label_7"), None, whole=True),
    "depth": Kind(("depth",), 1),
    "normal": Kind(("normal",), 3),
}


class SceneFiles(Dataset[Batch]):
    """Scenes ``root/split/{image,label,depth,normal}/N.npy``, N from 0 without gaps.

    An image is ``(H, W, 3)``, a label map ``(H, W)``, a depth map ``(H, W, 1)``, a map of normals
    ``(H, W, 3)``. Labels are whole numbers of any dtype, -1 where there is none; the others are
    floating. A depth of 0 and a normal of (0, 0, 0) stand for "no measurement".

    Names, shapes and dtypes of all files are checked here, from their headers; numbers when a file
    is read.

    Args:
        root: the folder of ``train`` and ``val``.
        split: ``"train"`` or ``"val"``.
        tasks: of ``"segment"``, ``"depth"``, ``"normal"``.
        classes: number of classes; labels are from -1 to ``classes - 1``.
        transform: takes ``(image, targets)`` and returns both; for augmentation.

    Raises:
        FileNotFoundError: a missing folder or file, by its name.
        ValueError: a file with another shape or dtype, or that is no array.

    ``dataset[n]`` is ``(image, {task: target})``: float32 of shapes ``(3, H, W)``, ``(1, H, W)``
    and ``(3, H, W)``, and int64 labels ``(H, W)``. It raises a ValueError that names the file for
    a label out of range or a number that is not finite.
    """

    def __init__(
        self,
        root: str | Path,
        split: str,
        tasks: Sequence[str],
        classes: int,
        transform: Callable[[Tensor, dict[str, Tensor]], Batch] | None = None,
    ) -> None:
        self.classes = classes
        self.transform = transform
        folder = Path(root) / split
        self.folders = {kind: find_folder(folder, kind) for kind in ("image", *tasks)}
        self.count = count_files(self.folders)
        self.size = check_headers(self.folders, self.count)

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Batch:
        if not 0 <= index < self.count:
            raise IndexError(index)
        arrays = {kind: self._read(kind, index) for kind in self.folders}
        image = arrays.pop("image")
        return self.transform(image, arrays) if self.transform else (image, arrays)

    def _read(self, kind: str, index: int) -> Tensor:
        path = self.folders[kind] / f"{index}.npy"
        array = np.load(path)
        if not np.isfinite(array).all():
            raise ValueError(
                f"Expected finite numbers in {path} but found NaN or infinity. "
                f"Write 0 where nothing was measured."
            )
        if KINDS[kind].whole:
            labels = array.astype(np.int64)
            low, high = labels.min(), labels.max()
            if low < IGNORED or high >= self.classes or (labels != array).any():
                raise ValueError(
                    f"Expected whole labels from {IGNORED} to {self.classes - 1} in {path} but "
                    f"found values from {array.min()} to {array.max()}. Set `classes` to the "
                    f"number of classes of this data, or mark other pixels with {IGNORED}."
                )
            return torch.from_numpy(labels)
        return torch.from_numpy(np.ascontiguousarray(array.transpose(2, 0, 1), dtype=np.float32))


def find_folder(split: Path, kind: str) -> Path:
    """The folder of a kind of file, under whichever of its names."""
    names = KINDS[kind].folders
    for name in names:
        if (split / name).is_dir():
            return split / name
    expected = " or ".join(str(split / name) for name in names)
    raise FileNotFoundError(f"Expected the folder {expected} but found none. {WHERE}")


def count_files(folders: dict[str, Path]) -> int:
    """The number of scenes; every folder must have the files 0.npy … of all of them."""
    found = {kind: {path.stem for path in folder.glob("*.npy")} for kind, folder in folders.items()}
    count = max(map(len, found.values()))
    if count == 0:
        raise FileNotFoundError(
            f"Expected the files 0.npy, 1.npy, … in {folders['image']} but found none. {WHERE}"
        )
    for kind, names in found.items():
        for index in range(count):
            if str(index) not in names:
                raise FileNotFoundError(
                    f"Expected the file {folders[kind] / f'{index}.npy'}, one of {count} scenes, "
                    f"but found none. Scenes are numbered from 0 without gaps, and every folder "
                    f"has all of them."
                )
    return count


def check_headers(folders: dict[str, Path], count: int) -> tuple[int, int]:
    """The size of the images, which every file must have; nothing but headers is read."""
    size: tuple[int, ...] = ()
    first = folders["image"] / "0.npy"
    for kind, folder in folders.items():
        channels, whole = KINDS[kind].channels, KINDS[kind].whole
        for index in range(count):
            path = folder / f"{index}.npy"
            try:
                array = np.load(path, mmap_mode="r")
            except (ValueError, EOFError, OSError) as error:
                raise ValueError(
                    f"Expected a complete .npy array in {path} but found something else ({error}). "
                    f"Copy or download it again."
                ) from error
            shape, dtype = array.shape, array.dtype
            size = size or shape[:2]
            expected = size if channels is None else (*size, channels)
            if shape != expected or len(size) != 2:
                shown = expected if len(size) == 2 else ("H", "W", *expected[2:])
                raise ValueError(
                    f"Expected shape {shown} in {path} but found {shape}. Every file has the "
                    f"height and width of {first}; channels come last."
                )
            if dtype.kind not in ("iuf" if whole else "f"):
                kinds = "whole or floating numbers" if whole else "floating numbers"
                raise ValueError(
                    f"Expected {kinds} in {path} but found {dtype}. Convert the array, images to "
                    f"[0, 1]."
                )
    height, width = size
    return height, width
