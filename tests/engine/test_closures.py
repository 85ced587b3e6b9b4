"""Optimizers that call their closure again: as in automatic optimisation, or refused by name."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch.optim import Optimizer

from lightning_mtl import (
    SAMO,
    DualBalance,
    LogLoss,
    MinNorm,
    RandomWeighting,
    Scalarization,
    UncertaintyWeighting,
)
from tests.common.faulty import Faulty, change, parameters, same
from tests.common.models import Balanced, Plain, loader, trainer, weights


class Climb(Optimizer):
    """Sharpness-aware: a step of ascent, gradients there, a step from the old place."""

    begin = 0

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {})
        self.steps, self.seen = 0, []

    def own(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"]]

    @torch.no_grad()
    def step(self, closure: Any) -> Any:
        again = torch.enable_grad()(closure)
        ps = self.own()
        loss = again()
        self.steps += 1
        if self.steps <= self.begin:
            for p in ps:
                p.add_(p.grad, alpha=-0.05)
            return loss
        old = [p.clone() for p in ps]
        for p in ps:
            p.add_(p.grad, alpha=0.01)
        self.clear()
        self.seen.append(again())
        for p, o in zip(ps, old, strict=True):
            p.copy_(o).add_(p.grad, alpha=-0.05)
        return loss

    def clear(self) -> None:
        self.zero_grad()


class Keeps(Climb):
    """Zeros instead of no gradients."""

    def clear(self) -> None:
        self.zero_grad(set_to_none=False)


class Late(Climb):
    """After two ordinary steps."""

    begin = 2


class Clears(Climb):
    """Clears the gradients before it calls the closure for the first time."""

    @torch.no_grad()
    def step(self, closure: Any) -> Any:
        self.clear()
        loss = torch.enable_grad()(closure)()
        for p in self.own():
            p.add_(p.grad, alpha=-0.05)
        return loss


class Zeros(Clears):
    def clear(self) -> None:
        self.zero_grad(set_to_none=False)


class Wraps(Optimizer):
    """Another optimizer inside, which gets the closure that was called already."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {})
        self.inner = torch.optim.SGD(self.param_groups, lr=0.05)

    def step(self, closure: Any) -> Any:
        closure()
        return self.inner.step(closure)


class Ahead(Wraps):
    """Lookahead: one call, every other step the mean with the parameters before."""

    def step(self, closure: Any) -> Any:
        before = [p.detach().clone() for g in self.param_groups for p in g["params"]]
        loss = self.inner.step(closure)
        with torch.no_grad():
            own = (p for g in self.param_groups for p in g["params"])
            for p, old in zip(own, before, strict=True):
                p.lerp_(old, 0.5)
        return loss


pytestmark = pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no")
AGAIN = [Climb, Keeps, Late, Zeros, Wraps]


def lbfgs(parameters: Any) -> Any:
    return torch.optim.LBFGS(parameters, lr=0.1, max_iter=4, line_search_fn="strong_wolfe")


def configured(make: Any) -> Any:
    return lambda module: make(list(module.net.parameters()))


FLAGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "clip": {"gradient_clip_val": 0.5},
    "accumulate": {"accumulate_grad_batches": 2},
    "bf16": {"precision": "bf16-mixed"},
}


@pytest.mark.parametrize("flags", FLAGS)
@pytest.mark.parametrize("make", [*AGAIN, Clears, Ahead, lbfgs])
def test_no_balancer_is_plain_lightning(make: Any, flags: str) -> None:
    """With dropout too: another mask in every call.

    Gradients that were set to zero in place, or half of them, take a second forward pass, with
    another mask.
    """
    found = []
    for model in (Plain, Balanced):
        torch.manual_seed(3)
        twice = make is Zeros or (make is Clears and flags == "accumulate")
        module = model(configured(make), dropout=0.0 if twice else 0.2)
        run = trainer(**FLAGS[flags])
        torch.manual_seed(3)
        run.fit(module, loader(40))
        found.append((weights(module), run.global_step, run.optimizers[0]))
    assert found[0][1] == found[1][1]
    assert torch.equal(found[0][0], found[1][0])
    if isinstance(found[0][2], Climb):
        assert found[0][2].seen == found[1][2].seen


def test_hooks_are_called_as_often_as_by_plain_lightning() -> None:
    told: list[list[str]] = []
    names = ("on_before_zero_grad", "on_before_backward", "on_after_backward")
    for base in (Plain, Balanced):
        calls: list[str] = []
        told.append(calls)
        hooks = {
            name: lambda self, *args, name=name, calls=calls: calls.append(name)
            for name in (*names, "on_before_optimizer_step")
        }
        module = type("Told", (base,), hooks)(configured(Climb))
        trainer().fit(module, loader(8))
    # Automatic optimisation clears in the closure, after the forward pass: the order is the same.
    assert told[0] == told[1]


@pytest.mark.parametrize("make", [LogLoss, UncertaintyWeighting, RandomWeighting])
def test_loss_weights_at_the_parameters_of_now(make: Any) -> None:
    """The gradient of the second call is that of the weighted losses there; state moves once."""

    class Look(Climb):
        def step(self, closure: Any) -> Any:
            super().step(closure)
            self.grads = [p.grad.clone() for p in self.own()]

    balancer = make()
    module = Balanced(configured(Look))
    run = trainer(callbacks=[balancer])
    run.fit(module, loader(4))
    (optimizer,) = run.optimizers
    first = Balanced()
    batch = next(iter(loader(4)))
    losses = first.task_losses(batch, 0)
    omega = module.last_step.loss_weights
    (omega @ torch.stack(list(losses.values()))).backward()
    with torch.no_grad():
        for p in first.net.parameters():
            p.add_(p.grad, alpha=0.01)
            p.grad = None
    there = torch.stack(list(first.task_losses(batch, 0).values()))
    if make is LogLoss:
        omega = LogLoss().loss_weights(there.detach())
    (omega @ there).backward()
    for grad, p in zip(optimizer.grads, first.net.parameters(), strict=True):
        torch.testing.assert_close(grad, p.grad, rtol=1e-5, atol=1e-6)


REFUSED = [MinNorm, DualBalance, SAMO, lambda: MinNorm(gradients="last_layer")]


@pytest.mark.parametrize("balancer", REFUSED)
@pytest.mark.parametrize("make", AGAIN)
def test_refused_beside_a_gradient_balancer(make: Any, balancer: Any) -> None:
    module, method = Balanced(configured(make)), balancer()
    before = parameters(module)
    run = trainer(callbacks=[method])
    told = "Late may have moved some" if make is Late else "No parameter was changed"
    message = (
        rf"^Expected {make.__name__} to call its closure once a step.* With "
        rf"{type(method).__name__} gradients .* {told}\. Use the balancer `SAMO`"
    )
    with pytest.raises(MisconfigurationException, match=message):
        run.fit(module, loader(40))
    assert run.global_step == (2 if make is Late else 0)
    assert make is Late or same(parameters(module), before)


@pytest.mark.parametrize("balancer", [None, MinNorm, DualBalance])
@pytest.mark.parametrize("make", [Ahead, Clears])
def test_one_call_is_all_the_same(make: Any, balancer: Any) -> None:
    """Under every balancer, with gradients that were cleared before it too."""

    def halved(parameters: Any) -> Any:
        return torch.optim.SGD(parameters, lr=0.025 if make is Ahead else 0.05)

    found = []
    for optimizer in (make, halved):
        module = Balanced(configured(optimizer))
        trainer(callbacks=[balancer()] if balancer else []).fit(module, loader(40))
        found.append(weights(module))
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-6)


def test_loss_weights_with_accumulation_are_refused() -> None:
    module = Balanced(configured(Climb))
    run = trainer(callbacks=[Scalarization({"a": 1.0, "b": 2.0})], accumulate_grad_batches=2)
    with pytest.raises(MisconfigurationException, match="With `accumulate_grad_batches=2` grad"):
        run.fit(module, loader(40))
    assert same(parameters(module), parameters(Balanced()))


@pytest.mark.parametrize("rule", ["raise", "skip_task", "skip_step"])
def test_a_bad_loss_in_a_later_call_reaches_nothing(rule: Any) -> None:
    """What is left of a step cannot be left out: an error, and parameters as before the step."""

    class Second(Faulty):
        def task_losses(self, batch: Any, batch_idx: int) -> Any:
            self.calls = getattr(self, "calls", 0) + 1
            return {
                task: loss * (torch.nan if self.calls == 8 else 1.0)
                for task, loss in super().task_losses(batch, batch_idx).items()
            }

    module = Second({}, configure=configured(Climb), on_bad_loss=rule)
    with pytest.raises(ValueError, match=r"Expected finite losses|cannot be left out any more"):
        trainer().fit(module, loader(40))
    stopped = Balanced(configured(Climb))
    trainer(max_steps=3).fit(stopped, loader(40))
    assert same(parameters(module), parameters(stopped))


def test_a_bad_first_call_leaves_the_step_out() -> None:
    module = Faulty(
        {3: change("a", lambda loss: loss * torch.nan)},
        configure=configured(Climb),
        on_bad_loss="skip_step",
    )
    run = trainer()
    with pytest.warns(UserWarning, match="cannot be used and is left out"):
        run.fit(module, loader(40))
    assert run.global_step == 9
    assert weights(module).isfinite().all()


@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph=True")
def test_graphs_of_gradients() -> None:
    """AdaHessian and others differentiate gradients, which `backward` has to leave a graph for."""

    class Second(Optimizer):
        def __init__(self, parameters: Any) -> None:
            super().__init__(parameters, {})

        @torch.no_grad()
        def step(self, closure: Any) -> Any:
            loss = torch.enable_grad()(closure)()
            ps = [p for g in self.param_groups for p in g["params"]]
            with torch.enable_grad():
                along = sum(p.grad.sum() for p in ps)
                curved = torch.autograd.grad(along, ps, allow_unused=True)
            for p, c in zip(ps, curved, strict=True):
                p.sub_(p.grad.detach() / (1 + c.abs()), alpha=0.05)
                p.grad = None
            return loss

    def backward(self: Any, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        loss.backward(create_graph=True)

    found = []
    for base in (Plain, Balanced):
        module = type("Graphs", (base,), {"backward": backward})(configured(Second))
        trainer().fit(module, loader(24))
        found.append(weights(module))
    assert torch.equal(*found)
