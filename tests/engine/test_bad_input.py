"""Bad losses, tasks and names: a clear error, and nothing that a step changes is changed."""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import LambdaCallback
from torch import Tensor

from lightning_mtl import (
    DualBalance,
    LogLoss,
    LossBalancer,
    MinNorm,
    MultiTaskModule,
    RandomWeighting,
    Scalarization,
)
from lightning_mtl.engine.guards import BadLossError
from tests.common.faulty import (
    Fault,
    Faulty,
    batches,
    change,
    fitted,
    parameters,
    same,
    state,
    without,
)
from tests.common.models import Balanced, Network, trainer

# What is left out is said once; tests/engine/test_edges.py checks that.
pytestmark = pytest.mark.filterwarnings("ignore:A loss or a gradient of optimiser step")


class Running(LossBalancer):
    """The example of the documentation: its state moves with the losses that it is given."""

    requires_positive_losses = True

    def __init__(self) -> None:
        super().__init__()
        self.add_state("mean", 0.0, per_task=True)

    def loss_weights(self, losses: Tensor) -> Tensor:
        mean = self.per_task_state("mean", losses)
        mean.copy_(torch.where(mean > 0, 0.9 * mean + 0.1 * losses, losses))
        return torch.tensor([1 / math.sqrt(value) for value in mean.tolist()]).to(losses)


BALANCERS: dict[str, list[type]] = {
    "none": [],
    "LogLoss": [LogLoss],
    "MinNorm": [MinNorm],
    "DualBalance": [DualBalance],
    "Running": [Running],
}
LOGARITHM = ("LogLoss", "DualBalance", "Running")
by_balancer = pytest.mark.parametrize("balancer", BALANCERS)
by_rule = pytest.mark.parametrize("rule", ["raise", "skip_task", "skip_step"])


@dataclass(frozen=True)
class Place:
    """Where the bad batch is: its index, the batches of its optimiser step, and that step."""

    every: int
    at: int
    group: range
    step: int

    @property
    def flags(self) -> dict[str, Any]:
        return {"accumulate_grad_batches": self.every}


PLACES = {
    "first step": Place(1, 0, range(1), 1),
    "later step": Place(1, 2, range(2, 3), 3),
    "first group": Place(3, 1, range(3), 1),
    "later group": Place(3, 4, range(3, 6), 2),
}
by_place = pytest.mark.parametrize("place", PLACES.values(), ids=PLACES)


def make(balancer: str) -> list[Any]:
    return [cls() for cls in {**BALANCERS, "RandomWeighting": [RandomWeighting]}[balancer]]


def error_in_fit(
    module: Any, message: str, balancers: list[Any], error: type = ValueError, **flags: Any
) -> dict[str, Any]:
    """Fit into an error; what is there after it."""
    run = trainer(callbacks=balancers, **flags)
    with pytest.raises(error, match=message):
        run.fit(module, batches())
    return {**state(run, module), "steps": run.global_step}


# ------------------------------------------------------------------------------------- bad losses

BAD: dict[str, Callable[[Tensor], Tensor]] = {
    "nan": lambda loss: loss * math.nan,
    "inf": lambda loss: loss * math.inf,
    "zero": lambda loss: loss - loss.detach(),
    "negative": lambda loss: -loss,
}
CASES = [
    (balancer, bad)
    for balancer in BALANCERS
    for bad in BAD
    if bad in ("nan", "inf") or balancer in LOGARITHM
]


class Given(Faulty):
    """Shared parameters by name, so that a task may be missing from the first step."""

    def shared_parameters(self) -> Any:
        return self.net.trunk.parameters()


@functools.cache
def ends_like(balancer: str, place: Place, what: str) -> dict[str, Any]:
    """The run that one with a bad batch must equal, bit for bit, as to parameters and all state.

    Args:
        balancer: which.
        place: of the bad batch.
        what: ``"stopped"`` before the bad step, ``"step"`` left out, or the task absent from the
            batch (``"task"``) or from all batches of the step (``"group"``).
    """
    balancers = make(balancer)
    if what == "stopped" and place.step == 1:
        module = Faulty()
        run = trainer(callbacks=balancers, limit_train_batches=0)
        run.fit(module, batches())
        return {**state(run, module), "steps": 0}
    if what in ("stopped", "step"):
        left_out = range(place.group[0], 6) if what == "stopped" else place.group
        return fitted(Faulty(), batches(leave_out=left_out), balancers, **place.flags)
    absent = [place.at] if what == "task" else place.group
    return fitted(Given({i: without("a") for i in absent}), batches(), balancers, **place.flags)


def test_a_step_that_is_left_out_draws_nothing() -> None:
    check(BAD["nan"], "skip_step", "RandomWeighting", PLACES["later step"], "", "step")


def check(
    fault: Callable[[Tensor], Tensor],
    rule: str,
    balancer: str,
    place: Place,
    message: str,
    what: str,
) -> None:
    module = Faulty({place.at: change("a", fault)}, on_bad_loss=rule)
    if rule == "raise":
        found = error_in_fit(module, message, make(balancer), BadLossError, **place.flags)
        assert found["steps"] == place.step - 1
        assert same(found, ends_like(balancer, place, "stopped"))
        return
    with warnings.catch_warnings():
        # Summed losses take a missing task for zero in the first such group, with a warning.
        warnings.filterwarnings("ignore", message="A task is missing from a micro-batch")
        found = fitted(module, batches(), make(balancer), **place.flags)
        expected = ends_like(balancer, place, "step" if rule == "skip_step" else what)
    assert same(found, expected)
    assert all(p.isfinite().all() for p in found["parameters"].values())


@by_place
@by_rule
@pytest.mark.parametrize(("balancer", "bad"), CASES)
def test_bad_loss(balancer: str, bad: str, rule: str, place: Place) -> None:
    expected = f"finite and positive (for {balancer})" if balancer in LOGARITHM else "finite"
    value = {"nan": "nan", "inf": "inf", "zero": "0.0", "negative": r"-\d.*"}[bad]
    cure = ", and a balancer that takes no logarithm" if balancer in LOGARITHM else r"\.$"
    message = (
        rf"^Expected {expected.replace('(', '[(]').replace(')', '[)]')} losses at optimiser step "
        rf"{place.step} but found {{'a': {value}}}. No parameter was changed.*learning rate; "
        rf"`on_bad_loss='skip_task'` or 'skip_step' goes on without such a loss{cure}"
    )
    check(BAD[bad], rule, balancer, place, message, "task")


@pytest.mark.parametrize("balancer", ["none", "MinNorm"])
@pytest.mark.parametrize("bad", ["zero", "negative"])
def test_zero_and_negative_losses_are_fine_without_a_logarithm(balancer: str, bad: str) -> None:
    after = fitted(Faulty({2: change("a", BAD[bad])}), batches(), make(balancer))
    assert after["steps"] == 6


def endless_slope(loss: Tensor) -> Tensor:
    """The same value with an infinite gradient, as of a square root at zero."""
    return loss + (loss - loss.detach()).sqrt()


@by_place
@by_rule
@pytest.mark.parametrize("balancer", ["MinNorm", "DualBalance"])
def test_finite_loss_with_a_gradient_that_is_not(balancer: str, rule: str, place: Place) -> None:
    message = (
        rf"^Expected finite gradients at optimiser step {place.step} but the gradient of "
        rf"\['a'\] is not.*No parameter was changed. Look for a square root.*='skip_task'`"
    )
    check(endless_slope, rule, balancer, place, message, "group")


def test_gradient_that_is_not_finite_in_a_head_alone() -> None:
    class Steep(Faulty):
        def forward(self, x: Tensor) -> dict[str, Tensor]:
            bias = self.net.heads["head_a"].bias
            return {**super().forward(x), "a": super().forward(x)["a"] + endless_slope(bias) - bias}

    module = Steep()
    before = parameters(module)
    found = error_in_fit(module, r"gradient of \['a'\] is not", [DualBalance()], BadLossError)
    assert same(found["parameters"], before)
    assert found["balancers"]["DualBalance"]["state"]["average"] is None


# ------------------------------------------------------------------- what `task_losses` returns

WRONG: dict[str, tuple[Fault, type[Exception], str]] = {
    "not declared": (
        lambda losses: {**losses, "depht": losses["a"]},
        ValueError,
        r"unknown task \['depht'\]; the module declares \['a', 'b'\]. Correct the name, or declare",
    ),
    "not scalar": (
        change("b", lambda loss: loss.expand(4)),
        ValueError,
        r"loss of task 'b' to be a scalar but got shape \(4,\). Reduce it, .*`\.mean\(\)`",
    ),
    "complex": (
        change("b", lambda loss: loss.to(torch.complex64)),
        ValueError,
        r"loss of task 'b' to be a real number but got torch.complex64. Return its real part",
    ),
    "no graph": (
        change("b", lambda loss: loss.detach()),
        ValueError,
        r"loss of task 'b' to have a graph but it does not depend on .* look for `\.detach\(\)`",
    ),
    "a number": (
        change("b", lambda loss: loss.item()),
        TypeError,
        r"loss of task 'b' to be a tensor but got float. Return the loss itself, not `\.item\(\)`",
    ),
    "a tensor": (
        lambda losses: losses["a"] + losses["b"],
        TypeError,
        r"dict {task: loss} but got Tensor. Return one scalar loss for each of \['a', 'b'\]",
    ),
}


@pytest.mark.parametrize("place", [PLACES["first step"], PLACES["later group"]], ids=["1", "2"])
@by_balancer
@pytest.mark.parametrize(("fault", "error", "message"), WRONG.values(), ids=WRONG)
def test_wrong_losses(
    fault: Fault, error: type[Exception], message: str, balancer: str, place: Place
) -> None:
    module = Faulty({place.at: fault})
    found = error_in_fit(module, message, make(balancer), error, **place.flags)
    assert same(found, ends_like(balancer, place, "stopped"))


class Undeclared(Faulty):
    """Its tasks are those of the first batch."""

    def __init__(self, faults: Any = None, **kwargs: Any) -> None:
        super().__init__(faults)
        MultiTaskModule.__init__(self, **kwargs)
        torch.manual_seed(1)
        self.net = Network()

    def task_losses(self, batch: Any, batch_idx: int) -> Any:
        losses = {name: y.square().mean() for name, y in self.net(batch[0]).items()}
        return self.faults.get(batch_idx, lambda unchanged: unchanged)(losses)


@pytest.mark.parametrize("name", ["a tensor", "not declared"])
def test_wrong_losses_of_a_module_that_declares_no_tasks(name: str) -> None:
    fault, error, message = WRONG[name]
    at = 0 if name == "a tensor" else 1
    message = r"a loss of \['depht'\], which the first batch had not.*tasks=\['a', 'b', 'depht'\]"
    if not at:
        message = r"{task: loss} but got Tensor. Return .* each of your tasks"
    module = Undeclared({at: fault})
    found = error_in_fit(module, message, [MinNorm()], error)
    expected = Undeclared()
    if at:
        fitted(expected, batches(1), [MinNorm()])
    assert same(found["parameters"], parameters(expected))


@pytest.mark.parametrize("every", [1, 3])
@by_balancer
def test_task_that_never_appears(balancer: str, every: int) -> None:
    module = Faulty({i: without("b") for i in range(6)})
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="A task is missing from a micro-batch")
        found = fitted(module, batches(), make(balancer), accumulate_grad_batches=every)
    assert found["steps"] == 6 // every
    assert all(p.isfinite().all() for p in found["parameters"].values())


@by_balancer
def test_task_that_is_missing_later_is_absent(balancer: str) -> None:
    seen = []
    module = Faulty({1: without("b"), 2: change("b", lambda loss: None)})
    note = LambdaCallback(on_train_batch_end=lambda *_: seen.append(module.last_step.tasks))
    after = fitted(module, batches(4), [*make(balancer), note])
    assert seen == [("a", "b"), ("a",), ("a",), ("a", "b")]
    assert after["steps"] == 4


# ------------------------------------------------------------------------------------------ names

NAMES = [
    (lambda: MultiTaskModule(["a", "b", "a"]), r"each task once but found \['a'\] more than once"),
    (lambda: MultiTaskModule([]), "at least one task but got none. Pass `tasks="),
    (lambda: MultiTaskModule(["a/b"]), r"without '\.' and '/', .* but got \['a/b'\]"),
    (lambda: MultiTaskModule("ab"), "task names as a list of strings but got 'ab'"),
    (
        lambda: Balanced(active_tasks=["a", "depht"]),
        r"`active_tasks` names the unknown task \['depht'\]; the module declares \['a', 'b'\]. Cor",
    ),
    (lambda: Balanced(active_tasks=["a", "a"]), r"each task once but found \['a'\] more than once"),
    (lambda: Balanced(on_bad_loss="skip"), r"`on_bad_loss` .*'ignore'\) but got 'skip'"),
]


@pytest.mark.parametrize(("build", "message"), NAMES)
def test_names_in_the_constructor(build: Callable[[], Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        build()


def test_active_tasks_keep_their_value() -> None:
    module = Balanced(active_tasks=["b"])
    with pytest.raises(ValueError, match=r"unknown task \['c'\]; the module declares"):
        module.active_tasks = ["b", "c"]
    assert module.active_tasks == ("b",)


@pytest.mark.parametrize(
    ("balancer", "message"),
    [
        (
            lambda: Scalarization({"depht": 2.0}),
            r"unknown tasks \['depht'\]; the tasks are \['a', ",
        ),
        (lambda: Scalarization([1.0]), r"for each of the 2 tasks \['a', 'b'\], found 1. Give"),
    ],
)
def test_names_in_a_balancer(balancer: Callable[[], Any], message: str) -> None:
    module = Balanced()
    found = error_in_fit(module, message, [balancer()])
    assert same(found["parameters"], parameters(Balanced()))
    assert found["steps"] == 0
