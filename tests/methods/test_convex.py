"""CAGrad, UPGrad, DualProj, SDMGrad and MoDo against brute force, limits and degenerate input."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
import torch

from lightning_mtl.gradient_balancers import MinNorm, min_norm_weights
from lightning_mtl.gradient_balancers.cagrad import CAGrad, cagrad_weights
from lightning_mtl.gradient_balancers.dual_proj import dual_proj_weights
from lightning_mtl.gradient_balancers.mo_do import MoDo, mo_do_weights
from lightning_mtl.gradient_balancers.sdmgrad import SDMGrad, sdmgrad_step, sdmgrad_weights
from lightning_mtl.gradient_balancers.upgrad import upgrad_weights
from tests.methods.test_exactness import degenerate_rows, random_rows

CASES = 300
NAN = float("nan")
LOSSES = torch.ones(2)


def gramian(rows: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(rows @ rows.T)


def drawn(draw=random_rows, largest: int = 6):
    """Rows of at most ``largest`` tasks, and preferences."""
    rng = np.random.default_rng(0)
    for case in range(CASES):
        rows = draw(case, rng)[:largest]
        yield rows, rng.uniform(0.2, 3.0, len(rows))


# ---------------------------------------------------------------------- CAGrad


def upper_bound(rows: np.ndarray, center: np.ndarray, radius: float, w: np.ndarray) -> np.ndarray:
    """No direction in the ball improves its worst task by more, whatever the weights are."""
    combined = w @ rows
    return combined @ center + radius * np.linalg.norm(combined, axis=-1)


@pytest.mark.parametrize("c", [0.05, 0.4, 0.9, 1.5])
@pytest.mark.parametrize("draw", [random_rows, degenerate_rows])
def test_cagrad_is_proved_optimal_by_duality(draw, c: float) -> None:
    worst = 0.0
    for rows, preference in drawn(draw):
        b = preference / preference.sum()
        total = cagrad_weights(gramian(rows), c, 0, preference.tolist()).numpy()
        center, found, norms = b @ rows, total @ rows, np.linalg.norm(rows, axis=1)
        radius, added = c * np.linalg.norm(center), np.clip(total - b, 0.0, None)
        moved = np.linalg.norm(found - center)
        assert moved <= radius * (1 + 1e-9)
        assert np.abs(total - b - added).max() <= 1e-12 * total.max()
        if moved < radius * (1 - 1e-9):  # the maximum is zero: no direction improves every task
            shortest = min_norm_weights(gramian(rows)).numpy()
            assert np.linalg.norm(shortest @ rows) <= 1e-7 * (shortest @ norms)
            gap, scale = -(rows @ found / norms).min(), np.linalg.norm(center)
        else:
            gap = upper_bound(rows, center, radius, added / added.sum()) - (rows @ found).min()
            scale = (np.linalg.norm(center) + radius) * norms[added > 1e-12 * added.max()].min()
        worst = max(worst, gap / scale)
    print(f"CAGrad, c={c}, {draw.__name__}: duality gap within {worst:.1e} of {CASES} matrices")
    assert worst < 1e-8


def test_no_point_of_a_dense_simplex_beats_cagrad() -> None:
    rng = np.random.default_rng(1)
    for rows, _ in drawn():
        size, b = len(rows), np.full(len(rows), 1 / len(rows))
        for s in (1e-6, 1.0, 1e6):
            scaled = s * rows
            added = cagrad_weights(gramian(scaled), 0.4, 0).numpy() - b
            center = b @ scaled
            radius = 0.4 * np.linalg.norm(center)
            points = rng.dirichlet(np.full(size, 0.5), 2000)
            values = upper_bound(scaled, center, radius, np.vstack([points, np.eye(size)]))
            found = upper_bound(scaled, center, radius, added / added.sum())
            assert found <= values.min() + 1e-9 * np.abs(values).max()


def test_two_tasks_of_cagrad_follow_the_closed_form() -> None:
    rng = np.random.default_rng(2)
    inside = 0
    for case in range(200):
        matrix = gramian(rng.standard_normal((2, 4)) * 10 ** rng.uniform(-0.5, 0.5, (2, 1))).numpy()
        c = 0.2 + 0.003 * case
        m11, m12, m22 = matrix[0, 0], matrix[0, 1], matrix[1, 1]
        radius = c * np.sqrt(matrix.sum()) / 2
        total, half = m11 - 2 * m12 + m22, 0.5 * (m11 - m22)
        x = float(half <= 0)
        if radius**2 * total > half**2:
            rest = (m11 * m22 - m12**2) / total
            root = np.sqrt(half**2 * rest / (total * (radius**2 * total - half**2)))
            x = np.clip(-np.sign(half) * root - (m12 - m22) / total, 0, 1)
        inside += 0 < x < 1
        w = np.array([x, 1 - x])
        expected = 0.5 + radius * w / np.sqrt(w @ matrix @ w)
        found = cagrad_weights(torch.from_numpy(matrix), c, 0).numpy()
        np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-9)
    assert 30 < inside < 170


def test_cagrad_is_the_average_without_a_ball_and_min_norm_in_a_large_one() -> None:
    for rows, preference in drawn():
        b = preference / preference.sum()
        found = cagrad_weights(gramian(rows), 0.0, 1, preference.tolist()).numpy()
        np.testing.assert_allclose(found, b, rtol=1e-12)
    rows = np.array([[1.0, 2.0, -1.0], [-2.0, 0.5, 1.0], [0.5, 1.0, 3.0]])
    shortest = MinNorm().weights(gramian(rows), LOSSES).numpy()
    large = cagrad_weights(gramian(rows), 1e6).numpy()
    np.testing.assert_allclose(large / large.sum(), shortest, atol=1e-5)


def test_cagrad_is_parallel_to_an_sdmgrad_direction() -> None:
    rng = np.random.default_rng(3)
    for _ in range(50):
        rows = rng.standard_normal((4, 12))
        total = cagrad_weights(gramian(rows), 0.4, 0)
        added = (total - 0.25).numpy()
        lam = np.linalg.norm(added / added.sum() @ rows) / np.linalg.norm(added @ rows)
        found = sdmgrad_weights(gramian(rows), lam)
        torch.testing.assert_close(found, total / total.sum(), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("weights", [cagrad_weights, upgrad_weights, dual_proj_weights])
def test_preference_is_like_repeated_tasks(weights) -> None:
    """Two copies of a task with equal preferences, and one with twice the preference."""
    rows = np.array([[1.0, 2.0, -1.0], [-2.0, 0.5, 1.0], [0.5, -1.0, 3.0]])
    once = weights(gramian(rows), preference=[2.0, 1.0, 1.0]).numpy()
    twice = weights(gramian(rows[[0, 0, 1, 2]])).numpy()
    np.testing.assert_allclose(once @ rows, twice @ rows[[0, 0, 1, 2]], rtol=1e-9, atol=1e-9)
    other = weights(gramian(rows)).numpy()
    assert np.abs(once - other).max() > 1e-2


def test_cagrad_at_stationary_points() -> None:
    rows = np.array([[2.0, 0.0], [-2.0, 0.0], [0.0, 1.0]])
    # Nothing improves the first two tasks, and the average conflicts with none.
    torch.testing.assert_close(
        cagrad_weights(gramian(rows), 0.4, 0) @ torch.from_numpy(rows),
        torch.tensor([0.0, 1 / 3], dtype=torch.float64),
    )
    rows[1] = [-3.0, 0.0]  # now it conflicts, but the ball holds a vector that does not
    found = cagrad_weights(gramian(rows), 1.0, 0) @ torch.from_numpy(rows)
    torch.testing.assert_close(found, torch.tensor([0.0, 1 / 3], dtype=torch.float64))
    # And a smaller ball holds none: as near to it as possible.
    found = cagrad_weights(gramian(rows), 0.4, 0) @ torch.from_numpy(rows)
    assert found[0] < -0.1
    center = torch.tensor([-1 / 3, 1 / 3], dtype=torch.float64)
    torch.testing.assert_close((found - center).norm(), 0.4 * center.norm())
    opposite = cagrad_weights(gramian(np.array([[1.0, 2.0], [-1.0, -2.0]])))
    torch.testing.assert_close(opposite, torch.full((2,), 0.5 / 1.16, dtype=torch.float64))


def test_cagrad_without_a_gradient_and_with_one_task() -> None:
    zero = torch.diag(torch.tensor([4.0, 0.0]))
    assert cagrad_weights(zero, 0.5).tolist() == pytest.approx([0.4, 0.4])
    assert cagrad_weights(torch.zeros(3, 3), 0.5, 0).tolist() == pytest.approx([1 / 3] * 3)
    assert cagrad_weights(torch.tensor([[9.0]]), 0.5).tolist() == pytest.approx([1.2])
    same = cagrad_weights(torch.ones(2, 2), 0.5)
    assert same.sum().item() == pytest.approx(1.2)
    # Beside two that conflict more than the ball can help, a third without gradient only adds to b.
    rows = np.array([[1.0, 0.0], [-3.0, 0.1], [0.0, 0.0]])
    found = cagrad_weights(gramian(rows), 0.4, 0).numpy()
    expected = 2 / 3 * cagrad_weights(gramian(rows[:2]), 0.4, 0).numpy()
    np.testing.assert_allclose(found, [*expected, 1 / 3], rtol=1e-12)


def test_cagrad_takes_rounding_of_float32_for_zero() -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        rows = torch.randn(4, 500, generator=generator, dtype=torch.float64)
        rows[1] = -0.7 * rows[0]  # no direction improves both
        expected = dual_proj_weights(rows @ rows.T)
        center = rows.mean(0)
        c = 1.1 * float((expected @ rows - center).norm() / center.norm())
        single = rows.float()
        found = cagrad_weights(single @ single.T, c, 0).double()
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
        rows[3] = -rows[:3].sum(0)
        single = rows.float()
        found = cagrad_weights(single @ single.T, c, 0)
        torch.testing.assert_close(found, torch.full_like(found, 0.25), rtol=0, atol=1e-7)


@pytest.mark.parametrize("rescale", [0, 1, 2])
def test_rescale_divides(rescale: int) -> None:
    matrix = gramian(np.array([[1.0, 2.0, -1.0], [-2.0, 0.5, 1.0]]))
    plain = CAGrad(0.3, 0).weights(matrix, LOSSES)
    expected = plain / [1.0, 1.09, 1.3][rescale]
    torch.testing.assert_close(CAGrad(0.3, rescale).weights(matrix, LOSSES), expected)


# --------------------------------------------------------- projections on a cone


def enumerated(rows: np.ndarray, target: np.ndarray) -> np.ndarray:
    """The vector nearest to ``target`` without conflict: every set of tight tasks is tried."""
    best, nearest = np.inf, target
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    for size in range(len(rows) + 1):
        for tight in combinations(range(len(rows)), size):
            face = unit[list(tight)]
            point = target - np.linalg.pinv(face, rcond=1e-10) @ (face @ target) if size else target
            distance = np.linalg.norm(point - target)
            if (unit @ point >= -1e-9 * np.linalg.norm(target)).all() and distance < best:
                best, nearest = distance, point
    return nearest


@pytest.mark.parametrize("draw", [random_rows, degenerate_rows])
def test_projections_against_enumeration(draw) -> None:
    for rows, preference in drawn(draw, 5):
        p = preference / preference.sum()
        projected = sum(share * enumerated(rows, row) for share, row in zip(p, rows, strict=True))
        size = np.abs(p @ np.linalg.norm(rows, axis=1))
        found = upgrad_weights(gramian(rows), preference.tolist()).numpy()
        assert np.abs(found @ rows - projected).max() <= 1e-6 * size
        assert (found >= p * (1 - 1e-12)).all()
        found = dual_proj_weights(gramian(rows), preference.tolist()).numpy()
        assert np.abs(found @ rows - enumerated(rows, p @ rows)).max() <= 1e-6 * size
        assert (found >= p * (1 - 1e-12)).all()


def test_projections_leave_what_does_not_conflict() -> None:
    rows = np.array([[1.0, 0.0, 0.5], [0.5, 1.0, 0.0], [0.0, 0.2, 1.0]])
    for weights in (upgrad_weights, dual_proj_weights):
        assert weights(gramian(rows)).tolist() == [1 / 3] * 3
    conflict = np.array([[2.0, 0.0], [-1.0, 1.5], [1.0, 1.0]])  # a pair; the average is fine
    assert dual_proj_weights(gramian(conflict)).tolist() == [1 / 3] * 3
    assert upgrad_weights(gramian(conflict)).tolist() != [1 / 3] * 3
    one = torch.tensor([[4.0]])
    assert upgrad_weights(one).tolist() == dual_proj_weights(one).tolist() == [1.0]


def test_upgrad_of_two_conflicting_tasks() -> None:
    m = gramian(np.array([[1.0, 2.0, -1.0], [-2.0, 0.5, 1.0]]))
    expected = [0.5 - 0.5 * m[0, 1] / m[0, 0], 0.5 - 0.5 * m[0, 1] / m[1, 1]]
    assert upgrad_weights(m).tolist() == pytest.approx([float(x) for x in expected])
    opposite = torch.tensor([[1.0, -1.0], [-1.0, 1.0]])
    assert upgrad_weights(opposite).tolist() == pytest.approx([1.0, 1.0])
    zero = torch.tensor([[1.0, -1.0, 0.0], [-1.0, 1.0, 0.0], [0.0, 0.0, 0.0]])
    assert upgrad_weights(zero)[2].item() == pytest.approx(1 / 3)


def test_upgrad_is_linear_in_the_length_of_each_gradient() -> None:
    rows = np.array([[1.0, 2.0, -1.0], [-2.0, 0.5, 1.0], [0.5, -1.0, 3.0]])
    pulls = [
        upgrad_weights(gramian(rows * factors[:, None])).numpy() @ (rows * factors[:, None])
        for factors in (np.ones(3), np.array([3.0, 1.0, 1.0]), np.array([2.0, 1.0, 1.0]))
    ]
    np.testing.assert_allclose(pulls[2], 0.5 * (pulls[0] + pulls[1]), rtol=1e-12)


def test_upgrad_removes_conflicts_of_tiny_gradients() -> None:
    rows = 1e-9 * np.array([[1.0, 2.0, -1.0], [-2.0, 0.5, 1.0]])
    found = upgrad_weights(gramian(rows)).tolist()
    assert found == pytest.approx([0.66666667, 0.69047619])


# --------------------------------------------------------------------- SDMGrad


def test_sdmgrad_is_min_norm_with_a_lower_bound() -> None:
    """Optimality over weights of at least lam b / (1 + lam): no vertex of them is better."""
    for rows, preference in drawn():
        b = preference / preference.sum()
        weights = sdmgrad_weights(gramian(rows), 0.5, preference.tolist()).numpy()
        assert weights.sum() == pytest.approx(1.0)
        assert (weights >= b / 3 - 1e-12).all()
        point = weights @ rows
        vertices = b / 3 + np.eye(len(b)) * 2 / 3
        corner = (vertices @ rows) @ point
        size = np.linalg.norm(rows, axis=1).max() ** 2
        assert (point @ point <= corner + 1e-12 * size).all()
        bound = 1e-9 * (np.linalg.norm(point) * np.linalg.norm(vertices @ rows, axis=1)).min()
        assert (point @ point <= corner + max(bound, 1e-14 * size)).all()


def test_sdmgrad_between_min_norm_and_the_average() -> None:
    for rows, _ in drawn():
        matrix = gramian(rows)
        torch.testing.assert_close(sdmgrad_weights(matrix, 0.0), MinNorm().weights(matrix, LOSSES))
        average = sdmgrad_weights(matrix, 1e9)
        torch.testing.assert_close(average, torch.full_like(average, 1 / len(rows)))
    zero = sdmgrad_weights(torch.diag(torch.tensor([4.0, 0.0])), 0.3)
    assert zero.tolist() == pytest.approx([0.15 / 1.3, 1.15 / 1.3])


def test_batches_drive_the_weights_and_the_last_gives_the_direction() -> None:
    generator = torch.Generator().manual_seed(0)
    first, second, third = torch.randn(3, 2, 5, generator=generator, dtype=torch.float64)
    start = torch.full((2,), 0.5, dtype=torch.float64)
    w = sdmgrad_step(first @ second.T, start, 0.3)
    assert (w - start).abs().max() > 1e-3
    torch.testing.assert_close(sdmgrad_step(second @ first.T, start, 0.3), w)
    found = SDMGrad(batches=3).direction(torch.stack([first, second, third]), LOSSES)
    torch.testing.assert_close(found, ((w + 0.15) / 1.3) @ third)
    found = SDMGrad(batches=3).direction(torch.stack([first, second]), LOSSES)
    torch.testing.assert_close(found, ((w + 0.15) / 1.3) @ (0.5 * (first + second)))
    alone = ((sdmgrad_step(first @ first.T, start, 0.3) + 0.15) / 1.3) @ first
    torch.testing.assert_close(SDMGrad(batches=3).direction(first[None], LOSSES), alone)
    torch.testing.assert_close(SDMGrad(batches=3).direction(first, LOSSES), alone)


def test_step_of_sdmgrad_by_hand() -> None:
    cross = torch.tensor([[2.0, 1.0], [-1.0, 1.0]])  # symmetric part diag(2, 1): L = 2
    start = torch.tensor([0.5, 0.5])
    # w - 0.5 / 2 * (2 * 0.65, 1 * 0.65) = (0.175, 0.3375), projected: + 0.24375
    found = sdmgrad_step(cross, start, 0.3, step_size=0.5)
    assert found.tolist() == pytest.approx([0.41875, 0.58125])
    twice = sdmgrad_step(cross, found, 0.3, step_size=0.5)
    assert sdmgrad_step(cross, start, 0.3, None, 0.5, 2).tolist() == pytest.approx(twice.tolist())
    assert sdmgrad_step(1e-20 * cross, start, 0.3, step_size=0.5).tolist() == found.tolist()
    assert sdmgrad_step(torch.zeros(2, 2), start).tolist() == [0.5, 0.5]


def test_noise_moves_the_kept_weights_less_than_exact_ones() -> None:
    generator = torch.Generator().manual_seed(1)
    mean = torch.randn(3, 200, generator=generator)
    target = SDMGrad().weights(mean @ mean.T, LOSSES)
    kept, errors, exact = SDMGrad(batches=3), [], []
    for k in range(300):
        noisy = mean + torch.randn(3, 3, 200, generator=generator)
        kept.direction(noisy, LOSSES)
        if k >= 100:
            now = (kept.offsets + 1 / 3 + 0.1) / 1.3
            errors.append((now - target).norm())
            average = noisy.mean(0)
            exact.append((SDMGrad().weights(average @ average.T, LOSSES) - target).norm())
    assert torch.stack(errors).mean() < 0.5 * torch.stack(exact).mean()


# ------------------------------------------------------------------------ MoDo


def test_modo_by_hand() -> None:
    cross = torch.tensor([[1.0, 3.0], [0.0, 4.0]])
    start = torch.tensor([0.5, 0.5])
    # J1 J2^T w = (2, 2): only the regularisation moves equal weights, and it does not.
    assert mo_do_weights(cross, start).tolist() == pytest.approx([0.5, 0.5])
    # J2 J1^T w = (0.5, 3.5): w - 0.1 * that = (0.45, 0.15), projected: + 0.2
    assert mo_do_weights(cross.T, start, 0.1, 0.0).tolist() == pytest.approx([0.65, 0.35])
    # From (0.65, 0.35): gradient (0.65, 3.35) and 0.5 w: (0.5525, -0.0025), projected: + 0.225
    found = mo_do_weights(cross.T, torch.tensor([0.65, 0.35]), 0.1, 0.5)
    assert found.tolist() == pytest.approx([0.7775, 0.2225])


def test_modo_follows_its_formula_over_steps() -> None:
    generator = torch.Generator().manual_seed(0)
    two, three = MoDo(0.02, 0.1), MoDo(0.02, 0.1, batches=3, scale="sum")
    w = torch.full((3,), 1 / 3, dtype=torch.float64)
    for _ in range(5):
        j1, j2, j3 = samples = torch.randn(3, 3, 6, generator=generator, dtype=torch.float64)
        w = mo_do_weights(j1 @ j2.T, w, 0.02, 0.1)
        expected = 0.5 * w @ (j1 + j2)
        torch.testing.assert_close(two.direction(samples[:2], LOSSES), expected)
        torch.testing.assert_close(three.direction(samples, LOSSES), 3 * w @ j3)
    single = MoDo(0.02, 0.1)
    alone = mo_do_weights(j1 @ j1.T, torch.full_like(w, 1 / 3), 0.02, 0.1) @ j1
    torch.testing.assert_close(single.direction(j1, LOSSES), alone)
    torch.testing.assert_close(MoDo(0.02, 0.1).direction(j1[None], LOSSES), alone)


def test_modo_finds_min_norm_when_the_samples_agree() -> None:
    jacobian = torch.tensor([[1.0, 2.0, -1.0], [-2.0, 0.5, 1.0], [0.5, 1.0, 3.0]])
    balancer = MoDo(0.1, 0.0)
    for _ in range(400):
        found = balancer.direction(jacobian.expand(2, -1, -1), LOSSES)
    torch.testing.assert_close(found, MinNorm().direction(jacobian, LOSSES))


@pytest.mark.parametrize("cls", [MoDo, lambda: SDMGrad(batches=3)])
def test_kept_weights_of_absent_tasks(cls) -> None:
    generator = torch.Generator().manual_seed(0)
    balancer = cls()
    with balancer.only("abc"):
        balancer.direction(torch.randn(2, 3, 6, generator=generator), torch.ones(3))
    before = balancer.offsets.clone()
    with balancer.only("abc", [0, 2]):
        found = balancer.direction(torch.randn(2, 2, 6, generator=generator), torch.ones(2))
    assert found.isfinite().all()
    assert balancer.offsets[1] == before[1]
    assert (balancer.offsets[[0, 2]] + 0.5).sum().item() == pytest.approx(1.0)


def test_batches_that_are_not_finite() -> None:
    for balancer in (MoDo(), SDMGrad(batches=3)):
        assert balancer.direction(torch.full((2, 3), NAN), LOSSES).isnan().all()
        assert not balancer.offsets.any()  # and the next step is a first one
