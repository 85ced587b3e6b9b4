"""What is special to the wrappers Every and Smooth; they and the task tensioner wrap anything."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from lightning_mtl.balancer import Balancer, GradientBalancer
from lightning_mtl.gradient_balancers import CentralDirection, DualBalance, MinNorm, TaskTensioner
from lightning_mtl.gradient_balancers.every import Every
from lightning_mtl.gradient_balancers.grad_norm import (
    GradNorm,
)
from lightning_mtl.gradient_balancers.grad_vac import GradVac
from lightning_mtl.gradient_balancers.meta_balance import MetaBalance
from lightning_mtl.gradient_balancers.pcgrad import PCGrad
from lightning_mtl.gradient_balancers.smooth import Smooth, smoothed_weights
from lightning_mtl.loss_balancers import EqualWeighting, LogLoss
from tests.common.models import Balanced, loader, trainer
from tests.methods.in_order import random_step, saved

NAN = float("nan")


REFUSED = [
    (Every, {"n": 0, "base": MinNorm()}, "`n` of Every .* at least 1, found 0"),
    (Every, {"n": 2.0, "base": MinNorm()}, "`n` of Every .* integer .* found 2.0"),
    (Every, {"n": 2, "base": LogLoss()}, "`base` of Every .* from the Gramian, found LogLoss. Use"),
    (Every, {"n": 2, "base": MetaBalance()}, "from the Gramian, found MetaBalance. Use"),
    (Every, {"n": 2, "base": GradVac(groups="layer")}, "from the Gramian, found GradVac"),
    (Every, {"n": 2, "base": Every(3, MinNorm())}, r"found Every\(n=3\)\. Wrap its base"),
    (
        Every,
        {"n": 2, "base": DualBalance(beta=0.0)},
        "balance gradients only, found DualBalance, whose loss weights would be lost",
    ),
    (Smooth, {"base": EqualWeighting()}, "`base` of Smooth .* found EqualWeighting. Use"),
    (Smooth, {"base": DualBalance(beta=0.0)}, "gradients only, found DualBalance"),
    (Smooth, {"base": MinNorm(), "alpha": 1.0}, r"`alpha` of Smooth .* \[0, 1\), found 1.0"),
    (Smooth, {"base": MinNorm(), "alpha": -0.1}, r"`alpha` of Smooth .* \[0, 1\), found -0.1"),
]


@pytest.mark.parametrize(("cls", "arguments", "message"), REFUSED)
def test_refused(cls, arguments, message) -> None:
    with pytest.raises(ValueError, match=message):
        cls(**arguments)


def test_defaults() -> None:
    assert Smooth(MinNorm()).alpha == 0.9
    for wrapper in (Every(2, MinNorm()), Smooth(MinNorm())):
        assert wrapper.gramian_weighted
        assert not wrapper.weight_heads
        assert not wrapper.requires_positive_losses
        assert wrapper.gradients == "parameters"


class Counted(GradientBalancer):
    """Weights 1, 2, 3, ... by the call; counts what it was asked; heads get a tenth."""

    def __init__(self, own_heads: bool = False) -> None:
        super().__init__(gradients="last_layer")
        self.calls = self.updates = 0
        self.weight_heads = own_heads
        self.requires_positive_losses = True

    def weights(self, gramian: Tensor, losses: Tensor) -> Tensor:
        self.calls += 1
        return losses.new_full((len(losses),), float(self.calls))

    def head_weights(self) -> Tensor:
        return torch.full((2,), self.calls / 10)

    def update(self, losses: Tensor, after: Tensor | None = None) -> None:
        self.updates += 1


def step(balancer: GradientBalancer, size: int = 2) -> float:
    losses = torch.ones(size)
    weights = balancer.weights(torch.eye(size), losses)
    balancer.update(losses)
    assert weights.unique().numel() == 1
    return float(weights[0])


@pytest.mark.parametrize("n", [1, 2, 3])
def test_weights_last_for_n_steps(n: int) -> None:
    balancer = Every(n, Counted())
    assert balancer.reused_weights() is None
    assert [step(balancer) for _ in range(7)] == [k // n + 1 for k in range(7)]
    assert balancer.base.calls == 6 // n + 1
    assert balancer.base.updates == 7
    assert balancer.gradients == "last_layer"
    assert balancer.requires_positive_losses


def test_reused_weights_are_told_before_the_step_and_change_nothing() -> None:
    balancer = Every(3, Counted())
    for k in range(8):
        told = balancer.reused_weights()
        assert (told is None) == (k % 3 == 0)
        again = balancer.reused_weights()
        assert told is None or torch.equal(again, told)
        if told is not None:
            told.zero_()  # a copy
        assert step(balancer) == k // 3 + 1


def test_only_steps_that_were_taken_count() -> None:
    balancer, losses = Every(2, Counted()), torch.ones(2)
    for _ in range(4):  # steps that are skipped: the weights still hold
        assert balancer.weights(torch.eye(2), losses)[0] == 1
    assert step(balancer) == 1
    assert step(balancer) == 1
    assert step(balancer) == 2


def test_weights_are_new_as_soon_as_a_task_has_none() -> None:
    balancer = Every(4, Counted())

    def narrowed(present: list[int]) -> tuple[bool, float]:
        with balancer.only("abc", present):
            told = balancer.reused_weights() is not None
            return told, step(balancer, len(present))

    assert narrowed([0, 1]) == (False, 1)
    assert narrowed([1]) == (True, 1)  # a part of the tasks: theirs hold
    assert narrowed([1, 2]) == (False, 2)  # c has none
    assert narrowed([0, 1]) == (False, 3)  # a and b come from different steps
    assert [narrowed([0, 1])[0] for _ in range(4)] == [True, True, True, False]
    assert narrowed([0, 1, 2]) == (False, 5)


def test_weights_that_are_not_finite_are_not_kept() -> None:
    balancer, losses = Every(5, MinNorm()), torch.ones(2)
    assert balancer.weights(torch.full((2, 2), NAN), losses).isnan().all()
    assert balancer.reused_weights() is None
    expected = balancer.weights(torch.eye(2), losses)
    assert torch.equal(balancer.reused_weights(), expected)
    smooth = Smooth(MinNorm())
    assert smooth.weights(torch.full((2, 2), NAN), losses).isnan().all()
    assert torch.equal(smooth.weights(torch.eye(2), losses), expected)
    before = smooth.average.clone()
    assert smooth.weights(torch.full((2, 2), NAN), losses).isnan().all()
    assert torch.equal(smooth.average, before)


def every_third(base: GradientBalancer) -> Every:
    return Every(3, base)


each_wrapper = pytest.mark.parametrize("wrap", [every_third, Smooth])


@each_wrapper
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_head_weights_follow_the_base(wrap, dtype: torch.dtype) -> None:
    gramian, losses = torch.diag(torch.tensor([1.0, 3.0])).to(dtype), torch.ones(2, dtype=dtype)
    plain, weighing = wrap(MinNorm()), wrap(MinNorm(weight_heads=True))
    own = wrap(Counted(own_heads=True))
    assert (plain.weight_heads, weighing.weight_heads, own.weight_heads) == (False, True, True)
    for _ in range(2):
        for balancer in (plain, weighing, own):
            weights = balancer.weights(gramian, losses)
            assert weights.dtype == dtype
            balancer.update(losses)
        torch.testing.assert_close(own.head_weights().to(dtype), weights / 10)
    assert plain.head_weights().tolist() == [1.0, 1.0]
    assert weighing.head_weights().tolist() == [0.75, 0.25]


@pytest.mark.parametrize(
    "wrap",
    [
        lambda base: Every(2, Smooth(base)),
        lambda base: Smooth(Every(2, base), alpha=0.5),
        lambda base: Smooth(Smooth(base, alpha=0.5), alpha=0.2),
    ],
)
def test_head_weights_of_a_wrapped_wrapper(wrap) -> None:
    balancer = wrap(Counted(own_heads=True))
    for _ in range(5):
        weights = balancer.weights(torch.eye(2), torch.ones(2))
        balancer.update(torch.ones(2))
    assert weights[0] != 1
    torch.testing.assert_close(balancer.head_weights(), weights / 10)


def test_no_head_weights_before_the_first_step() -> None:
    for balancer in (Every(2, MinNorm()), Smooth(MinNorm())):
        with pytest.raises(RuntimeError, match="no head weights before its first `weights`"):
            balancer.head_weights()


def test_every_is_resumed_within_a_period() -> None:
    rng = np.random.default_rng(0)
    data = [random_step(rng, 3) for _ in range(9)]

    def run(balancer: Every, part: list[tuple[Tensor, Tensor]]) -> list[Tensor]:
        found = []
        for jacobian, losses in part:
            found.append(balancer.direction(jacobian, losses))
            balancer.update(losses)
        return found

    expected = run(Every(4, PCGrad(seed=0)), data)
    for stop in range(9):
        first, second = (Every(4, PCGrad(seed=0)) for _ in range(2))
        run(first, data[:stop])
        second.load_state_dict(saved(first))
        assert all(map(torch.equal, run(second, data[stop:]), expected[stop:]))
        assert second.state_key == "Every(PCGrad)"


def test_smooth_is_a_moving_average() -> None:
    rng = np.random.default_rng(0)
    balancer, average = Smooth(MinNorm(), alpha=0.7), None
    for _ in range(6):
        jacobian, losses = random_step(rng, 3)
        gramian = jacobian @ jacobian.T
        latest = MinNorm().weights(gramian, losses)
        average = latest if average is None else 0.7 * average + 0.3 * latest
        torch.testing.assert_close(balancer.weights(gramian, losses), average)
    balancer.alpha = 0.0  # may be set anew at any time
    assert torch.equal(balancer.weights(gramian, losses), latest)
    assert torch.equal(smoothed_weights(average, latest, 0.0), latest)
    assert torch.equal(smoothed_weights(average, latest, 1.0), average)


def test_average_of_a_task_starts_with_its_first_weight() -> None:
    balancer = Smooth(Counted(), alpha=0.5)
    with balancer.only("ab", [0]):
        assert balancer.weights(torch.eye(1), torch.ones(1)).tolist() == [1.0]
    with balancer.only("ab"):
        assert balancer.weights(torch.eye(2), torch.ones(2)).tolist() == [1.5, 2.0]
    with balancer.only("ab", [1]):
        assert balancer.weights(torch.eye(1), torch.ones(1)).tolist() == [2.5]
    with balancer.only("ab"):
        assert balancer.weights(torch.eye(2), torch.ones(2)).tolist() == [2.75, 3.25]


@each_wrapper
def test_wrapped_balancer_is_reset_and_saved_too(wrap) -> None:
    jacobian, losses = random_step(np.random.default_rng(0), 3)
    balancer, other = (wrap(GradVac(seed=0)) for _ in range(2))
    first = balancer.direction(jacobian, losses)
    other.load_state_dict(saved(balancer))
    assert torch.equal(other.base.targets, balancer.base.targets)
    balancer.reset()
    assert balancer.base.targets is None
    assert torch.equal(balancer.direction(jacobian, losses), first)


def test_weights_of_another_run_are_refused() -> None:
    balancer, losses = Every(3, MinNorm()), torch.ones(3)
    with balancer.only("ab"):
        balancer.weights(torch.eye(2), losses[:2])
    with balancer.only("abc"):
        assert balancer.reused_weights() is None
        with pytest.raises(ValueError, match=r"`stored` in shape \(3, 3\) but found \(2, 3\)"):
            balancer.weights(torch.eye(3), losses)


BASES = {
    "PCGrad": lambda: PCGrad(seed=0),
    "PCGrad(mean)": lambda: PCGrad(order="ascending", include_self=True, scale="mean"),
    "GradVac": lambda: GradVac(seed=0),
    "GradNorm": lambda: GradNorm(weight_heads=False),
    "Every(PCGrad)": lambda: Every(2, PCGrad(seed=0)),
    "Every(MinNorm)": lambda: Every(3, MinNorm()),
    "Every(GradVac)": lambda: Every(2, GradVac(seed=0)),
    "Every(Smooth)": lambda: Every(2, Smooth(CentralDirection())),
    "Smooth(PCGrad)": lambda: Smooth(PCGrad(seed=0)),
    "Smooth(Every)": lambda: Smooth(Every(2, MinNorm())),
    "Smooth(GradNorm)": lambda: Smooth(GradNorm(weight_heads=False)),
}


@pytest.mark.parametrize("name", BASES)
@pytest.mark.parametrize("feasibility", ["published", "exact", "none"])
def test_task_tensioner_over(name: str, feasibility: str) -> None:
    rng = np.random.default_rng(0)
    data = [random_step(rng, 3) for _ in range(8)]
    base, whole = BASES[name](), TaskTensioner(BASES[name](), window=2, feasibility=feasibility)
    found = []
    for k, (jacobian, losses) in enumerate(data):
        expected = base.direction(jacobian, losses)
        base.update(losses)
        if k == 5:
            state = saved(whole)
        found.append(whole.direction(jacobian, losses))
        whole.update(losses)
        assert found[-1].isfinite().all()
        # The tension starts after the window; until then the base goes its way inside.
        assert torch.equal(found[-1], expected) == (k < 2)
    resumed = TaskTensioner(BASES[name](), window=2, feasibility=feasibility)
    resumed.load_state_dict(state)
    for (jacobian, losses), other in zip(data[5:], found[5:], strict=True):
        assert torch.equal(resumed.direction(jacobian, losses), other)
        resumed.update(losses)


class Held(GradientBalancer):
    """What Every(n, MinNorm()) means, with the Jacobian of every step."""

    def __init__(self, n: int, weight_heads: bool) -> None:
        super().__init__()
        self.n, self.weight_heads, self.steps = n, weight_heads, 0

    def weights(self, gramian: Tensor, losses: Tensor) -> Tensor:
        if self.steps % self.n == 0:
            self.held = MinNorm().weights(gramian, losses)
        return self.held

    def update(self, losses: Tensor, after: Tensor | None = None) -> None:
        self.steps += 1


@pytest.mark.parametrize("weight_heads", [False, True])
@pytest.mark.parametrize("losses", [[], [LogLoss()]])
def test_every_in_a_run(weight_heads: bool, losses: list[Balancer]) -> None:
    models = []
    every = Every(3, MinNorm(weight_heads=weight_heads))
    for balancer in (every, Held(3, weight_heads)):
        model = Balanced()
        trainer(callbacks=[*losses, balancer]).fit(model, loader())
        models.append(model)
    for found, expected in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(found, expected)
    assert int(every.times) == 7  # of 20 steps
