"""Quadratic programs and projections that several methods use."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lightning_mtl.gradient_balancers.dual_proj import dual_proj_weights
from lightning_mtl.gradient_balancers.upgrad import upgrad_weights
from lightning_mtl.numerics.quadratic import dual_cone_weights, nnls, nnls_rows, project_on_simplex
from tests.methods.test_convex import drawn
from tests.methods.test_exactness import degenerate_rows, random_rows


@pytest.mark.parametrize("draw", [random_rows, degenerate_rows])
def test_rows_together_or_one_by_one(draw) -> None:
    for rows, _ in drawn(draw, 8):
        units = rows / np.linalg.norm(rows, axis=1, keepdims=True)
        q = units @ units.T
        c = -q * np.linspace(1, 2, len(q))[:, None]
        together = nnls_rows(q, c)
        for w, side in zip(together, c, strict=True):
            slope = side - q @ w
            assert (w >= 0).all()
            assert (slope <= 1e-9).all()
            assert abs(w @ slope) <= 1e-9
            alone = nnls(q, side)
            assert np.abs((w - alone) @ units).max() <= 1e-7


def test_gramian_that_rounding_made_indefinite(monkeypatch) -> None:
    """More tasks than dimensions, float32: no matrix of cosines, but close to one."""
    solved, solve = [], np.linalg.solve
    monkeypatch.setattr(np.linalg, "solve", lambda *a: solved.append(1) or solve(*a))
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        jacobian = torch.randn(11, 5, generator=generator) @ torch.randn(5, 60, generator=generator)
        matrix = jacobian @ jacobian.T
        norms = jacobian.norm(dim=1)
        for weights in (upgrad_weights(matrix), dual_proj_weights(matrix)):
            slopes = jacobian @ (weights @ jacobian) / norms
            assert slopes.min() >= -1e-4 * (weights * norms).max()
            assert weights.max() < 100
    assert len(solved) < 20 * 100


def test_projection_on_the_simplex() -> None:
    rng = np.random.default_rng(0)
    for case in range(200):
        point = rng.standard_normal(case % 7 + 1) * 10 ** rng.uniform(-2, 2)
        found = project_on_simplex(point)
        assert (found >= 0).all()
        assert found.sum() == pytest.approx(1.0)
        slope = point - found  # equal on the support, and nowhere larger
        assert slope.max() - slope[found > 0].min() <= 1e-9 * max(1.0, np.abs(point).max())
    assert project_on_simplex(np.array([3.0, 0.0])).tolist() == [1.0, 0.0]


def test_many_projections_at_once() -> None:
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((5, 9))
    wanted = rng.standard_normal((4, 5))
    together = dual_cone_weights(rows @ rows.T, wanted)
    for weights, one in zip(wanted, together, strict=True):
        np.testing.assert_allclose(dual_cone_weights(rows @ rows.T, weights), one, atol=1e-12)
