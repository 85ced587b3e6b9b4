"""Golden vectors of PCGrad, GradVac, GradNorm and MetaBalance that no row of the table holds."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lightning_mtl.gradient_balancers._orders import orders_array
from lightning_mtl.gradient_balancers.grad_norm import (
    GradNorm,
    grad_norm_gradient,
    grad_norm_targets,
)
from lightning_mtl.gradient_balancers.grad_vac import GradVac
from lightning_mtl.gradient_balancers.meta_balance import MetaBalance, meta_balance_factors
from lightning_mtl.gradient_balancers.pcgrad import PCGrad, _coefficients, pcgrad_weights
from lightning_mtl.numerics.quadratic import gramian_array
from tests.common.methods import fixture, vector

DTYPES = {torch.float64: 1e-6, torch.float32: 1e-4}
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)

USED = {f"{f}.pc.C" for f in ("E2", "E3")} | {"S3.skip", "S3.self", "S3.dskip", "S3.dself"}
USED |= {f"gv{k}.{x}" for k in (1, 2, 3, 21, 22, 23) for x in ("w", "d", "rho")}
USED |= {
    f"{f}.gn.{x}" for f in ("E2", "E3") for x in ("r", "mean", "tg", "dw", "L", "dz", "sgd", "adam")
}
USED |= {f"mb.{k}.{x}" for k in (1, 2, 3) for x in "mwd"}


def close(found: Tensor, key: str, tolerance: float) -> None:
    expected = vector(key)
    error = (found.double() - expected).abs().max() / expected.abs().max()
    assert error <= tolerance, f"{key}: expected {expected}, found {found}, error {error:.1e}"


@pytest.mark.parametrize("name", ["E2", "E3"])
def test_pcgrad_coefficients(name: str) -> None:
    jacobian, _ = fixture(name)
    matrix = gramian_array(jacobian @ jacobian.T)
    found = _coefficients(matrix, orders_array(None, len(matrix)), include_self=False)
    close(torch.from_numpy(found), f"{name}.pc.C", 1e-6)


@each_dtype
@pytest.mark.parametrize(("include_self", "kind"), [(False, "skip"), (True, "self")])
def test_pcgrad_that_meets_itself(include_self: bool, kind: str, dtype: torch.dtype) -> None:
    jacobian, _ = fixture("S3", dtype)
    orders = [[1, 2, 0], [0, 2, 1], [0, 1, 2]]
    weights = pcgrad_weights(jacobian @ jacobian.T, orders, include_self)
    close(weights, f"S3.{kind}", DTYPES[dtype])
    close(weights @ jacobian, f"S3.d{kind}", DTYPES[dtype])


def test_pcgrad_draws_the_orders_of_the_vectors_at_times() -> None:
    jacobian, losses = fixture("S3")
    for include_self, key in ((False, "S3.skip"), (True, "S3.self")):
        balancer = PCGrad(include_self=include_self, seed=0)
        drawn = [balancer.weights(jacobian @ jacobian.T, losses) for _ in range(200)]
        assert any(torch.allclose(weights, vector(key)) for weights in drawn)


@each_dtype
@pytest.mark.parametrize("groups", ["model", "layer", "tensor"])
@pytest.mark.parametrize(("name", "keys"), [("E3", ["1", "2", "3"]), ("E2", ["21", "22", "23"])])
def test_grad_vac_sequence(name: str, keys: list[str], groups: str, dtype: torch.dtype) -> None:
    jacobian, losses = fixture(name, dtype)
    along, weighing = (GradVac(order="ascending", groups=g) for g in (groups, "model"))
    for key in keys:
        close(along.direction(jacobian, losses), f"gv{key}.d", DTYPES[dtype])
        close(
            weighing.weights(jacobian @ jacobian.T, losses).to(dtype), f"gv{key}.w", DTYPES[dtype]
        )
        for balancer in (along, weighing):
            rho = balancer.targets[:, :, 0]
            if name == "E2":
                assert torch.equal(rho, rho.T)
                rho = rho[0, 1]
            close(rho, f"gv{key}.rho", DTYPES[dtype])


@each_dtype
@pytest.mark.parametrize("name", ["E2", "E3"])
def test_grad_norm_step(name: str, dtype: torch.dtype) -> None:
    jacobian, losses = fixture(name, dtype)
    first = torch.tensor([4.0, 1.0, 2.0], dtype=dtype)[: len(losses)]
    norms, ones = jacobian.norm(dim=1), torch.ones_like(losses)
    tolerance = DTYPES[dtype]
    mean = grad_norm_targets(ones, norms, losses, first, alpha=0.0)
    close(mean[0], f"{name}.gn.mean", tolerance)
    close(grad_norm_targets(ones, norms, losses, first, 1.0) / mean, f"{name}.gn.r", tolerance)
    targets = grad_norm_targets(ones, norms, losses, first, alpha=1.5)
    close(targets, f"{name}.gn.tg", tolerance)
    close((norms - targets).abs().sum(), f"{name}.gn.L", tolerance)
    gradient = grad_norm_gradient(ones, norms, targets)
    close(gradient, f"{name}.gn.dw", tolerance)
    # LibMTL's parameters: w = T softmax(z), here with w = 1.
    close(gradient - gradient.mean(), f"{name}.gn.dz", tolerance)
    for optimizer in ("sgd", "adam"):
        balancer, gramian = GradNorm(optimizer=optimizer), jacobian @ jacobian.T
        balancer.weights(0 * gramian, first)  # the first losses; no gradient, no step
        balancer.learned[:, 2:] = 0  # nor a step of Adam
        assert torch.equal(balancer.weights(gramian, losses), ones)
        close(balancer.weights(gramian, losses), f"{name}.gn.{optimizer}", tolerance)


@each_dtype
def test_meta_balance_sequence(dtype: torch.dtype) -> None:
    balancer = MetaBalance()
    for k, name in enumerate(("E3", "SEQ2", "SEQ3"), start=1):
        jacobian, losses = fixture(name, dtype)
        close(balancer.direction(jacobian, losses), f"mb.{k}.d", DTYPES[dtype])
        close(balancer.averages[:, 0], f"mb.{k}.m", DTYPES[dtype])
        factors = meta_balance_factors(balancer.averages, balancer.averages[0])
        close(factors[:, 0], f"mb.{k}.w", DTYPES[dtype])
