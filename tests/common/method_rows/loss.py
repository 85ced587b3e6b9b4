"""Rows of the loss balancers that learn, count epochs, draw, or only look at the losses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from lightning_mtl.loss_balancers.dynamic_weight_average import DynamicWeightAverage
from lightning_mtl.loss_balancers.famo import FAMO
from lightning_mtl.loss_balancers.geometric_mean import GeometricMean
from lightning_mtl.loss_balancers.improvable_gap_v1 import ImprovableGapV1
from lightning_mtl.loss_balancers.imtll import IMTLL
from lightning_mtl.loss_balancers.random_weighting import RandomWeighting
from lightning_mtl.loss_balancers.soft_optimal_uncertainty import SoftOptimalUncertainty
from lightning_mtl.loss_balancers.stch import STCH
from lightning_mtl.loss_balancers.uncertainty_weighting import UncertaintyWeighting
from tests.common.method_rows.row import Method, both


def epoch_a_step(make: Callable[[], Any]) -> Callable[[], Any]:
    """Balancers for which every step is an epoch that begins with it."""

    def wrapped() -> Any:
        balancer = make()
        learn = balancer.update

        def update(losses: Tensor, after: Tensor | None = None) -> None:
            balancer.end_epoch()
            learn(losses, after)

        balancer.update = update
        return balancer

    return wrapped


def uneven_falls(make: Callable[[], Any]) -> Callable[[], Any]:
    """Balancers for which larger losses have fallen less, whatever the tests let them fall."""

    def wrapped() -> Any:
        balancer = make()
        learn = balancer.update

        def update(losses: Tensor, after: Tensor) -> None:
            learn(losses, after * (losses / losses.mean()) ** 0.1)

        balancer.update = update
        return balancer

    return wrapped


def weights_of(key: str) -> tuple[Any, ...]:
    """Golden vectors that are weights."""
    return tuple((f, None, f"{f}.{key}") for f in ("E2", "E3"))


ROWS = [
    Method("GeometricMean", GeometricMean, both("gls.d", "gls.w")),
    Method("RandomWeighting", lambda: RandomWeighting(seed=0), equivariant=False),
    Method(
        "RandomWeighting(scale=sum)",
        lambda: RandomWeighting(scale="sum", seed=1),
        equivariant=False,
    ),
    Method("UncertaintyWeighting", UncertaintyWeighting, scale=None, has_state=True),
    Method(
        "UncertaintyWeighting(init=-0.5)",
        lambda: UncertaintyWeighting(init=-0.5, lr=0.1),
        scale=None,
        has_state=True,
        warm_up=2,
    ),
    Method("IMTLL", IMTLL, both("ew"), scale=None, has_state=True),
    Method("DynamicWeightAverage", DynamicWeightAverage, both("ew")),
    Method(
        "DynamicWeightAverage(an epoch a step)",
        epoch_a_step(DynamicWeightAverage),
        has_state=True,
        warm_up=3,
    ),
    Method(
        "DynamicWeightAverage(window=2)",
        lambda: DynamicWeightAverage(window=2),
        has_state=True,
        warm_up=4,
    ),
    Method("ImprovableGapV1", ImprovableGapV1, both("si.d", "si.w"), scale=0.0),
    Method(
        "ImprovableGapV1(an epoch a step)",
        epoch_a_step(ImprovableGapV1),
        scale=0.0,
        has_state=True,
        warm_up=2,
    ),
    Method("SoftOptimalUncertainty", SoftOptimalUncertainty, weights_of("uwso1"), scale=None),
    Method(
        "SoftOptimalUncertainty(temperature=5)",
        lambda: SoftOptimalUncertainty(5.0),
        weights_of("uwso5"),
        scale=None,
    ),
    Method(
        "FAMO", uneven_falls(FAMO), (("E3", "famo.1.d", "famo.1.w"),), scale=None, has_state=True
    ),
    Method("FAMO(eps=0)", uneven_falls(lambda: FAMO(eps=0.0)), has_state=True, warm_up=2),
    Method(
        "FAMO(minimum, scale=sum)",
        uneven_falls(lambda: FAMO(minimum={"c": -1.0}, scale="sum")),
        scale=None,
        equivariant=False,
        has_state=True,
        warm_up=2,
    ),
    Method("STCH", STCH, both("si.d", "si.w"), scale=0.0),
    Method(
        "STCH(an epoch a step)",
        epoch_a_step(lambda: STCH(warm_up=1)),
        scale=0.0,
        has_state=True,
        warm_up=2,
    ),
    Method(
        "STCH(preference)",
        epoch_a_step(lambda: STCH(mu=0.1, warm_up=1, preference={"a": 3.0, "c": 0.5})),
        scale=0.0,
        equivariant=False,
        has_state=True,
        warm_up=2,
    ),
]
