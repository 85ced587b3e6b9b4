"""MinNorm and CentralDirection against the enumeration of all faces of the simplex."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
import torch

from lightning_mtl.gradient_balancers import central_direction_weights, min_norm_weights
from lightning_mtl.numerics.quadratic import nnls

CASES = 1000


def best_objective(rows: np.ndarray) -> float:
    """The smallest squared norm over the convex hull, by least squares on the rows of each face."""
    norms = np.linalg.norm(rows, axis=1)
    best = np.inf
    for size in range(1, len(rows) + 1):
        faces = np.array(list(combinations(range(len(rows)), size)))
        faces = np.take_along_axis(faces, np.argsort(norms[faces], axis=1, kind="stable"), axis=1)
        corner = rows[faces[:, 0]]
        edges = rows[faces[:, 1:]] - corner[:, None]
        lengths = np.linalg.norm(edges, axis=2)
        lengths[lengths == 0] = 1.0
        inverse = np.linalg.pinv(edges / lengths[:, :, None], rcond=1e-13)
        weights = np.empty(faces.shape)
        weights[:, 1:] = -np.einsum("fpk,fp->fk", inverse, corner) / lengths
        weights[:, 0] = 1.0 - weights[:, 1:].sum(1)
        inside = (weights >= -1e-9).all(1)
        inside &= (weights * norms[faces] >= -1e-9 * norms.min()).all(1)
        if inside.any():
            kept = np.clip(weights[inside], 0.0, None)
            kept /= kept.sum(1, keepdims=True)
            points = np.einsum("fk,fkp->fp", kept, rows[faces[inside]])
            best = min(best, float((points**2).sum(1).min()))
    return best


def error(weights: np.ndarray, rows: np.ndarray) -> float:
    """Relative error of the objective; with a floor where the point is zero up to rounding."""
    assert (weights >= 0).all()
    assert weights.sum() == pytest.approx(1.0, rel=1e-12)
    found, best = float(((weights @ rows) ** 2).sum()), best_objective(rows)
    return (found - best) / max(best, 1e-13 * float((rows**2).sum(1).min()))


def random_rows(case: int, rng: np.random.Generator) -> np.ndarray:
    """One to eight rows, often leaning to one side, norms up to 1e6 apart, rank full or not."""
    size, width = case % 8 + 1, int(rng.integers(1, 13))
    rows = rng.standard_normal((size, width)) + rng.choice([0, 1]) * rng.standard_normal(width)
    return rows * 10 ** rng.uniform(-3, 3, (size, 1))


def degenerate_rows(case: int, rng: np.random.Generator) -> np.ndarray:
    """Rank one, low rank, duplicated, opposite, nearly parallel, and Pareto-stationary rows."""
    size, width = case % 7 + 2, int(rng.integers(2, 13))
    rows = rng.standard_normal((size, width))
    kind = case % 6
    if kind == 0:
        rows = rng.standard_normal((size, 1)) * rows[0]
    elif kind == 1:
        rank = max(1, size // 2)
        rows = rng.standard_normal((size, rank)) @ rng.standard_normal((rank, width))
    elif kind == 2:
        rows[-1] = rows[0]
    elif kind == 3:
        rows[-1] = -rows[0]
    elif kind == 4:
        rows[-1] = rows[0] + 1e-3 * rows[-1]
    else:
        rows[-1] = -(rng.random(size - 1) @ rows[:-1])
    return rows * 10 ** rng.uniform(-1, 1, (size, 1))


@pytest.mark.parametrize("draw", [random_rows, degenerate_rows])
def test_min_norm(draw) -> None:
    rng = np.random.default_rng(0)
    worst = 0.0
    for case in range(CASES):
        rows = draw(case, rng)
        weights = min_norm_weights(torch.from_numpy(rows @ rows.T)).numpy()
        worst = max(worst, error(weights, rows))
    print(f"min norm, {draw.__name__}: objective within {worst:.1e} over {CASES} matrices")
    assert worst < 1e-8


@pytest.mark.parametrize("draw", [random_rows, degenerate_rows])
def test_central_direction(draw) -> None:
    rng = np.random.default_rng(1)
    worst = 0.0
    for case in range(CASES):
        rows = draw(case, rng)
        norms = np.linalg.norm(rows, axis=1)
        shares = central_direction_weights(torch.from_numpy(rows @ rows.T)).numpy() * norms
        worst = max(worst, error(shares / shares.sum(), rows / norms[:, None]))
    print(f"central direction, {draw.__name__}: objective within {worst:.1e} over {CASES} matrices")
    assert worst < 1e-8


def test_nnls_meets_its_optimality_conditions() -> None:
    rng = np.random.default_rng(2)
    for case in range(500):
        size = case % 10 + 1
        rows = rng.standard_normal((size, int(rng.integers(1, 13))))
        rows /= np.linalg.norm(rows, axis=1, keepdims=True)
        q, c = rows @ rows.T, rows @ rng.standard_normal(rows.shape[1])
        w = nnls(q, c)
        slope = c - q @ w
        bound = 1e-12 * (1 + np.abs(w).max())
        assert (w >= 0).all()
        assert (slope <= bound).all()
        assert np.abs(slope[w > 0]).max(initial=0.0) <= bound


def test_zero_gradients() -> None:
    gramian = torch.diag(torch.tensor([4.0, 0.0, 1.0, 0.0], dtype=torch.float64))
    assert min_norm_weights(gramian).tolist() == [0.0, 0.5, 0.0, 0.5]
    torch.testing.assert_close(
        central_direction_weights(gramian), gramian.new_tensor([1 / 3, 0.0, 2 / 3, 0.0])
    )
    nothing = torch.zeros(3, 3)
    assert min_norm_weights(nothing).tolist() == pytest.approx([1 / 3] * 3)
    assert central_direction_weights(nothing).tolist() == pytest.approx([1 / 3] * 3)


def test_identical_and_opposite_pairs() -> None:
    same = torch.tensor([[2.0, 2.0], [2.0, 2.0]])
    assert min_norm_weights(same).tolist() == [0.5, 0.5]
    assert central_direction_weights(same).tolist() == [0.5, 0.5]
    opposite = torch.tensor([[1.0, -3.0], [-3.0, 9.0]])
    assert min_norm_weights(opposite).tolist() == [0.75, 0.25]
    assert central_direction_weights(opposite).tolist() == [0.75, 0.25]


def test_two_tasks_follow_the_closed_form() -> None:
    rng = np.random.default_rng(3)
    for _ in range(50):
        jacobian = torch.from_numpy(rng.standard_normal((2, 4)))
        (d1, d2), (g1, g2) = jacobian.norm(dim=1), jacobian
        expected = (d2 * g1 + d1 * g2) / (d1 + d2)
        found = central_direction_weights(jacobian @ jacobian.T) @ jacobian
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("weights", [min_norm_weights, central_direction_weights])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("size", [1, 2, 3])
def test_gramian_that_is_not_finite_gives_no_weights(weights, bad: float, size: int) -> None:
    gramian = torch.eye(size)
    gramian[0, 0] = bad
    assert weights(gramian).isnan().all()
