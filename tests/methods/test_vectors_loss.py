"""Golden vectors of the loss balancers: values of their objectives, inner quantities, sequences."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_mtl.loss_balancers import LogLoss
from lightning_mtl.loss_balancers.dynamic_weight_average import (
    DynamicWeightAverage,
    dynamic_average_weights,
)
from lightning_mtl.loss_balancers.famo import FAMO, famo_weights
from lightning_mtl.loss_balancers.geometric_mean import geometric_mean_weights
from lightning_mtl.loss_balancers.improvable_gap_v1 import ImprovableGapV1, improvable_gap_weights
from lightning_mtl.loss_balancers.imtll import IMTLL, imtll_weights
from lightning_mtl.loss_balancers.random_weighting import random_weights
from lightning_mtl.loss_balancers.stch import STCH, stch_weights
from lightning_mtl.loss_balancers.uncertainty_weighting import (
    UncertaintyWeighting,
    uncertainty_weights,
)
from tests.common.methods import fixture, vector

DTYPES = {torch.float64: 1e-6, torch.float32: 1e-4}
FIXTURES = ("E2", "E3")
LOG_VALUES = [-0.2, 0.3, 0.1]  # of UW and IMTL-L
BASE = [4.0, 1.0, 2.0]  # means of an epoch: of DWA, IGBv1 and STCH
AFTER = [[1.9, 0.49, 1.3], [1.7, 0.44, 1.5], [1.2, 0.39, 1.1]]  # of FAMO
OF_FIXTURES = {
    "gls": ["L"],
    "si": ["L"],
    "rlw": ["w", "d", "L"],
    "uw": ["w", "L", "ds"],
    "imtll": ["w", "L", "ds", "star"],
    "dwa": ["w"],
    "igb1": ["w", "W"],
    "stch1.0": ["w", "d", "L"],
    "stch0.1": ["w", "d", "L"],
}
USED = {f"{f}.{method}.{x}" for f in FIXTURES for method, xs in OF_FIXTURES.items() for x in xs}
USED |= {f"{f}.uwo" for f in FIXTURES}
USED |= {f"famo.{k}.{key}" for k in (1, 2, 3) for key in ("w", "d", "xi")}

pytestmark = pytest.mark.parametrize("dtype", DTYPES, ids=str)
each_fixture = pytest.mark.parametrize("name", FIXTURES)


def close(found: Tensor, key: str) -> None:
    """Within the tolerance of the dtype, relative to the largest entry; values near 0 to one."""
    assert key in USED
    expected = vector(key)
    size = max(float(expected.abs().max()), 1.0 if expected.ndim == 0 else 0.0)
    assert found.shape == expected.shape
    error = float((found.double() - expected).abs().max()) / size
    assert error <= DTYPES[found.dtype], f"{key}: expected {expected}, found {found}"


def three(values: list[float], losses: Tensor) -> Tensor:
    return torch.tensor(values[: len(losses)]).to(losses)


@each_fixture
def test_geometric_mean(name: str, dtype: torch.dtype) -> None:
    _, losses = fixture(name, dtype)
    close(geometric_mean_weights(losses) @ losses, f"{name}.gls.L")


@each_fixture
def test_random_weighting(name: str, dtype: torch.dtype) -> None:
    jacobian, losses = fixture(name, dtype)
    weights = random_weights(three([0.5, -1.0, 2.0], losses))
    close(weights, f"{name}.rlw.w")
    close(weights @ jacobian, f"{name}.rlw.d")
    close(weights @ losses, f"{name}.rlw.L")


def first_gradient(balancer: Any, losses: Tensor) -> Tensor:
    """What the balancer's Adam was given in its first step."""
    balancer.update(losses)
    return balancer.moments[:, 0] / 0.1


@each_fixture
def test_uncertainty_weighting(name: str, dtype: torch.dtype) -> None:
    _, losses = fixture(name, dtype)
    s = three(LOG_VALUES, losses)
    close(uncertainty_weights(s), f"{name}.uw.w")
    balancer = UncertaintyWeighting()
    balancer.log_variances = s.clone()
    weights = balancer.loss_weights(losses)
    close(weights, f"{name}.uw.w")
    close(weights @ losses + s.sum() / 2, f"{name}.uw.L")
    close(first_gradient(balancer, losses), f"{name}.uw.ds")


@each_fixture
def test_imtl_l(name: str, dtype: torch.dtype) -> None:
    _, losses = fixture(name, dtype)
    s = three(LOG_VALUES, losses)
    close(imtll_weights(s), f"{name}.imtll.w")
    balancer = IMTLL()
    balancer.log_scales = s.clone()
    weights = balancer.loss_weights(losses)
    close(weights, f"{name}.imtll.w")
    close(weights @ losses - s.sum(), f"{name}.imtll.L")
    close(first_gradient(balancer, losses), f"{name}.imtll.ds")


@each_fixture
def test_imtl_l_at_its_optimum_is_the_logarithm(name: str, dtype: torch.dtype) -> None:
    """Proposition 1 of Lin et al.: log x is the minimum of e^s x - s - 1."""
    _, losses = fixture(name, dtype)
    balancer = IMTLL(lr=0.01)
    for _ in range(1500):
        balancer.update(losses)
    close(balancer.log_scales, f"{name}.imtll.star")
    weights = balancer.loss_weights(losses)
    torch.testing.assert_close(weights, LogLoss(eps=0.0).loss_weights(losses), rtol=1e-4, atol=0)
    close(weights @ losses - balancer.log_scales.sum() - len(losses), f"{name}.si.L")


@each_fixture
def test_optimal_uncertainty_is_the_log_loss(name: str, dtype: torch.dtype) -> None:
    _, losses = fixture(name, dtype)
    close(LogLoss(eps=0.0).loss_weights(losses), f"{name}.uwo")
    close(2 * uncertainty_weights(losses.log()), f"{name}.uwo")


@each_fixture
def test_dynamic_weight_average(name: str, dtype: torch.dtype) -> None:
    _, losses = fixture(name, dtype)
    before, last = three(BASE, losses), three([2.0, 0.9, 1.6], losses)
    close(dynamic_average_weights(last, before), f"{name}.dwa.w")
    balancer = DynamicWeightAverage()
    for mean in (before, last):
        for factor in (0.5, 1.5):  # two steps with this mean
            balancer.update(factor * mean)
        balancer.end_epoch()
    close(balancer.loss_weights(losses), f"{name}.dwa.w")


@each_fixture
def test_improvable_gap(name: str, dtype: torch.dtype) -> None:
    _, losses = fixture(name, dtype)
    base = three(BASE, losses)
    close(improvable_gap_weights(losses, base), f"{name}.igb1.W")
    balancer = ImprovableGapV1()
    for mean in (7 * base, base, 5 * base):  # the second epoch counts
        for factor in (0.5, 1.5):
            balancer.update(factor * mean)
        balancer.end_epoch()
    weights = balancer.loss_weights(losses)
    close(weights, f"{name}.igb1.W")
    close(weights * losses, f"{name}.igb1.w")


@pytest.mark.parametrize("mu", [1.0, 0.1])
@each_fixture
def test_stch(name: str, mu: float, dtype: torch.dtype) -> None:
    jacobian, losses = fixture(name, dtype)
    nadir, key = three(BASE, losses), f"{name}.stch{mu}"
    close(stch_weights(losses, nadir, mu), f"{key}.w")
    balancer = STCH(mu=mu, warm_up=2)
    for mean in (7 * nadir, 3 * nadir, nadir, 5 * nadir):  # the third epoch counts
        for factor in (0.5, 1.5):
            balancer.update(factor * mean)
        balancer.end_epoch()
    weights = balancer.loss_weights(losses)
    close(weights, f"{key}.w")
    close(weights @ jacobian, f"{key}.d")
    variable = losses.clone().requires_grad_()
    value = len(losses) * mu * torch.logsumexp((variable / nadir).log() / mu, 0)
    close(value.detach(), f"{key}.L")
    value.backward()
    torch.testing.assert_close(weights, variable.grad, rtol=DTYPES[dtype], atol=0)


def test_famo(dtype: torch.dtype) -> None:
    balancer = FAMO(gamma=1e-3)
    for k, name in enumerate(("E3", "SEQ2", "SEQ3"), start=1):
        jacobian, losses = fixture(name, dtype)
        weights = balancer.loss_weights(losses)
        close(weights, f"famo.{k}.w")
        close(weights @ jacobian, f"famo.{k}.d")
        z = torch.softmax(balancer.logits, 0)  # the paper's form
        torch.testing.assert_close(
            famo_weights(losses, balancer.logits),
            (z / losses) / (z / losses).sum(),
            rtol=1e-5,
            atol=0,
        )
        balancer.update(losses, torch.tensor(AFTER[k - 1], dtype=dtype))
        close(balancer.logits, f"famo.{k}.xi")
