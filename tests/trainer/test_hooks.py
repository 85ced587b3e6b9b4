"""Hooks of a step reach everybody who listens, and nobody else is called."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import LambdaCallback
from lightning.pytorch.trainer import call

from lightning_mtl import LogLoss, MinNorm
from lightning_mtl.balancer import _STEP_HOOKS
from tests.common.models import Balanced, Sum, loader, trainer

OURS = ("on_before_zero_grad", "on_before_backward", "on_after_backward")


class Listening(Balanced):
    """A module with hooks of its own."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.heard: list[str] = []

    def on_before_zero_grad(self, optimizer: Any) -> None:
        self.heard.append("on_before_zero_grad")

    def on_before_backward(self, loss: Any) -> None:
        assert loss.requires_grad
        self.heard.append("on_before_backward")

    def on_after_backward(self) -> None:
        assert all(p.grad is not None for p in self.net.parameters())
        self.heard.append("on_after_backward")


@pytest.mark.parametrize("balancer", [None, Sum, MinNorm])
def test_of_the_module(balancer: Any) -> None:
    module = Listening()
    trainer(callbacks=[balancer()] if balancer else [], max_steps=3).fit(module, loader())
    assert module.heard == [*OURS] * 3


@pytest.mark.parametrize("name", OURS)
def test_set_on_the_module_itself(name: str) -> None:
    module, heard = Balanced(), []
    setattr(module, name, lambda *args: heard.append(name))
    trainer(callbacks=[MinNorm()], max_steps=3).fit(module, loader())
    assert heard == [name] * 3


@pytest.mark.parametrize("name", _STEP_HOOKS)
def test_of_a_callback_made_of_functions(name: str) -> None:
    heard: list[str] = []
    listener = LambdaCallback(**{name: lambda *args: heard.append(name)})
    trainer(callbacks=[MinNorm(), listener], max_steps=3).fit(Balanced(), loader())
    assert heard == [name] * 3


@pytest.mark.parametrize("name", _STEP_HOOKS)
def test_of_a_balancer(name: str) -> None:
    heard: list[str] = []

    def hook(self: Any, run: Any, module: Any, *args: Any) -> None:
        getattr(Callback, name)(self, run, module, *args)
        heard.append(name)

    own = type("Own", (MinNorm,), {name: hook})
    trainer(callbacks=[own()], max_steps=3).fit(Balanced(), loader())
    assert heard == [name] * 3


def test_of_a_callback_that_comes_with_the_second_epoch() -> None:
    heard: list[int] = []

    class Late(Callback):
        def on_train_epoch_end(self, run: Any, module: Any) -> None:
            late = LambdaCallback(on_before_backward=lambda run, *_: heard.append(run.global_step))
            run.callbacks.append(late)

    run = trainer(callbacks=[MinNorm(), Late()], max_epochs=2)
    run.fit(Balanced(), loader(16))
    steps = run.num_training_batches
    assert heard == list(range(steps, 2 * steps))


def test_of_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lightning is not asked to call what nobody has."""
    called: list[str] = []
    real = call._call_callback_hooks

    def counted(run: Any, name: str, *args: Any, **kwargs: Any) -> None:
        called.append(name)
        real(run, name, *args, **kwargs)

    monkeypatch.setattr(call, "_call_callback_hooks", counted)
    trainer(callbacks=[MinNorm()], max_steps=3).fit(Balanced(), loader())
    assert "on_before_optimizer_step" in called
    assert not set(called) & set(OURS)


def test_hidden_hooks_come_back() -> None:
    balancers = [LogLoss(), MinNorm()]
    hidden: list[Any] = []

    class Look(Callback):
        def on_train_batch_end(self, run: Any, module: Any, *args: Any) -> None:
            hidden.extend(b.on_train_batch_end for b in balancers)

    for _ in range(2):
        trainer(callbacks=[*balancers, Look()], max_steps=2).fit(Balanced(), loader())
    assert hidden == [None] * 8
    for balancer in balancers:
        assert not set(vars(balancer)) & set(_STEP_HOOKS)
        balancer.on_train_batch_end(*[torch.zeros(())] * 5)


def test_hidden_hooks_come_back_after_an_error_and_in_copies() -> None:
    copies: list[Any] = []

    class Fails(Callback):
        def on_train_batch_end(self, run: Any, module: Any, *args: Any) -> None:
            copies.extend(copy.deepcopy(balancers))
            raise RuntimeError("as a test wants it")

    balancers = [LogLoss(), MinNorm()]
    with pytest.raises(RuntimeError, match="as a test wants it"):
        trainer(callbacks=[*balancers, Fails()]).fit(Balanced(), loader())
    for found in (*balancers, *copies):
        assert not set(vars(found)) & set(_STEP_HOOKS)


@pytest.mark.parametrize("balancers", [[], [MinNorm]])
def test_training_step_called_in_a_hook_trains_nothing(balancers: Any) -> None:
    class Calling(Balanced):
        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
            self.heard = self.training_step(batch, batch_idx)

    ends = []
    for cls in (Balanced, Calling):
        torch.manual_seed(0)
        module, run = cls(), trainer(max_steps=2, callbacks=[b() for b in balancers])
        run.fit(module, loader(8))
        assert run.global_step == 2
        ends.append(torch.cat([p.detach().flatten() for p in module.parameters()]))
    assert torch.equal(*ends)
    assert module.heard.requires_grad
