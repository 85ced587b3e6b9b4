"""Rows of the methods that solve a convex problem for their weights."""

from __future__ import annotations

from lightning_mtl.gradient_balancers import CentralDirection, MinNorm
from lightning_mtl.gradient_balancers.cagrad import CAGrad
from lightning_mtl.gradient_balancers.dual_proj import DualProj
from lightning_mtl.gradient_balancers.mo_do import MoDo
from lightning_mtl.gradient_balancers.sdmgrad import SDMGrad
from lightning_mtl.gradient_balancers.upgrad import UPGrad
from tests.common.method_rows.row import Method, both

PREFERENCE = {"a": 2.0, "c": 0.5}


def _cagrad(c: float, rescale: int) -> Method:
    return Method(
        f"CAGrad(c={c}, rescale={rescale})",
        lambda: CAGrad(c, rescale),
        both(f"cagrad{c}.d{rescale}", f"cagrad{c}.W" if rescale == 0 else None),
        weighted=True,
    )


ROWS = [
    *(_cagrad(c, rescale) for c in (0.4, 0.5) for rescale in (0, 1, 2)),
    Method("CAGrad(c=0)", lambda: CAGrad(0.0), weighted=True),
    Method(
        "CAGrad(c=2)",
        lambda: CAGrad(2.0, scale="sum"),
        weighted=True,
        nonconflicting=True,
        stationary_fixed_point=True,
    ),
    Method(
        "CAGrad(preference)",
        lambda: CAGrad(preference=PREFERENCE),
        weighted=True,
        equivariant=False,
    ),
    Method(
        "UPGrad",
        UPGrad,
        both("up.d", "up.w"),
        weighted=True,
        nonconflicting=True,
        stationary_fixed_point=True,
    ),
    Method(
        "UPGrad(preference)",
        lambda: UPGrad(PREFERENCE, scale="sum"),
        weighted=True,
        nonconflicting=True,
        equivariant=False,
        stationary_fixed_point=True,
    ),
    Method("DualProj", DualProj, weighted=True, nonconflicting=True, stationary_fixed_point=True),
    Method(
        "DualProj(preference)",
        lambda: DualProj(PREFERENCE),
        weighted=True,
        nonconflicting=True,
        equivariant=False,
        stationary_fixed_point=True,
    ),
    Method("SDMGrad", SDMGrad, both("sdm.d", "sdm.W"), weighted=True),
    Method(
        "SDMGrad(lam=0)",
        lambda: SDMGrad(0.0),
        both("mgda.none.draw", "mgda.none.w"),
        weighted=True,
        nonconflicting=True,
        stationary_fixed_point=True,
    ),
    Method(
        "SDMGrad(preference)",
        lambda: SDMGrad(preference=PREFERENCE, scale="sum"),
        weighted=True,
        equivariant=False,
    ),
    Method("SDMGrad(batches=3)", lambda: SDMGrad(batches=3), has_state=True),
    Method("MoDo", MoDo, scale=None, has_state=True),
    Method("MoDo(batches=3)", lambda: MoDo(batches=3, rho=0.0), scale=None, has_state=True),
    Method(
        "MinNorm(sum)",
        lambda: MinNorm(scale="sum"),
        weighted=True,
        nonconflicting=True,
        stationary_fixed_point=True,
    ),
    Method(
        "CentralDirection(sum)",
        lambda: CentralDirection(scale="sum"),
        weighted=True,
        nonconflicting=True,
        stationary_fixed_point=True,
    ),
]
