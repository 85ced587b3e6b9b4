"""Arguments changed after the constructor: used from then on, or refused with a reason."""

from __future__ import annotations

import copy
import inspect
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_mtl import (
    CentralDirection,
    DualBalance,
    LossBalancer,
    MinNorm,
    Scalarization,
    TaskTensioner,
    UncertaintyWeighting,
)
from lightning_mtl.balancer import GradientBalancer
from lightning_mtl.gradient_balancers import CAGrad, Every, PCGrad, Smooth, UPGrad
from lightning_mtl.loss_balancers import FAMO, RandomWeighting
from tests.common.methods import METHODS, direction
from tests.common.models import Balanced, loader, trainer, weights

TASKS = ("a", "b", "c")
ORDERED = {
    "preference": [3.0, 1.0, 0.5],
    "ranks": [3.0, 1.0, 0.5],
    "minimum": [0.01, 0.02, 0.03],
    "weights": [5.0, 1.0, 0.5],
}
# What to change an argument to, where a number a half larger is no valid choice.
OTHER: dict[str, list[Any]] = {
    **{name: [values, dict(zip(TASKS, values, strict=True))] for name, values in ORDERED.items()},
    "gradients": ["last_layer"],
    "scale": ["mean", "sum", "min"],
    "order": ["ascending", "random"],
    "groups": ["layer", "tensor", 1, 3],
    "normalization": ["loss", "l2", "log", "initial"],
    "projection": ["softmax", "simplex"],
    "optimizer": ["sgd", "adam"],
    "strategy": ["shrink", "enlarge"],
    "length": ["minimum", "projection"],
    "mode": ["median", "min"],
    "compared": ["plain", "weighted"],
    "local": ["gradient", "estimate"],
    "history": ["ema", lambda norms: norms.median(1).values],
    "feasibility": ["exact", "none"],
    "target": ["b", 2],
    "base": [CentralDirection(), MinNorm("l2")],
    "batches": [2, 3],
    "rescale": [0, 2],
    "max_norm": [None, 0.1],
    "window": [None, 1, 3],
    "seed": [7],
}
CASES = [
    (method, name)
    for method in METHODS
    if type(method.make()).__module__.startswith("lightning_mtl")
    for name in list(inspect.signature(type(method.make()).__init__).parameters)[1:]
    if name not in ("args", "kwargs")
]


def others(name: str, now: Any) -> list[Any]:
    if name in OTHER:
        return [value for value in OTHER[name] if value != now]
    if isinstance(now, bool):
        return [not now]
    if isinstance(now, int):
        return [now + 2]
    return [0.5 * now + 0.1]


def steps(balancer: Any, count: int, seed: int) -> list[Tensor]:
    """Directions of a few steps by hand."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(count):
        rows = torch.randn(3, 8, generator=generator)
        if getattr(balancer, "batches", 1) > 1:
            rows = torch.randn(balancer.batches, 3, 8, generator=generator)
        losses = torch.rand(3, generator=generator) + 0.5
        with balancer.only(TASKS):
            found.append(direction(balancer, rows, losses).detach().clone())
    return found


def same_as_built(balancer: Any, arguments: dict[str, Any]) -> None:
    """Whether it goes on as one does that was built so, from the same state."""
    built = type(balancer)(**arguments)
    with built.only(TASKS):
        pass
    built.load_state_dict(balancer.state_dict())
    for a, b in zip(steps(balancer, 4, 1), steps(built, 4, 1), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


def plain(method: Any) -> Any:
    """A balancer with the arguments of a row, without what the table hangs on it."""
    return type(made := method.make())(**copy.deepcopy(given(made)))


def given(balancer: Any) -> dict[str, Any]:
    names = list(inspect.signature(type(balancer).__init__).parameters)[1:]
    return {name: getattr(balancer, name) for name in names}


@pytest.mark.filterwarnings("ignore:.* was saved with")
@pytest.mark.parametrize(("method", "name"), CASES, ids=[f"{m.name}-{n}" for m, n in CASES])
def test_an_argument_changed_between_steps(method: Any, name: str) -> None:
    tried = 0
    for value in others(name, getattr(method.make(), name)):
        balancer = plain(method)
        arguments = copy.deepcopy(given(balancer)) | {name: copy.deepcopy(value)}
        steps(balancer, 2, 0)
        before = str(balancer.state_dict())
        try:
            type(balancer)(**arguments)
        except (ValueError, TypeError):  # no valid value, and so it is when it is set
            with pytest.raises((ValueError, TypeError)):
                setattr(balancer, name, value)
            assert str(balancer.state_dict()) == before
            continue
        refused = None
        try:
            setattr(balancer, name, value)
        except RuntimeError as error:
            refused = str(error)
        if refused:
            assert f"`{name}` of {type(balancer).__name__} counts when its state begins" in refused
            assert str(balancer.state_dict()) == before
            balancer.reset()
            setattr(balancer, name, value)
        assert getattr(balancer, name) is value or getattr(balancer, name) == value
        same_as_built(balancer, arguments)
        tried += 1
    assert tried or name in ("gradients", "batches"), "no valid value was tried"


@pytest.mark.filterwarnings("ignore:.* was saved with")
@pytest.mark.parametrize(
    "make",
    [
        Scalarization,
        lambda v: CAGrad(preference=v),
        UPGrad,
        lambda v: FAMO(minimum=v),
    ],
)
@pytest.mark.parametrize("named", [True, False])
def test_numbers_changed_inside(make: Any, named: bool) -> None:
    values: Any = [1.0, 0.25, 2.0] if named is False else {"a": 1.0, "b": 0.25, "c": 2.0}
    balancer = make([v / 100 for v in values] if not named else values)
    argument = next(n for n in ("weights", "preference", "minimum") if n in vars(balancer))
    steps(balancer, 2, 0)
    inside = getattr(balancer, argument)
    inside["b" if named else 1] = 0.125
    steps(copy.deepcopy(balancer), 1, 0)
    same_as_built(balancer, given(balancer))
    inside["b" if named else 1] = float("nan")
    with pytest.raises(ValueError, match=rf"every entry of `{argument}`.*found nan for task"):
        steps(balancer, 1, 0)


# ------------------------------------------------------------------------------------------ in fits


class Changing(Balanced):
    """``change(balancers, step)`` before every step."""

    def __init__(self, change: Any, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.change = change

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        own = [c for c in self.trainer.callbacks if isinstance(c, (LossBalancer, GradientBalancer))]
        self.change(own, batch_idx)


def fit(change: Any, *balancers: Any) -> Any:
    module = Changing(change)
    trainer(callbacks=list(balancers)).fit(module, loader())
    return module


class ByHand(LossBalancer):
    """The schedule of the next test."""

    needs_current_losses = False

    def __init__(self) -> None:
        super().__init__()
        self.add_state("step", 0)

    def loss_weights(self, losses: Tensor) -> Tensor:
        return torch.tensor([1.0, self.step / 10])

    def update(self, losses: Tensor, after: Tensor | None = None) -> None:
        self.step += 1


def test_a_schedule_of_a_loss_weight() -> None:
    def inside(balancers: Any, step: int) -> None:
        balancers[0].weights["b"] = step / 10

    def whole(balancers: Any, step: int) -> None:
        balancers[0].weights = {"b": step / 10}

    def ordered(balancers: Any, step: int) -> None:
        balancers[0].weights[1] = step / 10

    expected = weights(fit(lambda balancers, step: None, ByHand()))
    for how, start in ((inside, {"b": 0.5}), (whole, {"b": 0.5}), (ordered, [1.0, 0.5])):
        found = weights(fit(how, Scalarization(start)))
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-7)


def at_5(name: str, value: Any) -> Any:
    def change(balancers: Any, step: int) -> None:
        if step == 5:
            setattr(balancers[-1], name, value)

    return change


@pytest.mark.parametrize(
    ("balancer", "name", "value"),
    [
        (MinNorm(), "normalization", "loss"),  # which needs positive losses
        (MinNorm(), "gradients", "last_layer"),
        (DualBalance(), "beta", 0.0),  # which needs no rows
        (DualBalance(loss_part=False), "gradient_part", False),
        (Every(2, MinNorm()), "base", PCGrad()),
        (FAMO(minimum=[0.0, 0.0]), "minimum", None),
        (TaskTensioner(), "base", MinNorm()),
    ],
)
def test_what_a_fit_was_laid_out_for_stays(balancer: Any, name: str, value: Any) -> None:
    message = rf"^Expected `{name}` of {type(balancer).__name__} to stay during a fit, .*`fit`\.$"
    with pytest.raises(RuntimeError, match=message):
        fit(at_5(name, value), balancer)
    setattr(balancer, name, value)  # afterwards it may be
    fit(lambda balancers, step: None, balancer)


def test_what_a_wrapper_took_over_stays() -> None:
    base = MinNorm()
    with pytest.raises(RuntimeError, match=r"^Expected `weight_heads` of MinNorm to stay during a"):
        fit(lambda balancers, step: setattr(base, "weight_heads", step > 5), Smooth(base))
    base.scale = "sum"
    assert base.scale == "sum"


def test_unknown_names_and_numbers_that_are_none() -> None:
    for value, message in (
        ({"c": 1.0}, r"unknown tasks \['c'\]"),
        ([1.0], "hold one weight for each of the 2 tasks"),
        ({"a": -1.0}, "finite and at least 0, found -1.0 for task 'a'"),
        ({}, "at least one weight"),
    ):
        with pytest.raises(ValueError, match=message):
            fit(at_5("weights", value), Scalarization({"a": 2.0}))


def test_a_change_before_the_fit_is_checked_and_taken_up() -> None:
    early = CAGrad()
    early.c, early.preference = 0.9, {"b": 3.0}
    built = CAGrad(0.9, preference={"b": 3.0})
    nothing = lambda balancers, step: None  # noqa: E731 # two lines would not say more
    assert torch.equal(weights(fit(nothing, early)), weights(fit(nothing, built)))
    wrong = CAGrad()
    wrong.c = -1.0
    with pytest.raises(ValueError, match="`c` of CAGrad to be finite and at least 0, found -1"):
        fit(nothing, wrong)
    strict = MinNorm()
    strict.normalization = "loss"
    fit(nothing, strict)
    assert strict.requires_positive_losses


def test_what_counts_at_the_start_says_so() -> None:
    balancer = UncertaintyWeighting()
    balancer.init = 0.5  # nothing has begun
    steps(balancer, 1, 0)
    assert balancer.log_variances is not None
    with pytest.raises(RuntimeError, match=r"`init` of UncertaintyWeighting counts when its state"):
        balancer.init = 1.0
    drawing = RandomWeighting(seed=1)
    steps(drawing, 1, 0)
    with pytest.raises(RuntimeError, match="`seed` of RandomWeighting counts when its state begin"):
        drawing.seed = 2


class Mine(GradientBalancer):
    """A user's own: its attributes are its own affair."""

    def __init__(self, alpha: float = 1.0) -> None:
        super().__init__()
        self.built = [alpha]
        self.alpha = alpha

    def weights(self, gramian: Tensor, losses: Tensor) -> Tensor:
        self.alpha *= 0.5
        return torch.full_like(losses, self.alpha)


def test_a_class_of_a_user_changes_itself() -> None:
    balancer = Mine()
    fit(lambda balancers, step: None, balancer)
    assert balancer.built == [1.0]
    assert balancer.alpha == 0.5**20
