"""ConFIG, IMTL-G, IMTL and Aligned-MTL: their equations, guards and lengths."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lightning_mtl.gradient_balancers import central_direction_weights
from lightning_mtl.gradient_balancers.aligned_mtl import AlignedMTL, aligned_mtl_weights
from lightning_mtl.gradient_balancers.con_fig import ConFIG, config_weights
from lightning_mtl.gradient_balancers.imtl import IMTL
from lightning_mtl.gradient_balancers.imtlg import IMTLG, imtlg_weights
from tests.common.methods import fixture
from tests.methods.test_newton import rows_of

# ----------------------------------------------------------------------------- equal projections


def test_one_ray_where_no_weight_is_negative() -> None:
    rng = np.random.default_rng(8)
    interior = 0
    for size in (2, 3, 4, 6):
        for _ in range(30):
            jacobian = torch.from_numpy(rows_of(rng, size, 30, 1.0))
            gramian = jacobian @ jacobian.T
            shares = central_direction_weights(gramian)
            if shares.min() < 1e-9:
                continue
            interior += 1
            torch.testing.assert_close(imtlg_weights(gramian), shares)
            ray, other = shares @ jacobian, config_weights(gramian) @ jacobian
            torch.testing.assert_close(ray / ray.norm(), other / other.norm())
    assert interior > 80


def test_imtlg_improves_every_task_and_stays_short() -> None:
    """Random cones: projections are equal, or the central direction stands in."""
    rng = np.random.default_rng(9)
    counts = {"negative": 0, "central": 0}
    for _ in range(500):
        size = int(rng.integers(3, 8))
        rows = np.abs(rows_of(rng, size, 8, 1.5))
        jacobian = torch.from_numpy(rows)
        gramian = jacobian @ jacobian.T
        w = imtlg_weights(gramian)
        torch.testing.assert_close(float(w.sum()), 1.0)
        along = w @ jacobian
        norms = jacobian.norm(dim=1)
        projections = jacobian @ along / norms
        assert projections.min() > 0
        assert along.norm() <= norms.max() * (1 + 1e-9)
        if w.min() < 0:
            counts["negative"] += 1
            torch.testing.assert_close(projections, projections[:1].expand(size))
        else:
            torch.testing.assert_close(w, central_direction_weights(gramian))
            counts["central"] += bool(projections.max() > 1.001 * projections.min())
    assert min(counts.values()) > 20


def test_imtlg_near_its_pole() -> None:
    """The sum of the published weights passes zero as the third row shrinks."""
    rows = torch.tensor([[1, 0, 0], [0.6, 0.8, 0], [2, 1, 0.1]], dtype=torch.float64)
    for factor in torch.linspace(0.3, 0.9, 200).double():
        jacobian = rows.clone()
        jacobian[2] *= factor
        along = imtlg_weights(jacobian @ jacobian.T) @ jacobian
        assert along.norm() <= jacobian.norm(dim=1).max() * (1 + 1e-9)
        assert (jacobian @ along > 0).all()


def test_imtlg_with_dependent_rows() -> None:
    # Three rows in a plane have no equal projections; the outer two have.
    plane = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.9, 0.8]]).double()
    found = imtlg_weights(plane @ plane.T)
    torch.testing.assert_close(found, torch.tensor([0.5, 0.5, 0.0]).double())
    # A task given twice shares the weight of the one.
    once, twice = torch.eye(2).double(), torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 1.0]]).double()
    torch.testing.assert_close(imtlg_weights(twice @ twice.T) @ twice, imtlg_weights(once) @ once)


# ------------------------------------------------------------------------------------------ ConFIG


def test_config_cosines_follow_the_preference() -> None:
    jacobian, _ = fixture("E3")
    for wanted in ([1.0, 1.0, 1.0], [1.0, 2.0, 0.5]):
        along = config_weights(jacobian @ jacobian.T, wanted) @ jacobian
        cosines = jacobian @ along / jacobian.norm(dim=1) / along.norm()
        torch.testing.assert_close(cosines / cosines[0], torch.tensor(wanted).double() / wanted[0])


@pytest.mark.parametrize(
    ("length", "common"),
    [
        ("minimum", lambda n: n.min()),
        ("maximum", lambda n: n.max()),
        ("harmonic", lambda n: 1 / (1 / n).mean()),
        ("arithmetic", lambda n: n.mean()),
        ("geometric", lambda n: n.prod() ** (1 / 3)),
        ("projection", lambda n: n),
    ],
)
def test_config_lengths(length, common) -> None:
    jacobian, losses = fixture("E3")
    norms = jacobian.norm(dim=1)
    along = ConFIG(length=length).direction(jacobian, losses)
    cosines = jacobian @ along / norms / along.norm()
    torch.testing.assert_close(along.norm(), (common(norms) * cosines).sum())
    third = ConFIG(length=length, scale="mean").direction(jacobian, losses)
    torch.testing.assert_close(third, along / 3)


def test_config_is_the_projection_of_the_sum_also_with_dependent_rows() -> None:
    rng = np.random.default_rng(10)
    jacobian = torch.from_numpy(rng.standard_normal((7, 3)))
    along = config_weights(jacobian @ jacobian.T) @ jacobian
    assert along.norm() > 0.01
    torch.testing.assert_close(jacobian.sum(0) @ along, along @ along)
    unit = jacobian / jacobian.norm(dim=1, keepdim=True)
    nearest = torch.linalg.pinv(unit).sum(1)
    torch.testing.assert_close((along @ nearest).abs(), along.norm() * nearest.norm())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_config_of_gradients_that_only_cancel(dtype: torch.dtype) -> None:
    row = torch.tensor([0.1, 0.7, -0.3], dtype=dtype)
    for factors in ([1.0, -1.0], [1.0, -3.7], [1.0, -1.0, 0.0]):
        jacobian = torch.tensor(factors, dtype=dtype)[:, None] * row
        assert not config_weights(jacobian @ jacobian.T).any()


# -------------------------------------------------------------------------------------- Aligned-MTL


@pytest.mark.parametrize("mode", ["min", "median", "rmse"])
def test_aligned_is_the_nearest_orthogonal_system(mode: str) -> None:
    rng = np.random.default_rng(11)
    for size in (1, 2, 3, 6):
        jacobian = torch.from_numpy(rng.standard_normal((size, 8)))
        left, sigma, right = torch.linalg.svd(jacobian, full_matrices=False)
        squares = sigma.square().sort()[0]
        factor = {
            "min": squares[0],
            "median": squares[(size - 1) // 2],
            "rmse": squares.mean(),
        }[mode].sqrt()
        aligned = factor * left @ right
        found = aligned_mtl_weights(jacobian @ jacobian.T, None, mode) @ jacobian
        torch.testing.assert_close(found, aligned.sum(0))
        shares = list(range(1, size + 1))
        found = aligned_mtl_weights(jacobian @ jacobian.T, shares, mode) @ jacobian
        torch.testing.assert_close(found, torch.tensor(shares).double() * 2 / (size + 1) @ aligned)


def test_aligned_leaves_out_what_is_zero_up_to_rounding() -> None:
    rows = torch.tensor([[1.0, 2.0, -1.0], [-2.0, 0.5, 1.0]])
    parallel = torch.stack([rows[0], -3.7 * rows[0]])
    torch.testing.assert_close(
        AlignedMTL().direction(parallel, torch.ones(2)), parallel.sum(0), rtol=1e-5, atol=1e-5
    )
    three = torch.stack([rows[0], rows[1], rows[0] + rows[1]])
    sigma = torch.linalg.svdvals(three.double())
    along = AlignedMTL().direction(three, torch.ones(3))
    assert along.norm() <= 3**0.5 * sigma[1] * 1.0001
    assert along.norm() > 0.1
    assert AlignedMTL(weight_heads=True).weight_heads
    assert not AlignedMTL().weight_heads


# -------------------------------------------------------------------------------------------- IMTL


def test_imtl_learns_in_update_only_and_as_adam_does() -> None:
    balancer, losses = IMTL(lr=0.1), torch.tensor([2.0, 0.5, 1.5])
    s = torch.zeros(3, requires_grad=True)
    adam = torch.optim.Adam([s], lr=0.1)
    for k in range(5):
        for _ in range(2):
            torch.testing.assert_close(balancer.loss_weights(losses), s.detach().exp())
        balancer.weights(torch.eye(3), losses)
        adam.zero_grad()
        (s.exp() * losses * (1 + k) - s).sum().backward()
        adam.step()
        balancer.update(losses * (1 + k))
        torch.testing.assert_close(balancer.log_scales, s.detach())


def test_imtl_brings_losses_to_one_and_keeps_the_ray() -> None:
    balancer = IMTL(lr=0.05)
    jacobian, losses = fixture("E3")
    for _ in range(2000):
        balancer.update(losses)
    omega = balancer.loss_weights(losses)
    torch.testing.assert_close(omega * losses, torch.ones(3).double(), rtol=1e-3, atol=0)
    rows = omega[:, None] * jacobian
    along, plain = balancer.direction(rows, losses), IMTLG().direction(jacobian, losses)
    torch.testing.assert_close(along / along.norm(), plain / plain.norm())
    weights = balancer.weights(rows @ rows.T, losses)
    torch.testing.assert_close(float(weights.sum()), 1.0)
    assert torch.equal(IMTL(scale="sum").weights(torch.eye(3), losses), torch.ones(3))


def test_imtl_with_losses_far_from_one() -> None:
    balancer = IMTL(lr=10.0)
    losses = torch.tensor([1e-38, 1e38])
    for _ in range(20):
        balancer.update(losses)
        assert balancer.log_scales.isfinite().all()
        assert balancer.loss_weights(losses).isfinite().all()
    assert balancer.log_scales.tolist() == [70.0, -70.0]


def test_imtl_owns_both_stages() -> None:
    balancer = IMTL()
    assert balancer.requires_positive_losses
    assert not balancer.needs_current_losses
    assert balancer.needs_jacobian
    assert balancer.gramian_weighted
    assert not balancer.weight_heads
