"""Tasks that come in turn: data sets that alternate, a task that is late, one that never comes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

from lightning_mtl import DualBalance, GradNorm, LogLoss, MinNorm, MultiTaskModule, UPGrad
from lightning_mtl.gradient_balancers import MomentumConFIG, MTAdam, NashMTL
from tests.common.models import Balanced, Network, Plain, Samples, loader, resume_from, sgd, trainer
from tests.common.models import weights as parameters
from tests.trainer.test_resume import SavedLoader

pytestmark = [
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
    pytest.mark.filterwarnings("ignore:A task is missing from a micro-batch"),
    pytest.mark.filterwarnings("ignore:Resuming with a training loader"),
]
THREE = ("a", "b", "c")


class InTurn(Balanced):
    """Losses of the tasks that ``which(batch_idx)`` names."""

    def __init__(self, which: Any, tasks: Any = THREE, **kwargs: Any) -> None:
        super().__init__(tasks=tasks, **kwargs)
        self.which = which

    def task_losses(self, batch: Any, batch_idx: int) -> Any:
        losses = super().task_losses(batch, batch_idx)
        return {name: losses[name] for name in self.which(batch_idx)}


class Named(InTurn):
    def shared_parameters(self) -> Any:
        return self.net.trunk.parameters()


class PlainInTurn(Plain):
    def __init__(self, which: Any) -> None:
        super().__init__(tasks=THREE)
        self.which = which

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, targets = batch
        found, mse = self.net(x), nn.functional.mse_loss
        return sum(mse(found[t], targets[t]) for t in self.which(batch_idx))


def one(i: int) -> Any:
    return THREE[i % 3]


def two(i: int) -> Any:
    return {*THREE} - {one(i)}


def late(i: int) -> Any:
    return "ab" if i < 7 else "abc"


def fit(module: Any, *balancers: Any, **flags: Any) -> Any:
    run = trainer(callbacks=list(balancers), **flags)
    run.fit(module, loader(tasks=THREE), loader(16, tasks=THREE))
    return run, module


@pytest.mark.parametrize("which", [one, two, late])
@pytest.mark.parametrize("every", [1, 4])
def test_without_gradient_balancer_it_is_plain_lightning(which: Any, every: int) -> None:
    _, plain = fit(PlainInTurn(which), accumulate_grad_batches=every)
    run, ours = fit(InTurn(which), accumulate_grad_batches=every)
    assert run.global_step == 20 / every
    torch.testing.assert_close(parameters(ours), parameters(plain), rtol=0, atol=1e-7)


METHODS = [MinNorm, UPGrad, DualBalance, MTAdam, MomentumConFIG, NashMTL, GradNorm]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("which", [two, late])
@pytest.mark.parametrize("every", [1, 4])
def test_what_is_shared_is_found_as_if_it_had_been_named(
    method: Any, which: Any, every: int
) -> None:
    if method is GradNorm and every > 1:
        pytest.skip("a level")
    given = fit(Named(which), method(), accumulate_grad_batches=every)[1]
    found = fit(InTurn(which), method(), accumulate_grad_batches=every)[1]
    assert torch.equal(parameters(found), parameters(given))
    state = found._flow.state_dict()
    assert state["shared"] == given._flow.state_dict()["shared"]
    assert state["outside"] == []


@pytest.mark.parametrize("method", METHODS)
def test_one_data_set_a_batch(method: Any) -> None:
    run, module = fit(InTurn(one), method())
    assert run.global_step == 20
    assert all(name.startswith("net.trunk") for name in module._flow.state_dict()["shared"])
    # The first task trains as it is: nothing is known to be shared.
    first, alone = fit(InTurn(one), method(), max_steps=1)[1], fit(InTurn(one), max_steps=1)[1]
    if method is not DualBalance:  # which divides by the loss, too
        torch.testing.assert_close(parameters(first), parameters(alone))


def test_a_late_task_that_shares_more_is_found() -> None:
    class More(InTurn):
        """`c` goes through the head of `a`, which turns out to be shared."""

        def forward(self, x: Any) -> Any:
            found = super().forward(x)
            return {**found, "c": found["c"] + found["a"]}

    for balancer in (MinNorm(), DualBalance()):  # the latter has a state as wide as the rows
        run, module = fit(More(late), balancer)
        assert run.global_step == 20
        assert "net.heads.head_a.weight" in module._flow.state_dict()["shared"]


def test_a_checkpoint_before_every_task_was_met_goes_on(tmp_path: Any) -> None:
    class Three(SavedLoader):
        def __init__(self) -> None:
            super().__init__()
            self.data = Samples(40, THREE)

    saving = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=5, save_top_k=-1)
    whole = InTurn(late)
    trainer(callbacks=[MinNorm(), saving], enable_checkpointing=True).fit(whole, Three())
    later = InTurn(late)
    resumed = trainer(callbacks=[MinNorm()])
    resumed.fit(later, Three(), **resume_from(tmp_path / "step=5.ckpt"))
    assert resumed.global_step == 10
    assert torch.equal(parameters(later), parameters(whole))


class Undeclared(MultiTaskModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = Network()

    def configure_optimizers(self) -> Any:
        return sgd(self.parameters())

    def task_losses(self, batch: Any, batch_idx: int) -> Any:
        x, targets = batch
        name = "ab"[batch_idx % 2]
        return {name: nn.functional.mse_loss(self.net(x)[name], targets[name])}


@pytest.mark.filterwarnings("ignore:.* there is nothing to balance")
@pytest.mark.parametrize("balancers", [list, lambda: [LogLoss()], lambda: [MinNorm()]])
def test_a_later_name_of_a_module_that_declares_none(balancers: Any) -> None:
    message = (
        r"^`task_losses` returned a loss of \['b'\], which the first batch had not: without "
        r"declared tasks, .*\['a'\].*`super\(\).__init__\(tasks=\['a', 'b'\]\)`"
    )
    with pytest.raises(ValueError, match=message):
        trainer(callbacks=balancers()).fit(Undeclared(), loader())
