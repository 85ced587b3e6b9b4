"""Objects of the first hour that are none, in a wrong place, or of another task."""

from __future__ import annotations

import sys
from typing import Any

import lightning
import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torchmetrics import MeanSquaredError
from torchmetrics.classification import MulticlassAccuracy

from lightning_mtl import MinNorm, MultiTaskModule, Task, TaskTensioner
from tests.common.models import Balanced, Network, loader, sgd, trainer


class Declared(MultiTaskModule):
    """Two tasks of one number each, of which some may be declared otherwise."""

    def __init__(self, **others: Task) -> None:
        super().__init__({"a": Task(nn.MSELoss()), "b": Task(nn.MSELoss()), **others})
        torch.manual_seed(1)
        self.net = Network()

    def forward(self, x: Tensor) -> Any:
        return self.net(x)

    def configure_optimizers(self) -> Any:
        return sgd(self.parameters())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Task(nn.MSELoss), r"an object but got the class MSELoss.*`?Task\(MSELoss\(...\)"),
        (lambda: Task(nn.MSELoss(), MeanSquaredError), r"the class MeanSquaredError. Make one"),
        (lambda: Task(nn.MSELoss(), {"mse": "mse"}), "objects of torchmetrics but got 'mse'"),
        (lambda: Task(nn.MSELoss(), "mse"), "objects of torchmetrics but got 'mse'"),
        (lambda: MultiTaskModule([Task(nn.MSELoss())]), r"got \['Task'\]. Give every task its na"),
        (lambda: MultiTaskModule("ab"), "got 'ab'. Give every task its name"),
        (lambda: MultiTaskModule(["a"], baseline=[0.1]), "got list. Give each value the names"),
    ],
)
def test_classes_and_words_for_objects(make: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        make()


@pytest.mark.parametrize("callback", ["MinNorm", ("a", 1)])
def test_callbacks_that_are_none(callback: Any) -> None:
    error, message = MisconfigurationException, r"callbacks as objects but found .*MinNorm"
    if lightning.__version__ == "2.5.0":  # which refuses it by itself, when the Trainer is made
        error, message = ValueError, r"^Expected a parent$"
    with pytest.raises(error, match=message):
        trainer(callbacks=[callback]).fit(Declared(), loader(8))


def test_a_balancer_in_an_attribute_is_no_callback() -> None:
    module = Declared()
    module.balancer = MinNorm()
    with pytest.warns(UserWarning, match=r"holds MinNorm in `balancer`, .* takes no part"):
        trainer().fit(module, loader(8))
    trainer(callbacks=[module.balancer]).fit(module, loader(8))
    wrapping = TaskTensioner(module.balancer)
    trainer(callbacks=[wrapping]).fit(module, loader(8))


def test_a_loss_without_a_return() -> None:
    run = trainer()
    with pytest.warns(UserWarning, match="loss of task 'b' returned None .*missing") as told:
        run.fit(Declared(b=Task(lambda p, t: None)), loader(8))
    assert run.global_step == 2
    assert sum("returned None" in str(one.message) for one in told) == 1


@pytest.mark.skipif(sys.version_info < (3, 11), reason="errors have notes from 3.11 on")
def test_errors_of_losses_and_metrics_name_the_task() -> None:
    given = "(4,) and torch.float32, its target a tensor of shape (4,) and torch.float32."
    for module, what in (
        (Declared(b=Task(nn.functional.embedding)), "the loss"),
        (Declared(b=Task(nn.MSELoss(), {"acc": MulticlassAccuracy(3)})), "the metric `acc`"),
    ):
        with pytest.raises(Exception) as caught:  # noqa: PT011 # whichever torch has
            trainer(limit_val_batches=1).validate(module, loader(8))
        assert caught.value.__notes__ == [
            f"This was {what} of task 'b'. Its prediction is a tensor of shape {given}"
        ]


@pytest.mark.skipif(sys.version_info < (3, 11), reason="errors have notes from 3.11 on")
def test_a_backward_pass_of_ones_own() -> None:
    class Own(Balanced):
        def task_losses(self, batch: Any, batch_idx: int) -> Any:
            losses = super().task_losses(batch, batch_idx)
            sum(losses.values()).backward()
            return losses

    for callbacks in ([], [MinNorm()]):
        with pytest.raises(RuntimeError) as caught:
            trainer(callbacks=callbacks).fit(Own(), loader(8))
        assert "`.backward()` in `task_losses`" in caught.value.__notes__[0]
