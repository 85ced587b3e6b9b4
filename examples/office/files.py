"""Office-31 and Office-Home on disk: a folder of images a domain, text files that list them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as TF

WHERE = (
    "Office-31 and Office-Home are to be had from their authors, the published split files from "
    "examples/office/data_txt of the repository median-research-group/LibMTL; "
    "`python -m examples.office.standin --out FOLDER` writes small images in the same form."
)


class DomainImages(Dataset[tuple[Tensor, int]]):
    """The images that a split file lists, with their labels.

    A line is ``relative/path.jpg LABEL``: a path below ``root``, and a class from 0. Images of any
    size and mode are made RGB and resized to ``(size, size)`` whatever their proportions, as
    published.

    Lines, labels and the headers of all images are checked here; an image is decoded when it is
    read, or here with ``preload``.

    Args:
        root: the folder of the domains' folders.
        listing: the split file, ``{domain}_{train,val,test}.txt``.
        classes: labels are from 0 to ``classes - 1``.
        size: height and width of what the network sees, in pixels.
        preload: keep all images in memory, decoded: ``3 size²`` bytes each.

    Raises:
        FileNotFoundError: a missing file, by its name and the line that lists it.
        ValueError: a line without a label, a label out of range, a file that is no image.

    ``dataset[n]`` is ``(image, label)``: uint8 of shape ``(3, size, size)``, and a whole number.
    """

    def __init__(
        self, root: Path, listing: Path, classes: int, size: int, preload: bool = False
    ) -> None:
        self.size = size
        self.paths, self.labels = read_listing(root, listing, classes)
        self.pixels: Tensor | None = None
        if preload:
            self.pixels = torch.stack([self._decode(path) for path in self.paths])
        else:
            for path in self.paths:
                check_header(path)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        pixels = self._decode(self.paths[index]) if self.pixels is None else self.pixels[index]
        return pixels, self.labels[index]

    def _decode(self, path: Path) -> Tensor:
        try:
            with Image.open(path) as image:
                small = TF.resize(
                    image.convert("RGB"), [self.size, self.size], InterpolationMode.BILINEAR
                )
        except (OSError, SyntaxError) as error:  # what PIL raises for broken files
            raise not_an_image(path, error) from error
        return TF.pil_to_tensor(small)


def read_listing(root: Path, listing: Path, classes: int) -> tuple[list[Path], list[int]]:
    """Paths and labels of a split file, all of them there and in range."""
    if not listing.is_file():
        raise FileNotFoundError(f"Expected the split file {listing} but found none. {WHERE}")
    paths: list[Path] = []
    labels: list[int] = []
    for number, line in enumerate(listing.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        path, label = split_line(line, listing, number)
        if not 0 <= label < classes:
            raise ValueError(
                f"Expected labels from 0 to {classes - 1} in {listing} but found {label} in line "
                f"{number}. Set `classes` to the number of classes of this data."
            )
        if not (root / path).is_file():
            raise FileNotFoundError(
                f"Expected the image {root / path}, which line {number} of {listing} lists, but "
                f"found none. Is `root` the folder of the domains' folders? {WHERE}"
            )
        paths.append(root / path)
        labels.append(label)
    if not paths:
        raise ValueError(f"Expected images in {listing} but found no line. {WHERE}")
    return paths, labels


def split_line(line: str, listing: Path, number: int) -> tuple[str, int]:
    """The path and the label of a line; a path may hold spaces."""
    path, _, label = line.strip().rpartition(" ")
    if not path or not label.isdecimal():
        raise ValueError(
            f"Expected `relative/path.jpg LABEL` in line {number} of {listing}, with a whole "
            f"label from 0, but found {line.strip()!r}."
        )
    return path.strip(), int(label)


def check_header(path: Path) -> None:
    """Refuse a file that is no image; nothing but its header is read."""
    try:
        with Image.open(path):
            pass
    except (UnidentifiedImageError, OSError) as error:
        raise not_an_image(path, error) from error


def not_an_image(path: Path, error: Exception) -> ValueError:
    return ValueError(
        f"Expected an image in {path} but it cannot be decoded ({error}). Copy or download it "
        f"again."
    )


def check_domains(domains: Sequence[str]) -> tuple[str, ...]:
    """``domains`` as a tuple of different names."""
    if not domains or len(set(domains)) != len(domains):
        raise ValueError(f"Expected `domains` to be different names but found {list(domains)}.")
    return tuple(domains)
