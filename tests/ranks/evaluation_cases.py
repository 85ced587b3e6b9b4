"""Evaluations on data with missing labels, cut over processes."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import IterableDataset
from torchmetrics import (
    MeanAbsoluteError,
    MeanMetric,
    MeanSquaredError,
    Metric,
    MetricCollection,
    PearsonCorrCoef,
    SpearmanCorrCoef,
)
from torchmetrics.classification import MulticlassAccuracy, MulticlassAUROC
from torchmetrics.wrappers import ClasswiseWrapper, MinMaxMetric, Running

from lightning_mtl import MinNorm, MultiTaskModule, Task
from tests.common.models import Batched

WIDTHS = {"a": 1, "b": 1, "c": 3, "d": 2}
# Which tasks have labels in the batches of each rank, with the sizes of the batches.
LAYOUTS: dict[str, list[list[tuple[int, str]]]] = {
    "each on one rank": [[(5, "a"), (3, "a")], [(4, "b"), (6, "b")]],
    "on the first rank": [[(5, "ab"), (3, "b")], [(4, "a"), (6, "a")]],
    "on the second rank": [[(5, "a"), (3, "a")], [(4, "ab"), (6, "bcd")]],
    "in some batches": [[(5, "ab"), (3, "a"), (3, "bc")], [(4, "a"), (6, "b"), (3, "ad")]],
    "uneven batches": [[(5, "abcd")], [(4, "bcd"), (6, "acd"), (2, "abd"), (3, "cd")]],
    "no labels of one task": [[(5, "acd"), (3, "cd")], [(4, "a"), (6, "ac")]],
    "no batch on one rank": [[(5, "abcd"), (3, "ac")], []],
    "everything everywhere": [[(5, "abcd"), (3, "abcd")], [(4, "abcd"), (6, "abcd")]],
}


class Images(Metric):
    """Mean sizes, from lists of dicts; keeps an entry an image as mean average precision does."""

    higher_is_better = True
    found: list[Tensor]
    wanted: list[Tensor]

    def __init__(self) -> None:
        super().__init__()
        self.add_state("found", [], dist_reduce_fx=None)
        self.add_state("wanted", [], dist_reduce_fx=None)

    def update(
        self, predictions: list[dict[str, Tensor]], targets: list[dict[str, Tensor]]
    ) -> None:
        self.found += [p["boxes"] for p in predictions]
        self.wanted += [t["boxes"] for t in targets]

    def compute(self) -> dict[str, Any]:
        pairs = zip(self.found, self.wanted, strict=True)
        error = torch.stack([(p - t).abs().sum() for p, t in pairs]).mean()
        return {"error": error, "images": torch.tensor(len(self.found)), "boxes": torch.ones(3)}


def box_loss(predictions: list[dict[str, Tensor]], targets: list[dict[str, Tensor]]) -> Tensor:
    """The mean over images."""
    pairs = zip(predictions, targets, strict=True)
    return torch.stack([(p["boxes"] - t["boxes"]).square().mean() for p, t in pairs]).mean()


def tasks() -> dict[str, Task]:
    """Every kind of metric: sums, lists, moments, dicts, several of them."""
    classes = {
        "each": ClasswiseWrapper(MulticlassAccuracy(3, average=None)),
        "auroc": MulticlassAUROC(3, thresholds=None),
        "range": MinMaxMetric(MulticlassAccuracy(3, average="micro")),
        "inner": MetricCollection([MulticlassAccuracy(3, average="weighted")]),
    }
    moments = [MeanAbsoluteError(), PearsonCorrCoef(), SpearmanCorrCoef()]
    return {
        "a": Task(nn.MSELoss(), {"mse": MeanSquaredError(), "twice": MeanSquaredError() * 2.0}),
        "b": Task(nn.L1Loss(), moments),
        "c": Task(nn.CrossEntropyLoss(), classes),
        "d": Task(box_loss, Images()),
    }


class Measured(MultiTaskModule):
    """Linear heads; the last task predicts lists of dicts."""

    def __init__(self, declared: bool = True, **kwargs: Any) -> None:
        super().__init__(tasks() if declared else None, **kwargs)
        torch.manual_seed(3)
        self.trunk = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh())
        self.heads = nn.ModuleDict({f"head_{t}": nn.Linear(5, n) for t, n in WIDTHS.items()})

    def forward(self, x: Tensor) -> dict[str, Any]:
        z = self.trunk(x)
        found: dict[str, Any] = {t: self.heads[f"head_{t}"](z) for t in WIDTHS}
        found["a"], found["b"] = found["a"].squeeze(-1), found["b"].squeeze(-1)
        # As many boxes as an image has of them.
        found["d"] = [{"boxes": row.expand(1 + i % 3, -1)} for i, row in enumerate(found["d"])]
        return found

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
        plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, factor=0.5)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": plateau, "monitor": "val/loss/b"},
        }


class Undeclared(Measured):
    """Its own losses; asks for the default steps; other tasks in each batch."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(declared=False, **kwargs)

    def task_losses(self, batch: Any, batch_idx: int) -> dict[str, Any]:
        x, targets = batch
        predictions = self(x)
        losses = {"a": nn.MSELoss(), "b": nn.L1Loss()}
        return {t: losses[t](predictions[t], y) for t, y in targets.items() if t in losses}

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        super().validation_step(batch, batch_idx)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        super().test_step(batch, batch_idx)


class OwnHooks(Measured):
    """Overrides hooks, calls no ``super()``, and reads what was logged."""

    read: Any = None

    def on_validation_epoch_end(self) -> None:
        self.read = sorted(self.trainer.callback_metrics)


class Endless(IterableDataset[Any]):
    """A loader of unknown length."""

    def __init__(self, found: list[Any]) -> None:
        self.found = found

    def __iter__(self) -> Iterator[Any]:
        return iter(self.found)


def batches(layout: str, rank: int) -> list[Any]:
    """The batches of a rank."""
    generator = torch.Generator().manual_seed(10 + rank)
    found = []
    for size, labelled in LAYOUTS[layout][rank]:
        x = torch.randn(size, 4, generator=generator)
        noise = torch.randn(size, generator=generator)
        targets: dict[str, Any] = {
            "a": x.sum(1) + noise,
            "b": 20 * x.prod(1) - noise,
            "c": torch.arange(size) % 3,
            "d": [{"boxes": row[:2].expand(1 + i % 3, 2)} for i, row in enumerate(x)],
        }
        found.append((x, {t: y for t, y in targets.items() if t in labelled}))
    return found


def joined(layout: str) -> list[Any]:
    """The batches of all ranks, for one process."""
    return [batch for rank in range(len(LAYOUTS[layout])) for batch in batches(layout, rank)]


class Watching(Callback):
    """Another callback, first in the list of the user."""

    seen: Any = None

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: Any) -> None:
        self.seen = sorted(trainer.callback_metrics)

    def on_test_epoch_end(self, trainer: Trainer, pl_module: Any) -> None:
        self.on_validation_epoch_end(trainer, pl_module)


class Failing(MeanMetric):
    """Fails where it is told to."""

    fails = False

    def update(self, prediction: Tensor, target: Tensor) -> None:
        super().update(prediction)

    def compute(self) -> Tensor:
        if self.fails:
            raise ArithmeticError("there is no such mean")
        return super().compute()


def failing(rank: int, world: int) -> str:
    """A metric that fails on the second rank only."""
    module = Measured()
    module.tasks["a"].metrics["val"].add_metrics({"failing": Failing()})
    module.tasks["a"].metrics["val"]["failing"].fails = rank == 1
    data = Batched(batches("everything everywhere", rank))
    try:
        make(world).validate(module, data, verbose=False)
    except (ArithmeticError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


class Stateless(MeanMetric):
    """Counts in a plain attribute, of which no other process knows."""

    def __init__(self, **kwargs: Any) -> None:
        Metric.__init__(self, **kwargs)
        self.batches = 0

    def update(self, prediction: Tensor, target: Tensor) -> None:
        self.batches += 1

    def compute(self) -> Tensor:
        return torch.tensor(float(self.batches))


def added(what: str, rank: int, world: int) -> Any:
    """One more metric of the first task: its value, or the error."""
    metric = {
        "running": lambda: Running(MeanSquaredError(), window=2),
        "stateless": Stateless,
        "by itself": lambda: Stateless(sync_on_compute=False),
    }[what]()
    module = Measured()
    module.tasks["a"].metrics["val"].add_metrics({"added": metric})
    layout = "everything everywhere"
    data = batches(layout, rank) if world > 1 else joined(layout)
    trainer = make(world)
    try:
        trainer.validate(module, Batched(data), verbose=False)
    except ValueError as error:
        return str(error)
    return float(trainer.callback_metrics["val/a/added"])


def make(world: int, callbacks: Any = (), **kwargs: Any) -> Trainer:
    """A silent Trainer on CPUs."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    defaults: dict[str, Any] = {"logger": False, "enable_checkpointing": False}
    return Trainer(
        accelerator="cpu",
        devices=world,
        strategy="ddp" if world > 1 else "auto",
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        callbacks=list(callbacks),
        **{**defaults, **kwargs},
    )


def numbers(run: Trainer) -> dict[str, float]:
    """What callbacks see."""
    return {name: float(value) for name, value in run.callback_metrics.items()}


BASELINE = {"a": {"mse": 3.0}}


def run(case: str, rank: int, world: int) -> Any:
    """One case on one rank; rank 0 of 1 has all data."""
    what, _, layout = case.partition("|")
    if what == "fit":
        return fit(Path(layout), rank, world)
    if what == "failing":
        return failing(rank, world)
    if what == "random":
        return drawn(rank, world)
    if what == "added":
        return added(layout, rank, world)
    data = batches(layout, rank) if world > 1 else joined(layout)
    loader: Any = Batched(data)
    if layout == "no batch on one rank":
        loader = torch.utils.data.DataLoader(Endless(data), batch_size=None)
    watching, module = Watching(), Measured()
    if what == "baseline":
        counted = {"a": {"val/a/mse": False}}  # the product does not say which way is better
        module = Measured(baseline=BASELINE, delta_p_metrics=counted)
    elif what == "undeclared":
        module = Undeclared()
    elif what == "hooks":
        module = OwnHooks()
    trainer = make(world, [watching])
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # what Lightning says of logging by ranks
        warnings.filterwarnings("ignore", message=".*does not have many workers")
        if what == "test":
            returned = trainer.test(module, loader, verbose=False)
        else:
            returned = trainer.validate(module, loader, verbose=False)
    assert returned == [numbers(trainer)]
    read = getattr(module, "read", None)
    return {"numbers": numbers(trainer), "seen": watching.seen, "read": read}


class Drawn(MeanMetric):
    """Draws a number when it is computed, as metrics with subsets do."""

    def update(self, prediction: Tensor, target: Tensor) -> None:
        super().update(prediction)

    def compute(self) -> Tensor:
        return super().compute() + torch.rand(())


def drawn(rank: int, world: int) -> dict[str, float]:
    """Every rank with random numbers of its own."""
    module = Measured()
    module.tasks["a"].metrics["val"].add_metrics({"drawn": Drawn()})
    torch.manual_seed(rank)
    trainer = make(world)
    trainer.validate(module, Batched(batches("everything everywhere", rank)), verbose=False)
    return numbers(trainer)


def fit(folder: Path, rank: int, world: int) -> dict[str, Any]:
    """A fit whose schedule, checkpoint and end depend on a task that one rank has alone."""
    train = batches("everything everywhere", rank)
    watched = batches("uneven batches", rank)  # first a sanity check, with BatchNorm
    keep = ModelCheckpoint(folder, monitor="val/b/MeanAbsoluteError", filename="{epoch}-{step}")
    stop = EarlyStopping("val/loss/b", patience=2)
    trainer = make(
        world,
        [MinNorm(), keep, stop],
        max_epochs=6,
        enable_checkpointing=True,
        val_check_interval=1,
    )
    trainer.fit(Measured(), Batched(train), Batched(watched))
    return {
        "numbers": numbers(trainer),
        "rate": trainer.optimizers[0].param_groups[0]["lr"],
        "best": Path(keep.best_model_path).name,
        "score": float(keep.best_model_score),
        "steps": trainer.global_step,
        "wait": stop.wait_count,
    }
