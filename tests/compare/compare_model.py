"""A model of two tasks and its data, small enough to be compared within seconds."""

from __future__ import annotations

import ctypes
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset
from torchmetrics import MeanSquaredError
from torchmetrics.classification import MulticlassAccuracy

from lightning_mtl import GradientBalancer, MultiTaskModule, Task


class TwoTasks(MultiTaskModule):
    """Class and value of points in six dimensions, from one hidden layer."""

    def __init__(
        self,
        width: int = 8,
        lr: float = 0.1,
        baseline: str | None = None,
        measured: Literal["all", "classify", "none"] = "all",
    ) -> None:
        super().__init__(
            tasks={
                "classify": Task(
                    nn.CrossEntropyLoss(),
                    None if measured == "none" else MulticlassAccuracy(num_classes=3),
                ),
                "regress": Task(nn.MSELoss(), MeanSquaredError() if measured == "all" else None),
            },
            baseline=baseline,
        )
        self.save_hyperparameters()
        self.trunk = nn.Sequential(nn.Linear(6, width), nn.Tanh())
        heads = {"classify": nn.Linear(width, 3), "regress": nn.Linear(width, 1)}
        self.heads = nn.ModuleDict(heads)

    def forward(self, inputs: Tensor) -> dict[str, Tensor]:
        hidden = self.trunk(inputs)
        return {task: head(hidden) for task, head in self.heads.items()}

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), self.hparams.lr)

    def predict_step(self, batch: list) -> dict[str, Tensor]:
        return self(batch[0])


def plain_loss(prediction, target):  # type: ignore[no-untyped-def] # as most people write it
    return (prediction - target).abs().mean()


class Given(MultiTaskModule):
    """Tasks and baseline as they are given."""

    def __init__(self, tasks: dict[str, Task], **kwargs) -> None:  # type: ignore[no-untyped-def]
        super().__init__(tasks, **kwargs)


class Points(LightningDataModule):
    """The same points in every run, shuffled by the run's seed."""

    def __init__(self, size: int = 96, batch_size: int = 8) -> None:
        super().__init__()
        self.batch_size = batch_size
        generator = torch.Generator().manual_seed(0)
        inputs = torch.randn(size, 6, generator=generator)
        noise = torch.randn(size, 1, generator=generator)
        classes = (inputs[:, :3] + 0.5 * noise).argmax(1)
        values = inputs[:, 2:4].prod(1, keepdim=True) + 0.1 * noise
        points = [
            (x, {"classify": c, "regress": v})
            for x, c, v in zip(inputs, classes, values, strict=True)
        ]
        self.parts = [points[i::3] for i in range(3)]

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.parts[0], self.batch_size, shuffle=True)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(self.parts[1], self.batch_size)

    def test_dataloader(self) -> DataLoader:
        return DataLoader(self.parts[2], self.batch_size)

    def predict_dataloader(self) -> DataLoader:
        return DataLoader(TensorDataset(torch.zeros(4, 6)), batch_size=2)


class Untested(LightningDataModule):
    """Training data only."""

    def train_dataloader(self) -> DataLoader:
        return Points().train_dataloader()


class Nothing(Points):
    """No training data."""

    def train_dataloader(self) -> None:
        return None


class Empty(IterableDataset):
    """Data of which nobody knows beforehand that there is none."""

    def __iter__(self) -> Iterator[Tensor]:
        return iter(())


class NoBatch(Points):
    """A training loader without a batch."""

    def train_dataloader(self) -> DataLoader:
        return DataLoader(Empty())


class LateNone(Points):
    """Decides in ``setup`` that there is no validation."""

    def setup(self, stage: str) -> None:
        self.parts[1] = None

    def val_dataloader(self) -> DataLoader | None:
        return None if self.parts[1] is None else super().val_dataloader()


class LateError(Points):
    """Finds in ``setup`` that its files are missing."""

    def setup(self, stage: str) -> None:
        raise FileNotFoundError("no archive in this folder")


class LateEnd(Points):
    """Ends the process that sets it up."""

    def setup(self, stage: str) -> None:
        os._exit(3)


class NoTest(Points):
    """Test data that cannot be had."""

    def test_dataloader(self) -> DataLoader:
        raise LookupError("no test data")


class NoValidation(LightningDataModule):
    """Training data and test data only."""

    def train_dataloader(self) -> DataLoader:
        return Points(size=24).train_dataloader()

    def test_dataloader(self) -> DataLoader:
        return Points(size=24).test_dataloader()


class SameData(Points):
    """Validation data once more, called test data."""

    def test_dataloader(self) -> DataLoader:
        return self.val_dataloader()


class Leaving(TwoTasks):
    """Ends the process that builds it."""

    def __init__(self) -> None:
        super().__init__()
        raise SystemExit(0)


class Broken(GradientBalancer):
    """Fails at its first step."""

    def weights(self, gramian: Tensor, losses: Tensor) -> Tensor:
        raise ArithmeticError("this balancer always fails")


class Killed(GradientBalancer):
    """Ends its process, as a system without memory does."""

    def weights(self, gramian: Tensor, losses: Tensor) -> Tensor:
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError


class StuckLoading(Points):
    """Once a comparison has begun, a worker of its loader hangs in C code, and writes who it is."""

    def __init__(self, size: int = 24) -> None:
        super().__init__(size)

    def train_dataloader(self) -> DataLoader:
        return DataLoader(_StuckPoints(self.parts[0]), self.batch_size, num_workers=1)


class _StuckPoints(Dataset):
    def __init__(self, points: list) -> None:
        self.points = points

    def __len__(self) -> int:
        return len(self.points)

    def __getitem__(self, index: int) -> object:
        if Path("out/comparison.json").exists():
            hang()
        return self.points[index]


class Picky(GradientBalancer):
    """Takes a number only."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        if rate <= 0:
            raise ValueError(f"Expected `rate` above 0 but found {rate}.")
        self.rate = rate


def hang() -> None:
    """Call C code that never returns and never lets another thread run; write down who it is."""
    Path("stuck.pid").write_text(str(os.getpid()))
    ctypes.PyDLL(None).sleep(100_000)


class Stuck(GradientBalancer):
    """Calls C code that never returns and never lets another thread run; writes down who it is."""

    def weights(self, gramian: Tensor, losses: Tensor) -> Tensor:
        raise AssertionError(hang())


class Wordy(GradientBalancer):
    """Fails with an error of a megabyte, in letters that break what reads lines or UTF-8."""

    def weights(self, gramian: Tensor, losses: Tensor) -> Tensor:
        raise ArithmeticError("head \ud800 \u2028 \x1b[2J \u202e <b>&" + "x" * 1_000_000 + "\ntail")
