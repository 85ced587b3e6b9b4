"""Directions, weights and saved states that are not finite: none of them reaches a parameter."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from lightning_mtl import (
    DualBalance,
    Every,
    GradientBalancer,
    GradNorm,
    LossBalancer,
    MinNorm,
    MoCo,
    MoDo,
    MomentumConFIG,
    MTAdam,
    SDMGrad,
    Smooth,
)
from lightning_mtl.engine.guards import BadLossError, NotFiniteError
from tests.common.methods import TASKS
from tests.common.models import Balanced, loader, resume_from, trainer, weights

SAID = "ignore:A loss or a gradient of optimiser step"


class Wrong(GradientBalancer):
    """A direction that is not finite in one step."""

    def __init__(self, bad: float = torch.nan, step: int = 3) -> None:
        super().__init__()
        self.bad, self.step, self.calls = bad, step, 0

    def direction(self, jacobian: Tensor, losses: Tensor) -> Tensor:
        self.calls += 1
        found = jacobian.sum(0)
        if self.calls == self.step:
            found[-1] = self.bad
        return found


class WrongWeights(GradientBalancer):
    """Weights that are not finite in one step."""

    def __init__(self, bad: float = torch.nan, step: int = 3) -> None:
        super().__init__()
        self.bad, self.step, self.calls = bad, step, 0

    def weights(self, gramian: Tensor, losses: Tensor) -> Tensor:
        self.calls += 1
        found = torch.ones_like(losses)
        if self.calls == self.step:
            found[0] = self.bad
        return found


class WrongLossWeights(LossBalancer):
    """Loss weights that are not finite in one step."""

    def __init__(self, bad: float = torch.nan, step: int = 3) -> None:
        super().__init__()
        self.bad, self.step, self.calls = bad, step, 0

    def loss_weights(self, losses: Tensor) -> Tensor:
        self.calls += 1
        return torch.full_like(losses, self.bad if self.calls == self.step else 1.0)


class Far(GradientBalancer):
    """Weights that are finite, of a direction that is not."""

    def weights(self, gramian: Tensor, losses: Tensor) -> Tensor:
        return torch.full_like(losses, 1e39)


ALL = [Wrong, WrongWeights, WrongLossWeights]


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("make", ALL)
def test_an_error_names_the_balancer_and_nothing_is_written(
    make: Callable[..., Any], bad: float
) -> None:
    module, reference = Balanced(), Balanced()
    with pytest.raises(NotFiniteError, match=f"{make.__name__}.*No parameter was changed"):
        trainer(callbacks=[make(bad)], max_steps=5).fit(module, loader())
    trainer(max_steps=2).fit(reference, loader())
    torch.testing.assert_close(weights(module), weights(reference))


@pytest.mark.filterwarnings(SAID)
@pytest.mark.parametrize("rule", ["skip_task", "skip_step"])
@pytest.mark.parametrize("make", ALL)
def test_a_rule_leaves_the_step_out(make: Callable[..., Any], rule: str) -> None:
    module = Balanced(on_bad_loss=rule)
    run = trainer(callbacks=[make()], limit_train_batches=6)
    run.fit(module, loader())
    assert run.global_step == 5
    assert weights(module).isfinite().all()


@pytest.mark.parametrize("make", [Wrong])
def test_ignore_looks_at_nothing(make: Callable[..., Any]) -> None:
    module = Balanced(on_bad_loss="ignore")
    trainer(callbacks=[make()], max_steps=5).fit(module, loader())
    assert not weights(module).isfinite().all()


def test_finite_weights_of_a_direction_that_is_not() -> None:
    module = Balanced()
    before = weights(module)
    with pytest.raises(NotFiniteError, match="finite direction from Far"):
        trainer(callbacks=[Far()], max_steps=1).fit(module, loader())
    assert torch.equal(weights(module), before)


@pytest.mark.filterwarnings(SAID)
def test_a_state_that_is_spoilt_is_an_error_under_every_rule() -> None:
    """It would fail in every step from there on."""
    balancer = DualBalance()

    class Spoils(Balanced):
        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
            if batch_idx == 2:
                balancer.average[0, 0] = torch.nan

    module = Spoils(on_bad_loss="skip_step")
    with pytest.raises(NotFiniteError, match="finite direction from DualBalance"):
        trainer(callbacks=[balancer], max_steps=5).fit(module, loader())
    assert weights(module).isfinite().all()


# ------------------------------------------------------------------------------ saved states

STATES: list[tuple[Callable[[], Any], str]] = [
    (DualBalance, "average"),
    (MoCo, "average"),
    (MTAdam, "second"),
    (lambda: MomentumConFIG(rows_per_step=2), "second"),
    (lambda: Smooth(MinNorm()), "average"),
    (lambda: Every(2, MinNorm()), "stored"),
    (GradNorm, "learned"),
]


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize(("make", "name"), STATES)
def test_a_saved_state_is_looked_at_before_it_is_used(
    make: Callable[[], Any], name: str, bad: float
) -> None:
    balancer = make()
    with balancer.only(TASKS[:2]):
        balancer.direction(torch.randn(2, 5), torch.ones(2))
    state = balancer.state_dict()
    state["state"][name].view(-1)[-1] = bad
    fresh = make()
    with pytest.raises(ValueError, match=f"saved state of {type(fresh).__name__}.*{name}"):
        fresh.load_state_dict(state)
    assert fresh.state_dict()["state"][name] is None  # nothing was taken over


def test_in_a_checkpoint(tmp_path: Any) -> None:
    saver = ModelCheckpoint(tmp_path, filename="one", every_n_train_steps=2)
    run = trainer(
        tmp_path, callbacks=[DualBalance(), saver], max_steps=2, enable_checkpointing=True
    )
    run.fit(Balanced(), loader())
    path = tmp_path / "one.ckpt"
    checkpoint = torch.load(path, weights_only=True)
    checkpoint["callbacks"]["DualBalance"]["state"]["average"][0, 0] = torch.nan
    torch.save(checkpoint, path)
    again = trainer(
        tmp_path, callbacks=[DualBalance(), saver], max_steps=4, enable_checkpointing=True
    )
    with pytest.raises(ValueError, match="saved state of DualBalance"):
        again.fit(Balanced(), loader(), **resume_from(path))
    assert again.global_step <= 2


# ------------------------------------------------------------ what a method cannot digest


class Turns(Balanced):
    """The loss of one task is a number of its own in one batch."""

    at, value = 2, -1.0

    def task_losses(self, batch: Any, batch_idx: int) -> Any:
        losses = super().task_losses(batch, batch_idx)
        if batch_idx == self.at:
            losses["b"] = losses["b"] + (self.value - losses["b"].detach())
        return losses


@pytest.mark.parametrize("wrap", [None, Smooth, lambda b: Every(1, b)])
def test_a_negative_loss_is_a_bad_one_for_grad_norm(wrap: Callable[[Any], Any] | None) -> None:
    with pytest.raises(BadLossError, match=r"non-negative \(for GradNorm\).*'b': -1"):
        trainer(callbacks=[wrap(GradNorm()) if wrap else GradNorm()], max_steps=5).fit(
            Turns(), loader()
        )


@pytest.mark.filterwarnings(SAID)
@pytest.mark.parametrize("rule", ["skip_task", "skip_step"])
def test_and_is_left_out(rule: str) -> None:
    module = Turns(on_bad_loss=rule)
    run = trainer(callbacks=[GradNorm()], limit_train_batches=5)
    run.fit(module, loader())
    assert run.global_step == (5 if rule == "skip_task" else 4)
    assert weights(module).isfinite().all()


@pytest.mark.parametrize(("alpha", "value"), [(1.5, 0.0), (0.0, -1.0)])
def test_grad_norm_can_do_with_others(alpha: float, value: float) -> None:
    module = Turns()
    module.value = value
    run = trainer(callbacks=[GradNorm(alpha=alpha)], max_steps=5)
    run.fit(module, loader())
    assert run.global_step == 5


@pytest.mark.filterwarnings(SAID)
@pytest.mark.parametrize("rule", ["skip_task", "skip_step"])
@pytest.mark.parametrize("make", [MoDo, lambda: MoDo(batches=3), lambda: SDMGrad(batches=3)])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_batches_that_are_taken_apart(make: Callable[[], Any], rule: str, value: float) -> None:
    """None of them can do without a task, so the step is left out."""
    balancer, module = make(), Turns(on_bad_loss=rule)
    module.at, module.value = balancer.batches + 1, value
    run = trainer(
        callbacks=[balancer],
        accumulate_grad_batches=balancer.batches,
        limit_train_batches=4 * balancer.batches,
    )
    run.fit(module, loader())
    assert run.global_step == 3
    assert weights(module).isfinite().all()


class Without(Balanced):
    def task_losses(self, batch: Any, batch_idx: int) -> Any:
        losses = dict(super().task_losses(batch, batch_idx))
        if batch_idx == 3:
            del losses["b"]
        return losses


def test_what_is_said_of_a_missing_task_can_be_done() -> None:
    run = trainer(callbacks=[MoDo()], accumulate_grad_batches=2, max_steps=4)
    with pytest.raises(ValueError, match="use a balancer of one batch, SDMGrad") as error:
        run.fit(Without(), loader())
    assert "Use `batches=1`" not in str(error.value)


@pytest.mark.parametrize("size", [1e10, 1e18, 1e-20, 0.0])
@pytest.mark.parametrize("shape", [(2, 3, 5), (3, 3, 5), (1, 3, 5), (3, 5), (2, 1, 5), (2, 3, 1)])
@pytest.mark.parametrize("make", [MoDo, lambda: SDMGrad(batches=3)])
def test_any_length_and_shape(make: Callable[[], Any], shape: tuple[int, ...], size: float) -> None:
    balancer = make()
    for _ in range(3):
        found = balancer.direction(torch.randn(shape) * size, torch.ones(shape[-2]))
        assert found.shape == shape[-1:]
        assert found.isfinite().all()
    kept = balancer.offsets + 1 / shape[-2]
    assert kept.min() > -1e-12
    assert float(kept.sum()) == pytest.approx(1)
