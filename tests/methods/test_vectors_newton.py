"""Golden vectors of Aligned-MTL, ConFIG, IMTL-G and IMTL beside their directions and weights."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lightning_mtl.gradient_balancers import CentralDirection
from lightning_mtl.gradient_balancers.aligned_mtl import aligned_mtl_weights
from lightning_mtl.gradient_balancers.con_fig import ConFIG
from lightning_mtl.gradient_balancers.imtl import IMTL, imtl_weights
from lightning_mtl.gradient_balancers.imtlg import IMTLG, imtlg_weights
from lightning_mtl.numerics.bisector import with_projections
from lightning_mtl.numerics.quadratic import to_numpy, unit_gramian
from tests.common.methods import direction, fixture, vector

NAMES = ["E2", "E3"]
USED: set[str] = {"C3b.w", "C3b.d", "C3b.proj"} | {
    f"{name}.{part}"
    for name in NAMES
    for part in ("eig", "config.v", "config.L", "imtlg.proj", "imtl.a", "imtl.W", "imtl.d")
}
DTYPES = {torch.float64: 1e-6, torch.float32: 1e-4}
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
each_name = pytest.mark.parametrize("name", NAMES)


def close(found: Tensor, key: str, tolerance: float = 1e-6) -> None:
    expected = vector(key)
    error = (found.double() - expected).abs().max() / expected.abs().max()
    assert error <= tolerance, f"{key}: expected {expected}, found {found}, error {error:.1e}"


def equal_cosines(jacobian: Tensor) -> Tensor:
    """Coefficients of the unit rows whose sum has projection one on each of them."""
    cosines, _ = unit_gramian(to_numpy(jacobian @ jacobian.T))
    return torch.from_numpy(with_projections(cosines, torch.ones(len(cosines)).double().numpy()))


@each_name
def test_aligned_gradients_are_orthogonal_with_a_length_of_the_spectrum(name: str) -> None:
    jacobian, _ = fixture(name)
    gramian = jacobian @ jacobian.T
    values = vector(f"{name}.eig")
    lengths = {"min": values[0], "median": values.sort()[0][(len(values) - 1) // 2]}
    lengths["rmse"] = values.mean()
    for mode, square in lengths.items():
        # Columns of the matrix that the weights are sums of, from preferences that single one out.
        size = len(values)
        columns = []
        for t in range(size):
            lean = [1.0] * size
            lean[t] += 1.0
            more = aligned_mtl_weights(gramian, lean, mode) * (size + 1) / size
            columns.append(more - aligned_mtl_weights(gramian, None, mode))
        aligned = torch.stack(columns).T @ jacobian
        torch.testing.assert_close(aligned @ aligned.T, square * torch.eye(size).double())


@each_name
def test_config(name: str) -> None:
    jacobian, losses = fixture(name)
    close(equal_cosines(jacobian), f"{name}.config.v")
    close(ConFIG().direction(jacobian, losses).norm(), f"{name}.config.L")


@each_dtype
@each_name
def test_imtlg_projections(name: str, dtype: torch.dtype) -> None:
    jacobian, losses = fixture(name, dtype)
    projections = jacobian @ IMTLG().direction(jacobian, losses) / jacobian.norm(dim=1)
    for projection in projections:
        close(projection, f"{name}.imtlg.proj", DTYPES[dtype])


def test_imtlg_where_the_published_answer_increases_every_task() -> None:
    jacobian, losses = fixture("C3b")
    published = equal_cosines(jacobian) / jacobian.norm(dim=1)
    published /= published.sum()
    close(published, "C3b.w")
    close(published @ jacobian, "C3b.d")
    for projection in jacobian @ (published @ jacobian) / jacobian.norm(dim=1):
        close(projection, "C3b.proj")
    central = CentralDirection().weights(jacobian @ jacobian.T, losses)
    torch.testing.assert_close(imtlg_weights(jacobian @ jacobian.T), central)
    assert (jacobian @ IMTLG().direction(jacobian, losses) > 0).all()


@each_dtype
@each_name
def test_imtl(name: str, dtype: torch.dtype) -> None:
    jacobian, losses = fixture(name, dtype)
    balancer = IMTL()
    balancer.log_scales = torch.tensor([-0.2, 0.3, 0.1], dtype=dtype)[: len(losses)]
    rows = balancer.loss_weights(losses)[:, None] * jacobian
    close(balancer.weights(rows @ rows.T, losses), f"{name}.imtl.a", DTYPES[dtype])
    total = imtl_weights(jacobian @ jacobian.T, balancer.log_scales)
    close(total, f"{name}.imtl.W", DTYPES[dtype])
    close(direction(balancer, jacobian, losses), f"{name}.imtl.d", DTYPES[dtype])
