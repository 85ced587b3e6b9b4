"""A loader a domain: every batch holds images of each, and every task has images of its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities import CombinedLoader
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision.transforms import functional as TF

from examples.office.files import WHERE, DomainImages, check_domains

# Of ImageNet, on which the published network was trained.
MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
OFFICE_31 = ("amazon", "dslr", "webcam")
SPLITS = ("train", "val", "test")


class OfficeDataModule(LightningDataModule):
    """Domains of images in the published form, see :class:`~examples.office.files.DomainImages`.

    A batch is ``({domain: images}, {domain: labels})``; images are float32 of shape
    ``(N, 3, size, size)``, normalised with ImageNet's mean and deviation. In training every one has
    images of all domains that train, so an epoch is as long as the largest domain and smaller ones
    start again within it, as published; validation and test see every image once, so later batches
    have fewer domains. Single-task runs load their own domain alone, for as many steps an epoch as
    with all of them.

    Args:
        root: the folder of the domains' folders.
        splits: the folder of the split files; ``root`` by default.
        domains: names of the split files and of the tasks. Default: those of Office-31.
        classes: number of classes: 31 for Office-31, 65 for Office-Home, 10 for the stand-in.
        size: height and width to which images are resized, in pixels. Default 224, as in DB-MTL
            (arXiv:2308.12029, section 4.3), of which is the next one as well.
        batch_size: images of each domain in a batch, for each process. An incomplete last training
            batch of a domain is left out.
        preload: keep decoded images in memory, for data sets that fit.
        workers: processes that load, for each domain.

    Raises:
        FileNotFoundError: a missing folder or file.
        ValueError: a file that is not what it should be; an argument out of range.
    """

    def __init__(
        self,
        root: str | Path,
        splits: str | Path | None = None,
        domains: Sequence[str] = OFFICE_31,
        classes: int = 31,
        size: int = 224,
        batch_size: int = 64,
        preload: bool = False,
        workers: int = 0,
    ) -> None:
        super().__init__()
        self.root = Path(root)
        self.splits = self.root if splits is None else Path(splits)
        self.domains = check_domains(domains)
        if batch_size < 2:
            raise ValueError(
                f"Expected `batch_size` to be at least 2 but found {batch_size}: batch "
                f"normalisation needs two images of a domain."
            )
        if classes < 2 or size < 1:
            raise ValueError(
                f"Expected `classes` of at least 2 and `size` of at least 1 but found {classes} "
                f"and {size}."
            )
        self.classes = classes
        self.size = size
        self.batch_size = batch_size
        self.preload = preload
        self.workers = workers
        self.parts: dict[str, dict[str, DomainImages]] = {}

    def setup(self, stage: str = "fit") -> None:
        """Check all files, once."""
        if self.parts:
            return
        for folder in (self.root, self.splits):
            if not folder.is_dir():
                raise FileNotFoundError(
                    f"Expected the folder {folder}, of images or split files, but found none. "
                    f"{WHERE}"
                )
        parts = {split: {d: self._images(d, split) for d in self.domains} for split in SPLITS}
        for domain, images in parts["train"].items():
            if len(images) < self.batch_size:
                raise ValueError(
                    f"Expected at least one batch of {self.batch_size} images in "
                    f"{self.splits / f'{domain}_train.txt'} but found {len(images)}. Lower "
                    f"`batch_size`."
                )
        self.parts = parts

    def _wanted(self) -> tuple[str, ...]:
        """The domains that train; all of them where there is no module to ask."""
        module = getattr(self.trainer, "lightning_module", None)
        active = getattr(module, "active_tasks", None) or self.domains
        return tuple(domain for domain in self.domains if domain in active)

    def _images(self, domain: str, split: str) -> DomainImages:
        listing = self.splits / f"{domain}_{split}.txt"
        preload = self.preload and domain in self._wanted()
        return DomainImages(self.root, listing, self.classes, self.size, preload)

    def train_dataloader(self) -> CombinedLoader:
        return self._loaders("train", "max_size_cycle", shuffle=True, drop_last=True)

    def val_dataloader(self) -> CombinedLoader:
        return self._loaders("val", "max_size")

    def test_dataloader(self) -> CombinedLoader:
        return self._loaders("test", "max_size")

    def _loaders(self, split: str, mode: Any, **options: Any) -> CombinedLoader:
        loaders: dict[str, Any] = {}
        for domain, images in self.parts[split].items():
            loader = DataLoader(
                images,
                self.batch_size,
                num_workers=self.workers,
                persistent_workers=self.workers > 0,
                **options,
            )
            # A domain that does not train has numbers instead of images, for as many steps.
            loaders[domain] = loader if domain in self._wanted() else range(len(loader))
        return CombinedLoader(loaders, mode)

    def on_before_batch_transfer(
        self, batch: Mapping[str, Any], dataloader_idx: int
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """``{domain: (images, labels)}`` to inputs and targets.

        Without domains that are over, whose place is empty, and those that do not train.
        """
        there = {domain: pair for domain, pair in batch.items() if isinstance(pair, list)}
        images, labels = ({d: pair[part] for d, pair in there.items()} for part in (0, 1))
        return images, labels

    def on_after_batch_transfer(
        self, batch: tuple[dict[str, Tensor], dict[str, Tensor]], dataloader_idx: int
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Normalise on the device, whole batches at once, to which bytes have travelled."""
        images, labels = batch
        return {d: TF.normalize(x.float() / 255, MEAN, STD) for d, x in images.items()}, labels
