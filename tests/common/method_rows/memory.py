"""Rows of methods that keep something of the size of the Jacobian, or mask it by elements."""

from __future__ import annotations

from lightning_mtl.gradient_balancers.excess_mtl import ExcessMTL
from lightning_mtl.gradient_balancers.grad_drop import GradDrop
from lightning_mtl.gradient_balancers.mo_co import MoCo
from lightning_mtl.gradient_balancers.momentum_con_fig import MomentumConFIG
from lightning_mtl.gradient_balancers.mtadam import MTAdam
from tests.common.method_rows.row import Method

ROWS = [
    Method("GradDrop", lambda: GradDrop(seed=0)),
    Method("GradDrop(leak=0.25, scale=mean)", lambda: GradDrop(0.25, "mean", seed=1)),
    # The weights move by the squares of the gradients: no law of scale.
    Method("MoCo", MoCo, scale=None, has_state=True),
    Method(
        "MoCo(rho=0.5, scale=sum)", lambda: MoCo(rho=0.5, scale="sum"), scale=None, has_state=True
    ),
    Method(
        "MoCo(softmax, normalize)",
        lambda: MoCo(projection="softmax", normalize=True),
        scale=None,
        has_state=True,
    ),
    Method("ExcessMTL", ExcessMTL, has_state=True, warm_up=1),
    Method(
        "ExcessMTL(step_size=1, warm_up=2, scale=mean)",
        lambda: ExcessMTL(1.0, warm_up=2, scale="mean"),
        has_state=True,
        warm_up=2,
    ),
    # The first task is the anchor.
    Method("MTAdam", MTAdam, scale=None, equivariant=False, has_state=True, warm_up=1),
    Method(
        "MTAdam(eps=0)",
        lambda: MTAdam(eps=0.0),
        scale=0.0,
        equivariant=False,
        has_state=True,
        warm_up=1,
    ),
    # Turns go by the order of the tasks; the twelfth call is the first with all of them.
    Method(
        "MomentumConFIG",
        MomentumConFIG,
        scale=None,
        equivariant=False,
        has_state=True,
        stationary_fixed_point=True,
        warm_up=11,
    ),
    Method(
        "MomentumConFIG(eps=0)",
        lambda: MomentumConFIG(eps=0.0),
        scale=0.0,
        equivariant=False,
        has_state=True,
        stationary_fixed_point=True,
        warm_up=11,
    ),
    Method(
        "MomentumConFIG(rows_per_step=12)",
        lambda: MomentumConFIG(eps=0.0, rows_per_step=12),
        scale=0.0,
        has_state=True,
        stationary_fixed_point=True,
    ),
]
