"""Validation and test of one process: weights of means, dicts, structures, and what is run."""

from __future__ import annotations

import csv
from collections import namedtuple
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torchmetrics import MeanSquaredError, MetricCollection
from torchmetrics.classification import MulticlassAccuracy
from torchmetrics.wrappers import BootStrapper, ClasswiseWrapper, MetricTracker, MultioutputWrapper

from lightning_mtl import MinNorm, MultiTaskModule, Task
from lightning_mtl.trainer.samples import samples, samples_of_batch
from tests.common.models import (
    TASKS,
    Balanced,
    Batched,
    Network,
    Plain,
    loader,
    sgd,
    trainer,
    weights,
)
from tests.ranks.evaluation_cases import Images, box_loss

Pair = namedtuple("Pair", ["first", "second"])


def validated(module: Any, data: Any, **kwargs: Any) -> dict[str, float]:
    """What a validation logs."""
    run = trainer(**kwargs)
    run.validate(module, data, verbose=False)
    return {name: float(value) for name, value in run.callback_metrics.items()}


# ------------------------------------------------------------------------------ means by samples

TARGETS = {
    "tensor": torch.zeros,
    "list of dicts": lambda n: [{"boxes": torch.zeros(1 + i % 2, 4)} for i in range(n)],
    "tuple of dicts": lambda n: tuple({"boxes": torch.zeros(3, 4)} for _ in range(n)),
    "dict of tensors": lambda n: {"boxes": torch.zeros(n, 4), "labels": torch.zeros(n)},
    "dict of dicts": lambda n: {"x": {"y": torch.zeros(n, 2)}, "scale": torch.tensor(2.0)},
    "dict with names": lambda n: {"boxes": torch.zeros(n, 4), "names": ["cat", "dog", "bird"]},
    "dict of lists": lambda n: {"boxes": [torch.zeros(2, 4)] * n, "labels": [torch.zeros(2)] * n},
    "collated pair": lambda n: [torch.zeros(n), torch.zeros(n, 3)],
    "named pair": lambda n: Pair(torch.zeros(n), torch.zeros(n, 3)),
    "one tensor a sample": lambda n: [torch.zeros(5) for _ in range(n)],
    "ragged": lambda n: [torch.zeros(1 + i) for i in range(n)],
    "names": lambda n: ["label"] * n,
    "lengths that differ": lambda n: {"values": torch.zeros(n), "offsets": torch.zeros(n + 1)},
    "an object": lambda n: object(),
}


class Given(MultiTaskModule):
    """The loss of a batch stands in its inputs."""

    def __init__(self, count: Any = None) -> None:
        super().__init__({"a": Task(lambda p, t: p.mean(), count=count)})

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"a": x}


@pytest.mark.parametrize("make", TARGETS.values(), ids=TARGETS)
def test_means_are_weighted_by_samples(make: Any) -> None:
    data = Batched(
        [(torch.full((n,), float(loss)), {"a": make(n)}) for n, loss in ((9, 1), (1, 9))]
    )
    assert validated(Given(), data)["val/loss/a"] == pytest.approx(1.8)


@pytest.mark.parametrize("number", [float, torch.tensor], ids=["number", "tensor"])
def test_counts_may_be_fractions(number: Any) -> None:
    data = Batched(
        [(torch.full((3,), v), {"a": n}) for n, v in ((0.4, 1.0), (0.1, 6.0), (0.0, 9.0))]
    )
    logged = validated(Given(number), data)
    assert logged["val/loss/a"] == pytest.approx((0.4 * 1 + 0.1 * 6) / 0.5)


@pytest.mark.parametrize("number", [np.int64, np.float32, lambda n: torch.tensor([n])])
def test_counts_of_any_number_type(number: Any) -> None:
    data = Batched([(torch.full((3,), v), {"a": n}) for n, v in ((4, 1.0), (1, 6.0), (0, 9.0))])
    assert validated(Given(number), data)["val/loss/a"] == pytest.approx(2.0)


@pytest.mark.parametrize("count", [lambda n: torch.ones(2), lambda n: "3", lambda n: -1])
def test_a_count_that_is_not_one_number(count: Any) -> None:
    with pytest.raises(ValueError, match=r"task 'a' .*number of valid labels\), a finite number"):
        validated(Given(count), Batched([(torch.zeros(3), {"a": 3})]))


def test_a_batch_without_a_batch_dimension_counts_once() -> None:
    data = Batched([(torch.full((4,), v), {"a": torch.tensor(0.0)}) for v in (1.0, 2.0)])
    assert validated(Given(), data)["val/loss/a"] == pytest.approx(1.5)


def test_samples_that_nothing_tells() -> None:
    target = {"x": torch.zeros(2), "y": torch.zeros(3)}
    message = r"samples in the target of task 'a' but found \[2, 3\] in the dict.*Task\(count="
    with pytest.raises(ValueError, match=message):
        validated(Given(), Batched([(torch.zeros(5), {"a": target})]))
    with pytest.raises(ValueError, match=r"samples in a batch but found \[2, 3\].*Return"):
        samples_of_batch((torch.zeros(2), torch.zeros(3)), "Return pairs.")
    assert samples_of_batch([torch.zeros(7, 2), {"a": torch.zeros(7)}], "") == 7
    assert samples_of_batch({"x": [1, 2], "y": torch.zeros(6)}, "") == 6
    assert samples(None, torch.zeros(3), "", "") == 1


# ----------------------------------------------------------- metrics of dicts, lists and vectors


class Classes(MultiTaskModule):
    """Predictions are the inputs."""

    def __init__(self, metrics: Any, loss: Any = None, **kwargs: Any) -> None:
        super().__init__({"a": Task(loss or nn.CrossEntropyLoss(), metrics)}, **kwargs)

    def forward(self, x: Any) -> dict[str, Any]:
        return {"a": x}


POINTS = Batched([(torch.eye(3)[[0, 1, 2, 0]], {"a": torch.tensor([0, 1, 1, 2])})])


def test_a_dict_is_logged_by_name() -> None:
    classwise = ClasswiseWrapper(MulticlassAccuracy(3, average=None), labels=["x", "y", "z"])
    each = {f"each/multiclassaccuracy_{n}": v for n, v in (("x", 1.0), ("y", 0.5), ("z", 0.0))}
    nested = MetricCollection([MulticlassAccuracy(3, average="micro")])
    logged = validated(Classes({"each": classwise, "all": nested}), POINTS)
    expected = {f"val/a/{name}": value for name, value in each.items()}
    expected |= {"val/a/all_MulticlassAccuracy": 0.5}
    del logged["val/loss/a"]
    assert logged == pytest.approx(expected)
    booted = BootStrapper(MulticlassAccuracy(3), num_bootstraps=4)
    assert {"val/a/BootStrapper/mean", "val/a/BootStrapper/std"} < set(
        validated(Classes(booted), POINTS)
    )


def boxes(sizes: list[int]) -> tuple[Any, Any]:
    targets = [{"boxes": torch.ones(n, 4)} for n in sizes]
    return [{"boxes": torch.zeros(n, 4)} for n in sizes], {"a": targets}


def test_predictions_may_be_lists_of_dicts() -> None:
    logged = validated(Classes(Images(), box_loss), Batched([boxes([1, 2]), boxes([3])]))
    assert logged == {
        "val/loss/a": 1.0,
        "val/a/Images/error": 8.0,
        "val/a/Images/images": 3.0,
    }


@pytest.mark.parametrize(
    ("metric", "shape"),
    [
        (MulticlassAccuracy(3, average=None), r"Tensor of shape \(3,\)"),
        (MultioutputWrapper(MeanSquaredError(), 3), r"Tensor of shape \(3,\)"),
    ],
)
def test_a_vector_is_refused_before_training(metric: Any, shape: str) -> None:
    module = Classes(metric, nn.MSELoss() if "Multioutput" in type(metric).__name__ else None)
    module.weight = nn.Parameter(torch.ones(1))
    module.configure_optimizers = lambda: torch.optim.SGD(module.parameters(), lr=0.1)
    data = POINTS
    if "Multioutput" in type(metric).__name__:
        data = Batched([(torch.eye(3), {"a": torch.ones(3, 3)})])
    message = rf"^Expected the metric `val/a/.*` to be a number .* but got {shape}.*Average it"
    run = trainer()
    with pytest.raises(ValueError, match=message):
        run.fit(module, data, data)
    assert run.global_step == 0


def test_a_tracker_is_refused() -> None:
    with pytest.raises(TypeError, match=r"^Expected .* got a MetricTracker. Give the metric that"):
        Task(nn.MSELoss(), MetricTracker(MeanSquaredError()))


def test_delta_p_of_a_dict_names_its_entry() -> None:
    data = Batched([boxes([1, 2])])
    message = r"Δp but found \['val/a/Images/error', .*`delta_p_metrics`.*such as 'Images/error'"
    with pytest.raises(ValueError, match=message):
        validated(Classes(Images(), box_loss, baseline={"a": {"Images": 4.0}}), data)
    module = Classes(
        Images(),
        box_loss,
        baseline={"a": {"Images/error": 4.0}},
        delta_p_metrics={"a": {"val/a/Images/error": False}},
    )
    logged = validated(module, data)
    assert logged["val/a/Images/error"] == 6.0
    assert logged["val/delta_p/a"] == pytest.approx(-50.0)
    run = trainer()
    run.test(module, data, verbose=False)
    assert float(run.callback_metrics["test/delta_p/a"]) == pytest.approx(-50.0)


def test_delta_p_survives_hooks_of_ones_own() -> None:
    class Own(Balanced):
        def on_validation_epoch_end(self) -> None:
            self.read = set(self.trainer.callback_metrics)

    class Further(Own):
        def on_validation_epoch_end(self) -> None:
            super().on_validation_epoch_end()
            self.log("val/late", 1.0)

    for kind in (Own, Further):
        errors = {task: {"MeanSquaredError": 1.0} for task in TASKS}
        module = kind(baseline=errors)
        logged = validated(module, loader(16))
        assert set(logged) >= {"val/delta_p", "val/delta_p/a", "val/delta_p/b", "val/loss/a"}
        assert {"val/loss/a", "val/a/MeanSquaredError"} < module.read


def test_every_validation_starts_afresh(tmp_path: Path) -> None:
    """In mid-epoch, after a sanity check, and with a limit."""
    logger = CSVLogger(tmp_path, name="", version="")
    run = trainer(tmp_path, logger=logger, val_check_interval=10, limit_val_batches=2)
    module = Balanced()
    run.fit(module, loader(), loader(16))
    last = {n: float(v) for n, v in run.callback_metrics.items() if n.startswith("val/")}
    again = validated(module, loader(16), limit_val_batches=2)
    assert last == pytest.approx(again)
    with (tmp_path / "metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["val/loss/a"]]
    assert [row["step"] for row in rows] == ["9", "19"]
    assert float(rows[-1]["val/a/MeanSquaredError"]) == pytest.approx(
        last["val/a/MeanSquaredError"]
    )


# ----------------------------------------------------------------------- what nobody asked for


class Ported(MultiTaskModule):
    """Its own losses and no validation."""

    def __init__(self, tasks: Any = TASKS) -> None:
        super().__init__(tasks)
        torch.manual_seed(1)
        self.net = Network()
        self.modes: list[bool] = []

    def forward(self, x: Tensor) -> Any:
        return self.net(x)

    def task_losses(self, batch: Any, batch_idx: int) -> Any:
        self.modes.append(self.training)
        losses = {t: (y - batch[1][t]).square().mean() for t, y in self.net(batch[0]).items()}
        self.log("train_loss", sum(losses.values()).detach())
        return losses

    def configure_optimizers(self) -> Any:
        return sgd(self.parameters())


@pytest.mark.parametrize("tasks", [TASKS, None], ids=["named", "undeclared"])
def test_no_validation_that_nobody_asked_for(tmp_path: Path, tasks: Any) -> None:
    module = Ported(tasks)
    logger = CSVLogger(tmp_path, name="", version="")
    run = trainer(tmp_path, logger=logger, log_every_n_steps=20, callbacks=[MinNorm()])
    run.fit(module, loader())  # plain Lightning says nothing without a loader
    assert all(module.modes)
    with (tmp_path / "metrics.csv").open() as file:
        assert len([row for row in csv.DictReader(file) if row["train_loss"]]) == 1
    with pytest.warns(UserWarning, match="have no `validation_step`. Skipping val loop"):
        trainer().fit(module, loader(), loader(16))
    assert all(module.modes)
    for stage, step in (("validate", "validation_step"), ("test", "test_step")):
        with pytest.raises(MisconfigurationException, match=rf"No `{step}\(\)` method defined"):
            getattr(trainer(), stage)(module, loader(16), verbose=False)
    (first, *_) = trainer().predict(module, Batched([torch.zeros(2, 4)]))
    assert set(first) == set(TASKS)


def test_the_default_step_for_those_who_call_it() -> None:
    class Asked(Ported):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            super().validation_step(batch, batch_idx)

    module = Asked()
    expected = validated(Balanced(), loader(16))
    logged = validated(module, loader(16))
    assert logged.pop("train_loss") > 0
    assert logged == pytest.approx({f"val/loss/{t}": expected[f"val/loss/{t}"] for t in TASKS})


class Theirs(LightningModule):
    """Another library's module."""

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("theirs", 1.0)


def test_the_step_of_another_base_class() -> None:
    class Both(Ported, Theirs):
        pass

    class First(Theirs, Ported):
        pass

    assert validated(Both(), loader(16)) == validated(First(), loader(16)) == {"theirs": 1.0}


# ------------------------------------------------------------ training_step called in validation


class Reused(Balanced):
    """As in many Lightning modules."""

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.training_step(batch, batch_idx), batch_size=len(batch[0]))

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.log("test_loss", self.training_step(batch, batch_idx), batch_size=len(batch[0]))


@pytest.mark.parametrize("balancers", [[], [MinNorm]], ids=["none", "MinNorm"])
def test_training_step_in_validation_is_the_sum_of_the_losses(balancers: Any) -> None:
    module, plain = Reused(), Balanced()
    run = trainer(callbacks=[b() for b in balancers])
    run.fit(module, loader(), loader(16))
    trainer(callbacks=[b() for b in balancers]).fit(plain, loader(), loader(16))
    assert torch.equal(weights(module), weights(plain))
    logged = validated(plain, loader(16))
    total = logged["val/loss/a"] + logged["val/loss/b"]
    assert float(run.callback_metrics["val_loss"]) == pytest.approx(total)
    assert validated(module, loader(16))["val_loss"] == pytest.approx(total)  # after a fit
    assert validated(Reused(), loader(16))["val_loss"] > 0  # and before any
    run = trainer()
    run.test(module, loader(16), verbose=False)
    assert float(run.callback_metrics["test_loss"]) == pytest.approx(total)


def test_validation_step_called_in_test_tests() -> None:
    class Same(Balanced):
        def test_step(self, batch: Any, batch_idx: int) -> None:
            self.validation_step(batch, batch_idx)

    found = []
    for kind in (Same, Balanced):
        run = trainer()
        run.test(kind(), loader(16), verbose=False)
        found.append({name: float(value) for name, value in run.callback_metrics.items()})
    assert found[0] == found[1]
    assert set(found[0]) == {
        f"test/{n}" for t in TASKS for n in (f"loss/{t}", f"{t}/MeanSquaredError")
    }


def test_validation_equals_plain_lightning() -> None:
    plain, module = Plain(), Balanced()
    expected = validated(plain, loader(10, batch_size=4))
    logged = validated(module, loader(10, batch_size=4))
    assert expected == pytest.approx({n: logged[n] for n in expected}, rel=1e-6)
