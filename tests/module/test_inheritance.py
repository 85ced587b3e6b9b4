"""Modules of other libraries as bases, before or behind ours: what they bring is kept."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import Callback, LambdaCallback
from torch import Tensor, nn

from lightning_mtl import MinNorm, MultiTaskModule
from tests.common.models import Network, loader, sgd, trainer, weights

# Lightning's words for a fit without validation data, of a plain module too.
pytestmark = [
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no"),
    pytest.mark.filterwarnings("ignore:Resuming with a training loader that cannot save"),
]


class Theirs(LightningModule):
    """A module as libraries have them: arguments, all steps, hooks, optimizers."""

    def __init__(self, dropout: float, *, lr: float = 0.01) -> None:
        super().__init__()
        self.save_hyperparameters()
        torch.manual_seed(1)
        self.net = Network(dropout=dropout)
        self.calls: list[str] = []

    def losses(self, batch: Any) -> dict[str, Tensor]:
        x, targets = batch
        found = self.net(x)
        return {name: nn.functional.mse_loss(found[name], targets[name]) for name in found}

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return sum(self.losses(batch).values())

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("their_val", sum(self.losses(batch).values()))

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.log("their_test", sum(self.losses(batch).values()))
        self.log("their_a", 2.0)

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        return batch[0] * 0

    def on_validation_epoch_end(self) -> None:
        super().on_validation_epoch_end()
        self.log("their_a", 2.0)
        self.calls.append("validated")

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> int | None:
        self.calls.append("started")
        return -1 if batch_idx == 3 and self.current_epoch == 0 else None

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.calls.append("loaded")

    def configure_callbacks(self) -> list[Callback]:
        return [LambdaCallback(on_train_end=lambda *_: self.calls.append("their callback"))]

    def configure_optimizers(self) -> Any:
        return sgd(self.net.parameters())


class _Losses:
    def task_losses(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        return self.losses(batch)


class OursFirst(_Losses, MultiTaskModule, Theirs):
    def __init__(self, dropout: float, **kwargs: Any) -> None:
        Theirs.__init__(self, dropout)
        MultiTaskModule.__init__(self, tasks=["a", "b"], **kwargs)


class TheirsFirst(_Losses, Theirs, MultiTaskModule):
    def __init__(self, dropout: float, **kwargs: Any) -> None:
        Theirs.__init__(self, dropout)
        MultiTaskModule.__init__(self, tasks=["a", "b"], **kwargs)


class Grandchild(TheirsFirst):
    """A class of the user's in between."""

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> int | None:
        return super().on_train_batch_start(batch, batch_idx)


by_order = pytest.mark.parametrize("cls", [OursFirst, TheirsFirst, Grandchild])


@by_order
@pytest.mark.parametrize("balancers", [[], [MinNorm]], ids=["none", "MinNorm"])
def test_all_of_theirs_is_kept(cls: Any, balancers: Any, tmp_path: Any) -> None:
    directions = {task: {"their_a": False} for task in ("a", "b")}
    module = cls(
        0.0, baseline={t: {"their_a": 1.0} for t in directions}, delta_p_metrics=directions
    )
    flags = {"max_epochs": 2, "num_sanity_val_steps": 0}
    run = trainer(tmp_path, callbacks=[b() for b in balancers], **flags)
    run.fit(module, loader(40), loader(8))
    found = list(module.calls)
    assert found.count("started") == 14  # the fourth batch of the first epoch ends it
    assert run.global_step == 13
    assert found.count("validated") == 1  # none after an epoch that was cut short
    assert found[-1] == "their callback"
    assert "their_val" in run.callback_metrics
    assert not any(name.startswith("val/loss") for name in run.callback_metrics)
    assert run.callback_metrics["val/delta_p/a"] == -100.0
    assert module.hparams["dropout"] == 0.0
    run.save_checkpoint(tmp_path / "at.ckpt")
    (tested,) = run.test(module, loader(8), verbose=False)
    assert "their_test" in tested
    assert not any(run.predict(module, loader(4))[0].flatten())
    again = trainer(tmp_path, callbacks=[b() for b in balancers], **{**flags, "max_epochs": 3})
    again.fit(module, loader(40), ckpt_path=tmp_path / "at.ckpt")
    assert "loaded" in module.calls
    assert again.global_step == 23


class Alone(Theirs):
    """Theirs under automatic optimisation."""


@by_order
def test_no_balancer_is_their_training(cls: Any) -> None:
    found = []
    for make in (Alone, cls):
        module = make(0.1)
        torch.manual_seed(3)
        trainer(gradient_clip_val=0.5, accumulate_grad_batches=2, max_epochs=2).fit(
            module, loader(40)
        )
        found.append(weights(module))
    assert torch.equal(*found)


def test_their_training_step_may_give_the_losses() -> None:
    class Dicts(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = Network()

        def training_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
            found = {name: y.square().mean() for name, y in self.net(batch[0]).items()}
            return {"loss": sum(found.values()), **found}

        def configure_optimizers(self) -> Any:
            return sgd(self.parameters())

    class Ours(MultiTaskModule, Dicts):
        def task_losses(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
            found = Dicts.training_step(self, batch, batch_idx)
            return {name: found[name] for name in ("a", "b")}

    module, run = Ours(["a", "b"]), trainer(callbacks=[MinNorm()])
    run.fit(module, loader(8))
    assert module.last_step.gradient_weights is not None


def test_without_task_losses_their_training_step_is_refused() -> None:
    class Half(Theirs, MultiTaskModule):
        pass

    with pytest.raises(
        Exception, match=r"Half has the `training_step` of Theirs.*Define `task_losses"
    ):
        trainer().fit(Half(0.0), loader(8))


def test_the_line_to_write_when_their_constructor_needs_arguments() -> None:
    class Missing(_Losses, MultiTaskModule, Theirs):
        def __init__(self) -> None:
            super().__init__(["a", "b"])

    message = (
        r"arguments \['dropout'\] of Theirs, a base of Missing.*`Theirs.__init__\(self, dropout\)`"
        r", then `MultiTaskModule.__init__\(self, tasks=\.\.\.\)`"
    )
    with pytest.raises(TypeError, match=message):
        Missing()


@pytest.mark.parametrize("behind", [True, False])
def test_a_mixin_that_is_no_module(behind: bool) -> None:
    class Mixin:
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("mixed", 1.0)

    class Base(MultiTaskModule):
        def __init__(self) -> None:
            super().__init__(["a", "b"])
            self.net = Network()

        def task_losses(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
            return {name: y.square().mean() for name, y in self.net(batch[0]).items()}

        def configure_optimizers(self) -> Any:
            return sgd(self.parameters())

    class Ours(*((Base, Mixin) if behind else (Mixin, Base))):
        pass

    run = trainer()
    run.validate(Ours(), loader(8), verbose=False)
    assert run.callback_metrics.keys() == {"mixed"}


def test_a_users_own_step_comes_before_a_base_behind_it() -> None:
    class Own(MultiTaskModule):
        def validation_step(self, batch: Any, batch_idx: int) -> str:
            return "own"

    class Last(Own, Theirs):
        pass

    assert Last.validation_step is Own.validation_step
    assert Last.test_step is Theirs.test_step


class Layers(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.layer = nn.Linear(3, width)


@pytest.mark.parametrize("way", ["none", "passed on", "layers"])
def test_arguments_of_the_other_constructor(way: str) -> None:
    base: Any = Layers if way == "layers" else Theirs

    class Ours(_Losses, MultiTaskModule, base):
        if way == "passed on":

            def __init__(self, dropout: float) -> None:
                super().__init__(dropout=dropout)

    cure = "hold an object of it" if way == "layers" else r"`Theirs.__init__\(self, \.\.\.\)`, then"
    with pytest.raises(TypeError, match=f"unexpected keyword argument.*{cure}"):
        Ours(**{"width" if way == "layers" else "dropout": 1})


@pytest.mark.parametrize("ours", [True, False])
def test_the_other_constructor_last_or_alone(ours: bool) -> None:
    class Defaults(Theirs):
        def __init__(self) -> None:
            super().__init__(0.0)

    class Wrong(_Losses, MultiTaskModule, Defaults):
        def __init__(self) -> None:
            if ours:  # and then theirs, which begins all of it anew
                MultiTaskModule.__init__(self, ["a", "b"])
            Defaults.__init__(self)

    with pytest.raises(TypeError, match="that of MultiTaskModule last, but what they set is miss"):
        trainer().fit(Wrong(), loader(8))


def test_a_module_that_is_not_lightnings() -> None:
    class Wrong(_Losses, MultiTaskModule, Layers):
        def __init__(self) -> None:
            Layers.__init__(self, 2)
            MultiTaskModule.__init__(self, ["a", "b"])

    with pytest.raises(TypeError, match="Layers is no LightningModule, so hold an object of it"):
        Wrong()


def test_hyperparameters_of_all_constructors() -> None:
    class Last(LightningModule):
        def __init__(self, lr: float = 0.1) -> None:
            super().__init__()
            self.save_hyperparameters()

    class Ours(MultiTaskModule, Last):
        def __init__(self, depth: int) -> None:
            super().__init__(["a", "b"])

    assert {"depth": 4, "lr": 0.1}.items() <= Ours(4).hparams.items()
