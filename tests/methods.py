"""The table of methods: one row a variant, with the traits that the tests by property check."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_mtl.balancer import Balancer, GradientBalancer, LossBalancer
from lightning_mtl.gradient_balancers import CentralDirection, DualBalance, MinNorm, TaskTensioner
from lightning_mtl.loss_balancers import EqualWeighting, LogLoss, Scalarization


@dataclass(frozen=True)
class Method:
    """One variant of a method.

    Attributes:
        name: the class, and what differs from its defaults.
        make: a fresh balancer.
        golden: (fixture, key of the direction or None, key of the weights or None) in vectors.json.
        weighted: the direction is a combination of the rows with weights from the Gramian.
        nonconflicting: no task increases to first order.
        scale: the direction is multiplied by ``s**scale`` when all losses are multiplied by s;
            None where no such law exists.
        equivariant: neither the order nor the names of the tasks matter.
        unique: linearly dependent gradients, whose weights are not unique, have one direction.
        has_state: later calls depend on earlier ones.
        stationary_fixed_point: the direction is zero for two opposite gradients.
        warm_up: calls before the one in which the method does what its name says.
    """

    name: str
    make: Callable[[], Balancer]
    golden: tuple[tuple[str, str | None, str | None], ...] = ()
    weighted: bool = False
    nonconflicting: bool = False
    scale: float | None = 1.0
    equivariant: bool = True
    unique: bool = True
    has_state: bool = False
    stationary_fixed_point: bool = False
    warm_up: int = 0

    @property
    def cls(self) -> type[Balancer]:
        """The class of the balancer."""
        return type(self.make())


def _both(direction: str | None, weights: str | None = None) -> tuple[Any, ...]:
    return tuple(
        (f, direction and f"{f}.{direction}", weights and f"{f}.{weights}") for f in ("E2", "E3")
    )


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


METHODS = [
    Method("EqualWeighting", EqualWeighting, _both("ew")),
    Method("Scalarization", lambda: Scalarization({"a": 3.0, "c": 0.5}), equivariant=False),
    Method("LogLoss", LogLoss, _both("si.d", "si.w"), scale=None),
    Method("LogLoss(eps=0)", lambda: LogLoss(eps=0.0), _both("si.d", "si.w"), scale=0.0),
    Method(
        "MinNorm",
        MinNorm,
        (*_both("mgda.none.draw", "mgda.none.w"), ("D2", None, "D2.w"), ("C3", None, "C3.mgda.w")),
        weighted=True,
        nonconflicting=True,
        stationary_fixed_point=True,
    ),
    *(
        Method(
            f"MinNorm({n})",
            lambda n=n: MinNorm(normalization=n),
            _both(f"mgda.{n}.draw", f"mgda.{n}.w"),
            weighted=True,
            unique=False,
        )
        for n in ("l2", "loss", "loss+")
    ),
    Method(
        "CentralDirection",
        CentralDirection,
        (*_both("edm.d", "edm.w"), ("C3", "C3.edm.d", None)),
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
    _dual({"beta": 0.0}, _both("db.d", "db.w")),
    _dual({"beta": 0.0, "scale": "min"}, _both("db.min")),
    _dual({"beta": 0.0, "scale": "mean"}, _both("db.mean")),
    _dual({"beta": 0.0, "scale": "median"}, _both("db.median")),
    _dual({"beta": 0.0, "scale": "constant"}, _both("db.const")),
    _dual({"beta": 0.0, "loss_part": False}, _both("db.nolog.d", "db.nolog.w")),
    _dual({"beta": 0.5, "eps": 0.0, "loss_part": False}, scale=1.0),
    _dual({"gradient_part": False}, _both("si.d", "si.w")),
]

TASKS = "abcdefghijkl"


def direction(balancer: Balancer, jacobian: Tensor, losses: Tensor) -> Tensor:
    """What the flow does with all tasks present: the loss stage, then the gradient stage."""
    if isinstance(balancer, LossBalancer):
        jacobian = balancer.loss_weights(losses)[:, None] * jacobian
    if isinstance(balancer, GradientBalancer):
        return balancer.direction(jacobian, losses)
    return jacobian.sum(0)


def total_weights(balancer: Balancer, jacobian: Tensor, losses: Tensor) -> Tensor:
    """What multiplies the raw task gradients, for methods with weights."""
    weights = torch.ones_like(losses)
    if isinstance(balancer, LossBalancer):
        weights = balancer.loss_weights(losses)
    if isinstance(balancer, GradientBalancer):
        rows = weights[:, None] * jacobian
        weights = weights * balancer.weights(rows @ rows.T, losses)
    return weights


def named(method: Method, size: int = 12) -> Balancer:
    """A fresh balancer that knows the names of ``size`` tasks."""
    balancer = method.make()
    with balancer.only(TASKS[:size]):
        return balancer


_FILE = json.loads((Path(__file__).parent / "vectors.json").read_text(encoding="utf-8"))


def fixture(name: str, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Jacobian and losses of a fixture."""
    values = _FILE["fixtures"][name]
    return torch.tensor(values["rows"], dtype=dtype), torch.tensor(values["losses"], dtype=dtype)


def vector(key: str) -> Tensor:
    """A golden vector, float64."""
    return torch.tensor(_FILE["vectors"][key], dtype=torch.float64)


def unused_vectors(used: set[str]) -> set[str]:
    """Golden vectors that no test reads."""
    return set(_FILE["vectors"]) - used
