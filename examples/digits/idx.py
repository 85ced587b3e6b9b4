"""The file format of MNIST and of the data sets that took it over."""

from __future__ import annotations

import gzip
import math
import struct
import zlib
from pathlib import Path

import torch
from torch import Tensor

BYTES = 0x08  # the type code of unsigned bytes, the only one that these data sets have
DATA_SETS = (
    "Fashion-MNIST is in Debian's package dataset-fashion-mnist and at "
    "https://github.com/zalandoresearch/fashion-mnist; MNIST is downloaded by `source: mnist`"
)


def find_idx(folder: Path, name: str) -> Path:
    """The file ``name`` in ``folder``, packed (``.gz``) or not.

    Raises:
        FileNotFoundError: the folder or the file is missing; says where to get it.
    """
    if not folder.is_dir():
        raise FileNotFoundError(
            f"Expected a folder with the files of MNIST's format but found no folder {folder}. "
            f"Give it as `root`: {DATA_SETS}."
        )
    for path in (folder / name, folder / f"{name}.gz"):
        if path.is_file():
            return path
    raise FileNotFoundError(
        f"Expected {name} or {name}.gz in {folder} but found neither. {DATA_SETS}."
    )


def read_idx(path: Path, *sizes: int) -> Tensor:
    """An array of unsigned bytes.

    Args:
        path: the file; packed if its name ends with ``.gz``.
        sizes: of all dimensions after the first, ``28, 28`` for images and nothing for labels.

    Returns:
        Shape ``(N, *sizes)``, uint8.

    Raises:
        ValueError: the file has another type or shape, or ends too early or too late. Names it.
    """
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(
            f"Expected {path} to be a whole gzip file, but: {error}. Fetch it again."
        ) from error
    dimensions = 1 + len(sizes)
    start = 4 + 4 * dimensions
    magic = bytes([0, 0, BYTES, dimensions])
    if content[:4] != magic or len(content) < start:
        raise ValueError(
            f"Expected {path} to begin with {magic.hex()}, unsigned bytes in {dimensions} "
            f"dimensions, and their sizes, but found {content[:4].hex() or 'nothing'} and "
            f"{len(content)} bytes. Is it the right file?"
        )
    count, *found = struct.unpack(f">{dimensions}I", content[4:start])
    if tuple(found) != sizes:
        raise ValueError(f"Expected {path} to hold items of shape {sizes}, found {tuple(found)}.")
    if not count:
        raise ValueError(f"Expected {path} to hold at least one item, found none.")
    expected = count * math.prod(sizes)
    if len(content) - start != expected:
        raise ValueError(
            f"Expected {path} to hold {expected} bytes after its header of {start}, for {count} "
            f"items, found {len(content) - start}. Fetch it again."
        )
    return torch.frombuffer(bytearray(content[start:]), dtype=torch.uint8).view(count, *sizes)


def read_labelled(folder: Path, part: str, classes: int = 10) -> tuple[Tensor, Tensor]:
    """Images of 28x28 and their labels.

    Args:
        folder: of the four files.
        part: ``"train"`` or ``"t10k"``.
        classes: labels are from zero to one less than this.

    Returns:
        Shapes ``(N, 28, 28)`` and ``(N,)``, both uint8.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is damaged, the counts differ, or a label is out of range.
    """
    images_file = find_idx(folder, f"{part}-images-idx3-ubyte")
    labels_file = find_idx(folder, f"{part}-labels-idx1-ubyte")
    images, labels = read_idx(images_file, 28, 28), read_idx(labels_file)
    if len(images) != len(labels):
        raise ValueError(
            f"Expected as many labels in {labels_file} as images in {images_file}, {len(images)}, "
            f"found {len(labels)}."
        )
    if (worst := int(labels.max())) >= classes:
        raise ValueError(
            f"Expected labels from 0 to {classes - 1} in {labels_file}, found {worst} at position "
            f"{int(labels.argmax())}."
        )
    return images, labels
