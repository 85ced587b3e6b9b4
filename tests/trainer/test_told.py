"""What has no effect, or another than one may think, is said; searches without a balancer."""

from __future__ import annotations

import copy
from typing import Any

import lightning.pytorch
import pytest
import pytorch_lightning
import torch
from lightning.pytorch.callbacks import BatchSizeFinder, LearningRateFinder
from lightning.pytorch.tuner import Tuner
from torch.utils.data import DataLoader

from lightning_mtl import (
    CentralDirection,
    DualBalance,
    EqualWeighting,
    GradientMonitor,
    LogLoss,
    MinNorm,
    MultiTaskModule,
    TaskTensioner,
)
from tests.common.models import Balanced, Plain, Samples, loader, trainer, weights

PACKAGES = r"`pytorch_lightning` and `lightning\.pytorch` are different packages"


# ------------------------------------------------------------------- a switch without effect


@pytest.mark.parametrize("switch", [True, False])
def test_automatic_optimization_of_a_class_is_refused(switch: bool) -> None:
    message = rf"`automatic_optimization = {switch}` of Own has no effect: .* Remove it"
    with pytest.raises(TypeError, match=message):
        type("Own", (Balanced,), {"automatic_optimization": switch})


def test_automatic_optimization_of_another_base_is_refused() -> None:
    class Theirs(lightning.pytorch.LightningModule):
        automatic_optimization = False

    with pytest.raises(TypeError, match="`automatic_optimization = False` of Theirs has no effect"):
        type("Own", (Balanced, Theirs), {})


@pytest.mark.parametrize("switch", [True, False])
@pytest.mark.parametrize("when", ["after", "later", "in a hook"])
def test_automatic_optimization_of_an_object_is_said(switch: bool, when: str) -> None:
    class Own(Balanced):
        def __init__(self) -> None:
            super().__init__()
            if when == "after":
                self.automatic_optimization = switch

        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
            if when == "in a hook":
                self.automatic_optimization = switch

    def fitted() -> Own:
        module = Own()
        if when == "later":
            module.automatic_optimization = switch
        trainer(callbacks=[MinNorm()]).fit(module, loader())
        return module

    with pytest.warns(UserWarning, match=r"has no effect: MultiTaskModule runs the backward"):
        module = fitted()
    whole = Balanced()
    trainer(callbacks=[MinNorm()]).fit(whole, loader())
    assert torch.equal(weights(module), weights(whole))


# ------------------------------------------------------------------- nothing to balance, to log


@pytest.mark.parametrize("make", [MinNorm, CentralDirection, DualBalance, TaskTensioner])
@pytest.mark.parametrize("how", ["declared", "active", "from the batch", "outside"])
def test_one_task(make: Any, how: str) -> None:
    class One(Balanced):
        def task_losses(self, batch: Any, batch_idx: int) -> Any:
            x, targets = batch
            losses = {t: (y - targets[t]).square().mean() for t, y in self.net(x).items()}
            return {"a": losses["a"]} if how in ("declared", "from the batch") else losses

    arguments: dict[str, Any] = {
        "declared": {"tasks": ["a"]},
        "active": {"active_tasks": ["a"]},
        "from the batch": {},
        "outside": {"unbalanced_tasks": ["b"]},
    }[how]
    module, name = One(**arguments), type(make()).__name__
    if how == "from the batch":
        module._declared = None
    with pytest.warns(UserWarning, match=rf"{name} has the gradient of 'a' only, and with one"):
        trainer(callbacks=[make()]).fit(module, loader())


def test_one_task_without_a_gradient_balancer_needs_no_word() -> None:
    for callbacks in ([], [LogLoss()], [EqualWeighting()]):
        trainer(callbacks=callbacks).fit(Balanced(active_tasks=["a"]), loader())


def test_a_monitor_without_a_logger() -> None:
    with pytest.warns(UserWarning, match="GradientMonitor.*logger"):
        trainer(callbacks=[GradientMonitor()]).fit(Balanced(), loader())


# ------------------------------------------------------------------- the other package


def test_a_module_of_the_other_package() -> None:
    class Theirs(pytorch_lightning.LightningModule):
        pass

    for bases in ((MultiTaskModule, Theirs), (Theirs, MultiTaskModule)):
        with pytest.raises(TypeError, match=rf"Both derives from .*\. {PACKAGES}"):
            type("Both", bases, {})


@pytest.mark.parametrize("make", [MinNorm, LogLoss, GradientMonitor])
def test_a_trainer_of_the_other_package(make: Any) -> None:
    class Theirs(pytorch_lightning.LightningModule):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            raise AssertionError("nothing is trained")

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD([torch.nn.Parameter(torch.ones(1))])

    callback = make()
    with pytest.raises(
        TypeError, match=rf"The Trainer is that of `pytorch_lightning`\. {PACKAGES}"
    ):
        callback.setup(pytorch_lightning.Trainer(accelerator="cpu", logger=False), Theirs(), "fit")


# ------------------------------------------------------------------- searches


class Searched(Balanced):
    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.lr, self.batch_size = 0.01, 4

    def train_dataloader(self) -> DataLoader:
        return DataLoader(Samples(64), batch_size=self.batch_size)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(Samples(8), batch_size=4)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=self.lr)


class PlainSearched(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.lr, self.batch_size = 0.01, 4

    train_dataloader = Searched.train_dataloader
    val_dataloader = Searched.val_dataloader
    configure_optimizers = Searched.configure_optimizers


@pytest.mark.filterwarnings("ignore:.*max_lr.*")
def test_a_search_for_a_learning_rate_is_lightnings(tmp_path: Any) -> None:
    found = []
    for module in (Searched(), PlainSearched()):
        before = copy.deepcopy(module.state_dict())
        run = trainer(tmp_path)
        finder = Tuner(run).lr_find(module, num_training=20, min_lr=1e-4, max_lr=1e-1)
        assert finder is not None
        assert all(torch.equal(v, before[k]) for k, v in module.state_dict().items())
        found.append((finder.results["lr"], finder.results["loss"], finder.suggestion()))
        run.fit(module)  # goes on as it should after the search
        assert run.global_step > 0
    ours, plain = found
    assert ours[0] == plain[0]
    assert ours[1] == pytest.approx(plain[1], rel=1e-5)
    assert ours[2] == plain[2]


def test_a_search_for_a_batch_size_is_lightnings(tmp_path: Any) -> None:
    found = []
    for module in (Searched(), PlainSearched()):
        found.append(Tuner(trainer(tmp_path)).scale_batch_size(module, max_trials=3))
        assert module.batch_size == found[-1]
    assert found[0] == found[1]


@pytest.mark.parametrize("make", [LearningRateFinder, BatchSizeFinder])
def test_searching_callbacks(make: Any, tmp_path: Any) -> None:
    callback = make(num_training_steps=4) if make is LearningRateFinder else make(max_trials=1)
    module, run = Searched(), trainer(tmp_path, callbacks=[callback], max_steps=3)
    run.fit(module)
    assert run.global_step == 3
    assert module.last_step is not None
