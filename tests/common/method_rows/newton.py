"""Rows of the methods that solve Newton or closed-form equations with the Gramian."""

from __future__ import annotations

from lightning_mtl.gradient_balancers.aligned_mtl import AlignedMTL
from lightning_mtl.gradient_balancers.con_fig import ConFIG
from lightning_mtl.gradient_balancers.fair_grad import FairGrad
from lightning_mtl.gradient_balancers.imtl import IMTL
from lightning_mtl.gradient_balancers.imtlg import IMTLG
from lightning_mtl.gradient_balancers.nash_mtl import NashMTL
from tests.common.method_rows.row import Method, both

ROWS = [
    Method(
        "NashMTL",
        NashMTL,
        both("nash.clip"),
        weighted=True,
        nonconflicting=True,
        scale=0.0,
        stationary_fixed_point=True,
    ),
    Method(
        "NashMTL(max_norm=None)",
        lambda: NashMTL(max_norm=None),
        both("fair1.0.d", "fair1.0.w"),
        weighted=True,
        nonconflicting=True,
        scale=0.0,
        stationary_fixed_point=True,
    ),
    Method(
        "NashMTL(preference, scale=sum)",
        lambda: NashMTL(max_norm=None, preference={"a": 3.0, "c": 0.5}, scale="sum"),
        weighted=True,
        nonconflicting=True,
        scale=0.0,
        equivariant=False,
        stationary_fixed_point=True,
    ),
    # A law of scale for one call. Four: the last of the seven steps of test_state is no fresh one.
    Method(
        "NashMTL(update_weights_every=4)",
        lambda: NashMTL(update_weights_every=4),
        both("nash.clip"),
        weighted=True,
        nonconflicting=True,
        scale=0.0,
        has_state=True,
        stationary_fixed_point=True,
    ),
    *(
        Method(
            f"FairGrad(alpha={alpha})",
            lambda a=alpha: FairGrad(alpha=a),
            both(f"fair{alpha}.d", f"fair{alpha}.w") if alpha in (0.5, 1.0, 2.0) else (),
            weighted=True,
            nonconflicting=True,
            scale=(1 - alpha) / (1 + alpha),
            stationary_fixed_point=True,
        )
        for alpha in (0.1, 0.5, 1.0, 2.0, 10.0)
    ),
    Method(
        "FairGrad(scale=sum)",
        lambda: FairGrad(scale="sum"),
        weighted=True,
        nonconflicting=True,
        scale=0.0,
        stationary_fixed_point=True,
    ),
    *(
        Method(
            f"AlignedMTL(mode={mode})",
            lambda m=mode: AlignedMTL(mode=m),
            both(f"amtl.{mode}.d", f"amtl.{mode}.w"),
            weighted=True,
        )
        for mode in ("min", "median", "rmse")
    ),
    Method(
        "AlignedMTL(preference, scale=mean)",
        lambda: AlignedMTL(preference={"a": 3.0, "c": 0.5}, scale="mean"),
        weighted=True,
        equivariant=False,
    ),
    Method(
        "ConFIG",
        ConFIG,
        (*both("config.d", "config.w"), ("C3", "C3.config.d", None)),
        weighted=True,
        nonconflicting="independent",
        stationary_fixed_point=True,
    ),
    *(
        Method(
            f"ConFIG(length={length})",
            lambda n=length: ConFIG(length=n),
            weighted=True,
            nonconflicting="independent",
            stationary_fixed_point=True,
        )
        for length in ("minimum", "maximum", "harmonic", "arithmetic", "geometric")
    ),
    Method(
        "ConFIG(preference, scale=mean)",
        lambda: ConFIG(preference={"a": 3.0, "c": 0.5}, scale="mean"),
        weighted=True,
        nonconflicting="independent",
        equivariant=False,
    ),
    Method(
        "IMTLG",
        IMTLG,
        (*both("imtlg.d", "imtlg.w"), ("C3", "C3.imtlg.d", "C3.imtlg.w")),
        weighted=True,
        nonconflicting=True,
        stationary_fixed_point=True,
    ),
    # What it learned depends on the size of the losses: no law of scale.
    Method(
        "IMTL",
        IMTL,
        weighted=True,
        nonconflicting=True,
        scale=None,
        has_state=True,
        stationary_fixed_point=True,
        warm_up=2,
    ),
]
