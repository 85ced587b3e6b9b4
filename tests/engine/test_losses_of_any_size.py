"""Losses times 1e20, 1e-30 and the like: the directions that float64 finds, and whole fits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_mtl import (
    SAMO,
    ConFIG,
    GradientBalancer,
    MinNorm,
    MomentumConFIG,
    MTAdam,
    NashMTL,
    UPGrad,
)
from lightning_mtl.engine.guards import BadLossError
from tests.common.method_rows.row import Method
from tests.common.methods import METHODS, TASKS, direction
from tests.common.models import Balanced, loader, sgd, trainer, weights

SIZES = [1e20, 1e30, 1e-20, 1e-30]
# An absolute constant under a norm is part of the method.
ABSOLUTE = {"DualBalance(beta=0.0, loss_part=False)"}
# Differences of logarithms of float32 losses, brought to one size by Adam.
LOGARITHMS = ("FAMO", "LDCMTL")


def directions(method: Method, size: float, dtype: torch.dtype) -> Tensor:
    """Four steps of three tasks."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(3, 40, generator=generator)
    rows[1] -= 0.6 * rows[0]
    rows[2] *= 3
    balancer: Any = method.make()
    batches = getattr(balancer, "batches", 1)
    losses = (torch.tensor([1.0, 0.5, 2.0], dtype=torch.float64) * size).to(dtype)
    found = []
    with balancer.only(TASKS[:3]):
        for step in range(4):
            noise = torch.randn(3, 40, generator=generator)
            now = ((rows * (1 + 0.1 * step) + 0.2 * noise).double() * size).to(dtype)
            now = now if batches == 1 else torch.stack([now] * batches)
            found.append(direction(balancer, now, losses))
    return torch.stack(found).double()


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.name)
def test_float32_finds_what_float64_finds(method: Method, size: float) -> None:
    if method.name in ABSOLUTE and size < 1:
        pytest.skip("an absolute constant")
    exact, found = (directions(method, size, d) for d in (torch.float64, torch.float32))
    largest = exact.abs().amax()
    if largest > 3e38:
        pytest.skip("the direction itself is no float32 number")
    tolerance = 2e-2 if method.name.startswith(LOGARITHMS) else 1e-4
    torch.testing.assert_close(found / largest, exact / largest, rtol=0, atol=tolerance)


class Scaled(Balanced):
    """Its losses are multiplied by a number."""

    factor: float = 1.0

    def task_losses(self, batch: Any, batch_idx: int) -> Any:
        losses = super().task_losses(batch, batch_idx)
        return {task: loss * self.factor for task, loss in losses.items()}


def trained(factor: float, power: float, *callbacks: Any, **kwargs: Any) -> Tensor:
    """Parameters after three steps, with a learning rate that makes up for the factor."""
    rate = 0.01 / factor**power

    def optimizer(module: Any) -> Any:
        trunk, heads = module.net.trunk.parameters(), module.net.heads.parameters()
        groups = [{"params": trunk, "lr": rate}, {"params": heads, "lr": 0.01 / factor}]
        return torch.optim.SGD(groups)

    options = {k: kwargs.pop(k) for k in ("gradient_memory",) if k in kwargs}
    module = Scaled(optimizer, **options)
    module.factor = factor
    trainer(callbacks=list(callbacks), max_steps=3, **kwargs).fit(module, loader())
    return weights(module)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(
    ("make", "power"),
    [(MinNorm, 1), (UPGrad, 1), (ConFIG, 1), (lambda: NashMTL(weight_heads=False), 0)],
)
def test_a_fit_is_the_same(make: Any, power: float, size: float) -> None:
    start = weights(Scaled())
    expected = trained(1.0, power, make())
    assert not torch.equal(start, expected)
    torch.testing.assert_close(trained(size, power, make()), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("size", [1e20, 1e-20])
@pytest.mark.parametrize("memory", ["blocks", "host"])
def test_in_every_memory(memory: str, size: float) -> None:
    expected = trained(1.0, 1, MinNorm())
    found = trained(size, 1, MinNorm(), gradient_memory=memory)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("size", [1e20, 1e-20])
@pytest.mark.parametrize("make", [MTAdam, MomentumConFIG])
def test_adam_keeps_its_steps(make: Any, size: float) -> None:
    found = trained(size, 0, make(eps=0.0))
    torch.testing.assert_close(found, trained(1.0, 0, make(eps=0.0)), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("size", [1e20, 1e30])
def test_perturbations_keep_their_length(size: float) -> None:
    balancer = SAMO(rho=0.1, local="gradient")
    rows = torch.randn(2, 9) * size
    found = balancer.perturbations(rows.mean(0), rows)
    torch.testing.assert_close(found.norm(dim=1), torch.full((2,), 0.1))


class Long(GradientBalancer):
    def weights(self, gramian: Tensor, losses: Tensor) -> Tensor:
        return torch.ones_like(losses)


def test_what_is_said_of_a_gradient_is_true() -> None:
    """In float64 a gradient may be finite where its square is not."""
    module = Scaled(lambda m: sgd(m.net.parameters()))
    module.factor = 1e200
    run = trainer(callbacks=[Long()], max_steps=1, precision="64-true")
    with pytest.raises(BadLossError, match="longer than 1e154, whose square is not"):
        run.fit(module, loader())
