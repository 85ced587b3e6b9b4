"""What is special to each loss balancer: its law, what it learns, draws or counts, and extremes."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_mtl.loss_balancers import LogLoss
from lightning_mtl.loss_balancers.dynamic_weight_average import (
    DynamicWeightAverage,
    dynamic_average_weights,
)
from lightning_mtl.loss_balancers.famo import FAMO, famo_weights
from lightning_mtl.loss_balancers.geometric_mean import GeometricMean, geometric_mean_weights
from lightning_mtl.loss_balancers.improvable_gap_v1 import ImprovableGapV1, improvable_gap_weights
from lightning_mtl.loss_balancers.imtll import IMTLL
from lightning_mtl.loss_balancers.random_weighting import RandomWeighting
from lightning_mtl.loss_balancers.soft_optimal_uncertainty import (
    SoftOptimalUncertainty,
    soft_optimal_weights,
)
from lightning_mtl.loss_balancers.stch import STCH, stch_weights
from lightning_mtl.loss_balancers.uncertainty_weighting import UncertaintyWeighting

NAN, INF = float("nan"), float("inf")
LEARNED = [(UncertaintyWeighting, "log_variances", 1), (IMTLL, "log_scales", -1)]


def wide(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def some_losses(size: int = 5, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 10 ** (2 * torch.rand(size, generator=generator, dtype=torch.float64) - 1)


def slope(function: Any, losses: Tensor) -> Tensor:
    """The derivative of a function of the losses."""
    variable = losses.clone().requires_grad_()
    function(variable).backward()
    return variable.grad


def reloaded(balancer: Any, make: Any) -> Any:
    """A fresh balancer with the state of another, through a checkpoint file."""
    file = io.BytesIO()
    torch.save(balancer.state_dict(), file)
    file.seek(0)
    fresh = make()
    fresh.load_state_dict(torch.load(file, weights_only=True))
    return fresh


def same_state(a: Any, b: Any) -> bool:
    one, two = a.state_dict()["state"], b.state_dict()["state"]
    return all(
        torch.equal(one[k], two[k]) if isinstance(one[k], Tensor) else one[k] == two[k] for k in one
    )


# ------------------------------------------------------------------------------------- arguments

REFUSED = [
    (RandomWeighting, {"scale": "max"}, r"`scale` of RandomWeighting .*'sum'\), found 'max'"),
    (RandomWeighting, {"seed": -1}, "`seed` of RandomWeighting .* at least 0 .* found -1"),
    (UncertaintyWeighting, {"init": 71.0}, r"`init` of UncertaintyW.* \[-70, 70\], found 71.0"),
    (UncertaintyWeighting, {"lr": 0.0}, "`lr` of UncertaintyWeighting .* above 0, found 0.0"),
    (IMTLL, {"init": NAN}, r"`init` of IMTLL to be in \[-70, 70\], found nan"),
    (IMTLL, {"lr": -1.0}, "`lr` of IMTLL .* above 0, found -1.0"),
    (DynamicWeightAverage, {"temperature": 0}, "`temperature` of Dynamic.* above 0, found 0"),
    (DynamicWeightAverage, {"window": 0}, "`window` of DynamicW.* at least 1, found 0"),
    (DynamicWeightAverage, {"window": 2.0}, "`window` of DynamicW.* integer .* found 2.0"),
    (ImprovableGapV1, {"base_epoch": -1}, "`base_epoch` of ImprovableGapV1 .* 0, found -1"),
    (SoftOptimalUncertainty, {"temperature": -1.0}, "`temperature` of Soft.* above 0, found -1"),
    (SoftOptimalUncertainty, {"scale": None}, "`scale` of SoftOptimal.* found None"),
    (FAMO, {"gamma": -1e-3}, "`gamma` of FAMO .* at least 0, found -0.001"),
    (FAMO, {"lr": INF}, "`lr` of FAMO .* finite .* found inf"),
    (FAMO, {"eps": -1e-8}, "`eps` of FAMO .* at least 0, found -1e-08"),
    (FAMO, {"scale": "none"}, "`scale` of FAMO .* found 'none'"),
    (FAMO, {"minimum": {"a": NAN}}, "`minimum` of FAMO .* finite, found nan for task 'a'"),
    (FAMO, {"minimum": [0.0, "x"]}, "`minimum` of FAMO .* finite, found 'x' for task 1"),
    (STCH, {"mu": 0.0}, "`mu` of STCH .* above 0, found 0.0"),
    (STCH, {"warm_up": -1}, "`warm_up` of STCH .* at least 0, found -1"),
    (STCH, {"preference": {"a": 0.0}}, "`preference` of STCH .* above 0, found 0.0 for task 'a'"),
]


@pytest.mark.parametrize(("cls", "arguments", "message"), REFUSED)
def test_refused(cls: Any, arguments: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        cls(**arguments)


@pytest.mark.parametrize(
    ("balancer", "name"),
    [(STCH(preference=[1.0, 2.0]), "preference"), (FAMO(minimum=[0.5, 2.0]), "minimum")],
)
def test_numbers_in_order_get_the_names_of_the_tasks(balancer: Any, name: str) -> None:
    losses = torch.ones(3)
    with pytest.raises(ValueError, match=rf"`{name}` of .* for 3 tasks but found \[.*by hand"):
        balancer.loss_weights(losses)
    with pytest.raises(ValueError, match=rf"`{name}` .* of the 3 tasks \['a', .* found 2\. Give"):
        balancer.check_tasks(["a", "b", "c"])


@pytest.mark.parametrize(
    ("balancer", "name"),
    [(STCH(preference={"z": 2.0}), "preference"), (FAMO(minimum={"z": 1}), "minimum")],
)
def test_names_of_no_task(balancer: Any, name: str) -> None:
    with pytest.raises(ValueError, match=rf"`{name}` of .* unknown tasks \['z'\]; the tasks are"):
        balancer.check_tasks(["a", "b"])


def test_defaults() -> None:
    assert UncertaintyWeighting().hyperparameters() == {"init": 0.0, "lr": 0.025}
    assert IMTLL().hyperparameters() == {"init": 0.0, "lr": 0.025}
    assert DynamicWeightAverage().hyperparameters() == {"temperature": 2.0, "window": None}
    assert ImprovableGapV1().hyperparameters() == {"base_epoch": 1}
    assert SoftOptimalUncertainty().hyperparameters() == {"temperature": 1.0, "scale": "mean"}
    assert STCH().hyperparameters() == {"mu": 1.0, "warm_up": 4, "preference": None}
    assert RandomWeighting().hyperparameters() == {"scale": "mean", "seed": None}
    famo = {"gamma": 1e-3, "lr": 0.025, "minimum": None, "eps": 1e-8, "scale": "mean"}
    assert FAMO().hyperparameters() == famo


def test_what_the_flow_has_to_provide() -> None:
    blind = [RandomWeighting(), UncertaintyWeighting(), DynamicWeightAverage(), IMTLL()]
    seeing = [GeometricMean(), ImprovableGapV1(), SoftOptimalUncertainty(), FAMO(), STCH()]
    assert not any(b.needs_current_losses for b in blind)
    assert all(b.needs_current_losses for b in seeing)
    assert [b for b in blind + seeing if b.needs_losses_after] == [seeing[3]]
    assert all(b.requires_positive_losses for b in [*seeing, IMTLL()])
    assert not any(b.requires_positive_losses for b in [*blind[:3], FAMO(minimum=[-1.0])])


# ----------------------------------------------------------------------------- bad and far losses

TAKING_LOSSES = {
    "GeometricMean": geometric_mean_weights,
    "ImprovableGapV1": lambda losses: improvable_gap_weights(losses, torch.ones_like(losses)),
    "SoftOptimalUncertainty": soft_optimal_weights,
    "FAMO": lambda losses: famo_weights(losses, torch.zeros_like(losses), eps=0.0),
    "STCH": lambda losses: stch_weights(losses, torch.ones_like(losses)),
    "STCH, warming up": STCH().loss_weights,
}
TERM_BY_TERM = [TAKING_LOSSES["ImprovableGapV1"], TAKING_LOSSES["STCH, warming up"]]


@pytest.mark.parametrize("bad", [0.0, -1.0, NAN])
@pytest.mark.parametrize("function", TAKING_LOSSES.values(), ids=TAKING_LOSSES)
def test_no_weight_for_a_loss_without_logarithm(function: Any, bad: float) -> None:
    found = function(torch.tensor([1.0, bad])).isnan()
    assert found[1]
    if function not in TERM_BY_TERM:
        assert found.all()


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (geometric_mean_weights, [1 / 3e-30, 1 / 3, 1 / 3e30]),
        (lambda losses: improvable_gap_weights(losses, losses), [1e30, 1.0, 1e-30]),
        (lambda losses: improvable_gap_weights(losses, losses.flip(0)), [0.0, 0.0, 3e-30]),
        (soft_optimal_weights, [1.0, 0.0, 0.0]),
        (lambda losses: soft_optimal_weights(losses, 1e30), [0.576117, 0.211942, 0.211942]),
        (lambda losses: soft_optimal_weights(losses, 1e-10), [1.0, 0.0, 0.0]),
        (lambda losses: famo_weights(losses, torch.zeros(3), eps=0.0), [1.0, 1e-30, 0.0]),
        (lambda losses: famo_weights(losses, losses.log(), eps=0.0), [1 / 3] * 3),
        (lambda losses: stch_weights(losses, losses), [1e30, 1.0, 1e-30]),
        (lambda losses: stch_weights(losses, torch.ones(3)), [3e-30] * 3),
        (lambda losses: dynamic_average_weights(losses, losses), [1.0] * 3),
        (lambda losses: dynamic_average_weights(losses, losses.flip(0)), [0.0, 0.0, 3.0]),
        (lambda losses: dynamic_average_weights(losses.flip(0), losses, 1e-30), [3.0, 0.0, 0.0]),
    ],
)
def test_sixty_orders_apart_in_float32(function: Any, expected: list[float]) -> None:
    found = function(torch.tensor([1e-30, 1.0, 1e30]))
    torch.testing.assert_close(found, torch.tensor(expected), rtol=1e-4, atol=0)


@pytest.mark.parametrize(("cls", "name", "sign"), LEARNED)
def test_learning_from_far_losses_in_float32(cls: Any, name: str, sign: int) -> None:
    losses = torch.tensor([1e30, 1e-30, 1.0])
    balancer = cls()
    for k in range(1, 101):
        balancer.update(losses)
        learned = getattr(balancer, name)
        assert balancer.moments.isfinite().all()
        # A gradient that keeps its sign moves by about the learning rate, whatever its size.
        assert sign * learned[0] > 0.3 * 0.025 * k**0.5
        assert abs(sign * float(learned[1]) + 0.025 * k) < 1e-3 * k
        assert learned[2].abs() <= (0 if sign > 0 else 1e-6)
    for start in (-70.0, 70.0):
        balancer = cls(init=start, lr=1.0)
        for _ in range(3):
            assert balancer.loss_weights(losses).isfinite().all()
            balancer.update(torch.tensor([1e35, 1e-35, 1.0]))
        assert getattr(balancer, name).abs().max() <= 70


@pytest.mark.parametrize("bad", [0.0, -3.0])
def test_uncertainty_weighting_bears_losses_that_are_not_positive(bad: float) -> None:
    balancer = UncertaintyWeighting(lr=1.0)
    losses = torch.tensor([bad, 1.0])
    for _ in range(100):
        balancer.update(losses)
    assert balancer.log_variances[0] == -70
    assert balancer.loss_weights(losses).isfinite().all()
    balancer.update(torch.tensor([1e30, 1.0]))
    assert balancer.moments.isfinite().all()


def test_low_precision_losses_and_full_precision_state() -> None:
    losses = torch.tensor([2.0, 0.5], dtype=torch.bfloat16)
    for balancer in (UncertaintyWeighting(), IMTLL(), FAMO(), STCH(), DynamicWeightAverage()):
        assert balancer.loss_weights(losses).dtype == torch.bfloat16
        balancer.update(losses, losses / 2)
        state = [s for s in balancer.state_dict()["state"].values() if isinstance(s, Tensor)]
        assert state
        assert all(s.dtype == torch.float32 for s in state)


@pytest.mark.parametrize(
    "make",
    [UncertaintyWeighting, IMTLL, FAMO, STCH, ImprovableGapV1, lambda: DynamicWeightAverage(2, 1)],
)
def test_weights_move_no_state(make: Any) -> None:
    balancer = make()
    for k in range(4):
        losses = some_losses(3, k)
        first = balancer.loss_weights(losses)
        before = reloaded(balancer, make)
        assert torch.equal(balancer.loss_weights(losses), first)
        assert same_state(before, balancer)
        balancer.update(losses, losses**1.1)
        assert not same_state(before, balancer)


# ------------------------------------------------------------------------------- only the losses


@pytest.mark.parametrize("size", [1, 2, 5, 12])
def test_geometric_mean_is_differentiated(size: int) -> None:
    losses = some_losses(size)
    expected = slope(lambda x: x.prod() ** (1 / size), losses)
    found = GeometricMean().loss_weights(losses)
    torch.testing.assert_close(found, expected)
    logarithm = LogLoss(eps=0.0).loss_weights(losses)
    torch.testing.assert_close(found, logarithm * (found @ losses) / size)


def test_geometric_mean_of_a_hundred_losses() -> None:
    losses = torch.full((100,), 1e-3)  # their product is no float32 number
    torch.testing.assert_close(GeometricMean().loss_weights(losses), torch.full((100,), 0.01))


def test_soft_optimal_uncertainty_between_equal_and_one() -> None:
    losses = wide(2.0, 0.5, 1.5)
    for temperature, expected in ((1e9, wide(1, 1, 1) / 3), (1e-3, wide(0, 1, 0))):
        found = SoftOptimalUncertainty(temperature).loss_weights(losses)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-8)
    one, total = (
        SoftOptimalUncertainty(2.0, scale=s).loss_weights(losses) for s in ("mean", "sum")
    )
    torch.testing.assert_close(total, 3 * one)
    shifted = torch.exp(1 / (2 * losses) - 7)  # a softmax, however it is shifted
    torch.testing.assert_close(one, shifted / shifted.sum())


# ---------------------------------------------------------------------------------------- random


def test_random_weights_are_a_softmax_of_standard_normal_numbers() -> None:
    balancer = RandomWeighting(seed=0)
    drawn = torch.stack([balancer.loss_weights(torch.zeros(3).double()) for _ in range(4000)])
    torch.testing.assert_close(drawn.sum(1), torch.ones(4000).double(), rtol=0, atol=1e-6)
    torch.testing.assert_close(drawn.mean(0), wide(1, 1, 1) / 3, rtol=0.03, atol=0)
    differences = drawn[:, 0].log() - drawn[:, 1].log()  # of two independent standard normals
    assert abs(differences.mean()) < 0.08
    assert abs(differences.std() / 2**0.5 - 1) < 0.04
    excess = (differences**4).mean() / differences.var() ** 2 - 3
    assert abs(excess) < 0.3


def test_random_weights_have_a_generator_of_their_own() -> None:
    losses = torch.ones(4)
    balancer = RandomWeighting(seed=5)
    expected = [balancer.loss_weights(losses) for _ in range(3)]
    assert not torch.equal(expected[0], expected[1])
    balancer.reset()
    torch.manual_seed(99)
    before = torch.get_rng_state()
    assert torch.equal(balancer.loss_weights(losses), expected[0])
    assert torch.equal(torch.get_rng_state(), before)
    resumed = reloaded(balancer, lambda: RandomWeighting(seed=5))
    assert torch.equal(resumed.loss_weights(losses), expected[1])
    assert not torch.equal(RandomWeighting(seed=6).loss_weights(losses), expected[0])
    first, second = (RandomWeighting().loss_weights(losses) for _ in range(2))
    assert torch.equal(first, second)  # both from PyTorch's initial seed
    torch.manual_seed(98)
    assert not torch.equal(RandomWeighting().loss_weights(losses), first)
    total = RandomWeighting(scale="sum", seed=5).loss_weights(losses)
    torch.testing.assert_close(total, 4 * expected[0])


# --------------------------------------------------------------------------------------- learned


@pytest.mark.parametrize(("cls", "name", "sign"), LEARNED)
def test_learned_weights_find_the_losses(cls: Any, name: str, sign: int) -> None:
    losses = some_losses(4)
    balancer = cls()
    for _ in range(1500):
        balancer.update(losses)
    torch.testing.assert_close(getattr(balancer, name), sign * losses.log(), rtol=0, atol=1e-4)
    factor = 0.5 if cls is UncertaintyWeighting else 1.0
    torch.testing.assert_close(balancer.loss_weights(losses), factor / losses, rtol=1e-4, atol=0)


@pytest.mark.parametrize(("cls", "name", "sign"), LEARNED)
def test_learned_weights_do_not_decay(cls: Any, name: str, sign: int) -> None:
    balancer = cls(init=2.0)
    losses = wide(sign * 2.0, sign * 2.0).exp()  # best already, though far from zero
    for _ in range(10):
        balancer.update(losses)
    torch.testing.assert_close(getattr(balancer, name), wide(2.0, 2.0), rtol=0, atol=1e-6)


@pytest.mark.parametrize(("cls", "name", "sign"), LEARNED)
def test_learning_follows_the_objective(cls: Any, name: str, sign: int) -> None:
    losses, s = some_losses(4), some_losses(4, 1).log()
    if cls is UncertaintyWeighting:
        expected = slope(lambda x: (losses * torch.exp(-x) / 2 + x / 2).sum(), s)
    else:
        expected = slope(lambda x: (losses * torch.exp(x) - x).sum(), s)
    balancer = cls()
    setattr(balancer, name, s.clone())
    balancer.update(losses)
    torch.testing.assert_close(balancer.moments[:, 0], 0.1 * expected)
    torch.testing.assert_close(
        getattr(balancer, name), s - 0.025 * expected.sign(), rtol=1e-5, atol=0
    )
