"""Rows of methods that go through pairs of tasks or balance norms, and of the wrappers."""

from __future__ import annotations

from lightning_mtl.gradient_balancers.every import Every
from lightning_mtl.gradient_balancers.grad_norm import GradNorm
from lightning_mtl.gradient_balancers.grad_vac import GradVac
from lightning_mtl.gradient_balancers.meta_balance import MetaBalance
from lightning_mtl.gradient_balancers.min_norm import MinNorm
from lightning_mtl.gradient_balancers.pcgrad import PCGrad
from lightning_mtl.gradient_balancers.smooth import Smooth
from tests.common.method_rows.row import Method, both

_MIN_NORM = both("mgda.none.draw", "mgda.none.w")
_VACCINATED = (("E2", "gv21.d", "gv21.w"), ("E3", "gv1.d", "gv1.w"))

ROWS = [
    Method(
        "PCGrad",
        PCGrad,
        (("E2", "E2.pc.d", "E2.pc.w"),),
        weighted=True,
        equivariant=False,
        stationary_fixed_point=True,
    ),
    Method(
        "PCGrad(ascending)",
        lambda: PCGrad(order="ascending"),
        both("pc.d", "pc.w"),
        weighted=True,
        equivariant=False,
        stationary_fixed_point=True,
    ),
    Method(
        "PCGrad(include_self, mean)",
        lambda: PCGrad(include_self=True, scale="mean", seed=3),
        weighted=True,
        equivariant=False,
        stationary_fixed_point=True,
    ),
    Method(
        "GradVac",
        lambda: GradVac(seed=0),
        _VACCINATED[:1],
        weighted=True,
        equivariant=False,
        has_state=True,
        stationary_fixed_point=True,
    ),
    Method(
        "GradVac(ascending)",
        lambda: GradVac(order="ascending"),
        _VACCINATED,
        weighted=True,
        equivariant=False,
        has_state=True,
        stationary_fixed_point=True,
        warm_up=2,
    ),
    *(
        Method(
            f"GradVac({groups})",
            lambda g=groups: GradVac(beta=0.1, groups=g, order="ascending", scale="sum"),
            tuple((fixture, along, None) for fixture, along, _ in _VACCINATED),
            equivariant=False,
            has_state=True,
            stationary_fixed_point=True,
        )
        for groups in ("layer", "tensor")
    ),
    Method("GradNorm", GradNorm, both("ew"), weighted=True, has_state=True, warm_up=2),
    Method(
        "GradNorm(sgd)",
        lambda: GradNorm(optimizer="sgd", lr=1e-3, alpha=0.0, weight_heads=False),
        both("ew"),
        weighted=True,
        scale=None,
        has_state=True,
        warm_up=2,
    ),
    *(
        Method(
            f"MetaBalance({strategy})",
            lambda s=strategy, t=target: MetaBalance(t, s),
            (("E3", "mb.1.d", None),) if strategy == "both" else (),
            equivariant=False,
            has_state=True,
            warm_up=2,
        )
        for target, strategy in ((0, "both"), ("c", "shrink"), (0, "enlarge"))
    ),
    Method(
        "Every(3, Smooth(MinNorm))",
        lambda: Every(3, Smooth(MinNorm())),
        _MIN_NORM,
        weighted=True,
        has_state=True,
        stationary_fixed_point=True,
    ),
    Method(
        "Every(3, PCGrad)",
        lambda: Every(3, PCGrad(seed=1)),
        weighted=True,
        equivariant=False,
        has_state=True,
        stationary_fixed_point=True,
        warm_up=2,
    ),
    Method(
        "Smooth(MinNorm)",
        lambda: Smooth(MinNorm()),
        _MIN_NORM,
        weighted=True,
        has_state=True,
        stationary_fixed_point=True,
        warm_up=2,
    ),
    Method(
        "Smooth(GradNorm)",
        lambda: Smooth(GradNorm(), alpha=0.5),
        both("ew"),
        weighted=True,
        has_state=True,
        warm_up=2,
    ),
]
