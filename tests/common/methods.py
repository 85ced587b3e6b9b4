"""The table of methods: a row a variant, its traits and golden numbers; and how tests call one."""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path

import torch
from torch import Tensor

from lightning_mtl.balancer import Balancer, GradientBalancer, LossBalancer
from tests.common.method_rows.row import Method
from tests.common.places import DATA

# Every file of `tests/method_rows` but that of the row itself holds a list ROWS.
METHODS: list[Method] = [
    row
    for file in sorted((Path(__file__).parent / "method_rows").glob("[!_]*.py"))
    if file.stem != "row"
    for row in import_module(f"tests.common.method_rows.{file.stem}").ROWS
]

TASKS = "abcdefghijkl"


def direction(balancer: Balancer, jacobian: Tensor, losses: Tensor) -> Tensor:
    """What the flow does with all tasks present: the loss stage, then the gradient stage."""
    if isinstance(balancer, LossBalancer):
        jacobian = balancer.loss_weights(losses)[:, None] * jacobian
    if isinstance(balancer, GradientBalancer):
        found = balancer.direction(jacobian, losses)
    else:
        found = jacobian.sum(0)
    learn(balancer, losses)
    return found


def learn(balancer: Balancer, losses: Tensor) -> None:
    """What the flow does after a step; the losses have then fallen by a tenth."""
    needed = getattr(balancer, "needs_losses_after", False)
    balancer.update(losses, 0.9 * losses if needed else None)


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


_FILE = json.loads((DATA / "vectors.json").read_text(encoding="utf-8"))


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
