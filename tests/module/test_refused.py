"""What a MultiTaskModule does not train with: refused with the cure, and nothing is lost."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import pytorch_lightning
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import BackboneFinetuning, BatchSizeFinder, LearningRateFinder
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.tuner import Tuner
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_mtl import (
    CentralDirection,
    DualBalance,
    EqualWeighting,
    LogLoss,
    MinNorm,
    Scalarization,
)
from tests.common.faulty import batches, fitted, parameters, same
from tests.common.models import Balanced, Plain, Samples, sgd, trainer


class Tunable(Balanced):
    """Has all that the tuning callbacks ask for, so that only the refusal can stop them."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.lr, self.batch_size = 0.01, 4

    @property
    def backbone(self) -> Any:
        return self.net.trunk

    def train_dataloader(self) -> DataLoader:
        return DataLoader(Samples(24), batch_size=self.batch_size)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(Samples(8), batch_size=self.batch_size)


class OwnStep(Tunable):
    """Ported from plain Lightning without a look at the documentation."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, targets = batch
        return sum((y - targets[t]).square().mean() for t, y in self.net(x).items())


@pytest.fixture
def _alone() -> Iterator[None]:
    """Leave no process group and no address behind."""
    before = dict(os.environ)
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    os.environ.clear()
    os.environ.update(before)


def scaled() -> MixedPrecision:
    return MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))


FLAGS: dict[str, tuple[Callable[[], dict[str, Any]], str]] = {
    "LearningRateFinder": (
        lambda: {"callbacks": [LearningRateFinder(num_training_steps=2), MinNorm()]},
        r"LearningRateFinder is not supported with Tunable: it .* Compare learning rates in short",
    ),
    "BatchSizeFinder": (
        lambda: {"callbacks": [BatchSizeFinder(max_trials=1), LogLoss()]},
        r"BatchSizeFinder is not supported with Tunable: it .* Try batch sizes in short fits",
    ),
    "BackboneFinetuning": (
        lambda: {"callbacks": [BackboneFinetuning(unfreeze_backbone_at_epoch=1)]},
        r"BackboneFinetuning is not supported with Tunable: .* trunk frozen and no gradient bal",
    ),
    "foreign callback": (
        lambda: {"callbacks": [pytorch_lightning.callbacks.LambdaCallback()]},
        # Lightning 2.5 says it in its own words, later releases take the callback.
        r"found pytorch_lightning\..*\.LambdaCallback\. Import it from|object \(LambdaCallback\)",
    ),
    "two gradient balancers": (
        lambda: {"callbacks": [MinNorm(), CentralDirection()]},
        r"at most one gradient balancer .* found MinNorm, CentralDirection\. Keep one of them",
    ),
    "two loss balancers": (
        lambda: {"callbacks": [LogLoss(), Scalarization([1.0, 2.0])]},
        r"at most one loss balancer .* but found LogLoss, Scalarization\. Keep one of them",
    ),
    "equal weighting beside another": (
        lambda: {"callbacks": [EqualWeighting(), LogLoss()]},
        r"at most one loss balancer .* but found EqualWeighting, LogLoss\. Keep one of them",
    ),
    "hybrid after a loss balancer": (
        lambda: {"callbacks": [LogLoss(), DualBalance()]},
        r"one loss balancer .* found LogLoss, DualBalance\. DualBalance balances .* by itself\. Ke",
    ),
    "hybrid before a gradient balancer": (
        lambda: {"callbacks": [DualBalance(), MinNorm()]},
        r"at most one gradient balancer .* found DualBalance, MinNorm\. DualBalance balances",
    ),
}


def refuses(run: Callable[[], Any], module: Any, message: str) -> None:
    """The error, the module as it was, and the same module in a proper Trainer."""
    before = parameters(module)
    flags = [p.requires_grad for p in module.parameters()]
    with pytest.raises((MisconfigurationException, TypeError), match=message):
        run()
    assert same(parameters(module), before)
    assert [p.requires_grad for p in module.parameters()] == flags
    module.configure = lambda m: sgd(m.net.parameters())
    assert same(fitted(module, batches(), [MinNorm()]), fitted(Tunable(), batches(), [MinNorm()]))


@pytest.mark.filterwarnings("ignore:It is recommended to use .*sync_dist")
@pytest.mark.usefixtures("_alone")
@pytest.mark.parametrize(("flags", "message"), FLAGS.values(), ids=FLAGS)
def test_refused(flags: Callable[[], dict[str, Any]], message: str) -> None:
    module = Tunable()
    refuses(lambda: trainer(**flags()).fit(module), module, message)


@pytest.mark.parametrize("tune", ["lr_find", "scale_batch_size"])
def test_tuner(tmp_path: Any, tune: str) -> None:
    module = Tunable()
    run = trainer(tmp_path, callbacks=[MinNorm()])
    message = r"Finder is not supported with Tunable: it replaces the Trainer's callbacks"
    refuses(lambda: getattr(Tuner(run), tune)(module), module, message)
    assert (module.lr, module.batch_size) == (0.01, 4)
    assert not list(tmp_path.iterdir())


def test_lbfgs() -> None:
    message = (
        r"^LBFGS is not supported with Tunable: it evaluates the losses several times a step, .* "
        r"Use a first-order optimizer such as SGD or AdamW"
    )
    for balancer in (MinNorm, LogLoss):
        module = Tunable(configure=lambda m: torch.optim.LBFGS(m.parameters()))
        refuses(lambda b=balancer, m=module: trainer(callbacks=[b()]).fit(m), module, message)


def test_overridden_training_step() -> None:
    module = OwnStep()
    message = (
        r"^OwnStep overrides `training_step`, which is where MultiTaskModule balances. Rename it "
        r"to `task_losses\(self, batch, batch_idx\)` and return a dict {task: loss} instead of th"
    )
    run = trainer()
    before = parameters(module)
    with pytest.raises(MisconfigurationException, match=message):
        run.fit(module)
    assert same(parameters(module), before)
    run.validate(module, verbose=False)  # validation does not train: nothing is wrong with it
    assert set(run.callback_metrics) > {"val/loss/a", "val/loss/b"}


def test_one_balancer_twice() -> None:
    """Lightning sees it first: two callbacks would write one entry of a checkpoint."""
    with pytest.raises(RuntimeError, match="more than one stateful callback of type `MinNorm`"):
        Trainer(accelerator="cpu", logger=False, callbacks=[MinNorm(), MinNorm("l2")])


@pytest.mark.parametrize("balancer", [MinNorm(), LogLoss()])
def test_balancer_beside_an_ordinary_module(balancer: Any) -> None:
    """It would be silently without effect."""
    module, name = Plain(), type(balancer).__name__
    before = parameters(module)
    with pytest.raises(TypeError, match=f"Expected {name} beside a MultiTaskModule but found Pla"):
        trainer(callbacks=[balancer]).fit(module, batches(), batches())
    assert same(parameters(module), before)
