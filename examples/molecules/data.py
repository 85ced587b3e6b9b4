"""QM9 through PyTorch Geometric's own loader: standardised targets, the published division."""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch_geometric.datasets import QM9
from torch_geometric.loader import DataLoader

from examples.molecules.graphs import completed, with_lengths

# Task: its column in PyTorch Geometric's QM9, and what its errors are multiplied with: energies are
# in eV there and in meV in the table.
TARGETS = {
    "mu": (0, 1),
    "alpha": (1, 1),
    "HOMO": (2, 1000),
    "LUMO": (3, 1000),
    "R2": (5, 1),
    "ZPVE": (6, 1000),
    "U0": (12, 1000),
    "U": (13, 1000),
    "H": (14, 1000),
    "G": (15, 1000),
    "cv": (11, 1),
}
RAW = ("gdb9.sdf", "gdb9.sdf.csv", "uncharacterized.txt")
WHERE = (
    "`download: true` lets PyTorch Geometric fetch them; `python -m examples.molecules.convert "
    "--out FOLDER` writes them from the package qm9pack."
)


class MoleculesDataModule(LightningDataModule):
    """Molecules of QM9, or of files in its form, with standardised targets.

    A batch is ``(graphs, {task: target})``; targets are float32 of shape ``(N,)``, with mean 0 and
    deviation 1 over *all* molecules, as published. Graphs are a batch of PyTorch Geometric's, whose
    edges have five features: the kind of the bond, and the length.

    Args:
        root: the folder of PyTorch Geometric's ``raw`` and ``processed``.
        split: a file with a permutation of the molecules, saved by torch, as in the repository
            median-research-group/LibMTL (``examples/qm9/random_split.t``); the first ``held_out``
            are for the test, as many for validation. Default: a permutation that is always the
            same one.
        held_out: molecules for validation, and as many for test. Default 10,000, as in DB-MTL
            (arXiv:2308.12029, section 4.2), of which is the next one as well.
        batch_size: molecules a batch, for each process.
        complete: an edge between every two atoms, as published; else the bonds alone, which are an
            eighth of them.
        download: let PyTorch Geometric fetch what is missing.
        workers: processes that load.

    Attributes:
        deviation: of the targets, by task, in the units of the table: what a standardised error of
            1 means.

    Raises:
        FileNotFoundError: a missing folder or file.
        ValueError: a permutation of other molecules; an argument out of range.
    """

    def __init__(
        self,
        root: str | Path,
        split: str | Path | None = None,
        held_out: int = 10_000,
        batch_size: int = 128,
        complete: bool = True,
        download: bool = False,
        workers: int = 0,
    ) -> None:
        super().__init__()
        for name, value in (("held_out", held_out), ("batch_size", batch_size)):
            if value < 1:
                raise ValueError(f"Expected `{name}` to be at least 1 but found {value}.")
        self.root = Path(root)
        self.split = None if split is None else Path(split)
        self.held_out = held_out
        self.batch_size = batch_size
        self.complete = complete
        self.download = download
        self.workers = workers
        self.parts: dict[str, QM9] = {}
        self.deviation: dict[str, float] = {}

    def prepare_data(self) -> None:
        """Fetch and process what is missing, once, in one process."""
        self._read()

    def setup(self, stage: str = "fit") -> None:
        """Read all molecules, standardise their targets, divide them."""
        if self.parts:
            return
        dataset = self._read()
        order = self._order(len(dataset))
        targets = dataset._data.y  # of all molecules; `dataset.y` would be a copy
        columns = [column for column, _ in TARGETS.values()]
        chosen = targets[:, columns]
        if not chosen.isfinite().all():
            row = int((~chosen.isfinite()).any(dim=1).nonzero()[0])
            raise ValueError(
                f"Expected finite targets in {self.root / 'raw' / RAW[1]} but found "
                f"{chosen[row].tolist()} for molecule {row}. Repair the file and remove "
                f"{self.root / 'processed'}."
            )
        std, mean = torch.std_mean(chosen, dim=0)
        if (std == 0).any():
            constant = [task for task, value in zip(TARGETS, std, strict=True) if value == 0]
            raise ValueError(f"Expected targets that differ, but found one value for {constant}.")
        dataset._data.y = (chosen - mean) / std
        scales = [scale for _, scale in TARGETS.values()]
        self.deviation = {
            task: float(value) * scale
            for task, value, scale in zip(TARGETS, std, scales, strict=True)
        }
        n = self.held_out
        parts = {"test": order[:n], "val": order[n : 2 * n], "train": order[2 * n :]}
        self.parts = {name: dataset[part] for name, part in parts.items()}

    def _read(self) -> QM9:
        processed = self.root / "processed" / "data_v3.pt"
        missing = [name for name in RAW if not (self.root / "raw" / name).is_file()]
        if missing and not self.download:
            raise FileNotFoundError(
                f"Expected the files {list(RAW)} in {self.root / 'raw'} but did not find "
                f"{missing}. {WHERE}"
            )
        try:
            return QM9(str(self.root))
        except (IndexError, KeyError, ValueError, AttributeError, OSError) as error:
            raise ValueError(
                f"Expected QM9's files in {self.root / 'raw'}, as many rows of {RAW[1]} as "
                f"molecules of {RAW[0]}, but PyTorch Geometric cannot read them ("
                f"{type(error).__name__}: {error}). Copy them again and remove {processed.parent}."
            ) from error

    def _order(self, count: int) -> Tensor:
        if self.split is None:
            order = torch.randperm(count, generator=torch.Generator().manual_seed(0))
        else:
            order = read_order(self.split, count)
        if count <= 2 * self.held_out:
            raise ValueError(
                f"Expected more than {2 * self.held_out} molecules in {self.root} but found "
                f"{count}, so that none is left to train on. Lower `held_out`."
            )
        return order

    def train_dataloader(self) -> DataLoader:
        return self._loader("train", shuffle=True)

    def val_dataloader(self) -> DataLoader:
        return self._loader("val")

    def test_dataloader(self) -> DataLoader:
        return self._loader("test")

    def _loader(self, part: str, **options: Any) -> DataLoader:
        return DataLoader(
            self.parts[part],
            self.batch_size,
            num_workers=self.workers,
            persistent_workers=self.workers > 0,
            **options,
        )

    def on_after_batch_transfer(
        self, batch: Any, dataloader_idx: int
    ) -> tuple[Any, dict[str, Tensor]]:
        """Make the edges on the device, whole batches at once, and name the targets."""
        targets = dict(zip(TARGETS, batch.y.unbind(dim=1), strict=True))
        return with_lengths(completed(batch) if self.complete else batch), targets


def read_order(path: Path, count: int) -> Tensor:
    """A permutation of ``count`` molecules, as torch saved it."""
    if not path.is_file():
        raise FileNotFoundError(
            f"Expected the permutation of the molecules in {path} but found no file. It is "
            f"examples/qm9/random_split.t of the repository median-research-group/LibMTL; leave "
            f"out `split` for another one."
        )
    try:
        found = torch.load(path, weights_only=True)
    except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise ValueError(f"Expected a tensor in {path} but found {error}.") from error
    order = torch.as_tensor(found)
    if order.shape != (count,) or not torch.equal(order.sort().values, torch.arange(count)):
        raise ValueError(
            f"Expected a permutation of the {count} molecules in {path} but found shape "
            f"{tuple(order.shape)} and dtype {order.dtype}. It belongs to another data set."
        )
    return order


def check_targets(tasks: Sequence[str]) -> tuple[str, ...]:
    """``tasks`` as a tuple of known names."""
    if not tasks or not set(tasks) <= set(TARGETS) or len(set(tasks)) != len(tasks):
        raise ValueError(f"Expected `tasks` to be some of {list(TARGETS)} but found {list(tasks)}.")
    return tuple(tasks)
