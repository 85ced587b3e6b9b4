"""Every golden vector of the methods: 1e-6 relative in float64, 1e-4 in float32."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lightning_mtl.gradient_balancers import (
    CentralDirection,
    DualBalance,
    MinNorm,
    TaskTensioner,
    central_direction_weights,
    min_norm_weights,
    tension_weights,
)
from tests.common.methods import (
    METHODS,
    Method,
    direction,
    fixture,
    named,
    total_weights,
    unused_vectors,
    vector,
)

DTYPES = {torch.float64: 1e-6, torch.float32: 1e-4}
ROWS = [(m, *golden) for m in METHODS for golden in m.golden]

# fixture, base, losses over the fixture's, ratio of the windows, alpha, direction, weights
TENSIONED = [
    ("E2", CentralDirection, [1.1, 0.9], 0.3, "E2.tt.post", "E2.tt.postw"),
    ("E3", CentralDirection, [1.1, 0.9, 1.0], 0.3, "E3.tt.post", "E3.tt.postw"),
    ("E2", MinNorm, [1.1, 0.9], 0.3, "E2.ttmn.post", "E2.ttmn.postw"),
    ("E3", MinNorm, [1.1, 0.9, 1.0], 0.3, "E3.ttmn.post", "E3.ttmn.postw"),
    ("E3", CentralDirection, [1.1, 0.9, 1.0], 0.0, "E3.tt0.post", None),
    ("F2", CentralDirection, [1.05, 0.95], 1.0, "F2.post", "F2.postw"),
]


def close(found: Tensor, key: str, tolerance: float) -> None:
    expected = vector(key)
    error = (found.double() - expected).abs().max() / expected.abs().max()
    assert error <= tolerance, f"{key}: expected {expected}, found {found}, error {error:.1e}"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("method", "name", "along", "weights"), ROWS, ids=[f"{r[0].name}-{r[1]}" for r in ROWS]
)
def test_table(
    method: Method, name: str, along: str | None, weights: str | None, dtype: torch.dtype
) -> None:
    jacobian, losses = fixture(name, dtype)
    if along:
        found = direction(named(method, len(losses)), jacobian, losses)
        close(found, along, DTYPES[dtype])
    if weights:
        found = total_weights(named(method, len(losses)), jacobian, losses)
        close(found, weights, DTYPES[dtype])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("name", "base", "ratios", "alpha", "along", "weights"), TENSIONED)
def test_tensioner(name, base, ratios, alpha, along, weights, dtype) -> None:
    jacobian, losses = fixture(name, dtype)
    ratios = torch.tensor(ratios, dtype=dtype)
    gramian = jacobian @ jacobian.T
    found = tension_weights(gramian, base().weights(gramian, losses), losses, ratios, alpha)
    close(found @ jacobian, along, DTYPES[dtype])
    if weights:
        close(found, weights, DTYPES[dtype])
    # The callback: with window 1, an earlier step whose norms are smaller by the ratios.
    balancer = TaskTensioner(base(), window=1, alpha=alpha)
    balancer.direction(jacobian / ratios[:, None], losses)
    close(balancer.direction(jacobian, losses), along, DTYPES[dtype])


@pytest.mark.parametrize("name", ["E2", "E3", "F2"])
def test_tensioner_before_tension(name: str) -> None:
    jacobian, losses = fixture(name)
    key = "F2.v" if name == "F2" else f"{name}.tt.v"
    weights = central_direction_weights(jacobian @ jacobian.T)
    close(weights @ jacobian, key, 1e-6)
    balancer = TaskTensioner(window=3)
    for _ in range(3):
        close(balancer.direction(jacobian, losses), key, 1e-6)
    changed = balancer.direction(jacobian, losses)
    assert (changed - vector(key)).norm() > 1e-2


def test_tensioner_without_correction() -> None:
    jacobian, losses = fixture("F2")
    gramian = jacobian @ jacobian.T
    ratios = torch.tensor([1.05, 0.95], dtype=torch.float64)
    base = central_direction_weights(gramian)
    found = tension_weights(gramian, base, losses, ratios, 1.0, feasibility="none")
    close(found @ jacobian, "F2.pre", 1e-6)


# fixture, ratios, alpha, key of what follows
INNER = [
    ("E2", [1.1, 0.9], 0.3, "E2.tt"),
    ("E3", [1.1, 0.9, 1.0], 0.3, "E3.tt"),
    ("E3", [1.1, 0.9, 1.0], 0.0, "E3.tt0"),
    ("F2", [1.05, 0.95], 1.0, "F2"),
]


@pytest.mark.parametrize(("name", "ratios", "alpha", "key"), INNER)
def test_tensioner_by_its_inner_quantities(name, ratios, alpha, key) -> None:
    """The direction is v with every task's unit vector times its golden c, and c that of delta."""
    jacobian, losses = fixture(name)
    ratios = torch.tensor(ratios, dtype=torch.float64)
    gramian = jacobian @ jacobian.T
    base = central_direction_weights(gramian)
    offsets = jacobian - base @ jacobian
    c = vector(f"{key}.c")
    expected = base @ jacobian + (c / offsets.norm(dim=1)) @ offsets
    found = tension_weights(gramian, base, losses, ratios, alpha, feasibility="none") @ jacobian
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    if key != "E3.tt0":
        close(ratios + losses.log10(), f"{key}.delta", 1e-6)
        steep = torch.e - torch.e * vector(f"{key}.delta")
        torch.testing.assert_close(alpha / (1 + steep.exp()) + 1 - alpha, c, rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sigma", [0.0, 0.5])
def test_dual_balance_sequence(sigma: float, dtype: torch.dtype) -> None:
    balancer = DualBalance(beta=0.9, beta_sigma=sigma)
    for k, name in enumerate(("E3", "SEQ2", "SEQ3"), start=1):
        close(direction(balancer, *fixture(name, dtype)), f"db.{sigma}.{k}.d", DTYPES[dtype])
        close(balancer.average.norm(dim=1), f"db.{sigma}.{k}.n", DTYPES[dtype])


@pytest.mark.parametrize("name", ["E2", "E3"])
def test_dual_balance_norms(name: str) -> None:
    jacobian, losses = fixture(name)
    rows = DualBalance().loss_weights(losses)[:, None] * jacobian
    close(rows.norm(dim=1), f"{name}.db.n", 1e-6)


def test_dominated_gradient_gets_no_weight() -> None:
    jacobian, _ = fixture("D2")
    assert min_norm_weights(jacobian @ jacobian.T).tolist() == [1.0, 0.0]


def test_every_vector_is_used() -> None:
    used = {key for _, _, *keys in ROWS for key in keys} | {k for row in TENSIONED for k in row[4:]}
    used |= {f"db.{s}.{k}.{x}" for s in ("0.0", "0.5") for k in (1, 2, 3) for x in "dn"}
    used |= {"E2.tt.v", "E3.tt.v", "F2.v", "F2.pre", "E2.db.n", "E3.db.n"}
    used |= {f"{key}.{x}" for *_, key in INNER for x in ("c", "delta")}
    for file in Path(__file__).parent.glob("test_vectors_*.py"):
        used |= import_module(f"{__package__}.{file.stem}").USED
    assert unused_vectors(used) == set()
