"""A Gramian that is fitted to estimates and exact products."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lightning_mtl.numerics.estimate import corrected, estimated


def gramian(size: int, seed: int, rank: int | None = None, spread: float = 0.0) -> Tensor:
    torch.manual_seed(seed)
    rows = torch.randn(size, rank or size + 2, dtype=torch.float64)
    rows = rows * torch.logspace(-spread / 2, spread / 2, size, dtype=torch.float64)[:, None]
    return rows @ rows.T


def apart(matrix: Tensor, vectors: list[Tensor]) -> list[Tensor]:
    """Vectors at an angle of 60 degrees or more in the length that the matrix gives."""
    unit = [v / (v @ matrix @ v).sqrt() for v in vectors]
    if len(unit) == 2:
        rest = unit[1] - (unit[0] @ matrix @ unit[1]) * unit[0]
        unit[1] = rest / (rest @ matrix @ rest).sqrt() + 0.5 * unit[0]
    return unit


def smallest(matrix: Tensor) -> float:
    """Smallest eigenvalue, where the diagonal is one."""
    scale = matrix.diagonal().rsqrt()
    return float(torch.linalg.eigvalsh(matrix * torch.outer(scale, scale)).min())


@pytest.mark.parametrize("spread", [0, 3])
@pytest.mark.parametrize("size", [1, 2, 3, 8, 40])
@pytest.mark.parametrize("number", [1, 2])
def test_products_are_exact_and_it_stays_semi_definite(
    size: int, number: int, spread: float
) -> None:
    for seed in range(30):
        true = gramian(size, seed, spread=spread)
        estimates = [gramian(size, seed + 100), gramian(size, seed + 200, rank=1)]
        asked = apart(true, [torch.rand(size, dtype=torch.float64) for _ in range(number)][:size])
        found = estimated(estimates, asked, [true @ w for w in asked])
        for w in asked:
            torch.testing.assert_close(found @ w, true @ w, rtol=1e-6, atol=0)
        torch.testing.assert_close(found, found.T)
        assert smallest(found) > -1e-7


def test_a_combination_of_the_estimates_is_found_from_one_product() -> None:
    """Also where tasks differ by orders of magnitude."""
    for seed in range(30):
        first, second = gramian(5, seed, spread=4), gramian(5, seed + 100, spread=4)
        for shares in ((0.7, 2.5), (0.0, 1.0), (3.0, 0.0)):
            true = shares[0] * first + shares[1] * second
            w = torch.rand(5, dtype=torch.float64)
            torch.testing.assert_close(estimated([first, second], [w], [true @ w]), true)


@pytest.mark.parametrize("s", [1e-6, 1e-3, 1e3, 1e6])
def test_law_of_scale(s: float) -> None:
    true, first, second = gramian(4, 0), gramian(4, 1), gramian(4, 2)
    w = torch.rand(4, dtype=torch.float64)
    expected = estimated([first, second], [w], [true @ w])
    scaled = estimated([s * first, s * second], [w], [s * true @ w])
    torch.testing.assert_close(scaled, s * expected)


def test_one_direction_asked_twice_counts_once() -> None:
    """Rounding of the second product is not blown up by what the two differ in."""
    true, w = gramian(4, 0), torch.rand(4, dtype=torch.float64)
    rounded = (true @ w).float().double()
    found = estimated([gramian(4, 1), gramian(4, 2)], [w, w + 1e-9], [true @ w, rounded])
    torch.testing.assert_close(found @ w, true @ w, rtol=1e-5, atol=0)
    assert smallest(found) > -1e-7
    assert found.abs().max() < 10 * true.abs().max()


def test_zero_rows_and_an_estimate_of_zeros() -> None:
    true, first = gramian(3, 0), gramian(3, 1)
    for matrix in (true, first):
        matrix[1] = matrix[:, 1] = 0
    w = torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64)
    found = estimated([first, torch.zeros_like(first)], [w], [true @ w])
    torch.testing.assert_close(found @ w, true @ w)
    assert not found[1].any()
    assert found.isfinite().all()


@pytest.mark.parametrize(
    "product", [torch.zeros(2), torch.tensor([-1.0, 0.0]), torch.full((2,), torch.nan)]
)
def test_a_product_without_length_changes_nothing(product: Tensor) -> None:
    start, w = torch.eye(2), torch.tensor([1.0, 0.0])
    assert torch.equal(estimated([start, torch.ones(2, 2)], [w], [product]), start)
    kept = estimated([start, torch.ones(2, 2)], [w, w], [product, torch.tensor([2.0, 1.0])])
    torch.testing.assert_close(kept @ w, torch.tensor([2.0, 1.0]))


def test_nothing_is_corrected_where_it_is_right() -> None:
    true = gramian(6, 3)
    w = torch.rand(6, 2, dtype=torch.float64)
    torch.testing.assert_close(corrected(true, w, true @ w), true)


@pytest.mark.parametrize("angle", [1e-1, 1e-2, 1e-3, 1e-4])
@pytest.mark.parametrize("noise", [1e-2, 1e-3, 1e-5])
def test_products_with_noise_do_not_blow_up(noise: float, angle: float) -> None:
    """As in half precision, where two products contradict each other."""
    for seed in range(50):
        true, w = gramian(5, seed), torch.rand(5, dtype=torch.float64)
        asked = [w, w + angle * torch.randn(5, dtype=torch.float64)]
        products = [true @ v * (1 + noise * torch.randn(5, dtype=torch.float64)) for v in asked]
        found = estimated([gramian(5, seed + 100), gramian(5, seed + 200)], asked, products)
        assert smallest(found) > -1e-7
        assert found.abs().max() < 10 * true.abs().max()
        torch.testing.assert_close(found @ w, true @ w, rtol=0, atol=0.5 * float(true.max()))
