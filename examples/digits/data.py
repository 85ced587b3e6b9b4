"""Images of two overlapping digits, from load_digits, MNIST, or a data set in MNIST's format."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningDataModule
from torch import Tensor

from examples.digits.idx import read_labelled

SIZE, CANVAS = 28, 32
# Source digits for validation, and as many for test.
HELD_OUT = {"digits": 300, "mnist": 10_000, "fashion-mnist": 10_000}
STAGES = {"train": 0, "val": 1, "test": 2}

Source = Literal["digits", "mnist", "fashion-mnist"]
Batch = tuple[Tensor, dict[str, Tensor]]


class Digits(NamedTuple):
    """Source digits: images ``(N, 1, 28, 28)`` and labels ``(N,)``, both uint8."""

    images: Tensor
    labels: Tensor

    def take(self, index: Tensor) -> Digits:
        return Digits(self.images[index], self.labels[index])


def compose(upper_left: Tensor, lower_right: Tensor) -> Tensor:
    """Put two digits on a canvas of 32x32, the brighter pixel on top, and resize it to 28x28.

    Args:
        upper_left: shape ``(B, 1, 28, 28)``, uint8.
        lower_right: likewise.

    Returns:
        Images of shape ``(B, 1, 28, 28)``, float32 in [0, 1].
    """
    canvas = F.pad(upper_left, (0, CANVAS - SIZE, 0, CANVAS - SIZE))
    corner = canvas[..., CANVAS - SIZE :, CANVAS - SIZE :]
    torch.maximum(corner, lower_right, out=corner)
    return F.interpolate(canvas.float() / 255, SIZE, mode="bilinear", align_corners=False)


def draw_pairs(count: int, digits: Digits, *entropy: int) -> Tensor:
    """Indices of shape ``(2, count)``, the same whenever ``entropy`` is."""
    seed = np.random.SeedSequence(entropy).generate_state(1, np.uint64)
    generator = torch.Generator().manual_seed(int(seed[0]))
    return torch.randint(len(digits.labels), (2, count), generator=generator)


def make_batch(digits: Digits, pairs: Tensor) -> Batch:
    """``(image, {"classify": upper-left label, "reconstruct": lower-right digit})``."""
    left, right = pairs
    target = digits.images[right]
    targets = {"classify": digits.labels[left].long(), "reconstruct": target.float() / 255}
    return compose(digits.images[left], target), targets


class FreshPairs:
    """A training loader that never shows the same pairs twice and can save its position.

    Batch number ``n``, counted over all epochs, depends on the seed, the rank and ``n`` alone, so
    a run that is resumed from a checkpoint sees what it would have seen.

    Args:
        digits: the source digits.
        pairs: pairs an epoch; an incomplete last batch is left out.
        batch_size: pairs a batch.
        seed: of the pairs.
        rank: which process this is; every one draws pairs of its own.
    """

    def __init__(
        self, digits: Digits, pairs: int, batch_size: int, seed: int = 0, rank: int = 0
    ) -> None:
        self.digits = digits
        self.batches = pairs // batch_size
        self.batch_size = batch_size
        self.seed = seed
        self.rank = rank
        self.position = 0  # the number of the next batch

    def __len__(self) -> int:
        return self.batches

    def __iter__(self) -> Iterator[Batch]:
        for _ in range(self.batches):
            entropy = (STAGES["train"], self.seed, self.rank, self.position)
            self.position += 1
            yield make_batch(self.digits, draw_pairs(self.batch_size, self.digits, *entropy))

    def state_dict(self) -> dict[str, int]:
        return {"seed": self.seed, "position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.seed, self.position = state["seed"], state["position"]


class FixedPairs:
    """A loader of the same pairs every time, for validation and test.

    Args:
        digits: the source digits.
        pairs: number of pairs.
        batch_size: pairs a batch; the last one may be smaller.
        seed: of the pairs.
    """

    def __init__(self, digits: Digits, pairs: int, batch_size: int, seed: int) -> None:
        self.digits = digits
        self.batches = draw_pairs(pairs, digits, seed).split(batch_size, dim=1)

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Batch]:
        for pairs in self.batches:
            yield make_batch(self.digits, pairs)


class DigitsDataModule(LightningDataModule):
    """The two-digit problem.

    The source digits are divided into training, validation and test *before* they are paired, so
    that no digit is seen on both sides. That division and the pairs of validation and test are
    the same in every run; the pairs of training are new every epoch and depend on the seed.

    Args:
        source: ``"digits"`` (scikit-learn's 1,797 real digits of 8x8, upscaled; no download) or
            ``"mnist"`` (which torchvision downloads) or ``"fashion-mnist"`` (70,000 real images of
            clothes in the same format; nothing is downloaded).
        root: folder of the images. Those of MNIST lie in ``root/MNIST/raw``, where torchvision
            puts them, those of Fashion-MNIST in ``root`` itself.
        batch_size: training pairs a batch, for each process.
        train_pairs: training pairs an epoch.
        eval_pairs: pairs for validation, and as many for test.
        seed: of the training pairs; by default the one given to ``seed_everything``.

    Raises:
        ImportError: the library that has the source digits is not installed.
    """

    def __init__(
        self,
        source: Source = "digits",
        root: str | Path = "data",
        batch_size: int = 32,
        train_pairs: int = 8000,
        eval_pairs: int = 2000,
        seed: int | None = None,
    ) -> None:
        super().__init__()
        if source not in HELD_OUT:
            raise ValueError(
                f"Expected `source` to be one of {list(HELD_OUT)} but found {source!r}."
            )
        if not 2 <= batch_size <= train_pairs:
            raise ValueError(
                f"Expected `batch_size` to be from 2 to {train_pairs}, the training pairs of an "
                f"epoch, but found {batch_size}."
            )
        require(source)
        self.source = source
        self.root = Path(root)
        self.batch_size = batch_size
        self.train_pairs = train_pairs
        self.eval_pairs = eval_pairs
        self.seed = seed
        self.digits: dict[str, Digits] = {}

    def prepare_data(self) -> None:
        """Download MNIST where it is not there yet."""
        if self.source == "mnist":
            download_mnist(self.root)

    def setup(self, stage: str = "fit") -> None:
        """Load the source digits, divided, once."""
        if not self.digits:
            if self.source == "digits":
                self.digits = load_sklearn()
            else:
                raw = self.root / "MNIST" / "raw" if self.source == "mnist" else self.root
                self.digits = load_idx(raw)

    def train_dataloader(self) -> FreshPairs:
        seed = torch.initial_seed() if self.seed is None else self.seed
        rank = self.trainer.global_rank if self.trainer else 0
        return FreshPairs(self.digits["train"], self.train_pairs, self.batch_size, seed, rank)

    def val_dataloader(self) -> FixedPairs:
        return FixedPairs(self.digits["val"], self.eval_pairs, 250, STAGES["val"])

    def test_dataloader(self) -> FixedPairs:
        return FixedPairs(self.digits["test"], self.eval_pairs, 250, STAGES["test"])

    def mean_image_mse(self, split: Literal["val", "test"] = "val") -> float:
        """Reconstruction error of the mean training digit, which any model should beat."""
        self.setup()
        mean = self.digits["train"].images.float().mean(0) / 255
        loader = self.val_dataloader() if split == "val" else self.test_dataloader()
        targets = torch.cat([targets["reconstruct"] for _, targets in loader])
        return F.mse_loss(mean.expand_as(targets), targets).item()


def require(source: Source) -> None:
    """Import what ``source`` needs: early, so that processes forked later need not do it."""
    if source == "fashion-mnist":  # read by our own reader
        return
    module, package, extra = {
        "digits": ("sklearn.datasets", "scikit-learn", "demo"),
        "mnist": ("torchvision.datasets", "torchvision", "vision"),
    }[source]
    try:
        __import__(module)
    except ImportError as error:
        raise ImportError(
            f"Expected {package} for `source: {source}` but found none. Install it with: "
            f'pip install "lightning-mtl[{extra}]"'
        ) from error


def load_sklearn() -> dict[str, Digits]:
    """scikit-learn's digits, upscaled to 28x28 and divided at random, always in the same way."""
    from sklearn.datasets import load_digits

    source = load_digits()
    images = torch.as_tensor(source.images, dtype=torch.float32).unsqueeze(1) / 16
    images = F.interpolate(images, SIZE, mode="bilinear", align_corners=False)
    digits = Digits(
        (images * 255).round().to(torch.uint8), torch.as_tensor(source.target, dtype=torch.uint8)
    )
    order = torch.randperm(len(digits.labels), generator=torch.Generator().manual_seed(0))
    held = HELD_OUT["digits"]
    parts = {"val": order[:held], "test": order[held : 2 * held], "train": order[2 * held :]}
    return {name: digits.take(index) for name, index in parts.items()}


def download_mnist(root: Path) -> None:
    """Download MNIST unless it is in ``root`` already.

    Raises:
        RuntimeError: it is not there and cannot be downloaded.
    """
    from torchvision.datasets import MNIST

    try:
        MNIST(root, download=True)
    except (OSError, RuntimeError) as error:
        raise RuntimeError(
            f"Expected MNIST in {root / 'MNIST' / 'raw'} or a connection to download it, but found "
            f"neither. Put the four files {[name for name, _ in MNIST.resources]} there, or use "
            f"`source: digits`, which needs no download."
        ) from error


def load_idx(folder: Path) -> dict[str, Digits]:
    """Four files in MNIST's format: the last 10,000 training images are for validation.

    Of fewer than 60,000 images it is the last sixth.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is damaged; see :func:`~examples.digits.idx.read_labelled`.
    """
    images, labels = read_labelled(folder, "train")
    whole = Digits(images.unsqueeze(1), labels)
    cut = len(labels) - min(HELD_OUT["mnist"], max(1, len(labels) // 6))
    if not cut:
        raise ValueError(
            f"Expected at least two training images in {folder}, one of them for validation, "
            f"found {len(labels)}."
        )
    images, labels = read_labelled(folder, "t10k")
    return {
        "train": Digits(whole.images[:cut], whole.labels[:cut]),
        "val": Digits(whole.images[cut:], whole.labels[cut:]),
        "test": Digits(images.unsqueeze(1), labels),
    }
