"""Rows of the two papers' own methods, and of constant and logarithmic loss weights."""

from __future__ import annotations

from typing import Any

from lightning_mtl.gradient_balancers import CentralDirection, DualBalance, MinNorm, TaskTensioner
from lightning_mtl.loss_balancers import EqualWeighting, LogLoss, Scalarization
from tests.common.method_rows.row import Method, both


def _dual(
    arguments: dict[str, Any], golden: tuple[Any, ...] = (), scale: float | None = None
) -> Method:
    keeps = arguments.get("beta", 0.9) > 0 and arguments.get("gradient_part", True)
    return Method(
        f"DualBalance({', '.join(f'{k}={v}' for k, v in arguments.items())})",
        lambda: DualBalance(**arguments),
        golden,
        weighted=not keeps,
        scale=scale,
        has_state=keeps,
        stationary_fixed_point=arguments.get("gradient_part", True),
    )


ROWS = [
    Method("EqualWeighting", EqualWeighting, both("ew")),
    Method("Scalarization", lambda: Scalarization({"a": 3.0, "c": 0.5}), equivariant=False),
    Method("LogLoss", LogLoss, both("si.d", "si.w"), scale=None),
    Method("LogLoss(eps=0)", lambda: LogLoss(eps=0.0), both("si.d", "si.w"), scale=0.0),
    Method(
        "MinNorm",
        MinNorm,
        (*both("mgda.none.draw", "mgda.none.w"), ("D2", None, "D2.w"), ("C3", None, "C3.mgda.w")),
        weighted=True,
        nonconflicting=True,
        stationary_fixed_point=True,
    ),
    *(
        Method(
            f"MinNorm({n})",
            lambda n=n: MinNorm(normalization=n),
            both(f"mgda.{n}.draw", f"mgda.{n}.w"),
            weighted=True,
            unique=False,
        )
        for n in ("l2", "loss", "loss+")
    ),
    Method(
        "CentralDirection",
        CentralDirection,
        (*both("edm.d", "edm.w"), ("C3", "C3.edm.d", None)),
        weighted=True,
        nonconflicting=True,
        stationary_fixed_point=True,
    ),
    *(
        Method(
            f"TaskTensioner({feasibility})",
            lambda f=feasibility: TaskTensioner(window=2, feasibility=f),
            weighted=True,
            nonconflicting=feasibility == "exact",
            scale=None,
            equivariant=feasibility != "published",
            has_state=True,
            stationary_fixed_point=feasibility != "none",
            warm_up=2,
        )
        for feasibility in ("published", "exact", "none")
    ),
    Method(
        "TaskTensioner(MinNorm)",
        lambda: TaskTensioner(MinNorm(), window=2, history="ema"),
        weighted=True,
        scale=None,
        equivariant=False,
        has_state=True,
        stationary_fixed_point=True,
        warm_up=2,
    ),
    _dual({}),
    _dual({"eps": 0.0}, scale=0.0),
    _dual({"beta": 0.0}, both("db.d", "db.w")),
    _dual({"beta": 0.0, "scale": "min"}, both("db.min")),
    _dual({"beta": 0.0, "scale": "mean"}, both("db.mean")),
    _dual({"beta": 0.0, "scale": "median"}, both("db.median")),
    _dual({"beta": 0.0, "scale": "constant"}, both("db.const")),
    _dual({"beta": 0.0, "loss_part": False}, both("db.nolog.d", "db.nolog.w")),
    _dual({"beta": 0.5, "eps": 0.0, "loss_part": False}, scale=1.0),
    _dual({"gradient_part": False}, both("si.d", "si.w")),
]
