"""Golden vectors of GradDrop, MoCo, ExcessMTL, MTAdam, and min-norm on representation gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lightning_mtl.gradient_balancers import MinNorm
from lightning_mtl.gradient_balancers.excess_mtl import ExcessMTL, excess_risks
from lightning_mtl.gradient_balancers.grad_drop import (
    GradDrop,
    grad_drop,
    sign_purity,
    signed_batch_sums,
)
from lightning_mtl.gradient_balancers.mo_co import MoCo
from lightning_mtl.gradient_balancers.mtadam import MTAdam
from tests.common.methods import fixture, vector

USED: set[str] = set()
DTYPES = {torch.float64: 1e-6, torch.float32: 1e-4}
SEQUENCE = ("E3", "SEQ2", "SEQ3")
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)

# Gradients of two tasks with respect to a representation of two samples and three features.
GRADIENTS = [[[1, 2, -1], [0.5, 0, 1]], [[-2, 0.5, 1], [1, 1, -0.5]]]
ACTIVATION = [[1, -2, 0.5], [0.5, 1, -1]]
UNIFORM = {"gd": [0.3, 0.6, 0.45], "gdr": [0.4962566, 0.7682218, 0.0884774]}


def keys(*names: str) -> list[str]:
    """Keys that a test reads, noted as used."""
    USED.update(names)
    return list(names)


GRAD_DROP = {f: keys(f"{f}.gd.P", f"{f}.gd.M", f"{f}.gd.d", f"{f}.gd.dleak") for f in ("E2", "E3")}
REPRESENTATION = keys("gdr.q", "gdr.P", "gdr.M", "gdr.d")
STEPS = {
    name: [keys(*(f"{name}.{k}.{x}" for x in parts)) for k in (1, 2, 3)]
    for name, parts in {
        "moco": ["lam", "d"],
        "mocop": ["lam", "d"],
        "ex": ["e", "w", "d"],
        "mta": ["r", "u"],
    }.items()
}
UPPER_BOUND = keys("ub.flat", "ub.sum")


def close(found: Tensor, key: str, tolerance: float) -> None:
    expected = vector(key)
    error = (found.double() - expected).abs().max() / expected.abs().max()
    assert error <= tolerance, f"{key}: expected {expected}, found {found}, error {error:.1e}"


@each_dtype
@pytest.mark.parametrize("name", GRAD_DROP)
def test_grad_drop(name: str, dtype: torch.dtype) -> None:
    purity, mask, summed, leaked = GRAD_DROP[name]
    rows, _ = fixture(name, dtype)
    uniform = torch.tensor(UNIFORM["gd"], dtype=dtype)
    tolerance = DTYPES[dtype]
    close(sign_purity(rows), purity, tolerance)
    close(grad_drop(rows, uniform), summed, tolerance)
    close(grad_drop(rows, uniform, leak=0.25), leaked, tolerance)
    kept = (vector(mask) * rows.double()).sum(0)
    torch.testing.assert_close(grad_drop(rows, uniform).double(), kept)


@each_dtype
def test_grad_drop_on_a_representation(dtype: torch.dtype) -> None:
    votes, purity, mask, trunk = REPRESENTATION
    rows = torch.tensor(GRADIENTS, dtype=dtype).flatten(1)
    activation = torch.tensor(ACTIVATION, dtype=dtype)
    uniform = torch.tensor(UNIFORM["gdr"], dtype=dtype)
    found = signed_batch_sums(rows, activation)
    close(found, votes, DTYPES[dtype])
    close(sign_purity(found), purity, DTYPES[dtype])
    direction = grad_drop(rows, uniform, activation=activation)
    close(direction.view(2, 3).sum(0), trunk, DTYPES[dtype])
    kept = (vector(mask)[:, None] * rows.view(2, 2, 3).double()).sum(0)
    torch.testing.assert_close(direction.view(2, 3).double(), kept)


def test_grad_drop_class_masks_what_it_draws() -> None:
    rows = torch.tensor(GRADIENTS, dtype=torch.float64).flatten(1)
    losses = torch.ones(2)
    balancer = GradDrop(leak=0.25, seed=3, gradients="representation")
    balancer.representation = torch.tensor(ACTIVATION)
    uniform = torch.rand(3, generator=torch.Generator().manual_seed(3))
    expected = grad_drop(rows, uniform, 0.25, balancer.representation)
    assert torch.equal(balancer.direction(rows, losses), expected)
    uniform = torch.rand(6, generator=torch.Generator().manual_seed(3))
    assert torch.equal(GradDrop(seed=3).direction(rows, losses), grad_drop(rows, uniform))


@each_dtype
@pytest.mark.parametrize(
    ("name", "balancer"),
    [
        ("moco", MoCo(projection="softmax", normalize=True)),
        ("mocop", MoCo(beta=0.1, gamma=0.2)),
    ],
    ids=["moco", "mocop"],
)
def test_moco(name: str, balancer: MoCo, dtype: torch.dtype) -> None:
    balancer.reset()
    for step, (weights, along) in zip(SEQUENCE, STEPS[name], strict=True):
        close(balancer.direction(*fixture(step, dtype)), along, DTYPES[dtype])
        close(balancer.weight, weights, DTYPES[dtype])


@each_dtype
def test_excess_mtl(dtype: torch.dtype) -> None:
    balancer = ExcessMTL()
    for step, (risks, weights, along) in zip(SEQUENCE, STEPS["ex"], strict=True):
        rows, losses = fixture(step, dtype)
        close(balancer.direction(rows, losses), along, DTYPES[dtype])
        close(balancer.head_weights(), weights, DTYPES[dtype])
        close(excess_risks(rows, balancer.squares), risks, DTYPES[dtype])


@each_dtype
def test_mtadam(dtype: torch.dtype) -> None:
    balancer = MTAdam()
    for step, (norms, along) in zip(SEQUENCE, STEPS["mta"], strict=True):
        close(balancer.direction(*fixture(step, dtype)), along, DTYPES[dtype])
        close(balancer.norms[:, 0], norms, DTYPES[dtype])


@each_dtype
def test_min_norm_on_a_representation(dtype: torch.dtype) -> None:
    """Flattened rows are MGDA-UB; sums over the batch, as in LibMTL, are not."""
    flat, summed = UPPER_BOUND
    gradients = torch.tensor(GRADIENTS, dtype=dtype)
    balancer = MinNorm()
    for rows, key in ((gradients.flatten(1), flat), (gradients.sum(1), summed)):
        close(balancer.weights(rows @ rows.T, torch.ones(2)), key, DTYPES[dtype])
