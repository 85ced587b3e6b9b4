"""Rows of methods published since 2024."""

from __future__ import annotations

from lightning_mtl.gradient_balancers.min_norm import MinNorm
from lightning_mtl.gradient_balancers.samo import SAMO
from lightning_mtl.loss_balancers.go4_align import GO4Align
from lightning_mtl.loss_balancers.ldcmtl import LDCMTL
from tests.common.method_rows.row import Method

ROWS = [
    Method("GO4Align", GO4Align, scale=None, has_state=True),
    Method("GO4Align(groups=1)", lambda: GO4Align(groups=1), scale=None, has_state=True),
    Method(
        "GO4Align(groups=12)",
        lambda: GO4Align(groups=12, step_size=0.1),
        scale=None,
        has_state=True,
    ),
    # Neighbours in the order of the tasks are compared.
    Method("LDCMTL", LDCMTL, equivariant=False, has_state=True),
    Method("LDCMTL(plain)", lambda: LDCMTL(compared="plain"), equivariant=False, has_state=True),
    Method(
        "LDCMTL(initial)",
        lambda: LDCMTL(normalization="initial"),
        equivariant=False,
        has_state=True,
    ),
    Method(
        "LDCMTL(log)",
        lambda: LDCMTL(normalization="log"),
        scale=0.0,
        equivariant=False,
        has_state=True,
    ),
    # The direction of given rows; where rows are taken is the matter of test_perturbed.py.
    Method("SAMO", SAMO, weighted=True),
    Method(
        "SAMO(MinNorm)",
        lambda: SAMO(MinNorm()),
        weighted=True,
        nonconflicting=True,
        stationary_fixed_point=True,
    ),
]
