"""Real images in four renderings, written in the form of Office-31: a data set for a CPU.

``python -m examples.office.standin --out FOLDER`` writes scikit-learn's digits; with ``--images
FOLDER`` the clothes of Fashion-MNIST. Every image is in one domain only, as in the published data.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from examples.digits.idx import read_labelled

Array = NDArray[np.float64]

SIDE = 28  # pixels
CLOTHES = (
    *("t-shirt", "trouser", "pullover", "dress", "coat"),
    *("sandal", "shirt", "sneaker", "bag", "ankle-boot"),
)
DIGITS = tuple(map(str, range(10)))
SHARES = {"plain": 0.4, "inverted": 0.2, "sketch": 0.2, "coloured": 0.2}  # of the source images
# Of a domain. Published are 60, 20 and 20 %; with more to test on, fewer seeds tell methods apart.
SPLITS = {"train": 0.3, "val": 0.1, "test": 0.6}


def plain(image: Array, rng: np.random.Generator) -> Array:
    """Light on black, as it is."""
    return np.repeat(image[..., None], 3, axis=-1)


def inverted(image: Array, rng: np.random.Generator) -> Array:
    """Dark on white."""
    return 1 - plain(image, rng)


def sketch(image: Array, rng: np.random.Generator) -> Array:
    """Black lines on white where the brightness changes: the length of its gradient."""
    down, right = np.gradient(image)
    return 1 - plain(np.minimum(2 * np.hypot(down, right), 1), rng)


def coloured(image: Array, rng: np.random.Generator) -> Array:
    """In a colour, before a noisy background of another one."""
    own, other = rng.uniform(0.2, 1, 3), rng.uniform(0, 0.8, 3)
    background = other + 0.15 * rng.standard_normal((*image.shape, 3))
    cover = image[..., None]
    return np.clip(cover * own + (1 - cover) * background, 0, 1)


RENDERINGS: dict[str, Callable[[Array, np.random.Generator], Array]] = {
    "plain": plain,
    "inverted": inverted,
    "sketch": sketch,
    "coloured": coloured,
}


def load_digits() -> tuple[Array, NDArray[np.int64]]:
    """scikit-learn's 1,797 digits, enlarged to 28x28, in [0, 1], and their labels."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    small = np.round(images.reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)
    large = [
        np.asarray(Image.fromarray(i).resize((SIDE, SIDE), Image.Resampling.BILINEAR))
        for i in small
    ]
    return np.stack(large) / 255, labels


def load_clothes(folder: Path) -> tuple[Array, NDArray[np.int64]]:
    """Fashion-MNIST's 60,000 training images, in [0, 1], and their labels."""
    images, labels = read_labelled(folder, "train")
    return images.numpy() / 255, labels.numpy().astype(np.int64)


def write(out: Path, images: Path | None = None, count: int | None = None, seed: int = 0) -> None:
    """Write ``out/DOMAIN/images/CLASS/frame_N.png`` and ``out/DOMAIN_{train,val,test}.txt``.

    Args:
        out: a new folder.
        images: the folder of Fashion-MNIST; digits without it.
        count: how many source images are used, drawn at random; all of them by default.
        seed: of the draw, of the division and of the colours.

    Raises:
        FileExistsError: there is something in ``out`` already.
        FileNotFoundError: no such folder of Fashion-MNIST, or a file is missing in it.
        ValueError: ``count`` is too small for one image a split, or larger than there are images.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise FileExistsError(
            f"Expected {out} to be a new or empty folder but found something there. Give another "
            f"`--out`, or remove it first."
        )
    source, labels = load_digits() if images is None else load_clothes(images)
    names = DIGITS if images is None else CLOTHES
    count = len(source) if count is None else count
    if not 100 <= count <= len(source):
        raise ValueError(f"Expected `count` from 100 to {len(source)} but found {count}.")
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(source))[:count]
    for domain, indices in zip(SHARES, divide(order, list(SHARES.values())), strict=True):
        lines = []
        for number, index in enumerate(indices):
            name = f"{domain}/images/{names[labels[index]]}/frame_{number:05d}.png"
            path = out / name
            path.parent.mkdir(parents=True, exist_ok=True)
            rendered = RENDERINGS[domain](source[index], rng)
            Image.fromarray(np.round(255 * rendered).astype(np.uint8)).save(path)
            lines.append(f"{name} {labels[index]}\n")
        parts = divide(np.arange(len(lines)), list(SPLITS.values()))
        for split, part in zip(SPLITS, parts, strict=True):
            text = "".join(lines[i] for i in part)
            (out / f"{domain}_{split}.txt").write_text(text, encoding="utf-8")


def divide(items: NDArray[np.int64], shares: list[float]) -> list[NDArray[np.int64]]:
    """Consecutive parts of these shares."""
    ends = np.round(np.cumsum(shares)[:-1] * len(items)).astype(int)
    return np.split(items, ends)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        "python -m examples.office.standin", description="Write a stand-in for Office-31."
    )
    parser.add_argument("--out", type=Path, required=True, help="a new folder")
    parser.add_argument("--images", type=Path, help="the folder of Fashion-MNIST (default: digits)")
    parser.add_argument("--count", type=int, help="source images (default: all)")
    parser.add_argument("--seed", type=int, default=0)
    options = vars(parser.parse_args(arguments))
    try:
        write(**options)
    except (ValueError, OSError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
